"""How well a score orders samples: risk against coverage, and whether it predicts when going on helps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erde_hub.errors import ShapeError
from erde_hub.policies.eefp import should_exit


def aurc(confidence: Tensor, correct: Tensor) -> float:
    """Area under the risk-coverage curve: the error rate among the i most confident samples, averaged over i = 1 to N.

    0 is perfect; a score that orders at random gives the error rate. Samples of equal confidence count as if each order
    of them were equally likely.

    Shape:
        confidence, correct: (N,).

    References:
        Geifman et al., Bias-reduced uncertainty estimation for deep neural classifiers, 2019, arXiv 1805.08206.

    Example:
        >>> aurc(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, True, False, True]))
        0.14583333333333331
    """
    _check(confidence, correct)
    order = confidence.double().argsort(descending=True)
    values, wrong = confidence.double()[order], 1 - correct[order].double()
    _, group, sizes = values.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(sizes), dtype=torch.float64).scatter_add_(0, group, wrong) / sizes
    coverage = torch.arange(1, len(wrong) + 1, dtype=torch.float64)
    return float((errors[group].cumsum(0) / coverage).mean())


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Probability that a positive sample scores above a negative one, ties counting one half; None without either.

    Shape:
        scores, positive: (N,).
    """
    _check(scores, positive)
    positive = positive.bool()
    _, group, sizes = scores.double().unique(return_inverse=True, return_counts=True)
    ones = torch.bincount(group[positive], minlength=len(sizes))
    return _auroc_of_groups(ones, sizes - ones)


def _auroc_of_groups(ones: Tensor, zeros: Tensor) -> float | None:
    """AUROC from how many positive and negative samples have each score, by rising score."""
    pairs = int(ones.sum()) * int(zeros.sum())
    if not pairs:
        return None
    below = (zeros.cumsum(0) - zeros).double()
    return float((ones * (below + zeros / 2)).sum()) / pairs


def eefp(confidence: Tensor, correct: Tensor) -> list[float | None]:
    """Early-exit failure prediction: AUROC of each early exit's confidence for "correct here, or at no later exit".

    It measures what a policy needs: whether going on would help. Calibration error does not measure that.

    Shape:
        confidence, correct: (E, N). Returns E - 1 values; None where all samples should exit, or none.

    References:
        Rethinking calibration for early exits, 2025, arXiv 2508.21495. Deviations: none known.
    """
    labels = should_exit(correct)
    return [auroc(score, label) for score, label in zip(confidence, labels, strict=False)]


class Decisions:
    """Every early exit's confidence for "may exit here", of which a routed run takes those that it reaches.

    Sorted once, so that many thresholds cost one pass each.

    Args:
        confidence: Largest probability of each exit.
        correct: Whether each exit is correct.

    Shape:
        confidence, correct: (E, N).
    """

    def __init__(self, confidence: Tensor, correct: Tensor) -> None:
        self.targets = should_exit(correct)
        values, self.groups = confidence[:-1].unique(return_inverse=True)
        self.count = len(values)

    def eefp(self, exit_index: Tensor) -> float | None:
        """Early-exit failure prediction of a routed run: the AUROC over all decisions that it takes.

        A sample that exits at exit e took e + 1 of them, one at each exit on the way. Pooled over the exits, because
        one threshold has to serve them all; None where every decision should be to exit, or none.

        Shape:
            exit_index: (N,), the exit that each sample takes.
        """
        exits = torch.arange(len(self.targets))
        reached = exits[:, None] <= exit_index
        groups, targets = self.groups[reached], self.targets[reached]
        total = torch.bincount(groups, minlength=self.count)
        ones = torch.bincount(groups[targets.bool()], minlength=self.count)
        return _auroc_of_groups(ones, total - ones)


def mean_of_defined(values: list[float | None]) -> float | None:
    """Mean of the values that are not None; None if none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _check(scores: Any, flags: Any) -> None:
    if scores.ndim != 1 or scores.shape != flags.shape or not len(scores):
        raise ShapeError(
            f"scores and flags must be (N,), not empty, got {tuple(scores.shape)} and {tuple(flags.shape)}"
        )
