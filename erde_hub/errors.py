"""Errors that name the value, what is allowed and what to do.

Every error also inherits the builtin that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ErdeError(Exception):
    """Base of all errors that erde_hub raises on purpose."""


class ConfigError(ErdeError, ValueError):
    """A setting, a key or a combination of settings is not allowed."""


class UnknownNameError(ConfigError):
    """A name is not in its table; the message lists what is and the nearest spelling."""


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword that a class or a function does not take; the message lists those that it takes and the nearest."""


class ExitPointError(ErdeError, ValueError):
    """An exit is named wrongly, out of order, twice, or lies where no exit can be."""


class ExitNotReachedError(ErdeError, RuntimeError):
    """An exit did not fire during a forward pass, so there is no answer to give."""


class ThresholdError(ErdeError, ValueError):
    """A threshold is NaN, out of the policy's range or of the wrong length."""


class ShapeError(ErdeError, ValueError):
    """A tensor has the wrong shape."""


class InputTypeError(ErdeError, TypeError):
    """An argument has the wrong type or dtype."""


class NotSupportedError(ErdeError, NotImplementedError):
    """A method that transformers' models have makes no sense, or cannot work, for this one."""


class LabelError(ErdeError, ValueError):
    """Labels lie outside the classes of the model."""


class RebuildError(ErdeError, ValueError):
    """The backbone handed in cannot be rebuilt from what the config would store."""


class CheckpointError(ErdeError, ValueError):
    """A checkpoint is incomplete, damaged or does not fit its config."""


class CheckpointWriteError(ErdeError, OSError, ValueError):
    """Writing a checkpoint failed (full disk, permissions); the previous one is intact."""


class DataError(ErdeError, ValueError):
    """A data set lacks a column or a split, is empty, or holds an unreadable row."""


class LaunchError(ErdeError, ValueError):
    """The processes that were started do not form the group that was asked for."""


class NonFiniteLossError(ErdeError, ArithmeticError):
    """A loss became NaN or infinite; the message names step, exit and term."""


class RunExistsError(ErdeError, FileExistsError, ValueError):
    """The output folder already holds a run."""


class RecordsError(ErdeError, ValueError):
    """Recorded exits are damaged, hold NaN, or do not fit the model or each other."""


class RepeatedSamplesWarning(UserWarning):
    """Records hold a sample more than once, or samples that cannot be told apart."""


class ResultsError(ErdeError, ValueError):
    """A results file lacks a part, holds a value that JSON cannot, or names a place on the machine."""


class ExportError(ErdeError, ValueError):
    """A model cannot be written as a file of another format; the message names the exit or operator and the reason."""


class MissingDependencyError(ErdeError, ImportError):
    """An optional package is needed; the message gives the install command."""


def without_dependencies(part: str, missing: str | None) -> MissingDependencyError:
    """Builds the error for a part of the core where only the runtime for ONNX files was installed."""
    return MissingDependencyError(
        f"{part} needs torch, timm and transformers ({missing} is not installed): pip install erde-hub with its"
        " dependencies (without --no-deps)"
    )


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the allowed spelling closest to ``value``, or an empty string.

    Case counts for nothing. Where none is close, it is the shortest that begins with ``value``, if that is more than a
    letter.
    """
    names = {name.lower(): name for name in allowed if name}
    value = value.lower()
    match = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    if not match and len(value) > 1:
        match = sorted((name for name in names if name.startswith(value)), key=len)
    return f"; did you mean {names[match[0]]!r}?" if match else ""


def unknown_name(kind: str, value: object, allowed: Iterable[str]) -> UnknownNameError:
    """Builds the error for a name that is not in a table."""
    names = sorted(allowed)
    hint = nearest(value, names) if isinstance(value, str) else ""
    shown = ", ".join(names)
    if len(names) > 50:  # timm's thousand would hide the hint
        close = difflib.get_close_matches(str(value), names, n=8, cutoff=0.3)
        shown = f"{len(names)} names, among them {', '.join(close or names[:8])}"
    return UnknownNameError(f"unknown {kind} {value!r}{hint} (available: {shown})")


def unknown_argument(owner: str, name: str, allowed: Iterable[str], hint: str | None = None) -> UnknownArgumentError:
    """Builds the error for a keyword that is not taken.

    Args:
        owner: Who does not take it.
        name: The keyword.
        allowed: Those that are taken.
        hint: As :func:`nearest` returns it, which is asked if None.
    """
    names = list(allowed)
    hint = nearest(name, names) if hint is None else hint
    return UnknownArgumentError(f"{owner} has no argument {name!r}{hint} (it takes: {', '.join(names) or 'none'})")
