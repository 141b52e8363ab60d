"""Exit when the best class stands out."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import ExitPolicy


class ConfidencePolicy(ExitPolicy):
    """Exits when the largest softmax probability is at or above the threshold; above 1 no sample exits.

    References:
        Huang et al., Multi-Scale Dense Networks, 2018, arXiv 1703.09844.
    """

    uses_history: ClassVar[bool] = False
    exportable: ClassVar[bool] = True
    default_threshold: ClassVar[float] = 0.9
    never_threshold: ClassVar[float] = 2.0

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns the largest probability of the deepest exit, (N,)."""
        return ConfidencePolicy.score_last(self, log_probs[-1])

    def score_last(self, log_probs: Tensor) -> Tensor:
        """Returns the largest probability, (N, K) to (N,)."""
        return log_probs.amax(-1).exp()

    def never_leaves(self, threshold: float) -> bool:
        """A probability is at most 1."""
        return threshold > 1


class MarginPolicy(ExitPolicy):
    """Exits when the probability of the best class exceeds that of the second by the threshold or more."""

    uses_history: ClassVar[bool] = False
    exportable: ClassVar[bool] = True
    default_threshold: ClassVar[float] = 0.8
    never_threshold: ClassVar[float] = 2.0

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns the difference of the two largest probabilities of the deepest exit, (N,)."""
        return MarginPolicy.score_last(self, log_probs[-1])

    def score_last(self, log_probs: Tensor) -> Tensor:
        """Returns the difference of the two largest probabilities, (N, K) to (N,)."""
        best = log_probs.topk(2, dim=-1).values.exp()
        return best[..., 0] - best[..., 1]

    def never_leaves(self, threshold: float) -> bool:
        """A difference of probabilities is at most 1."""
        return threshold > 1
