"""EA-KD: samples whose teacher, and student, are uncertain count more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from erde_hub._arguments import check_choice, check_flag, check_number

from . import functional
from .additions import SampleWeight
from .batch import ExitBatch
from .kd import KDLoss

#: Which of the two weights of the paper: their mean, the teacher's entropy alone, or its product with the student's.
ENTROPY_WEIGHTS = ("both", "base", "interaction")


class EntropyWeight(SampleWeight):
    """Weight per sample and exit from the entropies of teacher and student.

    With t and s the logits of the paired exits, T' the entropy temperature and B the upper bound, log K::

        H_t = H(softmax(t / T'))    H_s = H(softmax(s / T'))
        w = H_t (1 + H_s / B) / 2   in [0, log K]: the mean of the base weight H_t and the interaction H_t H_s / B

    The weight is detached: it decides how much a sample counts and is not itself made smaller. It is not normalised:
    its mean, anywhere in [0, log K], rescales the term it multiplies, so compare with a baseline of matched weight or
    set ``normalize_weights``. A teacher that is confident everywhere gives weights near 0.

    Args:
        entropy_temperature: T' of both entropies, apart from the temperature of the divergence; positive.
        entropy_bound: B; None is log K as in the paper. The released code has 100 for CIFAR-100 in its KD and DKD,
            which all but switches the interaction off: 100.0 reproduces it.
        entropy_weighting: "both" as above, "base" for H_t, or "interaction" for H_t H_s / B.
        normalize_weights: Divide by the mean over the batch (of all processes) at each exit, which leaves the size of
            the term as it is.

    Raises:
        ConfigError: A number out of range, or no such weighting.
        InputTypeError: An argument of the wrong type.

    References:
        Su et al., EA-KD: Entropy-based Adaptive Knowledge Distillation, 2023, arXiv 2311.13621. Deviations: entropies
        are exact where the released code adds 1e-10 inside the logarithm; several exits, each weighed by its own
        logits; ``normalize_weights`` is ours.

    Example:
        >>> import torch
        >>> from erde_hub.losses import ExitBatch
        >>> even = torch.zeros(1, 1, 4)
        >>> round(EntropyWeight().weights(ExitBatch(even, torch.tensor([0]), even)).item(), 4)  # log 4
        1.3863
    """

    name: ClassVar[str] = "ea_kd"
    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        entropy_temperature: float = 3.0,
        entropy_bound: float | None = None,
        entropy_weighting: str = "both",
        normalize_weights: bool = False,
    ) -> None:
        super().__init__()
        self.entropy_temperature = check_number("entropy_temperature", entropy_temperature, zero=False)
        self.entropy_bound = None if entropy_bound is None else check_number("entropy_bound", entropy_bound, zero=False)
        self.entropy_weighting = check_choice("entropy_weighting", entropy_weighting, ENTROPY_WEIGHTS)
        self.normalize_weights = check_flag("normalize_weights", normalize_weights)

    def weights(self, batch: ExitBatch) -> Tensor:
        """Returns the weights (E, N)."""
        teacher = functional.entropy(batch.teacher_log_probs(self.entropy_temperature))
        weights = teacher
        if self.entropy_weighting != "base":
            student = functional.entropy(batch.student_log_probs(self.entropy_temperature).detach())
            fraction = student / (math.log(batch.num_classes) if self.entropy_bound is None else self.entropy_bound)
            weights = teacher * fraction if self.entropy_weighting == "interaction" else 0.5 * teacher * (1 + fraction)
        # The entropy of a one-hot distribution may come out as a tiny negative number.
        weights = weights.clamp_min(0.0)
        if self.normalize_weights:
            mean = batch.mean_over_samples(weights)
            weights = weights / mean.clamp_min(1e-12)
        return weights


class EAKDLoss(KDLoss):
    """Hinton's distillation whose divergence is weighed per sample by the entropies of teacher and student.

    Summed over exits e, averaged over samples n::

        L = sum_e w_e mean_n { ce_weight CE(s, y) + v kl_weight T^2 KL(p_t^T || p_s^T) }

    with v the detached weights of :class:`EntropyWeight`, H_t (1 + H_s / log K) / 2. The same weight joins any other
    loss: ``create_loss("erde").add(EntropyWeight())`` weighs ERDE's divergence where the teacher is correct
    and leaves its entropy term elsewhere as it is.

    The defaults are those of the paper for CIFAR-100 and Tiny-ImageNet. For ImageNet it has temperature 1, entropy
    temperature 2, and weights 1 for cross-entropy and 0.5 for the divergence.

    Args:
        temperature: Softens both sides of the divergence; positive. The divergence is multiplied by its square.
        kl_weight: Factor of the weighed divergence; above 0.
        ce_weight: Factor of the cross-entropy.
        entropy_temperature: Temperature of both entropies; positive.
        entropy_bound: Upper bound of the entropy; None is log K, 100.0 reproduces the released code on CIFAR-100.
        entropy_weighting: "both", "base" (the teacher's entropy) or "interaction" (its product with the student's).
        normalize_weights: Divide the weights by their mean over the batch at each exit.
        label_smoothing: Fraction of each target of the cross-entropy that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; None is the rule of
            :func:`~erde_hub.losses.map_teacher_exits`.

    Shape:
        student_logits: E tensors (N, K), shallow to deep. teacher_logits: any number of tensors (N, K). labels: (N,).
            The loss is a scalar.

    Raises:
        ConfigError: A number out of range, no divergence to weigh, no such weighting.
        InputTypeError: An argument of the wrong type.

    References:
        Su et al., EA-KD: Entropy-based Adaptive Knowledge Distillation, 2023, arXiv 2311.13621. Deviations: those of
        :class:`EntropyWeight`; the mean over the batch, as in the released code, where the paper writes a sum.

    Example:
        >>> import torch
        >>> even, confident = torch.zeros(1, 2), torch.tensor([[50.0, -50.0]])
        >>> loss = EAKDLoss(temperature=1.0, kl_weight=1.0, ce_weight=0.0)
        >>> round(loss([confident], [even], torch.tensor([0])).terms["ea_kd_weight"].item(), 4)  # half of log 2
        0.3466
    """

    def __init__(
        self,
        temperature: float = 4.0,
        kl_weight: float = 0.9,
        ce_weight: float = 0.1,
        entropy_temperature: float = 3.0,
        entropy_bound: float | None = None,
        entropy_weighting: str = "both",
        normalize_weights: bool = False,
        label_smoothing: float = 0.0,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(temperature, kl_weight, ce_weight, label_smoothing, exit_weights, teacher_exits)
        self._contain(EntropyWeight(entropy_temperature, entropy_bound, entropy_weighting, normalize_weights))


def ea_kd_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor, **settings: Any
) -> Tensor:
    """Returns the scalar of :class:`EAKDLoss` with these settings, for a single call."""
    return EAKDLoss(**settings)(student_logits, teacher_logits, labels).loss
