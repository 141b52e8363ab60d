"""The two ends of every sweep."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .base import ExitPolicy


class NeverPolicy(ExitPolicy):
    """Never exits early: every sample runs to the backbone's own classifier."""

    uses_history: ClassVar[bool] = False
    uses_threshold: ClassVar[bool] = False

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns zeros, (N,)."""
        return log_probs.new_zeros(log_probs.shape[1])

    def compare(self, score: Any, threshold: float | Tensor) -> Any:
        """No sample exits."""
        return score < score

    def never_leaves(self, threshold: float) -> bool:
        """True."""
        return True


class AlwaysPolicy(ExitPolicy):
    """Always takes the first exit; samples whose logits there are NaN go on, as under every policy."""

    uses_history: ClassVar[bool] = False
    uses_threshold: ClassVar[bool] = False

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns zeros, (N,), and NaN where the log-probabilities are NaN."""
        return log_probs[-1].amax(-1).mul(0)  # a largest log-probability is finite, or NaN

    def compare(self, score: Any, threshold: float | Tensor) -> Any:
        """Every sample with a prediction exits."""
        return score == score
