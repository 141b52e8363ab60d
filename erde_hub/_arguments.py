"""Checks of single arguments: a number, a whole number, one of several names, a flag, several numbers."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import ConfigError, InputTypeError, ThresholdError, unknown_name


def check_number(name: str, value: object, *, zero: bool, below: float = math.inf) -> float:
    """Returns a finite number above 0 (or at 0, if ``zero``) and below ``below``.

    Raises:
        InputTypeError: Not a number (a text such as ``"1e-3"``, which YAML does not read as one, a bool).
        ConfigError: Out of range, infinite or NaN.
    """
    allowed = ("at least 0" if zero else "above 0") + ("" if math.isinf(below) else f" and below {below:g}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a number {allowed}, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or value >= below or (value == 0 and not zero):
        raise ConfigError(f"{name} must be finite and {allowed}, got {value!r}")
    return float(value)


def check_whole(name: str, value: object, least: int) -> int:
    """Returns a whole number of at least ``least``.

    Raises:
        InputTypeError: Not a whole number.
        ConfigError: Out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    return value


def check_choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """Returns the value if it is one of the allowed ones; a miss raises :class:`UnknownNameError`."""
    if not isinstance(value, str) or value not in allowed:
        raise unknown_name(name, value, allowed)
    return value


def check_flag(name: str, value: object) -> bool:
    """Returns the value if it is a bool.

    Raises:
        InputTypeError: Anything else, since the text ``"false"`` would count as true.
    """
    if not isinstance(value, bool):
        raise InputTypeError(f"{name} must be True or False, got {value!r}")
    return value


def plain_numbers(values: object) -> list[float] | None:
    """Returns several numbers as floats, those of numpy and tensors included; None for anything else, texts and bools.

    Example:
        >>> plain_numbers([1, 2.5]), plain_numbers("12"), plain_numbers(3)
        ([1.0, 2.5], None, None)
    """
    try:
        plain = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(plain, Iterable) or isinstance(plain, (str, bytes, Mapping)):
            return None
        found = [value.item() if getattr(value, "ndim", None) == 0 else value for value in plain]
    except RuntimeError:  # a tensor on the meta device, which holds no number
        return None
    if any(isinstance(value, bool) or not isinstance(value, numbers.Real) for value in found):
        return None
    try:
        return [float(value) for value in found]
    except OverflowError:
        return None


def plain_threshold(threshold: object) -> float | list[float]:
    """Turns what a person may pass, numbers of numpy and tensors included, into a float or a list of floats.

    Texts are no numbers: rows of a sweep spell infinity ``"inf"``, since they are JSON, and ``float`` reads it.

    Raises:
        ThresholdError: Neither a number nor numbers.
    """
    plain: Any = threshold
    if hasattr(threshold, "tolist"):
        with contextlib.suppress(RuntimeError):  # see above
            plain = threshold.tolist()
    several = isinstance(plain, (list, tuple))
    floats = plain_numbers(plain if several else [plain])
    if floats is None:
        text = any(isinstance(value, str) for value in (plain if several else [plain]))
        hint = "; a text is no number: write float('inf'), for example" if text else ""
        raise ThresholdError(f"threshold must be a number or one number per early exit, got {threshold!r}{hint}")
    return floats if several else floats[0]


def threshold_rows(threshold: object, rows: int, num_early_exits: int) -> list[list[float]] | None:
    """Returns the thresholds of each sample, where an array or tensor gives each sample its own; None for all others.

    Args:
        threshold: What a call was given. Per sample: shape (N,), (N, 1) or (N, early exits).
        rows: Samples in the batch, N.
        num_early_exits: Of the model.

    Raises:
        ThresholdError: Two axes that do not fit, or a shape (N,) where N is also the number of early exits.

    Example:
        >>> import numpy as np
        >>> threshold_rows(np.array([0.5, 0.25]), rows=2, num_early_exits=3)
        [[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]
    """
    shape = tuple(getattr(threshold, "shape", ()))
    if not shape or (len(shape) == 1 and shape != (rows,)):
        return None
    if shape == (num_early_exits,) and rows > 1:
        raise ThresholdError(
            f"threshold of shape {shape} can mean one number per sample or one per early exit, as there are {rows} of"
            f" both: give shape ({rows}, 1) for one per sample, a list for one per early exit"
        )
    if shape not in ((rows,), (rows, 1), (rows, num_early_exits)):
        raise ThresholdError(
            f"threshold must be a number, a list of {num_early_exits} (one per early exit), or of shape"
            f" ({rows}, 1) (one per sample) or ({rows}, {num_early_exits}) (per sample and early exit), got {shape}"
        )
    given: Any = threshold
    per_sample = (own if isinstance(own, list) else [own] for own in given.tolist())
    return [own * (num_early_exits // len(own)) for own in per_sample]
