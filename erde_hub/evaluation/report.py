"""What a run was and what came out, assembled from records for ``results.json``.

Tables, figures and model cards are rendered from that file alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from erde_hub._version import __version__
from erde_hub.backbones import get_adapter
from erde_hub.errors import RecordsError, ResultsError
from erde_hub.policies import as_policy, policy_name
from erde_hub.prediction_sets import ConformalClassifier
from erde_hub.records import MIN_SAMPLES, ExitRecords

from .calibrated import calibrate_records
from .drift import check_same_model
from .groups import slice_metrics
from .metrics import ECE_BINS
from .results_file import PLACE, validate_results
from .signatures import failure_signatures, promise_signature
from .sweep import accuracy_at_cost, fine_thresholds, per_exit_metrics, route_records, sweep_thresholds

#: Error rate of the prediction sets whose coverage and size a report gives.
SET_ALPHA = 0.1
#: Fractions of the full cost at which methods are compared.
COST_FRACTIONS = (0.25, 0.5, 0.75)

_PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets")
_SECRET = re.compile(r"(?:^|_)(?:token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)


def build_results(
    records: ExitRecords,
    student: Any,
    data: Any,
    args: Any,
    *,
    held_out: ExitRecords | None = None,
    set_alpha: float = SET_ALPHA,
    teacher: Any = None,
    teacher_records: ExitRecords | None = None,
    teacher_exits: Sequence[int] | None = None,
    static_student: Any = None,
    static_records: ExitRecords | None = None,
    loss: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    thresholds: Sequence[float | Sequence[float]] | None = None,
    fine: int = 100,
    groups: tuple[torch.Tensor, Sequence[str]] | None = None,
    other_data: bool = False,
) -> dict[str, Any]:
    """Assembles the contents of ``results.json``; nothing is run, everything is read off the records.

    Args:
        records: The student's exits on the split that is reported.
        student: The model, or what :func:`describe_model` returned for it.
        data: An ``ImageData``, or what :func:`describe_data` returned for it.
        args: The run's arguments: a mapping, a dataclass, a ``DistillationArguments`` or an ``argparse.Namespace``.
            Absolute paths are reduced to their last part and secrets left out.
        held_out: The student's exits on other images, of the validation split: conformal prediction sets (APS) are
            fitted on them; coverage and set size on ``records`` are reported, per exit and routed. None, or fewer than
            20 of them, reports none.
        set_alpha: Error rate of these sets at each exit.
        teacher: The teacher or its description; None where there is none.
        teacher_records: The teacher's exits on the same split.
        teacher_exits: For each exit of the student, the teacher exit that it learned from.
        static_student: A separately trained network without early exits, or its description.
        static_records: Its outputs on the same split.
        loss: ``{"name": key, argument: value, ...}``.
        training: Facts of the training run: epochs, steps, seconds, batch_size and so on.
        thresholds: Of the sweep; None takes the policy's default steps.
        fine: Number of thresholds of the fine sweep, 0 for none.
        groups: Group of every sample (N,) and the names of the groups: their metrics at the stored threshold are
            reported as ``slices``, see :func:`~erde_hub.evaluation.slice_metrics`.
        other_data: The samples are of other data than the model was trained on: warnings give no advice on training.

    Returns:
        A dict of plain JSON values that passed :func:`validate_results`.

    Raises:
        ResultsError: A part is missing or holds what JSON cannot.
        ThresholdError: A threshold is out of the policy's range.
        RecordsError: ``held_out`` is of another model, or of the split that is reported.
    """
    records = _calibrated(records, student)  # the calibrated model's logits, by which it routes
    sets, set_facts = _prediction_sets(records, None if held_out is None else _calibrated(held_out, student), set_alpha)
    policy = getattr(student, "policy", None)
    described = _describe(student, records)
    if policy is None or isinstance(policy, str):
        policy = described["policy"]
    per_exit = per_exit_metrics(records, sets=sets)
    sweep = sweep_thresholds(records, thresholds, policy, sets=sets)
    fine_sweep = sweep_thresholds(records, fine_thresholds(records, policy, fine), policy, sets=sets) if fine else []
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
            **set_facts,
        },
        "per_exit": per_exit,
        "sweep": sweep,
        "fine_sweep": fine_sweep,
        "matched_cost": _matched_cost([*fine_sweep, *sweep], student_part["macs"], teacher_part),
        "warnings": failure_signatures(
            records,
            fine_sweep or sweep,
            never=policy_name(as_policy(policy)) == "never",
            other_data=other_data,
            teacher_records=teacher_records,
            teacher_correct=(training or {}).get("teacher_correct"),
        ),
    }
    if described.get("threshold") is not None:
        results["operating_point"] = sweep_thresholds(records, [described["threshold"]], policy, sets=sets)[0]
        profile = getattr(getattr(student, "config", None), "threshold_profile", None)
        if profile is not None and profile.get("threshold") == described["threshold"] and not other_data:
            routed = route_records(records, as_policy(policy), described["threshold"])[1].argmax(-1)
            right = (records.logits[-1].argmax(-1) == records.labels).double()
            signature = promise_signature(right - (routed == records.labels).double(), profile)
            results["warnings"] += [] if signature is None else [signature]
        if groups is not None:
            results["slices"] = slice_metrics(records, *groups, policy, described["threshold"], profile)
    if static_student is not None:
        results["static_student"] = _describe(static_student, static_records)
    return validate_results(_portable(results))


def _calibrated(records: ExitRecords, student: Any) -> ExitRecords:
    calibrator = getattr(student, "calibrator", None)
    if calibrator is None or isinstance(calibrator, str) or "calibrator" in records.info:
        return records
    return calibrate_records(records, calibrator)


def _prediction_sets(
    records: ExitRecords, held_out: ExitRecords | None, alpha: float
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Fits sets on held-out records, and returns those of the reported ones with what a report says about the fit."""
    if held_out is None:
        return None, {}
    check_same_model(held_out, records)
    split = held_out.info.get("split", "validation")
    if split == records.info.get("split", "test"):
        raise RecordsError(
            f"prediction sets cannot be fitted on the split that is reported, {split!r}: give records of validation"
            " images as held_out, or None"
        )
    if held_out.num_samples < MIN_SAMPLES:
        return None, {}
    fitted = ConformalClassifier.fit(held_out, alpha)
    facts = {"method": "split conformal, APS", "alpha": alpha, "split": split, "samples": held_out.num_samples}
    return fitted.sets(records.logits), {"sets": facts}


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
        "backbone_kwargs": get_adapter(config.library).notable_arguments(config),
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
        data: As the training code loads them; a mapping is taken as a description already. A local folder appears by
            its name.
    """
    if isinstance(data, Mapping):
        return {**data, "name": _data_name(str(data.get("name", "")))}
    described: dict[str, Any] = {
        "name": _data_name(str(data.name)),
        "fingerprint": data.fingerprint,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "kind": getattr(data, "kind", "image"),
        "input_size": list(data.input_size),
        "split": data.split_info,
    }
    for name in ("train", "validation", "test"):
        samples = getattr(getattr(data, name, None), "num_samples", None)  # None for a stream of unknown length
        if samples is not None:
            described[name] = samples
    return described


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
        {"of": of, "share": fraction, "macs": fraction * macs, "accuracy": accuracy_at_cost(rows, fraction * macs)}
        for of, macs in references
        for fraction in COST_FRACTIONS
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
    return PLACE.sub(lambda match: _last_part(match.group()), text)


def _last_part(place: str) -> str:
    return re.split(r"[\\/]+", place.rstrip("\\/"))[-1] or "root"
