"""Batches whose order, crops and sharing between processes are functions of (seed, epoch), so that a run can resume."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from erde_hub._image_files import decode
from erde_hub.errors import ConfigError

from .augment import (
    AUGMENT_STREAM,
    ORDER_STREAM,
    Augmentation,
    counter_hash,
    epoch_order,
    get_augmentation,
    isolated_rng,
)
from .decoding import EncodedImages, row_hashes
from .preprocessing import Preprocessing
from .streaming import StreamSplit

Batch = dict[str, Tensor]


#: What a batch holds beside the network's inputs.
_NOT_INPUTS = ("labels", "index")


def network_inputs(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """Returns what the network reads of a batch, by the names under which it takes it, on a device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if key not in _NOT_INPUTS}


@dataclass(frozen=True)
class BatchSettings:
    """How inputs are made of rows, beyond what the data themselves decide.

    Attributes:
        augmentation: Of images.
        seed: Of the augmentation.
        channels_last: Memory format of images.
    """

    augmentation: Augmentation
    seed: int = 0
    channels_last: bool = False


class Split(ABC):
    """Rows of known number with labels; subclasses hold what the network reads.

    Attributes:
        name: "train", "validation" or "test".
        labels: Class of every row, int64; of a regression its targets, (N, D) floats.
        indices: Row number in the source split, int64. It stays the same whatever part of the source is used, so a
            sample can be recognised across runs.
    """

    def __init__(self, name: str, labels: Tensor, indices: Tensor) -> None:
        self.name, self.labels, self.indices = name, labels, indices

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} rows)"

    @property
    def num_samples(self) -> int | None:
        """Number of rows; None for a stream of unknown length."""
        return len(self)

    @abstractmethod
    def check_settings(self, settings: BatchSettings) -> None:
        """Raises :class:`~erde_hub.errors.ConfigError` for settings that these rows cannot have."""

    def arrange(self, order: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
        """Returns the shuffled order of an epoch with rows moved between batches of that size where it saves work."""
        return order

    @abstractmethod
    def inputs(self, positions: NDArray[np.int64], settings: BatchSettings, epoch: int) -> Batch:
        """Returns what the network reads of these positions in the split, by the names under which it takes it."""

    @abstractmethod
    def contents(self) -> Iterator[bytes]:
        """Yields what each row holds, before it is augmented."""

    def content_hashes(self) -> NDArray[np.int64]:
        """Returns 64 bits of each row's content, (N,), by which it is known under any number and in any folder."""
        return row_hashes(self.contents()).astype(np.int64)


class ImageSplit(Split):
    """A split of images; ``preprocessing`` turns them into the network's input."""

    def __init__(self, name: str, labels: Tensor, indices: Tensor, preprocessing: Preprocessing) -> None:
        super().__init__(name, labels, indices)
        self.preprocessing = preprocessing

    def check_settings(self, settings: BatchSettings) -> None:
        """Images take all of them."""

    @abstractmethod
    def images(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Image.Image]:
        """Returns RGB images of these positions in the split."""

    @abstractmethod
    def pixels(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns uint8 (N, H, W, 3) of the network's input size for these positions in the split."""

    def inputs(self, positions: NDArray[np.int64], settings: BatchSettings, epoch: int) -> Batch:
        """Returns ``pixel_values``, augmented."""
        index = self.indices[positions].numpy()
        if settings.augmentation.per_image:
            values = values_of_images(self.images(positions), self.preprocessing, settings, index, epoch)
        else:
            values = values_of_pixels(self.pixels(positions), self.preprocessing, settings, index, epoch)
        return {"pixel_values": values}


class DecodedSplit(ImageSplit):
    """A split whose images are in memory as uint8, decoded and resized.

    Args:
        store: uint8 (M, H, W, 3), possibly shared with other splits.
        positions: Row of ``store`` for every row of the split.
    """

    def __init__(
        self,
        name: str,
        labels: Tensor,
        indices: Tensor,
        preprocessing: Preprocessing,
        store: NDArray[np.uint8],
        positions: NDArray[np.int64],
    ) -> None:
        super().__init__(name, labels, indices, preprocessing)
        self._store, self._positions = store, positions

    def images(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Image.Image]:
        """Returns RGB images of these positions in the split."""
        return [Image.fromarray(pixels) for pixels in self.pixels(np.asarray(positions, dtype=np.int64))]

    def pixels(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns uint8 (N, H, W, 3) for these positions in the split."""
        return self._store[self._positions[positions]]

    def contents(self) -> Iterator[bytes]:
        """Yields the pixels of each row, so that the file format is immaterial, with their size before them."""
        shape = repr(self._store.shape[1:]).encode()
        return (shape + self._store[position].tobytes() for position in self._positions)


class EncodedSplit(ImageSplit):
    """A split whose images stay encoded on disk and are decoded each time they are asked for."""

    def __init__(
        self, name: str, labels: Tensor, indices: Tensor, preprocessing: Preprocessing, encoded: EncodedImages
    ) -> None:
        super().__init__(name, labels, indices, preprocessing)
        self._encoded = encoded

    def images(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Image.Image]:
        """Decodes these positions of the split."""
        return [self._encoded.image(int(self.indices[position])) for position in positions]

    def pixels(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Decodes, resizes and crops these positions of the split."""
        return self.preprocessing.pixels(self.images(positions))

    def contents(self) -> Iterator[bytes]:
        """Yields the file of each row as it is."""
        return (content for _, content in self._encoded.iterate(self.indices.numpy()))


def values_of_pixels(
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: BatchSettings,
    index: NDArray[np.int64],
    epoch: int,
) -> Tensor:
    """Augments uint8 (N, H, W, 3) of the network's input size and normalises them."""
    bits = counter_hash(settings.seed, epoch, index, AUGMENT_STREAM)
    return preprocessing.normalize(settings.augmentation.apply(pixels, bits), settings.channels_last)


def values_of_images(
    images: list[Image.Image],
    preprocessing: Preprocessing,
    settings: BatchSettings,
    index: NDArray[np.int64],
    epoch: int,
) -> Tensor:
    """Resizes, augments and normalises images of any size."""
    if not settings.augmentation.per_image or not images:
        return values_of_pixels(preprocessing.pixels(images), preprocessing, settings, index, epoch)
    transform = preprocessing.training_transform(settings.augmentation)
    values = []
    for image, bits in zip(images, counter_hash(settings.seed, epoch, index, AUGMENT_STREAM), strict=True):
        with isolated_rng(int(bits)):
            values.append(transform(image))
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return torch.stack(values).contiguous(memory_format=layout)


class BatchLoader:
    """Batches of a split: ``{"pixel_values": (N, 3, H, W) float32, "labels": (N,) int64, "index": (N,) int64}``.

    Texts have ``input_ids`` and ``attention_mask`` (N, L) int64 in place of ``pixel_values``.

    Order and augmentation are pure functions of (seed, epoch) and (seed, epoch, sample); no global random generator is
    read or changed. Global batch i is ``order[i * B * W : (i + 1) * B * W]`` for batch size B and world size W, and
    rank r gets its r-th contiguous part. Joined in the order of the ranks, W processes with batches of B see exactly
    the batches of one process with W * B, and an epoch can be entered at any batch.

    The last global batch may be short (unless ``drop_last``). It is then cut into parts that differ by at most one row;
    with fewer rows than ranks some parts are empty. Every rank yields the same number of batches in any case, so
    gathering only has to allow for unequal sizes.

    A streamed split is read in full by every rank, which decodes its own rows only.

    Args:
        split: ``train``, ``validation`` or ``test`` of the data.
        batch_size: Rows per process.
        shuffle: New order in every epoch; otherwise the order of the split.
        augment: Name in the table of augmentations; None leaves images as they are.
        seed: Of order and augmentation.
        rank: This process.
        world_size: Number of processes.
        drop_last: Leave the short last global batch out.
        channels_last: Memory format of ``pixel_values``; for images only.
        num_workers: Processes that prepare batches. Not needed for decoded images; streams use one at most.

    Raises:
        ConfigError: A number out of range, an unknown augmentation or one that the rows cannot have, or an epoch
            without a single batch.

    Example:
        >>> loader = BatchLoader(data.train, 128, shuffle=True, augment="crop_flip", drop_last=True)  # doctest: +SKIP
        >>> loader.set_epoch(3, first_batch=17)  # doctest: +SKIP
    """

    def __init__(
        self,
        split: Split | StreamSplit,
        batch_size: int,
        shuffle: bool = False,
        augment: str | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        channels_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        _check_integer("batch_size", batch_size, 1)
        _check_integer("world_size", world_size, 1)
        _check_integer("rank", rank, 0, world_size - 1)
        _check_integer("num_workers", num_workers, 0)
        self.split, self.batch_size, self.shuffle, self.seed = split, batch_size, shuffle, seed
        self.rank, self.world_size, self.drop_last, self.num_workers = rank, world_size, drop_last, num_workers
        self._settings = BatchSettings(get_augmentation(augment), seed, channels_last)
        if isinstance(split, Split):
            split.check_settings(self._settings)
        self._epoch, self._first_batch = 0, 0
        if split.num_samples is not None and self.num_batches == 0:
            raise ConfigError(
                f"split {split.name!r} of {split.num_samples} rows gives no batch of {self.global_batch_size} rows"
                f" ({batch_size} per process on {world_size}): lower batch_size to"
                f" {split.num_samples // world_size} or less"
            )

    @property
    def global_batch_size(self) -> int:
        """Rows of one batch over all processes."""
        return self.batch_size * self.world_size

    @property
    def num_batches(self) -> int | None:
        """Batches of a whole epoch, the same for every rank; None for a stream of unknown length."""
        if self.split.num_samples is None:
            return None
        full, rest = divmod(self.split.num_samples, self.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __len__(self) -> int:
        number = self.num_batches
        return len(self.split) if number is None else number  # len() of such a split says what is missing

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch of the next iteration and the batch it starts at; ``len`` stays that of a whole epoch."""
        _check_integer("epoch", epoch, 0)
        _check_integer("first_batch", first_batch, 0, self.num_batches)
        self._epoch, self._first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self._epoch, self._first_batch
        if isinstance(self.split, StreamSplit):
            return self._stream_batches(self.split, epoch, first)
        return self._batches(self.split, epoch, first)

    def _batches(self, split: Split, epoch: int, first: int) -> Iterator[Batch]:
        order = np.arange(len(split))
        if self.shuffle:
            order = split.arrange(epoch_order(len(split), self.seed, epoch), self.global_batch_size)
        batches = _EpochBatches(split, self._settings, order, epoch, self._part, self.global_batch_size, len(self))
        yield from _load(batches, range(first, len(self)), self.num_workers)

    def _stream_batches(self, split: StreamSplit, epoch: int, first: int) -> Iterator[Batch]:
        _ = split.held_out_images  # here and not in each worker anew
        shuffle_seed = None
        if self.shuffle:
            shuffle_seed = int(counter_hash(self.seed, epoch, np.array([0]), ORDER_STREAM)[0] >> np.uint64(1))
        batches = _StreamBatches(
            split, self._settings, shuffle_seed, epoch, self._part, first, self.global_batch_size, self.drop_last
        )
        yield from _load(batches, None, min(1, self.num_workers))

    def _part(self, size: int) -> slice:
        """The part of a global batch of ``size`` rows that is this rank's."""
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)


@dataclass(frozen=True, eq=False)
class _EpochBatches(Dataset[Batch]):
    """One rank's batches of one epoch, each built on its own, here or in a worker."""

    split: Split
    settings: BatchSettings
    order: NDArray[np.int64]
    epoch: int
    part: Callable[[int], slice]
    size: int
    number: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, batch: int) -> Batch:
        rows = self.order[batch * self.size : (batch + 1) * self.size]
        positions = rows[self.part(len(rows))]
        inputs = self.split.inputs(positions, self.settings, self.epoch)
        return {**inputs, "labels": self.split.labels[positions], "index": self.split.indices[positions]}


@dataclass(frozen=True, eq=False)
class _StreamBatches(IterableDataset[Batch]):
    """One rank's batches of one pass through a stream, starting at batch ``first``."""

    split: StreamSplit
    settings: BatchSettings
    shuffle_seed: int | None
    epoch: int
    part: Callable[[int], slice]
    first: int
    size: int
    drop_last: bool

    def __iter__(self) -> Iterator[Batch]:
        rows = islice(self.split.rows(self.shuffle_seed), self.first * self.size, None)
        while chunk := list(islice(rows, self.size)):
            if len(chunk) < self.size and self.drop_last:
                return
            chunk = chunk[self.part(len(chunk))]
            images = [decode(content, self.split.where(row)) for row, content, _ in chunk]
            labels = torch.tensor([label for _, _, label in chunk], dtype=torch.int64)
            index = np.array([row for row, _, _ in chunk], dtype=np.int64)
            values = values_of_images(images, self.split.preprocessing, self.settings, index, self.epoch)
            yield {"pixel_values": values, "labels": labels, "index": torch.from_numpy(index)}


def _load(batches: Dataset[Batch], numbers: range | None, workers: int) -> DataLoader[Batch]:
    # The loader draws a seed for its workers: from a generator of its own, so that the global one stays as it is.
    return DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),
    )


def _init_worker(_: int) -> None:
    # Workers inherit the handlers of the training process. Ctrl-C reaches them too: the training process decides then,
    # and may want the batches under way; SIGTERM ends a worker, whatever it means to the training process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}"
        raise ConfigError(f"{name}={value!r} is not allowed: give {allowed}")
