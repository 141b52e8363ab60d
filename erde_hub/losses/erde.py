"""ERDE: distil where the teacher is correct, keep the entropy high where it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erde_hub._arguments import check_choice, check_flag, check_number

from . import functional
from ._checks import check_smoothing, check_weights
from .base import ExitLoss
from .batch import ExitBatch, Term

CORRECTNESS = ("per_exit", "final_exit")
ENTROPY_EXITS = ("intermediate", "all")


class ERDELoss(ExitLoss):
    """Entropy-regularised distillation for early exits.

    With t the logits of the teacher's exit, s those of the student's, m[e, n] = 1 where argmax t = y and else 0, T the
    temperature, p^T = softmax(z / T), E exits, N samples and K classes::

        L = 1/N sum_e sum_n { m [ kl_weight T^2/K KL(p_t^T || p_s^T) + ce_weight CE(s, y) ]
                              - [e < E] (1 - m) entropy_weight H(p_s) }

        dL/ds = 1/N { m [ kl_weight T/K (p_s^T - p_t^T) + ce_weight (p_s - onehot y) ]
                      + [e < E] (1 - m) entropy_weight p_s (log p_s + H(p_s)) }

    On a sample that the teacher classifies correctly, the student's exit imitates it and learns the label. On the
    others nothing is imitated and the exit's entropy is *raised*, so that such a sample goes on to the next exit; the
    final exit has no next one, and learns nothing from it. The teacher is detached; the masks carry no gradient. Since
    entropy is subtracted, the loss can be negative. A batch in which every sample, or none, is teacher-wrong is fine.

    The masks are those of these three terms. A further term that joins by :meth:`add` applies to every sample:
    "feature" imitates the teacher's features also where its prediction is wrong.

    The paper's text could not be had in full, so where accounts of it leave a choice, each reading is an option below
    and the default is the one best supported. The divergence is divided by K and so weak compared with the
    cross-entropy when there are many classes: try ``kl_weight`` up to K, and ``entropy_weight`` of 0, 0.005 and 0.05
    (its gradient is at most log K per logit).

    Args:
        temperature: Softens both sides of the divergence; positive. The entropy is taken at temperature 1, as by the
            exit policy.
        kl_weight: Factor of the divergence. Not published; 1 is a choice.
        ce_weight: Factor of the cross-entropy. Not published; 1 is a choice.
        entropy_weight: Factor of the entropy; 0 switches the term off, which leaves distillation on teacher-correct
            samples.
        correctness: Whose prediction counts as correct: "per_exit", the paired teacher exit's, or "final_exit", the
            teacher's last exit's for all.
        entropy_exits: Where entropy is raised: "intermediate" (all but the final exit) or "all".
        reduction: What sums over samples are divided by: "batch" the batch, "subset" the samples to which the term
            applies at that exit (a single wrong sample then weighs as much as all correct ones), "sum" nothing. Exits
            are always summed.
        kl_scale: "T2_over_K" multiplies the divergence by T^2 / K, "T2" by T^2 as in Hinton's loss.
        kd_on_teacher_wrong: Divergence and cross-entropy on teacher-wrong samples too; with ``entropy_weight=0`` that
            is plain distillation at every exit.
        kd_on_all_samples_at_final_exit: The same at the final exit only, so that it learns from every sample.
        label_smoothing: Fraction of each target of the cross-entropy that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit for all its terms, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; None is the rule of
            :func:`~erde_hub.losses.map_teacher_exits`.

    Shape:
        student_logits: E tensors (N, K), shallow to deep. teacher_logits: any number of tensors (N, K). labels: (N,).
            The loss is a scalar.

    Raises:
        ConfigError: A number out of range, all weights 0, a reading that does not exist.
        InputTypeError: An argument of the wrong type.

    References:
        Entropy-regularised distillation for early exits, 2025, arXiv 2510.04856; temperature 2 and entropy weight 0.005
        are published. Deviations: none known; the readings above are stated because no code is public.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 0])
        >>> teacher = torch.tensor([[9.0, 0.0], [0.0, 9.0]])  # correct on the first sample, wrong on the second
        >>> student = torch.zeros(2, 2)
        >>> result = ERDELoss(kl_weight=0.0, entropy_weight=0.1)([student, student], [teacher, teacher], labels)
        >>> # cross-entropy of one sample at two exits, 2 x log 2 / 2; entropy of one sample at one exit, log 2 / 2
        >>> {name: round(value.item(), 4) for name, value in result.terms.items()}
        {'ce': 0.6931, 'entropy': 0.3466, 'teacher_right': 0.5}
        >>> round(result.loss.item(), 4)  # 0.6931 - 0.1 x 0.3466
        0.6585
    """

    def __init__(
        self,
        temperature: float = 2.0,
        kl_weight: float = 1.0,
        ce_weight: float = 1.0,
        entropy_weight: float = 0.005,
        *,
        correctness: str = "per_exit",
        entropy_exits: str = "intermediate",
        reduction: str = "batch",
        kl_scale: str = "T2_over_K",
        kd_on_teacher_wrong: bool = False,
        kd_on_all_samples_at_final_exit: bool = False,
        label_smoothing: float = 0.0,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(exit_weights=exit_weights, teacher_exits=teacher_exits, reduction=reduction)
        self.temperature = check_number("temperature", temperature, zero=False)
        self.kl_weight, self.ce_weight, self.entropy_weight = check_weights(
            type(self).__name__, kl_weight=kl_weight, ce_weight=ce_weight, entropy_weight=entropy_weight
        )
        self.correctness = check_choice("correctness", correctness, CORRECTNESS)
        self.entropy_exits = check_choice("entropy_exits", entropy_exits, ENTROPY_EXITS)
        self.kl_scale = check_choice("kl_scale", kl_scale, functional.KL_SCALES)
        self.kd_on_teacher_wrong = check_flag("kd_on_teacher_wrong", kd_on_teacher_wrong)
        self.kd_on_all_samples_at_final_exit = check_flag(
            "kd_on_all_samples_at_final_exit", kd_on_all_samples_at_final_exit
        )
        self.label_smoothing = check_smoothing(label_smoothing)

    def distillation_terms(self) -> tuple[str, ...]:
        """Returns ``kl``, where it has a weight."""
        return (*(("kl",) if self.kl_weight else ()), *super().distillation_terms())

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the terms ``kl`` (with its scale), ``ce`` and ``entropy``; one of weight 0 is left out."""
        correct = batch.teacher_right
        if self.correctness == "final_exit":
            correct = batch.teacher_right_at_final_exit.expand_as(correct)
        distil = self._distil_mask(correct)
        terms = []
        if self.kl_weight:
            kl = functional.kl_divergence(
                batch.teacher_log_probs(self.temperature), batch.student_log_probs(self.temperature)
            )
            factor = functional.kl_factor(self.kl_scale, self.temperature, batch.num_classes)
            terms.append(Term("kl", kl * factor, self.kl_weight, distil))
        if self.ce_weight:
            ce = functional.cross_entropy(batch.student_log_probs(), batch.labels, self.label_smoothing)
            terms.append(Term("ce", ce, self.ce_weight, distil))
        if self.entropy_weight:
            wrong = ~correct
            if self.entropy_exits == "intermediate":
                wrong[-1] = False
            # Maximised, hence the sign.
            terms.append(Term("entropy", functional.entropy(batch.student_log_probs()), -self.entropy_weight, wrong))
        return terms

    def _distil_mask(self, correct: Tensor) -> Tensor | None:
        """Where divergence and cross-entropy apply, (E, N) bool; None is everywhere."""
        if self.kd_on_teacher_wrong:
            return None
        if self.kd_on_all_samples_at_final_exit:
            return torch.cat([correct[:-1], torch.ones_like(correct[-1:])])
        return correct


def erde_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor, **settings: Any
) -> Tensor:
    """Returns the scalar of :class:`ERDELoss` with these settings, for a single call."""
    return ERDELoss(**settings)(student_logits, teacher_logits, labels).loss
