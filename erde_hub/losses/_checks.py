"""Checks of what a loss is built from and of what it is called with; each error names the argument, or the exit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from erde_hub.errors import ConfigError, InputTypeError, ShapeError, unknown_name
from erde_hub.inputs import check_class_labels


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


def check_some_weight(loss: str, weights: dict[str, float]) -> None:
    """Raises :class:`ConfigError` where all weights of a loss are 0."""
    if not any(weights.values()):
        raise ConfigError(f"{loss} has nothing to train: {', '.join(weights)} are all 0; give at least one above 0")


def check_exit_logits(name: str, exit_logits: object) -> Sequence[Tensor]:
    """Returns the logits of all exits if they are a sequence of floating (N, K) tensors that agree in shape and device.

    Raises:
        InputTypeError: Not a sequence of floating-point tensors, or on several devices.
        ShapeError: No exit, an exit that is not (N, K), that differs from the first, without samples, or with one
            class.
    """
    if isinstance(exit_logits, Tensor):
        hint = f"{name}.unbind(0)" if exit_logits.ndim == 3 else f"[{name}]"
        raise InputTypeError(
            f"{name} must be a sequence of (N, K) tensors, one per exit, got one tensor of shape"
            f" {tuple(exit_logits.shape)}; pass {hint}"
        )
    if not isinstance(exit_logits, Sequence) or isinstance(exit_logits, str):
        raise InputTypeError(
            f"{name} must be a sequence of (N, K) tensors, one per exit, got {type(exit_logits).__name__}"
        )
    if not exit_logits:
        raise ShapeError(f"{name} is empty: give the logits of at least one exit, shallow to deep")
    first = exit_logits[0]
    for index, logits in enumerate(exit_logits):
        where = f"{name}[{index}] (exit {index} of {len(exit_logits)})"
        if not isinstance(logits, Tensor):
            raise InputTypeError(f"{where} must be a tensor, got {type(logits).__name__}")
        if not logits.is_floating_point():
            raise InputTypeError(f"{where} must hold floating-point logits, got {logits.dtype}")
        if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
            raise ShapeError(
                f"{where} must be (N, K) with at least one sample and two classes, got shape {tuple(logits.shape)}"
            )
        if logits.shape != first.shape:
            raise ShapeError(
                f"{where} has shape {tuple(logits.shape)}, but exit 0 has {tuple(first.shape)}: all exits answer for"
                " the same samples and classes"
            )
        if logits.device != first.device:
            raise InputTypeError(f"{where} is on {logits.device}, but exit 0 is on {first.device}")
    return exit_logits


def check_same_classes(student: Tensor, teacher: Tensor) -> None:
    """Checks that both networks answered for the same samples and classes.

    Raises:
        ShapeError: Another number of classes or samples.
        InputTypeError: Another device.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ShapeError(
            f"the student has {student.shape[1]} classes and the teacher {teacher.shape[1]}: a teacher must know the"
            " same classes, in the same order"
        )
    if student.shape[0] != teacher.shape[0]:
        raise ShapeError(
            f"student_logits hold {student.shape[0]} samples and teacher_logits {teacher.shape[0]}: both must see the"
            " same batch"
        )
    if student.device != teacher.device:
        raise InputTypeError(f"student_logits are on {student.device} and teacher_logits on {teacher.device}")


def check_labels(labels: object, logits: Tensor, *, values: bool) -> Tensor:
    """Returns labels (N,) as int64.

    Args:
        labels: Class indices.
        logits: Logits (N, K) of one exit, for N, K and the device.
        values: Check the range too, which waits for the device.

    Raises:
        InputTypeError: Not an integer tensor, or on another device than the logits.
        ShapeError: Not (N,).
        LabelError: A label outside 0 to K - 1.
    """
    if isinstance(labels, Tensor) and labels.device != logits.device:
        raise InputTypeError(f"labels are on {labels.device} and the logits on {logits.device}")
    return check_class_labels(labels, *logits.shape, values=values)
