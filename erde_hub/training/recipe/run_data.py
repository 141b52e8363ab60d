"""What the run of a checkpoint left beside it says about its data: which they were, and which rows were trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from transformers.utils import cached_file

from erde_hub.errors import ConfigError
from erde_hub.evaluation import ExitRecords, load_results
from erde_hub.training.data_splits import StoredSplit
from erde_hub.training.recipe_arguments import DataArguments

SPLIT_FILE = "split.json"
RESULTS_FILE = "results.json"

#: Arguments of the data that belong to one data set and are taken from the run together with it.
_OF_THE_DATA = ("dataset_config", "image_column", "text_column", "label_column")


def run_file(model: str, name: str) -> str | None:
    """Returns a file that the run that trained a model left beside it, if there is one."""
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
        args: What the user asked for.

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


def rows_trained_on(model: str, records: ExitRecords) -> torch.Tensor | None:
    """Returns those sample indices of records that the run of a model was trained on; None where nothing is known.

    The run's ``split.json`` lists the rows that were held out of the source split from which the training rows come. It
    speaks of records whose data have the same fingerprint.

    Args:
        model: Folder or Hub repository of the model.
        records: From :func:`~erde_hub.training.recipe.collect`.

    Raises:
        DataError: The file is damaged.
    """
    path = run_file(model, SPLIT_FILE)
    if path is None:
        return None
    stored = StoredSplit.read(path)
    source = stored.info["train"]["source"]
    if stored.streamed or records.info.get("fingerprint") != stored.fingerprint or "source" not in records.info:
        return None
    if records.info["source"] != source:
        return records.index[:0]
    held = [rows for name, rows in stored.rows.items() if name != "train" and stored.info[name]["source"] == source]
    known = torch.from_numpy(np.concatenate([*held, np.empty(0, np.int64)]))
    return records.index[~torch.isin(records.index, known)]
