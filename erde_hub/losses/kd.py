"""Hinton's distillation at every exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from erde_hub._arguments import check_number

from . import functional
from ._checks import check_smoothing, check_weights
from .base import ExitLoss
from .batch import ExitBatch, Term


class KDLoss(ExitLoss):
    """Distillation on all samples at all exits: cross-entropy with the labels, divergence from the softened teacher.

    With t the logits of the teacher's exit, s those of the student's, T the temperature and p^T = softmax(z / T)::

        L = sum_e w_e mean_n { ce_weight CE(s, y) + kl_weight T^2 KL(p_t^T || p_s^T) }

    The teacher is detached. The mean divides by N, not by N K. With one exit this is Hinton's loss; who writes it as
    (1 - f) CE + f T^2 KL has ce_weight = 1 - f and kl_weight = f. The weights need not sum to 1, since in other sources
    (and in ERDE) they do not. The defaults are the CIFAR-100 baseline of EA-KD's code; timm's task has T = 1 and both
    weights 1.

    This is the baseline to compare ERDE with: ERDE without its entropy term is not plain distillation, as it leaves out
    the samples that the teacher gets wrong. ERDE divides its divergence by K; for the same scale here, divide
    ``kl_weight`` by K.

    Args:
        temperature: Softens both sides; positive. The divergence is multiplied by its square.
        kl_weight: Factor of the divergence, f in Hinton's form.
        ce_weight: Factor of the cross-entropy, 1 - f in Hinton's form.
        label_smoothing: Fraction of each target of the cross-entropy that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; ``[-1] * E`` is the teacher's final exit
            for all; None is the rule of :func:`~erde_hub.losses.map_teacher_exits`.

    Shape:
        student_logits: E tensors (N, K), shallow to deep. teacher_logits: any number of tensors (N, K). labels: (N,).
            The loss is a scalar.

    Raises:
        ConfigError: A number out of range, or both weights 0.
        InputTypeError: An argument that is not a number.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531, section 2. Deviations:
        several exits, summed.

    Example:
        >>> import torch
        >>> teacher, student, labels = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0])
        >>> result = KDLoss(temperature=2.0, kl_weight=0.5, ce_weight=0.5)([student], [teacher], labels)
        >>> # 4 KL((.731, .269) || (.5, .5)) and log 2
        >>> round(result.terms["kl"].item(), 4), round(result.terms["ce"].item(), 4)
        (0.4438, 0.6931)
    """

    #: There is a further term, so that both weights may be 0.
    trains_more: ClassVar[bool] = False

    def __init__(
        self,
        temperature: float = 4.0,
        kl_weight: float = 0.9,
        ce_weight: float = 0.1,
        label_smoothing: float = 0.0,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(exit_weights=exit_weights, teacher_exits=teacher_exits)
        self.temperature = check_number("temperature", temperature, zero=False)
        weights = {"kl_weight": kl_weight, "ce_weight": ce_weight}
        self.kl_weight, self.ce_weight = check_weights(type(self).__name__, may_be_0=self.trains_more, **weights)
        self.label_smoothing = check_smoothing(label_smoothing)

    def distillation_terms(self) -> tuple[str, ...]:
        """Returns ``kl``, where it has a weight."""
        return (*(("kl",) if self.kl_weight else ()), *super().distillation_terms())

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the terms ``kl`` (T^2 included) and ``ce``; one of weight 0 is left out."""
        terms = []
        if self.kl_weight:
            kl = functional.kl_divergence(
                batch.teacher_log_probs(self.temperature), batch.student_log_probs(self.temperature)
            )
            factor = functional.kl_factor("T2", self.temperature, batch.num_classes)
            terms.append(Term("kl", kl * factor, self.kl_weight))
        if self.ce_weight:
            ce = functional.cross_entropy(batch.student_log_probs(), batch.labels, self.label_smoothing)
            terms.append(Term("ce", ce, self.ce_weight))
        return terms


def kd_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor, **settings: Any
) -> Tensor:
    """Returns the scalar of :class:`KDLoss` with these settings, for a single call."""
    return KDLoss(**settings)(student_logits, teacher_logits, labels).loss
