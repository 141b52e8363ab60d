"""Folders of images, a folder per class, read as torchvision and timm read them.

The files are listed here and handed to ``datasets`` with their labels, so that no name of a file or folder decides what
is read, except ``train``, ``validation`` and ``test`` as folders of class folders.
"""

from __future__ import annotations

import json
import logging
import mimetypes
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from erde_hub._image_files import is_image, raster_formats
from erde_hub.errors import DataError, LabelError, nearest

from .columns import are_numbers, label_text

_logger = logging.getLogger(__name__)

#: Names of splits, as ``datasets`` knows them.
SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_TABLES = (".parquet", ".arrow")
# Files that may hold images, or say where they are, which lie in no class folders; ``datasets`` reads them.
_FOR_DATASETS = (".zip", ".tar", ".gz", "README.md")
# Tables of texts, which may have a few pictures next to them.
_TEXTS = (".csv", ".tsv", ".json", ".jsonl")
# Files that say which image has which label; see :func:`_read_metadata`.
_METADATA = ("metadata.csv", "metadata.jsonl")
# Folders that programs write beside a user's own files.
_BY_PROGRAMS = {"__MACOSX", ".git", ".ipynb_checkpoints"}
_HIDDEN_IMAGES = "in a hidden folder, which is no class (rename it to read it)"
_UNREADABLE = "in an image format that Pillow does not read"

Parts = tuple[str, ...]


@dataclass
class Tables:
    """What was opened under a name.

    Attributes:
        name: Hub name, or the last component of the folder.
        splits: Tables or streams by the usual names of splits.
        roots: Where files that an image column names may lie; None for files that were listed here.
        files: For folders of images, how many files were seen, used and left out, by reason.
    """

    name: str
    splits: dict[str, Any]
    roots: list[str] | None
    files: dict[str, Any] | None = None


@dataclass
class FolderContent:
    """The files below a folder.

    Attributes:
        images: Path of every image below the folder, in parts, in the order of the joined paths.
        tables: Parquet and Arrow files.
        metadata: Files that may say which image has which label.
        seen: Number of files.
        left_out: Files that are not used, by reason.
    """

    images: list[Parts] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    metadata: list[Parts] = field(default_factory=list)
    seen: int = 0
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def list_files(root: Path) -> FolderContent:
    """Lists a folder; symbolic links are followed, hidden files left out, unknown endings opened.

    Images in hidden folders, such as a class called ``.net``, are left out with a warning; torchvision reads them.

    Raises:
        DataError: A folder cannot be listed.
    """
    content = FolderContent()
    formats = set(raster_formats())
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in formats}
    found = []
    for path in _walk(root, ()):
        parts = path.relative_to(root).parts
        name, ending = "/".join(parts), path.suffix.lower()
        content.seen += 1
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            shown = ending in endings and not path.name.startswith(".") and not _BY_PROGRAMS.intersection(parts)
            content.left_out[_HIDDEN_IMAGES if shown else "hidden"].append(name)
        elif not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises where a folder may not be searched)
            content.left_out["no file (a broken link or a device)"].append(name)
        elif ending in _TABLES:
            content.tables.append(path)
        elif path.name in _METADATA:
            content.metadata.append(parts)
        elif ending in endings or is_image(path):
            found.append((name, parts))
        else:
            kind = mimetypes.guess_type(name)[0] or ""
            content.left_out[_UNREADABLE if kind.startswith("image/") else "no image"].append(name)
    content.images = [parts for _, parts in sorted(found)]
    return content


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"the folder {folder.name!r} cannot be listed: {error.strerror}") from error
    for entry in entries:
        try:
            folds = entry.is_dir()
        except OSError:  # it lies where nothing may be looked at
            folds = False
        if folds:
            yield from _walk(Path(entry.path), (*above, real))
        else:
            yield Path(entry.path)


