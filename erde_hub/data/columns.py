"""Opening a data set with ``datasets`` and finding its columns, with errors that say what to do."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.csv.csv import CsvConfig
from huggingface_hub.constants import HF_HUB_CACHE
from numpy.typing import NDArray

from erde_hub.errors import DataError, LabelError, nearest

from .decoding import EncodedImages
from .folders import SPLIT_ALIASES, read_class_folders

_logger = logging.getLogger(__name__)

_CLASS_DTYPES = ("int", "uint", "bool", "string", "large_string")


@dataclass
class Source:
    """A data set as it is stored: labels read, images still encoded.

    Args:
        name: Hub name, or the last component of the folder.
        class_names: Names of the classes, in the order of their labels.
        labels: Labels from 0 per source split; unlabelled test splits are left out.
        images: Encoded images per source split.
        files: For folders of images, how many files were seen, used and left out.
    """

    name: str
    class_names: list[str]
    labels: dict[str, NDArray[np.int64]]
    images: dict[str, EncodedImages]
    files: dict[str, Any] | None = None


@dataclass
class Tables:
    """What was opened under a name.

    Attributes:
        name: Hub name, or the last component of the folder.
        splits: Tables or streams by the usual names of splits.
        roots: Where files that an image column names may lie; None for files that were listed here.
        files: For folders of images, how many files were seen, used and left out.
    """

    name: str
    splits: dict[str, Any]
    roots: list[str] | None
    files: dict[str, Any] | None = None


def open_source(
    dataset: str,
    image_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> Source:
    """Opens a Hub data set or a local folder, finds its columns and reads its labels.

    Raises:
        DataError: Nothing of that name, a folder without data, no train split, a column missing or in doubt, an empty
            split, rows without label, a single class.
        LabelError: A label outside the classes.
    """
    opened = open_tables(dataset, config_name, cache_dir)
    name, tables = opened.name, opened.splits
    image, label = find_columns(tables["train"].features, name, image_column, label_column)
    class_names, labels = read_labels(tables, name, label)
    images = {
        split: EncodedImages(as_images(tables[split], image), image, name, split, opened.roots) for split in labels
    }
    return Source(name, class_names, labels, images, opened.files)


def open_tables(dataset: str, config_name: str | None, cache_dir: str | None) -> Tables:
    """As :func:`open_dataset`, loaded, with rows in every split.

    Raises:
        DataError: See :func:`open_dataset`; also an empty split.
    """
    opened = open_dataset(dataset, config_name, streaming=False, cache_dir=cache_dir)
    for split, table in opened.splits.items():
        if len(table) == 0:
            raise DataError(f"split {split!r} of {opened.name!r} is empty: give one with rows, or leave it out")
    return opened


def open_dataset(dataset: str, config_name: str | None, streaming: bool, cache_dir: str | None) -> Tables:
    """Opens a folder or a data set of the Hub. A folder of class folders is never streamed: its files lie here.

    Raises:
        DataError: Nothing of that name, a folder without data or without train split, or a cache that cannot be
            written.
        LabelError: A class folder without training images.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        name = path.resolve().name
        found = read_class_folders(path)
        if found is not None:
            return Tables(name, dict(found[0]), None, found[1])
        loaded, roots = _load(str(path), config_name, streaming, cache_dir), [str(path)]
    else:
        name = dataset
        _check_hub_name(dataset, path)
        loaded = _load(dataset, config_name, streaming, cache_dir)
        roots = [str(Path(HF_HUB_CACHE, "datasets--" + dataset.replace("/", "--"))), f"hf://datasets/{dataset}@"]
    roots.append(str(datasets.config.EXTRACTED_DATASETS_PATH))
    tables: dict[str, Any] = {}
    for split, table in loaded.items():
        usual = SPLIT_ALIASES.get(str(split).lower())
        if usual is None:
            _logger.info("split %r of %s is not used (train, validation and test are)", split, name)
        elif usual in tables:
            raise DataError(f"{name!r} has two splits that mean {usual!r}: {', '.join(map(repr, loaded))}; keep one")
        else:
            tables[usual] = table
    if "train" not in tables:
        raise DataError(
            f"{name!r} has no split 'train'{nearest('train', map(str, loaded))} (found: {', '.join(map(repr, loaded))})"
        )
    return Tables(name, tables, roots)


def _load(source: str, config_name: str | None, streaming: bool, cache_dir: str | None) -> Any:
    """Calls ``datasets.load_dataset``; in CSV files only an empty cell is missing, so that a class may be called NA."""
    local = Path(source).is_dir()
    name = Path(source).resolve().name if local else source
    try:
        builder = datasets.load_dataset_builder(source, config_name, cache_dir=cache_dir)
        csv = isinstance(builder.config, CsvConfig)
        options = {"keep_default_na": False, "na_values": [""]} if csv else {}
        return datasets.load_dataset(source, config_name, streaming=streaming, cache_dir=cache_dir, **options)
    except Exception as error:  # of many unrelated types, from files, formats, the Hub and the network
        reason = _first_line(error)
        _check_cache(cache_dir or str(datasets.config.HF_DATASETS_CACHE), error)
        if "corresponds to no data" in str(error):  # what datasets says of a split without rows
            raise DataError(f"a split of {name!r} is empty ({error}): give one with rows, or leave it out") from error
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise DataError(f"{name!r} has several configurations: {reason}; name one with --dataset_config") from error
        if local:
            raise DataError(
                f"folder {source!r} cannot be read by datasets.load_dataset: {reason}; give one with parquet files or"
                " with a folder of images per class (below train/ and test/)"
            ) from error
        raise DataError(
            f"data set {source!r} is neither 'digits' nor a folder here, and the Hub did not give it: {reason}; check"
            f" the name and the network{_near_folder(Path(source))}"
        ) from error


def _check_cache(folder: str, error: Exception) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as refused:
        raise DataError(
            f"the cache of data sets, {folder!r}, cannot be written ({refused.strerror}): choose another folder with"
            " cache_dir= (recipes: --cache_dir) or the variable HF_DATASETS_CACHE"
        ) from error


def _check_hub_name(dataset: str, path: Path) -> None:
    if path.is_file():
        raise DataError(f"{dataset!r} is a file: give the folder it is in")
    for prefix in ("https://huggingface.co/datasets/", "hf://datasets/"):
        if dataset.startswith(prefix):
            raise DataError(f"{dataset!r} is an address: give the data set's name, {dataset.removeprefix(prefix)!r}")
    looks_local = dataset.startswith((".", "~", os.sep)) or os.sep * 2 in dataset or dataset.count("/") > 1
    if looks_local or not dataset:
        raise DataError(f"there is no folder {dataset!r}{_near_folder(path)}")


def _near_folder(path: Path) -> str:
    parent = path.parent
    if not path.name or not parent.is_dir():
        return ""
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return nearest(path.name, ["digits", *folders])


def _first_line(error: Exception) -> str:
    # datasets wraps the reason of a failed build; the message is long and may span lines
    reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    text = str(reason or error).strip() or type(error).__name__
    return " ".join(text.split())[:400]


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


def read_labels(tables: Mapping[str, Any], dataset: str, column: str) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Reads the labels of all splits as integers from 0 and names the classes.

    Class names are those of the ClassLabel feature; otherwise the sorted values of the train split. A test split whose
    labels are all missing (None or -1) is left out, as it cannot be scored.

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
    if missing and all(_is_number(value) for value in known.tolist() if value not in _MISSING):
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
