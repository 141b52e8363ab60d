"""The two ends of every sweep."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import ExitPolicy


class NeverPolicy(ExitPolicy):
    """Never leaves early: every sample runs to the backbone's own classifier."""

    uses_history: ClassVar[bool] = False
    uses_threshold: ClassVar[bool] = False

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns zeros, (N,)."""
        return log_probs.new_zeros(log_probs.shape[1])

    def compare(self, score: Tensor, threshold: float | Tensor) -> Tensor:
        """Nobody leaves."""
        return score != score

    def never_leaves(self, threshold: float) -> bool:
        """True."""
        return True


class AlwaysPolicy(ExitPolicy):
    """Always leaves at the first exit."""

    uses_history: ClassVar[bool] = False
    uses_threshold: ClassVar[bool] = False

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns zeros, (N,)."""
        return log_probs.new_zeros(log_probs.shape[1])

    def compare(self, score: Tensor, threshold: float | Tensor) -> Tensor:
        """Everybody leaves."""
        return score == score