def read_image_folder(root: Path, content: FolderContent, prefer_tables: bool = False) -> Tables | None:
    """Reads a folder per class, at the top or below ``train``, ``validation`` and ``test``; None where there are none.

    Every image below a class folder belongs to the class, however deep it lies. Splits may also lie below every class
    (``cat/train/1.png``), and all of it in one more folder. Images that lie in no class folders may be described by
    ``metadata.csv`` or ``metadata.jsonl``. A folder with parquet or Arrow files that hold images is a table, whatever
    images lie next to them. So is one with such files of any kind, or as many CSV or JSON files as images, where the
    images lie in no class folders.

    Args:
        root: The folder.
        content: What :func:`list_files` found in it.
        prefer_tables: Tables are read where there are any, with or without images.

    Returns:
        Per split a data set with the columns ``image`` and ``label``, in the order of the paths.

    Raises:
        DataError: Folders that can be read in two ways, two splits of one meaning, no class folders or a single one.
        LabelError: A class without a training image.
    """
    unreadable, others = (content.left_out.get(reason, []) for reason in (_UNREADABLE, "no image"))
    pictures = len(content.images) + len(unreadable)
    texts = sum(name.endswith(_TEXTS) for name in others) >= pictures
    if not content.images and (content.tables or texts):
        return None
    if content.tables and (prefer_tables or any(map(_holds_images, content.tables))):
        return None
    if not content.images:
        raise DataError(
            f"{root.name!r} holds {len(unreadable)} files {_UNREADABLE} ({unreadable[0]}) and none that it reads:"
            " convert them to PNG or JPEG, or import a plugin that reads them before"
        )
    deep = any(len(parts) > 1 for parts in content.images)
    assigned = _assign(content, root.name) if deep else []
    names = sorted({label for _, label, _ in assigned})
    single = len(names) == 1
    if content.tables:
        if len(names) < 2:
            return None
        content.left_out["tables, while the folders tell the classes"] += [
            path.relative_to(root).as_posix() for path in content.tables
        ]
    inside = {part for parts in content.metadata for part in parts[:-1]} & set(names)
    if content.metadata and (len(names) < 2 or _are_splits(names, bool(inside))):
        return _read_metadata(root, content)
    if (len(names) < 2 and texts) or (not assigned and any(name.endswith(_FOR_DATASETS) for name in others)):
        return None
    if single or not assigned:
        folders = f"a single class folder, {names[0]!r}" if single else "no class folders"
        raise DataError(
            f"{root.name!r} holds {len(content.images)} images and {folders}: put the images of each class into"
            " a folder of the class's name (below train/, validation/ and test/ if they are split), or name each image"
            " and its label in metadata.csv, in columns file_name and label"
        )
    if content.metadata:
        content.left_out["metadata, while the folders tell the classes"] += ["/".join(own) for own in content.metadata]
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for split, label, parts in assigned:
        rows[split].append((str(root.joinpath(*parts)), label))
    names = sorted({label for _, label in rows["train"]})
    for split, own in rows.items():
        _check_classes(root.name, split, {label for _, label in own}, names)
    places = {parts[: parts.index(label)] for _, label, parts in assigned}
    folders_seen = {entry.name for place in places for entry in root.joinpath(*place).iterdir() if entry.is_dir()}
    empty = sorted(folders_seen - {label for _, label, _ in assigned})
    empty = [name for name in empty if not name.startswith((".", "__"))]
    if empty:
        _logger.warning("%s: folders without an image are no classes: %s", root.name, ", ".join(empty[:10]))
    files = _report(root.name, content, sum(map(len, rows.values())))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {
        split: datasets.Dataset.from_dict(
            {"image": [path for path, _ in own], "label": [label for _, label in own]}, features=features
        )
        for split, own in rows.items()
    }
    return Tables(root.name, splits, None, files)


def read_schema(table: Path) -> pa.Schema | None:
    """Returns the columns of a Parquet or Arrow file; None for a damaged one."""
    try:
        if table.suffix.lower() == ".parquet":
            return pq.read_schema(table)
        with pa.OSFile(str(table)) as file:  # as a stream, which datasets writes, or with an index at its end
            indexed = file.read(6) == b"ARROW1"
            file.seek(0)
            return (pa.ipc.open_file(file) if indexed else pa.ipc.open_stream(file)).schema
    except (pa.ArrowException, OSError):
        return None


