"""Models that answer with real numbers (``problem_type="regression"``): their labels and their loss.

Outputs are (N, D) per exit. There are no probabilities, so what reads probabilities - entropy and its siblings,
calibrators, distillation losses - is refused by name; ``never`` and ``set_size`` are the policies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError, InputTypeError, LabelError, ShapeError

REGRESSION = "regression"


def check_targets(labels: object, count: int, num_targets: int, *, values: bool = True) -> Tensor:
    """Returns real-valued labels as (N, D).

    Args:
        labels: (N, D) floats, or (N,) where D is 1.
        count: N.
        num_targets: D.
        values: Check that they are finite, which on an accelerator waits for the device.

    Raises:
        InputTypeError: Not a floating-point tensor.
        ShapeError: Another shape.
        LabelError: A label is NaN or infinite; the message names its position.
    """
    if not isinstance(labels, Tensor):
        raise InputTypeError(f"labels must be a tensor of real numbers, got {type(labels).__name__}")
    if not labels.is_floating_point():
        raise InputTypeError(
            f"labels of a regression must be floats, got {labels.dtype}: convert real targets with labels.float(); for"
            " class indices wrap the model without problem_type='regression'"
        )
    if labels.shape != (count, num_targets) and not (num_targets == 1 and labels.shape == (count,)):
        also = f" or ({count},)" if num_targets == 1 else ""
        raise ShapeError(
            f"labels must have shape ({count}, {num_targets}){also}, one number per sample and target, got"
            f" {tuple(labels.shape)}"
        )
    labels = labels.reshape(count, num_targets)
    if values and count:
        wrong = (~labels.isfinite()).nonzero()
        if len(wrong):
            row, target = wrong[0].tolist()
            raise LabelError(
                f"labels[{row}, {target}] is {labels[row, target].item()}: a regression learns finite numbers only"
                f" ({len(wrong)} of {labels.numel()} are not)"
            )
    return labels


def mean_squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples and targets of the squared error, at least in float32.

    Shape:
        both: (N, D). Returns a scalar.
    """
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return F.mse_loss(outputs.to(dtype), labels.to(dtype))


def refuse_regression(problem_type: Any, what: str, instead: str = "") -> None:
    """Raises :class:`ConfigError` where a regression meets what takes class probabilities.

    Args:
        problem_type: Of the model or of the records.
        what: Who reads them, as the subject of a sentence.
        instead: What to do.
    """
    if problem_type == REGRESSION:
        hint = f": {instead}" if instead else ""
        raise ConfigError(f"{what} reads class probabilities, which problem_type='regression' does not give{hint}")
