"""Self-distillation: the student's earlier exits learn from its last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from erde_hub._arguments import check_number
from erde_hub.errors import ConfigError

from . import functional
from ._checks import check_smoothing
from .additions import ExtraTerm
from .base import ExitLoss
from .batch import ExitBatch, Term


class SelfDistillationTerm(ExtraTerm):
    """The divergence of each earlier exit from the last one, T^2 KL(p_last^T || p_e^T); the last exit is detached.

    It needs no teacher and joins any loss. Weights of samples that read the teacher do not apply to it.

    Args:
        self_weight: Factor of the term; above 0.
        self_temperature: Softens both sides; positive. The divergence is multiplied by its square.

    Raises:
        ConfigError: A number out of range.
        InputTypeError: An argument that is not a number.

    References:
        Zhang et al., Be Your Own Teacher, 2019, arXiv 1905.08094. Deviations: logits only, without its feature term.
        EENet's backbones (arXiv 2301.07099) add 0.01 of it at temperature 3, averaged over samples and classes, in the
        last quarter of training.
    """

    name: ClassVar[str] = "self"

    def __init__(self, self_weight: float = 0.1, self_temperature: float = 3.0) -> None:
        super().__init__()
        self.self_weight = check_number("self_weight", self_weight, zero=False)
        self.self_temperature = check_number("self_temperature", self_temperature, zero=False)

    def check_exits(self, num_exits: int) -> None:
        """Refuses a student that has only its last exit."""
        if num_exits < 2:
            raise ConfigError(
                "'self' teaches the earlier exits by the last one, and the student has one exit in all: give it exits"
            )

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the term ``self``, 0 at the last exit."""
        log_probs = batch.student_log_probs(self.self_temperature)
        kl = functional.kl_divergence(log_probs[-1:], log_probs) * self.self_temperature**2
        early = torch.ones(batch.num_exits, 1, dtype=torch.bool, device=kl.device)
        early[-1] = False
        return [Term("self", kl, self.self_weight, early.expand_as(kl))]


class SelfDistillationLoss(ExitLoss):
    """Cross-entropy at every exit, and the earlier exits imitate the last one; no teacher.

    With s_E the logits of the last exit, detached, and T the temperature::

        L = sum_e w_e mean_n { CE(s, y) + [e < E] self_weight T^2 KL(p_E^T || p_e^T) }

    What deep exits know reaches the shallow ones at no cost: one network, one pass. With a teacher at hand the same
    term joins its loss, ``create_loss("kd").add(SelfDistillationTerm())``. A student with one exit has no earlier ones:
    only its cross-entropy is left, and the Distiller refuses it.

    Args:
        self_weight: Factor of the divergence from the last exit; above 0.
        self_temperature: Softens both sides of that divergence; positive. It is multiplied by its square.
        label_smoothing: Fraction of each target of the cross-entropy that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).

    Shape:
        student_logits: E tensors (N, K), shallow to deep. labels: (N,). The loss is a scalar.

    Raises:
        ConfigError: A number out of range.
        InputTypeError: An argument that is not a number.

    References:
        Zhang et al., Be Your Own Teacher, 2019, arXiv 1905.08094. Deviations: those of :class:`SelfDistillationTerm`;
        weight and temperature are ours.

    Example:
        >>> import torch
        >>> early, last = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
        >>> result = SelfDistillationLoss(self_weight=1.0, self_temperature=2.0)([early, last], None, torch.tensor([0]))
        >>> [round(value, 4) for value in result.exit_terms["self"].tolist()]  # 4 KL((.731, .269) || (.5, .5)), 0
        [0.4438, 0.0]
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(
        self,
        self_weight: float = 0.1,
        self_temperature: float = 3.0,
        label_smoothing: float = 0.0,
        exit_weights: str | Sequence[float] = "uniform",
    ) -> None:
        super().__init__(exit_weights=exit_weights)
        self.label_smoothing = check_smoothing(label_smoothing)
        self._contain(SelfDistillationTerm(self_weight, self_temperature))

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the term ``ce``; ``self`` joins it."""
        ce = functional.cross_entropy(batch.student_log_probs(), batch.labels, self.label_smoothing)
        return [Term("ce", ce, weight=1.0)]


def self_distillation_loss(student_logits: Sequence[Tensor], labels: Tensor, **settings: Any) -> Tensor:
    """Returns the scalar of :class:`SelfDistillationLoss` with these settings, for a single call."""
    return SelfDistillationLoss(**settings)(student_logits, None, labels).loss
