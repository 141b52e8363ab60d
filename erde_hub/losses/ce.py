"""Joint training of all exits with cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from . import functional
from ._checks import check_smoothing
from .base import ExitLoss
from .batch import ExitBatch, Term


class CELoss(ExitLoss):
    """Weighted sum over exits of the cross-entropy with the labels.

    Summed over exits e, averaged over samples n::

        L = sum_e w_e mean_n CE(s, y)

    with CE at temperature 1. No teacher is read; teacher logits handed in are
    ignored. The way to train a teacher, a static student (one exit), and the first rung of any comparison of
    distillation methods.

    Args:
        label_smoothing: Fraction of each target that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit, or a preset: "uniform", "msdnet", "sdn" (follows the epoch), "linear",
            "branchynet" (:func:`~erde_hub.losses.exit_weights_preset`).

    Shape:
        student_logits: E tensors (N, K), shallow to deep. labels: (N,). The loss is a scalar.

    Raises:
        ConfigError: A smoothing outside [0, 1), weights that are negative or all 0.
        UnknownNameError: No preset has that name.

    References:
        Teerapittayanon et al., BranchyNet, 2016, arXiv 1709.01686 (weighted sum over exits). Deviations:
        none.

    Example:
        >>> import torch
        >>> result = CELoss(exit_weights=[0.5, 1.0])([torch.zeros(1, 4), torch.zeros(1, 4)], None, torch.tensor([2]))
        >>> round(result.loss.item(), 4)  # 1.5 log 4
        2.0794
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, label_smoothing: float = 0.0, exit_weights: str | Sequence[float] = "uniform") -> None:
        super().__init__(exit_weights=exit_weights)
        self.label_smoothing = check_smoothing(label_smoothing)

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the term ``ce``."""
        values = functional.cross_entropy(batch.student_log_probs(), batch.labels, self.label_smoothing)
        return [Term("ce", values, weight=1.0)]


def ce_loss(student_logits: Sequence[Tensor], labels: Tensor, **settings: Any) -> Tensor:
    """Returns the scalar of :class:`CELoss` with these settings, for a single call."""
    return CELoss(**settings)(student_logits, None, labels).loss
