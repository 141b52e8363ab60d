"""The data of a checkpoint's run, read from the files next to it: the data set, and the rows that were trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from erde_hub._files import replacing
from erde_hub.data.base import LabelledData
from erde_hub.data.loader import Split
from erde_hub.data.splits import StoredSplit
from erde_hub.data.streaming import StreamSplit
from erde_hub.errors import ConfigError, DataError, ResultsError
from erde_hub.evaluation import ExitRecords, load_results

from .arguments import DataArguments

SPLIT_FILE = "split.json"
RESULTS_FILE = "results.json"
#: Hashes of the samples that were trained on, 8 bytes each.
TRAINED_ON_FILE = "trained_on.safetensors"
#: Hashes of the held-out samples that calibrator and learned policy of a checkpoint were fitted on.
FITTED_ON_FILE = "fitted_on.safetensors"

#: Arguments of the data that belong to one data set and are taken from the run together with it.
_OF_THE_DATA = ("dataset_config", "image_column", "text_column", "label_column")


def run_file(model: str, name: str) -> str | None:
    """Returns a file that the training run wrote next to a model, if there is one."""
    try:
        return cached_file(
            model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None


def data_of_run(model: str, args: DataArguments) -> tuple[DataArguments, str | None]:
    """Fills in the data set that a model's run was trained on where none is named.

    Args:
        model: Folder or Hub repository of the model.
        args: What the user requested.

    Returns:
        The arguments with a data set, and the fingerprint that the run's data had; None where the user named the data.

    Raises:
        ConfigError: No data set is named, and the run does not say which it was, or it was a folder.
        ResultsError: The run's report is damaged.
    """
    if args.dataset is not None:
        return args, None
    path = run_file(model, RESULTS_FILE)
    if path is None:
        raise ConfigError(
            f"--dataset is needed: {model!r} has no {RESULTS_FILE} that says what it was trained on; give --dataset"
            " digits, a Hub name or a folder"
        )
    results = load_results(path)
    told, dataset = results["args"], results["dataset"]
    name = str(dataset["name"])
    if name != "digits" and "/" not in name:
        raise ConfigError(
            f"--dataset is needed: {model!r} was trained on {name!r}, a folder, and where that lies is not stored; give"
            " --dataset FOLDER"
        )
    fields = [f.name for f in dataclasses.fields(args)]
    same = {key: told.get(key) for key in _OF_THE_DATA if key in fields and getattr(args, key) is None}
    return dataclasses.replace(args, dataset=name, **same), dataset.get("fingerprint")


def is_other_data(data: LabelledData, model: str) -> bool:
    """Tells whether a model's run was trained on other data, or does not say on which."""
    path = run_file(model, RESULTS_FILE)
    try:
        own = {} if path is None else load_results(path)["dataset"]
    except ResultsError:
        return True
    key = "name" if data.streamed else "fingerprint"  # a stream has a fingerprint of its own
    return bool(own.get(key) != getattr(data, key))


def save_trained_on(data: LabelledData, folder: Path) -> None:
    """Writes hashes of the samples that a run trained on, 8 bytes each; nothing for a stream.

    Raises:
        CheckpointWriteError: The file cannot be written.
    """
    if not isinstance(data.train, Split):
        return
    _save_hashes(data.train.content_hashes(), folder / TRAINED_ON_FILE)


def save_fitted_on(split: Split | StreamSplit, rows: torch.Tensor, folder: Path, keep: bool = False) -> None:
    """Writes hashes of the samples that parts of a checkpoint were fitted on; of a stream's samples nothing is known.

    Args:
        split: Where those of new parts come from.
        rows: Their sample indices.
        folder: Of the checkpoint.
        keep: The checkpoint keeps a part that was fitted before, perhaps on other data: what the file says stays in
            it, and where there is none, none is written that would make that part look known.

    Raises:
        CheckpointWriteError: The file cannot be written.
    """
    path, hashes = folder / FITTED_ON_FILE, []
    if keep and not path.is_file():
        return
    if keep:
        hashes.append(load_file(path)["hashes"].numpy())
    if len(rows) and isinstance(split, Split):
        hashes.append(split.content_hashes()[torch.isin(split.indices, rows).numpy()])
    if hashes:
        _save_hashes(np.concatenate(hashes), path)
    else:
        path.unlink(missing_ok=True)


def extend_fitted_on(split: Split | StreamSplit, rows: torch.Tensor, folder: Path) -> None:
    """Adds samples to the list that :func:`save_fitted_on` wrote, if there is one.

    Raises:
        CheckpointWriteError: The file cannot be written.
    """
    if (folder / FITTED_ON_FILE).is_file():
        save_fitted_on(split, rows, folder, keep=True)


def rows_fitted_on(model: str, records: ExitRecords, split: Split | StreamSplit) -> torch.Tensor | None:
    """Returns those sample indices of records that calibrator and policy of a model were fitted on; None: not known.

    Args:
        model: Folder or Hub repository of the model.
        records: From :func:`~erde_hub.scripts.common.collect`.
        split: What the records were collected on.

    Raises:
        DataError: The file that says so is damaged.
    """
    return _known_by_content(model, records, split, FITTED_ON_FILE)


def _save_hashes(hashes: np.ndarray, path: Path) -> None:
    with replacing(path) as temporary:
        save_file({"hashes": torch.from_numpy(np.unique(hashes))}, temporary, {"format": f"erde_hub.{path.stem}/1"})


def rows_trained_on(model: str, records: ExitRecords, split: Split | StreamSplit | None = None) -> torch.Tensor | None:
    """Returns those sample indices of records that the run of a model was trained on; None where nothing is known.

    Of the data of the run, which have its fingerprint, rows are known by their number: the run's ``split.json`` lists
    those that were held out of the source split from which the training rows come. Other data may hold the same
    samples in another folder or order; these are known by their content, of which ``trained_on.safetensors`` has
    hashes: pixels of small images, files of large ones, tokens of texts.

    Args:
        model: Folder or Hub repository of the model.
        records: From :func:`~erde_hub.scripts.common.collect`.
        split: What the records were collected on; without it, or of a stream, contents are not compared.

    Raises:
        DataError: One of the two files is damaged.
    """
    path = run_file(model, SPLIT_FILE)
    stored = None if path is None else StoredSplit.read(path)
    same = stored is not None and not stored.streamed and records.info.get("fingerprint") == stored.fingerprint
    if stored is None or not same or "source" not in records.info:
        return _known_by_content(model, records, split, TRAINED_ON_FILE)
    source = stored.info["train"]["source"]
    if records.info["source"] != source:
        return records.index[:0]
    held = [rows for name, rows in stored.rows.items() if name != "train" and stored.info[name]["source"] == source]
    known = torch.from_numpy(np.concatenate([*held, np.empty(0, np.int64)]))
    return records.index[~torch.isin(records.index, known)]


def _known_by_content(
    model: str, records: ExitRecords, split: Split | StreamSplit | None, name: str
) -> torch.Tensor | None:
    path = run_file(model, name)
    if path is None or not isinstance(split, Split):
        return None
    words = Path(name).stem.replace("_", " ")  # trained on, fitted on
    try:
        trained = load_file(path)["hashes"].numpy()
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(
            f"{name} of {model!r} is damaged, so that it is not known which samples were {words}:"
            f" {error}; restore it, or delete it to go on without"
        ) from error
    seen = torch.from_numpy(np.isin(split.content_hashes(), trained))
    return records.index[torch.isin(records.index, split.indices[seen])]
