"""The two ends of every sweep."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .base import ExitPolicy


class NeverPolicy(ExitPolicy):
    """Never leaves early: every sample runs to the backbone's own classifier."""

    uses_history: ClassVar[bool] = False
    uses_threshold: ClassVar[bool] = False

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns zeros, (N,)."""
        return log_probs.new_zeros(log_probs.shape[1])

    def compare(self, score: Any, threshold: float | Tensor) -> Any:
        """Nobody leaves."""
        return score < score

    def never_leaves(self, threshold: float) -> bool:
        """True."""
        return True


class AlwaysPolicy(ExitPolicy):
    """Always leaves at the first exit; samples whose answer there is NaN go on, as under every policy."""

    uses_history: ClassVar[bool] = False
    uses_threshold: ClassVar[bool] = False

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns zeros, (N,), and NaN where the answer is NaN."""
        return log_probs[-1].amax(-1).mul(0)  # a largest log-probability is finite, or NaN

    def compare(self, score: Any, threshold: float | Tensor) -> Any:
        """Everybody leaves who has an answer."""
        return score == score
