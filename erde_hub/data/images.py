"""Image data for training and evaluation: one call from a name to three splits, class names and preprocessing.

:func:`load_image_data` takes ``"digits"``, a folder or a Hub name; :class:`BatchLoader` gives batches of a split.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from erde_hub.errors import (
    ConfigError,
    DataError,
    InputTypeError,
    LabelError,
    MissingDependencyError,
    unknown_name,
)

from .base import LabelledData, check_limits
from .decoding import (
    HASHED_ROWS,
    EncodedImages,
    content_digest,
    content_hash,
    content_keys,
    decode_splits,
    row_hashes,
)
from .integrity import IMAGE_CHECKS, find_unreadable
from .loader import BatchLoader, DecodedSplit, EncodedSplit, Split
from .opening import Source, open_source
from .preprocessing import (
    LARGE_IMAGE_DEFAULTS,
    Preprocessing,
    channel_statistics,
    check_overrides,
    complete,
)
from .splits import SPLIT_NAMES, SplitPlan, bucket_of, leave_out_copies, limit_plan, load_plan, plan_splits
from .streaming import open_stream

_logger = logging.getLogger(__name__)

__all__ = ["BatchLoader", "ImageData", "image_data_from_arrays", "load_image_data"]


@dataclass(kw_only=True)
class ImageData(LabelledData):
    """Labelled images; see :class:`~erde_hub.data.base.LabelledData`.

    Attributes:
        transform: Turns an RGB image into the network's input.
    """

    kind: ClassVar[str] = "image"

    transform: Preprocessing

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(3, H, W) of the batches."""
        return self.transform.input_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel, of pixels in [0, 1]."""
        return self.transform.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Per channel, of pixels in [0, 1]."""
        return self.transform.std

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, standard deviation, size and resizing: ``model.set_preprocessing(**data.preprocessing)``."""
        return self.transform.to_dict()


def load_image_data(
    dataset: str | os.PathLike[str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    input_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    streaming: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    split_file: str | os.PathLike[str] | None = None,
    check_images: Literal["all", "headers", "none"] = "all",
    seed: int = 0,
    progress: bool = True,
) -> ImageData:
    """Loads a data set and cuts it into train, validation and test.

    Small images (all of one size, square or not, of at most 96x96 pixels, and so is the input) are decoded once, kept
    as uint8 and remembered on disk; they keep their shape unless ``input_size`` says otherwise, and their mean and
    standard deviation are measured on train. Larger ones are decoded when they are needed, with ImageNet's mean and
    standard deviation, 224x224, bicubic and ``crop_pct`` 0.875 unless told otherwise.

    Args:
        dataset: "digits" (scikit-learn's, 32x32, no download), a local folder (of images, one folder per class or
            described by ``metadata.csv``, or what ``datasets.load_dataset`` reads), or a name on the Hub.
        image_column: Needed where the features show no image column, or several.
        label_column: Needed where the features show no class column, or several.
        config_name: Configuration of a Hub data set that has several.
        input_size: (3, H, W), or one number for a square.
        mean: Per channel on [0, 1]; give the teacher's where its weights come from elsewhere.
        std: Per channel on [0, 1].
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: In (0, 1].
        crop_mode: "center" (the default) or "squash", see :class:`Preprocessing`.
        streaming: Read rows one after another, for sets larger than the disk.
        cache_dir: Where ``datasets`` and the decoded images are kept; by default the cache of ``datasets``.
        max_train_samples: Train on a stratified part.
        max_eval_samples: Use stratified parts of validation and test.
        split_file: Written by :meth:`ImageData.save_split`: use exactly these held-out rows. A file of streamed data
            holds a rule that data which are loaded follow too; one with row numbers is of no use to a stream.
        check_images: Large images that cannot be read are found here and not in the middle of training: "all" decodes
            every image once, on all cores, and remembers in ``cache_dir`` that it did; "headers" opens up to 20,000 of
            each split; "none" looks at nothing. Copies in splits of more than about a gigabyte are found by "all" only.
            Small images are decoded here in any case, streams never; of a stream "all" reads given validation and test
            splits before training, so that copies of them are left out of train.
        seed: Of the held-out rows; 0 gives the splits that other people get.
        progress: Show progress bars.

    Raises:
        DataError: No such data, no or several columns, an empty split, a single class, an unreadable image (named by
            its row), rows without label, a split file of other data.
        LabelError: A label outside the classes.
        ConfigError: A number or a name that is not allowed.
        MissingDependencyError: "digits" without scikit-learn.
    """
    limits = {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}
    check_limits(limits)
    dataset, cache = os.fspath(dataset), None if cache_dir is None else os.fspath(cache_dir)
    if check_images not in IMAGE_CHECKS:
        raise unknown_name("check_images", check_images, IMAGE_CHECKS)
    if dataset == "digits":
        named = {"image_column": image_column, "label_column": label_column, "config_name": config_name}
        for name, value in named.items():
            if value is not None:
                raise ConfigError(
                    f"{name}={value!r} is not for 'digits', which has neither columns nor configurations: leave it out,"
                    " or name another dataset"
                )
    overrides = check_overrides(input_size, mean, std, interpolation, crop_pct, crop_mode)
    if streaming:
        for name, given in {"'digits'": dataset == "digits", **limits}.items():
            if given and name != "max_train_samples":
                raise ConfigError(f"streaming does not go with {name}: load without streaming")
        opened = open_stream(
            dataset,
            image_column,
            label_column,
            config_name,
            overrides,
            cache,
            max_train_samples,
            split_file,
            check_images == "all",
        )
        return ImageData(**opened)
    stored: Mapping[str, EncodedImages | NDArray[np.uint8]]
    if dataset == "digits":
        source, stored = read_digits(overrides.get("input_size", (3, 32, 32))[1:])
        overrides.pop("input_size", None)
    else:
        source = open_source(dataset, image_column, label_column, config_name, cache)
        stored = source.images
    fingerprint = content_hash(source.class_names, source.labels, stored, progress)
    prefix_hash = _prefix_hash(source)
    folder = Path(cache or datasets.config.HF_DATASETS_CACHE)
    keys = {}
    for split, images in stored.items():
        kept = folder / "erde_hub_checked" / f"{fingerprint}-{split}.keys"
        keys[split] = content_keys(images, kept, check_images == "all", progress)
    known = {split: own.tolist() for split, own in keys.items() if own is not None}
    if len(known) < len(keys):
        _logger.warning(
            "%s: copies of images in %s are not looked for, and may be on both sides of the cut: more than about a"
            " gigabyte is read for that with check_images='all' only",
            source.name,
            ", ".join(split for split in keys if split not in known),
        )
    plan = (
        plan_splits(source.labels, seed, known)
        if split_file is None
        else load_plan(
            split_file, source.labels, fingerprint, prefix_hash, lambda split: _buckets(source.images[split])
        )
    )
    plan = leave_out_copies(plan, known)
    used = limit_plan(plan, source.labels, max_train_samples, max_eval_samples)
    return replace(
        _build(source, stored, plan, used, fingerprint, overrides, folder, check_images, progress),
        prefix_hash=prefix_hash,
        files=source.files,
    )


def image_data_from_arrays(
    name: str,
    arrays: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.integer[Any]]]],
    class_names: Sequence[str],
    seed: int = 0,
) -> ImageData:
    """Makes data of images in memory, for sets built in code.

    Args:
        name: What reports call it.
        arrays: Images and labels per source split; "train" at least. Missing splits are cut as for any data set, and
            copies are treated as there.
        class_names: In the order of the labels.
        seed: Of the held-out rows.

    Shape:
        images: uint8 (N, H, W, 3). labels: (N,), from 0.

    Raises:
        InputTypeError: Images that are not uint8 (N, H, W, 3).
        LabelError: A label outside the classes.
        DataError: No train split, or too few rows.
    """
    images, labels = {}, {}
    for split, (pixels, values) in arrays.items():
        if split not in SPLIT_NAMES:
            raise DataError(f"{name!r} has a split {split!r}: allowed are {', '.join(SPLIT_NAMES)}")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) != len(values):
            raise InputTypeError(
                f"images of split {split!r} are {pixels.dtype} {pixels.shape} with {len(values)} labels: give uint8"
                " (N, H, W, 3) and N labels"
            )
        if len(values) and not 0 <= values.min() <= values.max() < len(class_names):
            raise LabelError(
                f"labels of split {split!r} range from {values.min()} to {values.max()}: give 0 to"
                f" {len(class_names) - 1} for {len(class_names)} classes"
            )
        images[split], labels[split] = np.ascontiguousarray(pixels), values.astype(np.int64)
    if "train" in images and any(pixels.shape[1:] != images["train"].shape[1:] for pixels in images.values()):
        raise InputTypeError(f"images of {name!r} differ in size between splits")
    source = Source(name, list(class_names), labels, {})
    fingerprint = content_hash(class_names, labels, images)
    keys = {split: row_hashes(pixels).tolist() for split, pixels in images.items()}
    plan = leave_out_copies(plan_splits(labels, seed, keys), keys)
    return _build(source, images, plan, plan, fingerprint, {}, None, "none", progress=False)


def _build(
    source: Source,
    stored: Mapping[str, EncodedImages | NDArray[np.uint8]],
    plan: SplitPlan,
    used: SplitPlan,
    fingerprint: str,
    overrides: Mapping[str, Any],
    cache: Path | None,
    check: str,
    progress: bool,
) -> ImageData:
    """Puts the splits together, decoded where that is sensible; ``used`` is the part of ``plan`` that is asked for."""
    needed = {
        split: np.unique(np.concatenate([rows for origin, rows in used.rows.values() if origin == split]))
        for split in dict.fromkeys(origin for origin, _ in used.rows.values())
    }
    stores = decode_splits(stored, needed, fingerprint, overrides, cache and cache / "erde_hub_decoded", progress)
    if stores is None:
        for split, rows in needed.items():
            checked = cache and cache / "erde_hub_checked" / f"{fingerprint}-{split}"
            find_unreadable(source.images[split], rows, check, checked, progress)
        preprocessing = complete(overrides, **LARGE_IMAGE_DEFAULTS)
    else:
        origin, rows = used.rows["train"]
        mean, std = overrides.get("mean"), overrides.get("std")
        if mean is None or std is None:
            measured = channel_statistics(stores[origin].pixels, stores[origin].positions(rows))
            mean, std = mean or measured[0], std or measured[1]
        preprocessing = complete({**overrides, "mean": mean, "std": std}, input_size=(3, *stores[origin].size))
    splits: dict[str, Split] = {}
    for name, (origin, rows) in used.rows.items():
        labels, indices = torch.from_numpy(source.labels[origin][rows]), torch.from_numpy(rows.copy())
        if stores is None:
            splits[name] = EncodedSplit(name, labels, indices, preprocessing, source.images[origin])
        else:
            pixels, positions = stores[origin].pixels, stores[origin].positions(rows)
            splits[name] = DecodedSplit(name, labels, indices, preprocessing, pixels, positions)
    return ImageData(
        name=source.name,
        fingerprint=fingerprint,
        class_names=source.class_names,
        transform=preprocessing,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        split_info=used.info,
        augment="shift" if source.name == "digits" else "rrc_flip" if stores is None else "crop_flip",
        plan=plan,
    )


def _prefix_hash(source: Source) -> str | None:
    """What a stream of the same data has for a fingerprint; None for images that no stream can give."""
    images = source.images.get("train")
    if images is None:
        return None
    rows = images.iterate(range(min(HASHED_ROWS, len(images))))
    return content_digest(source.class_names, [(content, int(source.labels["train"][row])) for row, content in rows])


def _buckets(images: EncodedImages) -> NDArray[np.int64]:
    return np.fromiter((bucket_of(content) for _, content in images.iterate()), np.int64, len(images))


def read_digits(size: tuple[int, ...]) -> tuple[Source, dict[str, NDArray[np.uint8]]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels, enlarged and repeated to three channels."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingDependencyError(
            "the data set 'digits' comes with scikit-learn: pip install scikit-learn"
        ) from error
    levels, labels = load_digits(return_X_y=True)
    grey = np.rint(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC) for image in grey]
    pixels = np.repeat(np.stack([np.asarray(image) for image in enlarged])[..., None], 3, axis=-1)
    source = Source("digits", [str(digit) for digit in range(10)], {"train": labels.astype(np.int64)}, {})
    return source, {"train": pixels}
