"""Exit when the softmax entropy is low."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from erde_hub.losses import functional

from .base import GRID, ExitPolicy


class EntropyPolicy(ExitPolicy):
    """Exits when the softmax entropy in nats is strictly below the threshold.

    H(p) = -sum_k p_k log p_k lies in [0, log K]; a threshold of 0 never exits, one above log K always does. The
    maximum grows with the number of classes, so a threshold does not carry over between data sets.

    References:
        Teerapittayanon et al., BranchyNet, 2016, arXiv 1709.01686; used by ERDE, arXiv 2510.04856.
    """

    leaves_above: ClassVar[bool] = False
    uses_history: ClassVar[bool] = False
    exportable: ClassVar[bool] = True
    never_threshold: ClassVar[float] = 0.0

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns the entropy of the deepest exit, (N,), in nats; saturated probabilities count 0, NaN stays NaN."""
        return EntropyPolicy.score_last(self, log_probs[-1])

    def score_last(self, log_probs: Tensor) -> Tensor:
        """Returns the entropy, (N, K) to (N,)."""
        return functional.entropy(log_probs)

    def score_one(self, log_probs: Tensor) -> float:
        """Returns the entropy of one sample."""
        row = log_probs[0]
        score = -row.exp().dot(row).item()
        return score if math.isfinite(score) else super().score_one(log_probs)  # a class of probability 0, or NaN

    def grid(self, num_classes: int, num_early_exits: int) -> list[float]:
        """Returns thresholds from 0 to a little above log K, denser near 0."""
        highest = 1.001 * math.log(num_classes)  # strictly above any entropy, rounding included
        return [0.0, *(round(highest * (i / GRID) ** 2, 6) for i in range(1, GRID + 1))]

    def never_leaves(self, threshold: float) -> bool:
        """No entropy is strictly below 0."""
        return threshold <= 0
