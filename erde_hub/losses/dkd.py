"""Decoupled distillation: the target class and the others, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from erde_hub._arguments import check_number, check_whole

from . import functional
from ._checks import check_smoothing, check_weights
from .base import ExitLoss
from .batch import ExitBatch, Term

# Far below any logit, so that exp() of a difference is 0, and finite, so that 0 times it is 0.
_OUT = -1e9


class DKDLoss(ExitLoss):
    """Hinton's divergence taken apart into target class against the rest, and the rest among themselves.

    With p = softmax(z / T), b = (p_y, 1 - p_y) and q = softmax of z / T over the classes other than y::

        L = sum_e w_e mean_n { ce_weight CE(s, y)
                               + T^2 [ target_weight KL(b_t || b_s) + nontarget_weight KL(q_t || q_s) ] }

    In Hinton's loss the second divergence is multiplied by 1 - p_t[y], so what a confident teacher knows about the
    other classes hardly counts; here it does. With target_weight 1 and nontarget_weight 1 - p_t[y] the two are the
    same. With two classes the second divergence is 0. The teacher is detached.

    Args:
        temperature: Softens both sides; positive. The divergences are multiplied by its square.
        target_weight: Factor of the divergence between target and rest, alpha in the paper.
        nontarget_weight: Factor of the divergence among the other classes, beta in the paper; 8 for CIFAR-100 with
            strong teachers, 0.5 for ImageNet.
        ce_weight: Factor of the cross-entropy.
        warmup_epochs: Both divergences grow linearly over so many epochs (20 for CIFAR-100 in the released code); 0 is
            none. Without epochs (:meth:`set_epoch`) they are complete.
        label_smoothing: Fraction of each target of the cross-entropy that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; None is the rule of
            :func:`~erde_hub.losses.map_teacher_exits`.

    Shape:
        student_logits: E tensors (N, K), shallow to deep. teacher_logits: any number of tensors (N, K). labels: (N,).
            The loss is a scalar.

    Raises:
        ConfigError: A number out of range, or all weights 0.
        InputTypeError: An argument of the wrong type.

    References:
        Zhao et al., Decoupled Knowledge Distillation, 2022, arXiv 2203.08679, equation 7. Deviations: several exits,
        summed.

    Example:
        >>> import torch
        >>> teacher, student, labels = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), torch.tensor([0])
        >>> loss = DKDLoss(temperature=1.0, target_weight=1.0, nontarget_weight=1.0, ce_weight=0.0)
        >>> terms = loss([student], [teacher], labels).terms
        >>> # KL((.212, .788) || (1/3, 2/3)) and KL((.269, .731) || (1/2, 1/2))
        >>> round(terms["target"].item(), 4), round(terms["nontarget"].item(), 4)
        (0.0359, 0.1109)
    """

    state: ClassVar[str] = "the epoch, with warmup_epochs"

    def __init__(
        self,
        temperature: float = 4.0,
        target_weight: float = 1.0,
        nontarget_weight: float = 8.0,
        ce_weight: float = 1.0,
        warmup_epochs: int = 0,
        label_smoothing: float = 0.0,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(exit_weights=exit_weights, teacher_exits=teacher_exits)
        self.temperature = check_number("temperature", temperature, zero=False)
        self.target_weight, self.nontarget_weight, self.ce_weight = check_weights(
            type(self).__name__, target_weight=target_weight, nontarget_weight=nontarget_weight, ce_weight=ce_weight
        )
        self.warmup_epochs = check_whole("warmup_epochs", warmup_epochs, 0)
        self.label_smoothing = check_smoothing(label_smoothing)

    def distillation_terms(self) -> tuple[str, ...]:
        """Returns ``target`` and ``nontarget``, where they have a weight."""
        weights = {"target": self.target_weight, "nontarget": self.nontarget_weight}
        return (*(name for name, weight in weights.items() if weight), *super().distillation_terms())

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the terms ``target`` and ``nontarget`` (T^2 included) and ``ce``; one of weight 0 is left out."""
        is_target = torch.nn.functional.one_hot(batch.labels, batch.num_classes).bool()
        square, ramp = self.temperature**2, self._ramp()
        student, teacher = batch.student_log_probs(self.temperature), batch.teacher_log_probs(self.temperature)
        terms = []
        if self.target_weight:
            kl = functional.kl_divergence(_target_or_not(teacher, is_target), _target_or_not(student, is_target))
            terms.append(Term("target", kl * square, self.target_weight * ramp))
        if self.nontarget_weight:
            kl = functional.kl_divergence(_others(teacher, is_target), _others(student, is_target))
            terms.append(Term("nontarget", kl * square, self.nontarget_weight * ramp))
        if self.ce_weight:
            ce = functional.cross_entropy(batch.student_log_probs(), batch.labels, self.label_smoothing)
            terms.append(Term("ce", ce, self.ce_weight))
        return terms

    def _ramp(self) -> float:
        if not self.warmup_epochs or self._epoch is None:
            return 1.0
        return min(self._epoch[0] / self.warmup_epochs, 1.0)


def _target_or_not(log_probs: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities of the label and of all else, (..., N, K) to (..., N, 2)."""
    target = log_probs.masked_fill(~is_target, 0.0).sum(-1)
    rest = log_probs.masked_fill(is_target, _OUT).logsumexp(-1)
    return torch.stack([target, rest], dim=-1)


def _others(log_probs: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities among the classes that are not the label; the label itself has probability 0."""
    return torch.nn.functional.log_softmax(log_probs.masked_fill(is_target, _OUT), dim=-1)


def dkd_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor, **settings: Any
) -> Tensor:
    """Returns the scalar of :class:`DKDLoss` with these settings, for a single call."""
    return DKDLoss(**settings)(student_logits, teacher_logits, labels).loss
