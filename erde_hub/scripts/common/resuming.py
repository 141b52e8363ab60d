"""Checks that a finished network was made with the settings of the run that resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from erde_hub.data.base import LabelledData
from erde_hub.errors import ConfigError
from erde_hub.evaluation.report import published_arguments
from erde_hub.training.arguments import FREE_ON_RESUME, DistillationArguments

from .arguments import DataArguments, ExitArguments, StudentArguments, TeacherArguments, plain_text

_PARTS = (DataArguments, StudentArguments, ExitArguments, TeacherArguments, DistillationArguments)

#: Settings that change no result: names, places, what is looked at before training. The data are compared as such.
_FREE = FREE_ON_RESUME | {"config", "cache_dir", "check_images", "dataset", "measure_latency"}


def _names(*parts: type) -> frozenset[str]:
    return frozenset(f.name for part in parts for f in dataclasses.fields(part))


#: What the teacher's training reads, and that of the static student; a finished student depends on everything.
_READ_BY = {
    "teacher": _names(DataArguments, ExitArguments, TeacherArguments, DistillationArguments),
    "static student": _names(DataArguments, ExitArguments, DistillationArguments)
    | {"student_architecture", "student_kwargs", "student_pretrained"},
}


def check_finished(
    stored: Mapping[str, Any], settings: Mapping[str, Any], data: LabelledData, role: str = "student"
) -> None:
    """Compares the settings that a finished network was made with against those of the run that takes it over.

    A setting that an older version did not store had its default.

    Args:
        stored: ``results.json`` of the finished part; ``args`` and the data's fingerprint are read.
        settings: Of the run, see :func:`settings_dict`.
        data: Of the run.
        role: "student", "teacher" or "static student".

    Raises:
        ConfigError: They differ; the message names the first setting, both values, and what to do.
    """
    was, requested = stored.get("args", {}), published_arguments(settings)
    before, now = _resolve(was, role), _resolve(requested, role)
    for name in _compared(was, requested, role):
        if before.get(name) != now.get(name):
            own = role == "teacher" and any(name in (args.get("teacher_training") or {}) for args in (was, requested))
            raise ConfigError(
                f"--resume with {name}={now.get(name)!r}, but the {role} that is finished was made with"
                f" {name}={before.get(name)!r}: continue {_words(name, before.get(name), own)}, or start a new run in"
                " another output_dir"
            )
    fingerprint = stored.get("dataset", {}).get("fingerprint")
    if fingerprint not in (None, data.fingerprint):
        raise ConfigError(
            f"--resume with other data (fingerprint): the {role} that is finished was made with {fingerprint}, now it"
            f" is {data.fingerprint}; restore them or start a new run in another output_dir"
        )


def _compared(was: Mapping[str, Any], requested: Mapping[str, Any], role: str) -> list[str]:
    """Returns the names of the settings that decide what a network is."""
    left_out = set(_FREE)
    if role == "teacher":
        left_out.add("teacher_training")  # it is part of the training arguments, which are compared
        if was.get("teacher_exit_points") and requested.get("teacher_exit_points"):
            left_out.add("exits")
    return [name for name in requested if name not in left_out and name in _READ_BY.get(role, requested)]


def _resolve(args: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Returns the settings of one network, with defaults where unset (None for the arguments of a loss)."""
    values: dict[str, Any] = {}
    for field in (f for part in _PARTS for f in dataclasses.fields(part)):
        values[field.name] = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    values |= args
    if role == "teacher":
        values |= values["teacher_training"] or {}
    if values["teacher"] is not None:
        values["teacher"] = PurePath(values["teacher"]).name  # what is published of an absolute path
    return values


def _words(name: str, value: Any, of_teacher: bool) -> str:
    """Says how a setting is written on the command line."""
    if of_teacher:
        return f"with --teacher_training {name}={plain_text(value)}"
    return f"without --{name}" if value in (None, [], {}) else f"with --{name} {plain_text(value)}"
