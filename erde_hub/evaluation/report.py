"""``results.json``: what a run was and what came out, assembled, checked, written and read in one place.

Tables, pictures and model cards are rendered from this file alone. It goes into repositories and onto the Hub, so it
holds no absolute path, user or host: local data and checkpoints appear by name, data with a fingerprint.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from erde_hub import __version__
from erde_hub._files import write_text
from erde_hub.errors import ResultsError, nearest

from .calibrated import calibrate_records
from .metrics import ECE_BINS
from .records import ExitRecords
from .sweep import accuracy_at_cost, fine_thresholds, per_exit_metrics, sweep_thresholds

#: Shares of the full cost at which methods are compared.
COST_SHARES = (0.25, 0.5, 0.75)

_PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets")
_SECRET = re.compile(r"(?:^|_)(?:token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)
# An absolute path of either kind, a home folder or a file URL, at the start or behind a separator; not a web address.
_END = r"[^\s\"',;|<>]"
_PLACE = re.compile(
    rf"(?:^|(?<=[\s=:,;\"'(\[{{|<>]))"
    rf"(?:file:/+{_END}*|/[^/\s\"',;|<>]{_END}*|[A-Za-z]:[\\/]{_END}*|\\\\{_END}+|~[\w.-]*/{_END}*)"
)


def build_results(
    records: ExitRecords,
    student: Any,
    data: Any,
    args: Any,
    *,
    teacher: Any = None,
    teacher_records: ExitRecords | None = None,
    teacher_exits: Sequence[int] | None = None,
    static_student: Any = None,
    static_records: ExitRecords | None = None,
    loss: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    thresholds: Sequence[float | Sequence[float]] | None = None,
    fine: int = 100,
) -> dict[str, Any]:
    """Assembles the contents of ``results.json``; nothing is run, everything is read off the records.

    Args:
        records: The student's exits on the split that is reported.
        student: The model, or what :func:`describe_model` returned for it.
        data: An ``ImageData``, or what :func:`describe_data` returned for it.
        args: The run's arguments: a mapping, a dataclass, a ``DistillationArguments`` or an ``argparse.Namespace``.
            Absolute paths are reduced to their last part and secrets left out.
        teacher: The teacher or its description; None where there is none.
        teacher_records: The teacher's exits on the same split.
        teacher_exits: For each exit of the student, the teacher exit that it learned from.
        static_student: A separately trained network without early exits, or its description.
        static_records: Its outputs on the same split.
        loss: ``{"name": key, argument: value, ...}``.
        training: Facts of the training run: epochs, steps, seconds, batch_size and so on.
        thresholds: Of the sweep; None takes the policy's default steps.
        fine: Number of thresholds of the fine sweep, 0 for none.

    Returns:
        A dict of plain JSON values that passed :func:`validate_results`.

    Raises:
        ResultsError: A part is missing or holds what JSON cannot.
        ThresholdError: A threshold is out of the policy's range.
    """
    calibrator = getattr(student, "calibrator", None)
    if calibrator is not None and not isinstance(calibrator, str) and "calibrator" not in records.info:
        records = calibrate_records(records, calibrator)  # what the model answers with, and routes by
    policy = getattr(student, "policy", None)
    described = _describe(student, records)
    if policy is None or isinstance(policy, str):
        policy = described["policy"]
    per_exit = per_exit_metrics(records)
    sweep = sweep_thresholds(records, thresholds, policy)
    fine_sweep = sweep_thresholds(records, fine_thresholds(records, policy, fine), policy) if fine else []
    described.pop("per_exit", None)  # has a place of its own
    student_part = {**described, "macs": per_exit[-1]["macs"], "accuracy": per_exit[-1]["accuracy"]}
    if teacher_exits is not None:
        student_part["teacher_exits"] = list(teacher_exits)
    teacher_part = None if teacher is None else _describe(teacher, teacher_records)
    dataset = describe_data(data)
    arguments = published_arguments(args)
    if "dataset" in arguments:
        arguments["dataset"] = dataset["name"]
    results: dict[str, Any] = {
        "erde_hub": __version__,
        "versions": _versions(),
        "args": arguments,
        "teacher": teacher_part,
        "student": student_part,
        "dataset": dataset,
        "loss": None if loss is None else dict(loss),
        "training": None if training is None else dict(training),
        "metrics": {
            "split": records.info.get("split", "test"),
            "samples": records.num_samples,
            "ece_bins": ECE_BINS,
            "ece_binning": "right-closed",
            "nll": "nats",
        },
        "per_exit": per_exit,
        "sweep": sweep,
        "fine_sweep": fine_sweep,
        "matched_cost": _matched_cost([*fine_sweep, *sweep], student_part["macs"], teacher_part),
    }
    if described.get("threshold") is not None:
        results["operating_point"] = sweep_thresholds(records, [described["threshold"]], policy)[0]
    if static_student is not None:
        results["static_student"] = _describe(static_student, static_records)
    return validate_results(_portable(results))


def describe_model(model: Any, records: ExitRecords | None = None) -> dict[str, Any]:
    """Describes an early-exit model for a report: what it is, what it costs, and how good each exit is.

    Args:
        model: An :class:`~erde_hub.EarlyExitWrapper`.
        records: Its exits on the split that is reported; without them no accuracies are given.
    """
    config, table = model.config, model.exit_table()
    described: dict[str, Any] = {
        "architecture": config.architecture,
        "library": config.library,
        "backbone_kwargs": dict(config.backbone_kwargs or {}),
        "exits": list(config.exits or []),
        "head": config.head,
        "head_kwargs": dict(config.head_kwargs or {}),
        "policy": config.policy,
        "policy_kwargs": dict(config.policy_kwargs or {}),
        "threshold": config.threshold,
        "calibrator": getattr(config, "calibrator", None),
        "input_size": list(config.input_size or []),
        "macs": list(table.cumulative_macs)[-1],
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }
    if records is not None:
        per_exit = per_exit_metrics(records)
        described.update(accuracy=per_exit[-1]["accuracy"], per_exit=per_exit, fingerprint=records.fingerprint)
    return described


def describe_data(data: Any) -> dict[str, Any]:
    """Describes a data set for a report: name, fingerprint, classes, sizes of the splits and how they were made.

    Args:
        data: An ``ImageData``; a mapping is taken as a description already. A local folder appears by its name.
    """
    if isinstance(data, Mapping):
        return {**data, "name": _data_name(str(data.get("name", "")))}
    described: dict[str, Any] = {
        "name": _data_name(str(data.name)),
        "fingerprint": data.fingerprint,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "input_size": list(data.input_size),
        "split": data.split_info,
    }
    for name in ("train", "validation", "test"):
        samples = getattr(getattr(data, name, None), "num_samples", None)  # None for a stream of unknown length
        if samples is not None:
            described[name] = samples
    return described


def validate_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the contents of a ``results.json`` and returns them.

    Raises:
        ResultsError: A part is missing, has the wrong type or an impossible value, is not JSON, or holds an absolute
            path; the message names the place, such as ``sweep[3].accuracy``.
    """
    if not isinstance(results, Mapping):
        raise ResultsError(f"results must be a mapping, got {type(results).__name__}")
    for key, kind in _REQUIRED.items():
        if key not in results:
            raise ResultsError(f"results have no {key!r}{nearest(key, results)} (they hold: {', '.join(results)})")
        _expect(key, results[key], kind)
    exits = len(results["per_exit"])
    for key in ("per_exit", "sweep"):
        if not results[key]:
            raise ResultsError(f"{key} is empty")
    for i, row in enumerate(results["per_exit"]):
        _check_row(f"per_exit[{i}]", row, {"exit": str, "accuracy": _FRACTION, "macs": int})
    for key in ("sweep", "fine_sweep"):
        _expect(key, results.get(key, []), list)
        for i, row in enumerate(results.get(key, [])):
            _check_sweep_row(f"{key}[{i}]", row, exits)
    if results.get("operating_point") is not None:
        _check_sweep_row("operating_point", results["operating_point"], exits)
    _check_row("student", results["student"], {"architecture": str, "exits": list, "macs": int, "accuracy": _FRACTION})
    for key in ("teacher", "static_student"):
        if results.get(key) is not None:
            _expect(key, results[key], Mapping)
            _check_row(key, results[key], {"architecture": str, "macs": int, "accuracy": _FRACTION})
    _check_row("dataset", results["dataset"], {"name": str, "num_classes": int})
    for key in ("loss", "training"):
        if results.get(key) is not None:
            _expect(key, results[key], Mapping)
    _check_values("", results)
    return dict(results)


