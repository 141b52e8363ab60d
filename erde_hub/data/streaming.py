"""Data read one row after another, for sets larger than the disk."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import datasets
from torch import Tensor

from erde_hub._image_files import decode
from erde_hub._progress import passing_bar
from erde_hub.errors import DataError, InputTypeError, LabelError

from .augment import epoch_order
from .columns import find_columns
from .decoding import HASHED_ROWS, content_digest, row_hashes, stored_bytes
from .opening import open_dataset
from .preprocessing import LARGE_IMAGE_DEFAULTS, SMALL_IMAGE_PIXELS, Preprocessing, channel_statistics, complete
from .splits import EVERY_BUCKET, SPLIT_NAMES, Buckets, SplitPlan, StoredSplit, bucket_info, bucket_of, split_buckets

_logger = logging.getLogger(__name__)

_STREAM_SAMPLE = 1_000


class StreamSplit:
    """Rows read one after another, for sets larger than the disk: no list of labels, and perhaps no known length.

    A shuffled pass takes the files in random order and mixes rows in a buffer. A sample's index is its row in its file
    plus 2**32 times the number of the file, the same in every pass. A part of a source split is chosen by a hash of the
    image bytes, which needs no second look at the data: rows whose hash modulo 100 lies in ``buckets``.

    Args:
        name: "train", "validation" or "test".
        stream: A ``datasets.IterableDataset`` whose image column is not decoded.
        columns: Names of the image and of the label column.
        classes: Number of classes, for checking labels.
        preprocessing: Turns images into the network's input.
        dataset: Name of the data set, for messages.
        buckets: First and last (exclusive) bucket of the rows that belong to this split.
        num_samples: Number of rows where it is known.
        limit: Read only so many rows of the stream.
        buffer: Encoded rows that are mixed with each other.
        held_out: Splits whose rows are left out of this one where their images are equal. They are read once, before
            the first pass. How many are left out is known, and logged, at the end of a pass, so that ``num_samples``
            counts them in and a pass may be shorter.
        roots: Where files that the image column names may lie; see :func:`~erde_hub.data.decoding.stored_bytes`.
    """

    def __init__(
        self,
        name: str,
        stream: Any,
        columns: tuple[str, str],
        classes: int,
        preprocessing: Preprocessing,
        dataset: str,
        buckets: Buckets = EVERY_BUCKET,
        num_samples: int | None = None,
        limit: int | None = None,
        buffer: int = 2048,
        held_out: Sequence[StreamSplit] = (),
        roots: Sequence[str] | None = None,
    ) -> None:
        self.name, self.preprocessing, self.num_samples, self._roots = name, preprocessing, num_samples, roots
        self._stream, self._columns, self._classes, self._dataset = stream, columns, classes, dataset
        self._buckets, self._limit, self._buffer, self._held_out = buckets, limit, buffer, held_out
        self._told_of_copies = False

    def __len__(self) -> int:
        if self.num_samples is None:
            # a TypeError, so that list(loader) and the like take it for "length unknown"
            raise InputTypeError(f"the number of rows of the streamed split {self.name!r} is unknown: set max_steps")
        return self.num_samples

    def __repr__(self) -> str:
        return f"StreamSplit({self.name!r}, {self.num_samples or 'unknown number of'} rows)"

    @property
    def labels(self) -> Tensor:
        """Not available: a stream is not read as a whole."""
        raise DataError(f"the streamed split {self.name!r} has no list of labels: load the data without streaming")

    @property
    def indices(self) -> Tensor:
        """Not available: a stream is not read as a whole."""
        raise DataError(f"the streamed split {self.name!r} has no list of rows: load the data without streaming")

    @cached_property
    def held_out_images(self) -> frozenset[int]:
        """64 bits of each image of the splits whose copies are left out, read where they are first asked for."""
        contents = (content for split in self._held_out for _, content, _ in split.rows())
        shown = passing_bar(contents, "looking for copies", None, shown=True) if self._held_out else contents
        return frozenset(row_hashes(shown).tolist())

    def rows(self, shuffle_seed: int | None = None) -> Iterator[tuple[int, bytes, int]]:
        """Yields index, encoded image and label of every row; the order depends on ``shuffle_seed`` alone."""
        if shuffle_seed is None:
            yield from self._read(range(self._files))
            return
        generator = random.Random(shuffle_seed)
        files = list(range(self._files))
        generator.shuffle(files)
        held: list[tuple[int, bytes, int]] = []
        for row in self._read(files):
            if len(held) < self._buffer:
                held.append(row)
            else:
                place = generator.randrange(self._buffer)
                yield held[place]
                held[place] = row
        generator.shuffle(held)
        yield from held

    def where(self, index: int) -> str:
        """Names a row for a message."""
        file = f"file {index >> 32} of " if self._files > 1 else ""
        return f"row {index & 0xFFFFFFFF} of {file}split {self.name!r} of {self._dataset!r} (streamed)"

    @property
    def _files(self) -> int:
        # a limited stream is one piece: its first rows, in the order of the files
        return 1 if self._limit is not None else int(self._stream.num_shards)

    def _read(self, files: Iterable[int]) -> Iterator[tuple[int, bytes, int]]:
        """Yields rows in their order, without copies of held-out ones."""
        held_out, copies, used = self.held_out_images, 0, 0
        try:
            for row in self._read_all(files):
                if held_out and int(row_hashes([row[1]])[0]) in held_out:
                    copies += 1
                    continue
                used += 1
                yield row
            if copies and not used:
                raise DataError(
                    f"every row of {self.name!r} occurs in validation or test too: nothing is left to train on"
                )
        finally:  # also where a pass ends before the stream
            if copies and not self._told_of_copies:
                self._told_of_copies = True
                _logger.warning("%d rows of %s are copies of held-out rows and are left out", copies, self.name)

    def _read_all(self, files: Iterable[int]) -> Iterator[tuple[int, bytes, int]]:
        image_column, label_column = self._columns
        for file in files:
            if self._limit is not None:
                rows = self._stream.take(self._limit)
            else:
                rows = self._stream if self._files == 1 else self._stream.shard(self._files, file)
            for number, row in enumerate(rows):
                index = (file << 32) + number
                content = stored_bytes(row[image_column], self.where(index), self._roots)
                label = row[label_column]
                if not self._buckets[0] <= bucket_of(content) < self._buckets[1]:
                    continue
                if label is None or not 0 <= label < self._classes:
                    raise LabelError(
                        f"label {label!r} in {self.where(index)} is outside the {self._classes} classes (0 to"
                        f" {self._classes - 1})"
                    )
                yield index, content, int(label)


def open_stream(
    dataset: str,
    image_column: str | None,
    label_column: str | None,
    config_name: str | None,
    overrides: Mapping[str, Any],
    cache_dir: str | None,
    max_train_samples: int | None = None,
    split_file: str | os.PathLike[str] | None = None,
    find_copies: bool = True,
) -> dict[str, Any]:
    """Opens a data set as streams; returns the arguments of :class:`~erde_hub.data.images.ImageData`.

    Missing splits are cut as for data that are loaded (:func:`~erde_hub.data.splits.split_rules`), but by a
    hash of the image bytes instead of row by row. With ``find_copies``, copies of rows of other given splits are
    left out of train, see :class:`StreamSplit`. Where the first image is small, mean and standard deviation are
    measured on the first 1,000 training rows.

    Raises:
        DataError: No such data, a column missing or in doubt, labels without class names, an unreadable image, a split
            file of other data or with row numbers.
    """
    opened = open_dataset(
        dataset, config_name, streaming=True, cache_dir=cache_dir, prefer_tables=image_column is not None
    )
    name, streams, roots = opened.name, opened.splits, opened.roots
    features = streams["train"].features or streams["train"]._resolve_features().features
    image, label = find_columns(features, name, image_column, label_column)
    if not isinstance(features[label], datasets.ClassLabel):
        raise DataError(
            f"label column {label!r} of {name!r} does not name its classes, and a stream is not read ahead to find"
            " them: load without streaming, or store the column as ClassLabel"
        )
    class_names = list(features[label].names)
    streams = {split: stream.cast_column(image, datasets.Image(decode=False)) for split, stream in streams.items()}

    if "test" in streams and _unlabelled(streams["test"], label):
        _logger.info("split 'test' of %s is not used: it has no labels", name)
        del streams["test"]

    first = streams["train"].take(HASHED_ROWS)
    digest = content_digest(
        class_names, [(stored_bytes(row[image], "the first rows", roots), row[label]) for row in first]
    )
    sizes = {split: _known_size(stream) for split, stream in streams.items()}
    streams = {split: _mixed(own) if isinstance(own, datasets.Dataset) else own for split, own in streams.items()}
    parts = split_buckets(streams)
    if split_file is not None:
        stored = StoredSplit.read(split_file)
        stored.check_data(digest, digest, streamed=True)
        parts = stored.buckets()
        for source in {source for source, _ in parts.values()} - streams.keys():
            raise DataError(f"split file {stored.name!r} takes rows from {source!r}, which these data do not have")

    def split(
        part: str, preprocessing: Preprocessing, limit: int | None = None, held_out: Sequence[StreamSplit] = ()
    ) -> StreamSplit:
        source, buckets = parts[part]
        size = sizes[source] if buckets == EVERY_BUCKET else None
        if size is not None and limit is not None:
            size = min(size, limit)
        columns, classes = (image, label), len(class_names)
        return StreamSplit(
            part,
            streams[source],
            columns,
            classes,
            preprocessing,
            name,
            buckets,
            size,
            limit,
            held_out=held_out,
            roots=roots,
        )

    unset = complete(overrides, **LARGE_IMAGE_DEFAULTS)
    probe = split("train", unset)
    sample = list(islice(probe.rows(), _STREAM_SAMPLE))
    if not sample:
        raise DataError(f"split 'train' of {name!r} is empty: give one with rows")
    preprocessing = _preprocessing(probe, sample, overrides, unset)
    splits = {part: split(part, preprocessing) for part in ("validation", "test")}
    given = [splits[part] for part in splits if find_copies and parts[part][0] != parts["train"][0]]
    splits["train"] = split("train", preprocessing, max_train_samples, given)  # parts of one split share no image
    info = {part: {"rows": splits[part].num_samples, **bucket_info(*parts[part])} for part in SPLIT_NAMES}
    if given:
        info["train"]["copies"] = "left out as they are read"
    height, width = preprocessing.input_size[1:]
    return {
        "name": name,
        "fingerprint": digest,
        "prefix_hash": digest,
        "class_names": class_names,
        "transform": preprocessing,
        "augment": "crop_flip" if height * width <= SMALL_IMAGE_PIXELS else "rrc_flip",
        "split_info": info,
        "plan": SplitPlan({}, info),
        **splits,
    }


def _unlabelled(stream: Any, label: str) -> bool:
    """Tells whether the first row has no label, as in the test splits of many benchmarks."""
    return any(row[label] in (None, -1) for row in stream.take(1))


def _mixed(files: datasets.Dataset) -> Any:
    """Listed files as a stream in a fixed random order, so that the classes are mixed and not one after another."""
    order = epoch_order(len(files), 0, 0)
    mixed = datasets.Dataset.from_dict(files[order], features=files.features)
    return mixed.to_iterable_dataset(num_shards=max(1, len(files) // _STREAM_SAMPLE))


def _known_size(stream: Any) -> int | None:
    """Number of rows as far as the metadata tell it."""
    if isinstance(stream, datasets.Dataset):
        return len(stream)
    splits, split = stream.info.splits, stream.split
    return splits[str(split)].num_examples if splits and split is not None and str(split) in splits else None


def _preprocessing(
    probe: StreamSplit, head: list[tuple[int, bytes, int]], overrides: Mapping[str, Any], unset: Preprocessing
) -> Preprocessing:
    images = [decode(content, probe.where(index)) for index, content, _ in head[:HASHED_ROWS]]
    sizes = {image.size for image in images}
    width, height = images[0].size
    if (
        len(sizes) > 1
        or width * height > SMALL_IMAGE_PIXELS
        or overrides.get("input_size", (3, height, width)) != (3, height, width)
    ):
        return unset
    native = complete(overrides, input_size=(3, height, width), mean=unset.mean, std=unset.std)
    images += [decode(content, probe.where(index)) for index, content, _ in head[HASHED_ROWS:]]
    mean, std = channel_statistics(native.pixels(images))
    return complete(overrides, input_size=(3, height, width), mean=mean, std=std)
