"""Columns of images, texts and labels: found by their type, read, and named where something is wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from erde_hub.errors import DataError, LabelError, nearest

_logger = logging.getLogger(__name__)

_CLASS_DTYPES = ("int", "uint", "bool", "string", "large_string")


def find_columns(
    features: Mapping[str, Any], dataset: str, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Finds the image and the label column by feature type, or checks the ones that were named.

    Raises:
        DataError: A named column is not there or has the wrong type; none or several candidates.
    """
    image = _pick(
        "image", image_column, dataset, features, [name for name, kind in features.items() if _is_image(kind)]
    )
    if not _is_image(features[image]) and not _could_be_image(features[image]):
        raise DataError(
            f"image column {image!r} of {dataset!r} is of type {_kind(features[image])}: give a column of images, of"
            " encoded bytes or of paths"
        )
    return image, _find_label(features, dataset, image, label_column)


def find_text_columns(
    features: Mapping[str, Any], dataset: str, text_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Finds the text and the label column by feature type, or checks the ones that were named.

    Raises:
        DataError: A named column is not there or has the wrong type; none or several candidates.
    """
    candidates = [name for name, kind in features.items() if _is_text(kind) and name != label_column]
    if len(candidates) > 1:  # labels may be texts too
        candidates = [name for name in candidates if name not in ("label", "labels")]
    text = _pick("text", text_column, dataset, features, candidates)
    if not _is_text(features[text]):
        raise DataError(
            f"text column {text!r} of {dataset!r} is of type {_kind(features[text])}: give a column of strings"
        )
    return text, _find_label(features, dataset, text, label_column)


def _find_label(features: Mapping[str, Any], dataset: str, beside: str, label_column: str | None) -> str:
    candidates = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not candidates:
        candidates = [name for name, kind in features.items() if name != beside and _could_be_label(kind)]
        candidates = [name for name in candidates if name == "label"] or candidates
    label = _pick("label", label_column, dataset, features, candidates)
    if not isinstance(features[label], datasets.ClassLabel) and not _could_be_label(features[label]):
        raise DataError(
            f"label column {label!r} of {dataset!r} is of type {_kind(features[label])}: labels of classification are"
            " integers or strings, one per row"
        )
    return label


def _pick(kind: str, wanted: str | None, dataset: str, features: Mapping[str, Any], candidates: Sequence[str]) -> str:
    columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    if wanted is not None:
        if wanted not in features:
            raise DataError(
                f"{dataset!r} has no {kind} column {wanted!r}{nearest(wanted, features)} (columns: {columns})"
            )
        return wanted
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise DataError(f"no {kind} column found in {dataset!r} (columns: {columns}): name it with --{kind}_column")
    raise DataError(f"{dataset!r} has several {kind} columns: {', '.join(candidates)}; choose one with --{kind}_column")


def _kind(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _could_be_image(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "string", "large_string")


def _could_be_label(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(_CLASS_DTYPES)


def as_images(table: Any, column: str) -> Any:
    """Casts a column of bytes or paths to images; leaves one that already holds images as it is."""
    return table if _is_image(table.features[column]) else table.cast_column(column, datasets.Image())


def label_text(cell: str) -> str:
    """What a cell of a CSV file says as a label, so that 007 is no 7; pandas calls it (``converters``)."""
    stripped = cell.strip()
    return stripped if stripped.lstrip("+-").isdigit() else cell


def are_numbers(labels: Iterable[str | None]) -> bool:
    """Tells whether all labels are whole numbers in their usual form, which are classes in the order of numbers."""
    return all(re.fullmatch(r"0|-?[1-9]\d{0,17}", label) for label in labels if label is not None)


def read_labels(tables: Mapping[str, Any], dataset: str, column: str) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Reads the labels of all splits as integers from 0 and names the classes.

    Class names are those of the ClassLabel feature; otherwise the sorted values of the train split. A test split whose
    labels are all missing (None, an empty text or -1) is left out, as it cannot be scored.

    Raises:
        DataError: Rows without label, or fewer than two classes in train.
        LabelError: A label that is no class, named by its row.
    """
    feature = tables["train"].features[column]
    values: dict[str, NDArray[Any]] = {}
    for split, table in tables.items():
        if column not in table.features or type(table.features[column]) is not type(feature):
            raise DataError(f"split {split!r} of {dataset!r} has no label column {column!r} like that of train")
        if isinstance(feature, datasets.ClassLabel) and table.features[column].names != feature.names:
            raise DataError(f"splits 'train' and {split!r} of {dataset!r} name the classes of {column!r} differently")
        storage = table.data.column(column)
        missing = np.asarray(storage.is_null())
        if storage.type in _STRING_TYPES:  # an empty cell names no class
            missing = missing | np.array([not (label or "").strip() for label in storage.to_pylist()], bool)
        if isinstance(feature, datasets.ClassLabel):
            missing = missing | (np.asarray(storage.fill_null(-1)) == -1)
        if split != "train" and missing.all():
            _logger.info("split %r of %s is not used: it has no labels", split, dataset)
            continue
        if missing.any():
            raise DataError(
                f"{int(missing.sum())} rows of split {split!r} of {dataset!r} have no label in {column!r}, the first is"
                f" row {int(np.argmax(missing))}: remove them"
            )
        values[split] = np.asarray(storage.to_pylist() if storage.type in _STRING_TYPES else storage.to_numpy())
    if isinstance(feature, datasets.ClassLabel):
        class_names, labels = list(feature.names), {split: v.astype(np.int64) for split, v in values.items()}
        for split, rows in labels.items():
            _check_range(rows, len(class_names), dataset, split)
            untrained = [class_names[label] for label in np.setdiff1d(rows, labels["train"])]
            if untrained:
                raise LabelError(
                    f"classes of split {split!r} of {dataset!r} have no row in train: {', '.join(untrained[:20])}; add"
                    " some, or remove their rows"
                )
    else:
        class_names, labels = _classes_of_values(values, dataset, column)
    if len(np.unique(labels["train"])) < 2:
        raise DataError(
            f"all rows of split 'train' of {dataset!r} have the same label in {column!r}"
            f" ({class_names[int(labels['train'][0])]!r}): classification needs two classes at least"
        )
    return class_names, labels


#: Texts that stand for a missing number in files of tables.
_MISSING = ("NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "None", "none", "<NA>", "-")
_STRING_TYPES = tuple(datasets.Value(dtype).pa_type for dtype in ("string", "large_string"))


def _check_range(labels: NDArray[np.int64], classes: int, dataset: str, split: str) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise LabelError(
            f"label {int(labels[row])} in row {row} of split {split!r} of {dataset!r} is outside the {classes} classes"
            f" (0 to {classes - 1})"
        )


def _is_number(value: Any) -> bool:
    try:
        return float(value) is not None
    except ValueError:
        return False


def _classes_of_values(
    values: Mapping[str, NDArray[Any]], dataset: str, column: str
) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    known = np.unique(values["train"])
    missing = [value for value in known.tolist() if value in _MISSING]
    numbers = [_is_number(value) for value in known.tolist() if value not in _MISSING]
    if missing and numbers and all(numbers):
        row = int(np.argmax(np.isin(values["train"], missing)))
        raise DataError(
            f"labels in {column!r} of {dataset!r} are numbers and {missing[0]!r} (first in row {row} of train), which"
            " says that there is none: remove these rows"
        )
    if len(known) > max(20, len(values["train"]) // 2):
        raise DataError(
            f"column {column!r} of {dataset!r} has {len(known)} different values in {len(values['train'])} rows, which"
            " are hardly classes: name the right one with --label_column"
        )
    labels = {}
    for split, rows in values.items():
        positions = np.searchsorted(known, rows)
        wrong = (positions == len(known)) | (known[np.minimum(positions, len(known) - 1)] != rows)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise LabelError(
                f"label {rows[row].item()!r} in row {row} of split {split!r} of {dataset!r} does not occur in train"
                f" (classes: {', '.join(map(str, known[:20].tolist()))})"
            )
        labels[split] = positions.astype(np.int64)
    return [str(value) for value in known.tolist()], labels
