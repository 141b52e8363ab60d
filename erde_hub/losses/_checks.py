"""Checks of what a loss is built from and of what it is called with; each error names the argument, or the exit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erde_hub._arguments import check_number
from erde_hub.errors import ConfigError, InputTypeError, ShapeError
from erde_hub.tasks import check_class_labels


def check_weights(loss: str, *, may_be_0: bool = False, **weights: object) -> tuple[float, ...]:
    """Returns the factors of a loss's terms, in the order given: finite, at least 0, and one of them above 0.

    Args:
        loss: Its name, for the message.
        may_be_0: All of them may be 0.
        **weights: By name.

    Raises:
        InputTypeError: Not a number.
        ConfigError: Out of range, or all of them 0.
    """
    values = tuple(check_number(name, value, zero=True) for name, value in weights.items())
    if not may_be_0 and not any(values):
        raise ConfigError(f"{loss} has nothing to train: {', '.join(weights)} are all 0; give at least one above 0")
    return values


def check_smoothing(label_smoothing: object) -> float:
    """Returns the fraction of each target that is spread over the classes, if it is in [0, 1)."""
    return check_number("label_smoothing", label_smoothing, zero=True, below=1.0)


def check_exit_logits(name: str, exit_logits: object, least: int = 2) -> Sequence[Tensor]:
    """Returns the logits of all exits if they are a sequence of floating (N, K) tensors that agree in shape and device.

    Args:
        name: Of the argument.
        exit_logits: What was given.
        least: Fewest columns: two classes, or one target of a regression.

    Raises:
        InputTypeError: Not a sequence of floating-point tensors, or on several devices.
        ShapeError: No exit, an exit that is not (N, K), that differs from the first, without samples, or with too few
            columns.
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
        if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < least:
            columns = "two classes" if least == 2 else "one target"
            raise ShapeError(
                f"{where} must be (N, K) with at least one sample and {columns}, got shape {tuple(logits.shape)}"
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
    """Checks that both networks have the same samples and classes.

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


def check_index(index: object, logits: Tensor) -> Tensor | None:
    """Returns stable sample numbers (N,) as int64, on the device of the logits; None where there are none.

    Raises:
        InputTypeError: Not an integer tensor.
        ShapeError: Not (N,).
    """
    if index is None:
        return None
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise InputTypeError(f"index must be a tensor of whole numbers, one per sample, got {kind}")
    if index.shape != logits.shape[:1]:
        raise ShapeError(f"index must have shape ({len(logits)},), one number per sample, got {tuple(index.shape)}")
    return index.to(logits.device, torch.int64)


def check_features(name: str, features: object, exit_logits: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Returns the features of all exits if there is one tensor (N, ..., D), or None, per exit.

    Raises:
        InputTypeError: Not a sequence of floating-point tensors.
        ShapeError: Another number of exits or samples.
    """
    if not isinstance(features, Sequence) or isinstance(features, str):
        raise InputTypeError(
            f"{name} must be a sequence with one tensor (N, ..., D) per exit, or None at exits without a feature, got"
            f" {type(features).__name__}: this loss compares features"
        )
    if len(features) != len(exit_logits):
        raise ShapeError(f"{name} has {len(features)} entries for {len(exit_logits)} exits: give one per exit, or None")
    for index, feature in enumerate(features):
        if feature is None:
            continue
        if not isinstance(feature, Tensor) or not feature.is_floating_point():
            kind = feature.dtype if isinstance(feature, Tensor) else type(feature).__name__
            raise InputTypeError(f"{name}[{index}] must be a floating-point tensor or None, got {kind}")
        if feature.ndim < 2 or len(feature) != len(exit_logits[0]):
            raise ShapeError(
                f"{name}[{index}] must be (N, ..., D) with N = {len(exit_logits[0])} samples and the channels last, got"
                f" {tuple(feature.shape)}"
            )
    return features


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


def without_teacher(loss: object) -> str:
    """Says how to train without a teacher, for errors: by another loss or, in a class of your own, by declaring it."""
    own = type(loss).__module__.split(".")[0] != "erde_hub"
    declare = f", or set needs_teacher = False in the class {type(loss).__name__} if its terms read no teacher"
    return f"train with the loss 'ce'{declare if own else ''}"
