"""Joint training of all exits of a regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from erde_hub.errors import InputTypeError
from erde_hub.tasks import REGRESSION, check_targets

from .base import ExitLoss
from .batch import ExitBatch, Term


class MSELoss(ExitLoss):
    """Weighted sum over exits of the squared error, for models that predict real numbers.

    Summed over exits e, averaged over samples n and targets d::

        L = sum_e w_e mean_nd (s - y)^2

    No teacher is read; teacher outputs handed in are ignored. Squared errors grow with the unit of the targets: targets
    of a size near 1 suit the usual learning rates.

    Args:
        exit_weights: One number per exit, or a preset: "uniform", "msdnet", "sdn" (follows the epoch), "linear",
            "branchynet" (:func:`~erde_hub.losses.exit_weights_preset`).

    Shape:
        student_logits: E tensors (N, D), shallow to deep. labels: (N, D) floats, or (N,) where D is 1. The loss is a
        scalar.

    Raises:
        ConfigError: Weights that are negative or all 0.
        UnknownNameError: No preset has that name.

    References:
        Jazbec et al., 2024, arXiv 2311.05931, train the exits of their regressions jointly. Deviations: squared error,
        without a learnt noise.

    Example:
        >>> import torch
        >>> outputs = [torch.zeros(1, 2), torch.ones(1, 2)]
        >>> result = MSELoss(exit_weights=[0.5, 1.0])(outputs, None, torch.tensor([[1.0, 3.0]]))
        >>> result.loss.item()  # (1 + 9) / 4 + (0 + 4) / 2
        4.5
    """

    task: ClassVar[str] = REGRESSION
    needs_teacher: ClassVar[bool] = False

    def __init__(self, exit_weights: str | Sequence[float] = "uniform") -> None:
        super().__init__(exit_weights=exit_weights)

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the term ``mse``."""
        outputs = batch.student_logits
        return [Term("mse", (outputs - batch.labels.to(outputs.dtype)).square().mean(-1), weight=1.0)]

    def _check_labels(self, labels: Tensor, logits: Tensor) -> Tensor:
        if isinstance(labels, Tensor) and labels.device != logits.device:
            raise InputTypeError(f"labels are on {labels.device} and the outputs on {logits.device}")
        values = logits.device.type == "cpu" and not torch.compiler.is_compiling()
        return check_targets(labels, *logits.shape, values=values)


def mse_loss(student_outputs: Sequence[Tensor], labels: Tensor, **settings: Any) -> Tensor:
    """Returns the scalar of :class:`MSELoss` with these settings, for a single call."""
    return MSELoss(**settings)(student_outputs, None, labels).loss
