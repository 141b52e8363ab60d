"""From a name to tables with ``datasets``: folders, names on the Hub, and errors that say what to do."""

from __future__ import annotations

import glob
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.csv.csv import CsvConfig
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from numpy.typing import NDArray

from erde_hub.errors import DataError, nearest

from .columns import are_numbers, as_images, find_columns, label_text, read_labels
from .decoding import EncodedImages
from .folders import SPLIT_ALIASES, FolderContent, Tables, list_files, read_image_folder, read_schema

_logger = logging.getLogger(__name__)

# Builders of ``datasets`` by the ending of files.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# Files that ``datasets`` writes next to its tables.
_NO_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_HUB_ADDRESS = re.compile(r"^(https?://)?(huggingface\.co|hf\.co)/datasets/|^hf://(datasets/)?|^datasets/")


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
    opened = open_tables(dataset, config_name, cache_dir, image_column is not None, label_column)
    name, tables = opened.name, opened.splits
    image, label = find_columns(tables["train"].features, name, image_column, label_column)
    class_names, labels = read_labels(tables, name, label)
    images = {
        split: EncodedImages(as_images(tables[split], image), image, name, split, opened.roots) for split in labels
    }
    return Source(name, class_names, labels, images, opened.files)


def open_tables(
    dataset: str,
    config_name: str | None,
    cache_dir: str | None,
    prefer_tables: bool = False,
    label_column: str | None = None,
) -> Tables:
    """As :func:`open_dataset`, loaded, with rows in every split.

    Raises:
        DataError: See :func:`open_dataset`; also an empty split.
    """
    opened = open_dataset(dataset, config_name, False, cache_dir, prefer_tables, label_column)
    for split, table in opened.splits.items():
        if len(table) == 0:
            raise DataError(f"split {split!r} of {opened.name!r} is empty: give one with rows, or leave it out")
    return opened


def open_dataset(
    dataset: str,
    config_name: str | None,
    streaming: bool,
    cache_dir: str | None,
    prefer_tables: bool = False,
    label_column: str | None = None,
) -> Tables:
    """Opens a folder or a data set of the Hub. A folder of images is never streamed: its files lie here.

    Args:
        dataset: Folder or name.
        config_name: Configuration of a Hub data set that has several.
        streaming: Tables are streamed.
        cache_dir: Of ``datasets``.
        prefer_tables: A folder's tables are read, whatever class folders lie next to them: for texts, and where the
            column of images was named.
        label_column: Whose cells stay as they are written in CSV files; ``label`` and ``labels`` where none is named.

    Raises:
        DataError: Nothing of that name, a folder without data or without train split, files outside the folder, or a
            cache that cannot be written.
        LabelError: A class folder without training images.
    """
    path = Path(os.path.expanduser(dataset))  # noqa: PTH111 (Path.expanduser raises for users that do not exist)
    if dataset and path.is_dir():
        path = path.resolve()
        content = list_files(path)
        if content.seen == 0:
            raise DataError(
                f"folder {dataset!r} holds no files: give one with parquet files or with a folder per class"
            )
        opened = read_image_folder(path, content, prefer_tables)
        if opened is None:
            loaded = _load(str(path), content, config_name, streaming, cache_dir, label_column)
            opened = Tables(path.name, loaded, [str(path), str(datasets.config.EXTRACTED_DATASETS_PATH)])
    else:
        _check_hub_name(dataset, path)
        cached = Path(HF_HUB_CACHE, "datasets--" + dataset.replace("/", "--"))
        roots = [str(cached), f"hf://datasets/{dataset}@", str(datasets.config.EXTRACTED_DATASETS_PATH)]
        opened = Tables(dataset, _load(dataset, None, config_name, streaming, cache_dir, label_column), roots)
    tables: dict[str, Any] = {}
    found = ", ".join(map(repr, opened.splits))
    for split, table in opened.splits.items():
        usual = SPLIT_ALIASES.get(str(split).lower())
        if usual is None:
            _logger.info("split %r of %s is not used (train, validation and test are)", split, opened.name)
        elif usual in tables:
            raise DataError(f"{opened.name!r} has two splits that mean {usual!r}: {found}; keep one")
        else:
            tables[usual] = table
    if "train" not in tables:
        hint = nearest("train", map(str, opened.splits))
        raise DataError(f"{opened.name!r} has no split 'train'{hint} (found: {found})")
    opened.splits = tables
    return opened


