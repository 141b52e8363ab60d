"""What a model predicts, and what its labels must be: classes, real numbers, or tokens.

Classes are (N, K) logits per exit. A regression (``problem_type="regression"``) predicts (N, D) real numbers: there
are no probabilities, so what reads probabilities (entropy and its siblings, calibrators, distillation losses) refuses
it. A causal language model gives logits for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError, InputTypeError, LabelError, ShapeError

#: Label of tokens that do not count.
IGNORED = -100
REGRESSION = "regression"


def check_class_labels(labels: object, count: int, num_classes: int, *, values: bool = True, where: str = "") -> Tensor:
    """Returns class indices (N,) as int64.

    Args:
        labels: Class indices of any integer type.
        count: N.
        num_classes: K.
        values: Check the range too, which on an accelerator waits for the device.
        where: What the labels belong to, for the message: " in the train split".

    Raises:
        InputTypeError: Not an integer tensor.
        ShapeError: Not (N,).
        LabelError: A label outside 0 to K - 1; the message names its row.
    """
    if not isinstance(labels, Tensor):
        raise InputTypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputTypeError(f"labels must be class indices of an integer type, not soft labels, got {labels.dtype}")
    if labels.shape != (count,):
        raise ShapeError(f"labels must have shape ({count},), one per sample, got {tuple(labels.shape)}")
    if values and count:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            outside = ((labels < 0) | (labels >= num_classes)).nonzero()
            row = int(outside[0])
            raise LabelError(
                f"label {int(labels[row])} of row {row}{where} is outside the {num_classes} classes, 0 to"
                f" {num_classes - 1} ({len(outside)} of {count} labels are)"
            )
    return labels.long()


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


def check_token_labels(labels: object, shape: Sequence[int], vocabulary: int, *, values: bool = True) -> Tensor:
    """Returns token labels (N, L) as int64.

    Args:
        labels: Usually the ``input_ids`` themselves: they are shifted here, as in transformers; -100 does not count.
        shape: (N, L).
        vocabulary: Number of tokens there are.
        values: Check the range too, which on an accelerator waits for the device.

    Raises:
        InputTypeError: Not an integer tensor.
        ShapeError: Not (N, L).
        LabelError: A label that is no token.
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputTypeError(f"labels must be token ids (int64), got {kind}")
    if tuple(labels.shape) != tuple(shape):
        raise ShapeError(f"labels must have shape {tuple(shape)}, one per token, got {tuple(labels.shape)}")
    if values and labels.numel():
        counted = labels[labels != IGNORED]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= vocabulary):
            wrong = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
            raise LabelError(
                f"labels hold {wrong}, but there are {vocabulary} tokens: labels lie in 0 to"
                f" {vocabulary - 1}, or are {IGNORED} where a token does not count"
            )
    return labels.long()


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each next token.

    Shape:
        logits: (N, L, V). labels: (N, L), unshifted. Returns a scalar; 0 where no token counts.
    """
    ahead = labels[:, 1:].reshape(-1)
    losses = F.cross_entropy(logits[:, :-1].reshape(len(ahead), -1), ahead, ignore_index=IGNORED, reduction="sum")
    return losses / (ahead != IGNORED).sum().clamp_min(1)