def save_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Checks and writes ``results.json``, one row of a table per line; an earlier file survives a failure.

    Raises:
        ResultsError: See :func:`validate_results`.
        CheckpointWriteError: The file cannot be written.
    """
    write_text(path, _dumps(validate_results(results)) + "\n")


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a ``results.json``.

    Raises:
        ResultsError: There is no such file, it is not JSON, or see :func:`validate_results`.
    """
    try:
        return validate_results(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ResultsError(f"there is no {os.fspath(path)!r}: a finished run leaves it in its output folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{Path(path).name} is not JSON: {error}") from error


_FRACTION = "a fraction in [0, 1]"
_REQUIRED: dict[str, Any] = {
    "erde_hub": str,
    "args": Mapping,
    "student": Mapping,
    "dataset": Mapping,
    "per_exit": list,
    "sweep": list,
}


def _describe(model: Any, records: ExitRecords | None) -> dict[str, Any]:
    if not isinstance(model, Mapping):
        return describe_model(model, records)
    described = dict(model)
    if records is not None:
        per_exit = per_exit_metrics(records)
        described.update(accuracy=per_exit[-1]["accuracy"], per_exit=per_exit, macs=per_exit[-1]["macs"])
    return described


def _matched_cost(
    rows: Sequence[Mapping[str, Any]], student_macs: int, teacher: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    references = [("student", student_macs)]
    if teacher is not None and isinstance(teacher.get("macs"), int):
        references.append(("teacher", teacher["macs"]))
    return [
        {"of": of, "share": share, "macs": share * macs, "accuracy": accuracy_at_cost(rows, share * macs)}
        for of, macs in references
        for share in COST_SHARES
    ]


def published_arguments(args: Any) -> dict[str, Any]:
    """Returns a run's arguments as ``results.json`` holds them: plain values, no secrets, the last part of a path.

    Args:
        args: A mapping, a dataclass, a ``DistillationArguments`` or an ``argparse.Namespace``.

    Raises:
        ResultsError: Something else, or a value that JSON cannot hold.
    """
    if hasattr(args, "public_dict"):
        args = args.public_dict()
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        args = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    if not isinstance(args, Mapping):
        raise ResultsError(f"args must be a mapping, a dataclass or a Namespace, got {type(args).__name__}")
    return _portable({str(key): value for key, value in args.items() if not _SECRET.search(str(key))}, "args")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _data_name(name: str) -> str:
    """A Hub name stays, a local folder is called by its last part."""
    place = Path(name).expanduser()
    if name and (place.is_absolute() or name.startswith(".") or place.exists()):
        return place.resolve().name
    return name


def _portable(value: Any, where: str = "") -> Any:
    """Turns a tree into plain JSON values without places on the machine."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, enum.Enum):
        return _portable(value.value, where)
    if isinstance(value, str):
        return value if where.endswith(".class_names") else _without_places(value)
    if isinstance(value, np.generic):
        return _portable(value.item(), where)
    if isinstance(value, float):
        return _portable_number(value, where)
    if isinstance(value, PurePath):
        relative = not value.is_absolute() and ".." not in value.parts and not str(value).startswith("~")
        return value.as_posix() if relative else value.name
    if isinstance(value, Mapping):
        return {str(key): _portable(entry, f"{where}.{key}" if where else str(key)) for key, entry in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _portable(value.tolist(), where)
    if isinstance(value, (set, frozenset)):
        return _portable(sorted(value), where)
    if isinstance(value, (list, tuple)):
        return [_portable(entry, where) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _portable(dataclasses.asdict(value), where)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    raise ResultsError(f"{where or 'results'} holds a {type(value).__name__}, which JSON cannot: pass plain values")


def _portable_number(value: float, where: str) -> Any:
    if math.isnan(value):
        raise ResultsError(f"{where} is NaN: a result that could not be computed is left out, or None")
    return value if math.isfinite(value) else str(value)


def _without_places(text: str) -> str:
    whole = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    if whole and "\n" not in text:  # also with blanks in it
        return _last_part(text)
    return _PLACE.sub(lambda match: _last_part(match.group()), text)


def _last_part(place: str) -> str:
    return re.split(r"[\\/]+", place.rstrip("\\/"))[-1] or "root"


def _expect(where: str, value: Any, kind: Any) -> None:
    if kind is _FRACTION:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    elif kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    else:
        good = isinstance(value, kind)
    if not good:
        wanted = {int: "an integer of at least 0", float: "a number of at least 0", Mapping: "a mapping"}
        names = kind if isinstance(kind, str) else wanted.get(kind, f"a {getattr(kind, '__name__', kind)}")
        raise ResultsError(f"{where} must be {names}, got {value!r:.80}")


def _check_row(where: str, row: Any, kinds: Mapping[str, Any]) -> None:
    _expect(where, row, Mapping)
    for key, kind in kinds.items():
        if key not in row:
            raise ResultsError(f"{where} has no {key!r}{nearest(key, row)} (it holds: {', '.join(row)})")
        _expect(f"{where}.{key}", row[key], kind)


def _check_sweep_row(where: str, row: Any, exits: int) -> None:
    _check_row(where, row, {"threshold": object, "accuracy": _FRACTION, "mean_macs": float, "exit_share": list})
    shares = row["exit_share"]
    for share in shares:
        _expect(f"{where}.exit_share", share, _FRACTION)
    if len(shares) != exits or abs(sum(shares) - 1) > 1e-6:
        raise ResultsError(f"{where}.exit_share must be {exits} fractions that sum to 1, got {shares}")
    threshold = row["threshold"]
    for value in threshold if isinstance(threshold, list) else [threshold]:
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("inf", "-inf")):
            raise ResultsError(f"{where}.threshold must be a number, 'inf' or a list of these, got {threshold!r}")


def _check_values(where: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ResultsError(f"{where or 'results'} has the key {key!r}, which is no string")
            _check_values(f"{where}.{key}" if where else key, entry)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _check_values(f"{where}[{i}]", entry)
    elif isinstance(value, str):
        if ".class_names[" not in where and _PLACE.search(value):
            raise ResultsError(f"{where} holds a place on the machine, {value!r}: give a name instead")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ResultsError(f"{where} is {value}, which JSON cannot hold: write 'inf', or leave it out")
    elif value is not None and not isinstance(value, (bool, int)):
        raise ResultsError(f"{where} holds a {type(value).__name__}, which JSON cannot")


def _dumps(results: Mapping[str, Any]) -> str:
    """Indents mappings to the second level and puts each row of a table on its own line."""
    lines = []
    for key, value in results.items():
        if isinstance(value, Mapping) and value:
            inner = [f"    {json.dumps(k)}: {_compact(v)}" for k, v in value.items()]
            text = "{\n" + ",\n".join(inner) + "\n  }"
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            text = "[\n" + ",\n".join(f"    {_compact(row)}" for row in value) + "\n  ]"
        else:
            text = _compact(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