def _load(
    source: str,
    content: FolderContent | None,
    config_name: str | None,
    streaming: bool,
    cache_dir: str | None,
    label_column: str | None,
) -> Any:
    """Calls ``datasets.load_dataset``; in CSV files only an empty cell is missing, so that a class may be called NA,
    and labels stay as they are written.

    Args:
        source: A folder or a name on the Hub.
        content: Of the folder; None for the Hub.
        label_column: See :func:`open_dataset`.
    """
    columns: tuple[str, ...] = ()
    name = source if content is None else Path(source).name
    where = source
    options: dict[str, Any] = {}
    if content is not None and glob.has_magic(source):  # datasets takes these characters for a pattern
        endings = [path.suffix for path in (*content.tables, *map(Path, content.left_out["no image"]))]
        where = next((_BUILDERS[ending] for ending in endings if ending in _BUILDERS), source)
        options = {"data_dir": glob.escape(source)} if where != source else {}
    try:
        builder = datasets.load_dataset_builder(where, config_name, cache_dir=cache_dir, **options)
        _check_files(builder, source, content, config_name)
        if content is not None:
            _check_contents(builder, source)
        if isinstance(builder.config, CsvConfig):
            options |= {"keep_default_na": False, "na_values": [""]}
            if builder.info.features is None and not streaming:
                columns = ("label", "labels") if label_column is None else (label_column,)
                options["converters"] = dict.fromkeys(columns, label_text)
        elif content is None:  # no second round of requests to the Hub
            if streaming:
                return builder.as_streaming_dataset()
            builder.download_and_prepare()
            return builder.as_dataset()
        tables = datasets.load_dataset(where, config_name, streaming=streaming, cache_dir=cache_dir, **options)
        for column in columns:
            own = [table for table in tables.values() if column in table.features]
            if own and all(are_numbers(table.unique(column)) for table in own):
                tables = tables.cast_column(column, datasets.Value("int64"))
        return tables
    except DataError:
        raise
    except Exception as error:  # of many unrelated types, from files, formats, the Hub and the network
        reason = _first_line(error)
        _check_cache(cache_dir or str(datasets.config.HF_DATASETS_CACHE), error)
        if "corresponds to no data" in str(error):  # what datasets says of a split without rows
            raise DataError(f"a split of {name!r} is empty ({error}): give one with rows, or leave it out") from error
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise DataError(f"{name!r} has several configurations: {reason}; name one with --dataset_config") from error
        if content is not None:
            advice = "give one with parquet files or with a folder of images per class (below train/ and test/)"
            capital = [table for table in _other_tables(content) if Path(table).suffix != Path(table).suffix.lower()]
            if "'utf-8' codec" in reason:
                advice = "save its files as UTF-8"
            elif capital:
                advice = f"write the endings of its files in small letters, not like {capital[0]!r}"
            raise DataError(f"folder {source!r} cannot be read by datasets.load_dataset: {reason}; {advice}") from error
        raise DataError(
            f"data set {source!r} is neither 'digits' nor a folder here, and the Hub did not give it: {reason}; check"
            f" the name and the network{_near_folder(Path(source))}"
        ) from error


def _check_files(builder: Any, source: str, content: FolderContent | None, config_name: str | None) -> None:
    """Refuses files that a data set's card names elsewhere; tells which tables of a folder ``datasets`` leaves out."""
    used = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    for file in used:
        remote = content is None and file.startswith(("hf://", "https://"))
        if not remote and (content is None or not Path(os.path.normpath(file)).is_relative_to(source)):
            raise DataError(
                f"the card of {Path(source).name!r} names the file {file!r}, which is not in the data set's folder: put"
                " it there"
            )
    if content is None or config_name is not None:
        return
    real = {os.path.realpath(file) for file in used}
    tables = content.tables + [Path(source, name) for name in _other_tables(content)]
    unused = sorted(path.name for path in tables if os.path.realpath(path) not in real)
    if unused:
        _logger.warning(
            "%d of %d tables in %s are not used (%s): where the names of some files tell a split (train-1.parquet),"
            " datasets reads those alone, files of one kind only, and endings in small letters",
            len(unused),
            len(tables),
            Path(source).name,
            ", ".join(unused[:5]),
        )


def _other_tables(content: FolderContent) -> list[str]:
    """Returns the files of rows that are neither Parquet nor Arrow."""
    others = {name: Path(name.lower().removesuffix(".gz")) for name in content.left_out.get("no image", [])}
    endings = (*_BUILDERS, ".tsv", ".txt")
    return [name for name, path in others.items() if path.suffix in endings and path.name not in _NO_ROWS]


def _check_contents(builder: Any, source: str) -> None:
    """Refuses local tables that ``datasets`` would misread: it reads all with the features of the first."""
    known: dict[str, tuple[str, list[str]]] = {}
    if builder.info.features is not None:
        known = {key: ("the card", kind.names) for key, kind in _classes(builder.info.features)}
    for file in (str(file) for files in (builder.config.data_files or {}).values() for file in files):
        path = Path(file)
        if path.suffix in (".parquet", ".arrow") and (schema := read_schema(path)) is not None:
            for key, kind in _classes(datasets.Features.from_arrow_schema(schema)):
                first, names = known.setdefault(key, (path.name, kind.names))
                if names != kind.names:
                    raise DataError(
                        f"{first!r} and {path.name!r} of {Path(source).name!r} name the classes of {key!r} differently,"
                        f" {names[:20]} and {kind.names[:20]}, and datasets reads all with the names of the first: cast"
                        " the column to one ClassLabel in all of them and save them again"
                    )
        elif path.suffix == ".csv" and path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                header = lines.readline()
            other = next((mark for mark in ";\t|" if mark in header and "," not in header), None)
            if other is not None:
                raise DataError(
                    f"{path.name!r} of {Path(source).name!r} separates its columns by {other!r} (first line:"
                    f" {header.strip()[:80]!r}): save it with commas"
                )


def _classes(features: Any) -> list[tuple[str, datasets.ClassLabel]]:
    return [(key, kind) for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]


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
    name = "/".join(_HUB_ADDRESS.sub("", dataset).strip("/").split("/")[:2])
    if name != dataset and "/" in name and (_HUB_ADDRESS.match(dataset) or name + "/" == dataset):
        raise DataError(f"{dataset!r} is an address: give the data set's name, {name!r}")
    try:
        validate_repo_id(dataset)
    except HFValidationError as error:
        hint = _near_folder(path) or ", and names on the Hub look like org/name"
        raise DataError(f"there is no folder {dataset!r}{hint}") from error


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