def _holds_images(table: Path) -> bool:
    """Tells whether a column of a Parquet or Arrow file holds encoded bytes; a damaged file holds none."""
    schema = read_schema(table)
    kinds = [] if schema is None else schema.types
    cells = [kind.field("bytes").type if pa.types.is_struct(kind) and "bytes" in kind.names else kind for kind in kinds]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in cells)


def _read_metadata(root: Path, content: FolderContent) -> Tables:
    """Reads files with a row per image, which name it in the column ``file_name``, relative to their own folder.

    Folders whose names hold the word train, validation or test tell the splits.

    Raises:
        DataError: A file that cannot be read, or without that column.
    """
    splits: dict[str, list[pd.DataFrame]] = defaultdict(list)
    try:
        for parts in sorted(content.metadata):
            path = root.joinpath(*parts)
            if path.suffix == ".csv":  # a class may be called NA
                kept = {"label": label_text}
                table = pd.read_csv(path, keep_default_na=False, na_values=[""], converters=kept)
                if "label" in table and are_numbers(table["label"].dropna()):
                    table["label"] = pd.to_numeric(table["label"])
            else:
                lines = path.read_text(encoding="utf-8").splitlines()
                table = pd.DataFrame([json.loads(line) for line in lines if line.strip()])
            files = [Path(*parts[:-1], file).as_posix() for file in table.pop("file_name")]
            table.insert(0, "image", files)
            for split, own in table.groupby([_split_of(str(Path(file).parent)) or "train" for file in files]):
                splits[split].append(own)
        joined = {split: pd.concat(own).convert_dtypes() for split, own in splits.items()}
        tables = {split: datasets.Dataset.from_pandas(own, preserve_index=False) for split, own in joined.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        names = ", ".join("/".join(parts) for parts in content.metadata)
        raise DataError(
            f"{names} of {root.name!r} cannot be read ({type(error).__name__}: {error}): give a row per image, with its"
            " path in the column file_name and its class in the column label"
        ) from error
    named = {os.path.normpath(file) for table in joined.values() for file in table["image"]}
    others = ["/".join(parts) for parts in content.images if str(Path(*parts)) not in named]
    if others:
        content.left_out["not in the metadata"] += others
    report = _report(root.name, content, len(content.images) - len(others) + len(content.metadata))
    images = {split: table.cast_column("image", datasets.Image()) for split, table in tables.items()}
    return Tables(root.name, images, [str(root)], report)


def _are_splits(names: list[str], described: bool) -> bool:
    """Tells parts of a data set (train_images, test_images) from classes (train station, test tube).

    Args:
        names: Of the folders that images lie in.
        described: Metadata lie inside the folders, which classes do not have.
    """
    rests = [" ".join(word for word in _words(name) if word not in SPLIT_ALIASES) for name in names]
    return all(map(_split_of, names)) and (described or "" in rests or len(set(rests)) < len(rests))


def _words(name: str) -> list[str]:
    return [word for word in re.split("[^a-z]+", name.lower()) if word]


def _split_of(folder: str) -> str | None:
    """Returns the split that a word in the name of a folder stands for, or of one above it."""
    return next((SPLIT_ALIASES[word] for word in _words(folder) if word in SPLIT_ALIASES), None)


def _depth(images: Iterable[Parts]) -> int:
    """How many folders lie around those that are splits or classes."""
    folders = {parts[:-1] for parts in images if len(parts) > 1}
    first, last = min(folders), max(folders)
    shared = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    splits = [level for level, name in enumerate(shared) if name.lower() in SPLIT_ALIASES]
    return min([*splits, len(shared), max(map(len, folders)) - 1])


def _assign(content: FolderContent, name: str) -> list[tuple[str, str, Parts]]:
    """Returns split, class and path of the images that are used."""
    depth = _depth(content.images)
    below: dict[str, set[Parts]] = defaultdict(set)  # folders in which images lie, by the topmost one
    for parts in content.images:
        if len(parts) > depth + 1:
            below[parts[depth]].add(parts[depth + 1 : -1])
    splits = {folder: SPLIT_ALIASES[folder.lower()] for folder in below if folder.lower() in SPLIT_ALIASES}
    nested = sorted(folder for folder in splits if any(below[folder]))  # with class folders
    classes = sorted(set(below) - set(splits))
    if nested and classes and (len(nested) == 1 or "train" not in {splits[folder] for folder in nested}):
        raise DataError(
            f"{name!r} can be read in two ways: {nested[0]!r} holds folders like a split, and {classes[0]!r} lies next"
            " to it like a class: move the training images into train/CLASS/, or rename a folder"
        )
    if nested:
        if "train" not in {splits[folder] for folder in nested}:
            raise DataError(f"{name!r} has no split 'train' (found: {', '.join(map(repr, nested))})")
        return _assign_splits(content, depth, name, splits)
    return _assign_classes(content, depth, name, below, splits) if classes else []


def _assign_splits(
    content: FolderContent, depth: int, name: str, splits: dict[str, str]
) -> list[tuple[str, str, Parts]]:
    doubled = [split for split, count in Counter(splits.values()).items() if count > 1]
    if doubled:
        raise DataError(f"{name!r} has two splits that mean {doubled[0]!r}: {', '.join(map(repr, splits))}; keep one")
    assigned = []
    for parts in content.images:
        if len(parts) <= depth + 1 or parts[depth] not in splits:
            content.left_out["in no folder of a split"].append("/".join(parts))
        elif len(parts) == depth + 2:
            content.left_out["in a split, in no class folder"].append("/".join(parts))
        else:
            assigned.append((splits[parts[depth]], parts[depth + 1], parts))
    return assigned


def _assign_classes(
    content: FolderContent, depth: int, name: str, below: dict[str, set[Parts]], splits: dict[str, str]
) -> list[tuple[str, str, Parts]]:
    inner = {rest[0] if rest else "" for folders in below.values() for rest in folders}
    by_class = inner <= {folder for folder in inner if folder.lower() in SPLIT_ALIASES}  # cat/train/1.png
    if by_class and "train" not in {SPLIT_ALIASES[folder.lower()] for folder in inner}:
        raise DataError(f"{name!r} has no split 'train' (found: {', '.join(map(repr, sorted(inner)))})")
    if splits:
        _logger.warning(
            "%s: %s is read as a class, as it lies next to %s and holds no class folders",
            name,
            ", ".join(map(repr, sorted(splits))),
            next(folder for folder in below if folder not in splits),
        )
    assigned = []
    for parts in content.images:
        if len(parts) <= depth + 1:
            content.left_out["in no class folder"].append("/".join(parts))
        else:
            split = SPLIT_ALIASES[parts[depth + 1].lower()] if by_class else "train"
            assigned.append((split, parts[depth], parts))
    deep = sorted(folder for folder, rest in below.items() if any(rest))
    if deep and not by_class:
        _logger.warning("%s: images in folders below class %r belong to that class", name, deep[0])
    return assigned


def _check_classes(name: str, split: str, classes: set[str], known: list[str]) -> None:
    unknown = sorted(classes - set(known))
    if unknown:
        raise LabelError(
            f"classes of split {split!r} of {name!r} have no training image: {', '.join(map(repr, unknown))}"
            f"{nearest(unknown[0], known)} (classes of train: {', '.join(known[:20])}): add some, or"
            " remove the folder"
        )


def _report(name: str, content: FolderContent, used: int) -> dict[str, Any]:
    """Logs and returns how many files were seen, used and left out, by reason."""
    reasons = "; ".join(f"{len(paths)} {reason} ({paths[0]})" for reason, paths in content.left_out.items())
    quiet = set(content.left_out) <= {"hidden", "no image"}
    _logger.log(
        logging.INFO if quiet else logging.WARNING,
        "%s: %d of %d files are used%s",
        name,
        used,
        content.seen,
        f"; not used: {reasons}" if reasons else "",
    )
    left_out = {reason: len(paths) for reason, paths in content.left_out.items()}
    return {"seen": content.seen, "used": used, "left_out": left_out}
