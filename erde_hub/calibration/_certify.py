"""Which candidates samples support, by tests in a fixed order (Learn then Test) or by conformal risk control."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erde_hub.policies import ExitPolicy
from erde_hub.policies.offline import exit_indices

from ._bounds import (
    betting_p_values,
    betting_p_values_of_counts,
    conformal_risk,
    difference_p_value,
    hoeffding_bentkus_p_values,
    smallest_bound,
)


def certify(
    losses: Tensor,
    bound: float,
    confidence: float | None,
    method: str,
    binary: bool = True,
    weights: Tensor | None = None,
) -> int:
    """Walks along candidates while the samples support the bound, and returns the index of the last that they support.

    Args:
        losses: Of every candidate, in the order in which they are tested; the first must lose nothing and is not
            tested.
        bound: On the expected loss.
        confidence: None for ``crc``.
        method: ``ltt``, ``exact``, ``ucb`` or ``crc``.
        binary: Losses are -1, 0 or 1.
        weights: How many samples each column stands for; None is one each.

    Shape:
        losses: (C, N) in [-1, 1]. weights: (N,).
    """
    evidence = _Evidence(losses, method, binary, weights)
    if method == "crc":
        return _last_accepted(evidence.conformal_risk() <= bound)
    level = 1 - float(confidence or 0)
    if method == "exact":  # one by one, since each takes a while and the walk ends at the first that fails
        index = 0
        while index + 1 < len(losses) and evidence.p_value(index + 1, bound) <= level:
            index += 1
        return index
    return _last_accepted(evidence.p_values(bound) <= level)


class _Evidence:
    """What samples say about the expected losses of candidates."""

    def __init__(self, losses: Tensor, method: str, binary: bool = True, weights: Tensor | None = None) -> None:
        self.losses = losses.double()
        self.weights = (torch.ones(losses.shape[1]) if weights is None else weights).double()
        self.method, self.binary = method, binary
        self.samples = int(self.weights.sum())
        self.lost = self.losses.clamp(min=0) @ self.weights
        self.won = (-self.losses).clamp(min=0) @ self.weights

    def conformal_risk(self) -> Tensor:
        return conformal_risk(self.losses.clamp(min=0), self.weights)

    def p_values(self, bound: float) -> Tensor:
        """Of the hypothesis that the expected loss exceeds a bound, for every candidate."""
        if self.method == "ltt":
            return hoeffding_bentkus_p_values(self.lost / self.samples, self.samples, bound, self.binary)
        if self.method == "ucb" and self.binary:
            return betting_p_values_of_counts(self.lost, self.won, self.samples, bound)
        if self.method == "ucb":
            return betting_p_values(self.losses, bound, self.weights)
        return torch.tensor([self.p_value(i, bound) for i in range(len(self.losses))])

    def p_value(self, index: int, bound: float) -> float:
        """The same for one candidate, by the exact test."""
        lost, won = round(float(self.lost[index])), round(float(self.won[index]))
        return difference_p_value(lost, won, self.samples, bound)


def supported_bound(losses: Tensor, confidence: float | None, method: str, binary: bool = True) -> float:
    """Returns the smallest bound that samples support for the last of some candidates.

    Shape:
        losses: (C, N), the candidates up to the one in question; only ``crc`` looks at those before it.
    """
    if method == "crc":
        return float(_Evidence(losses, method).conformal_risk()[-1])
    evidence = _Evidence(losses[-1:], method, binary)
    return smallest_bound(lambda a: float(evidence.p_values(a)[0]), 1 - float(confidence or 0), 1e-9)


def _last_accepted(accepted: Tensor) -> int:
    failed = (~accepted[1:]).nonzero()
    return int(failed[0, 0]) if len(failed) else len(accepted) - 1


def candidate_losses(
    scores: Tensor, losses: Tensor, policy: ExitPolicy, thresholds: Sequence[Sequence[float]]
) -> Tensor:
    """Loss of every sample under every candidate, (C, N) float32."""
    rows = [losses.gather(0, exit_indices(scores, policy, values)[None])[0].float() for values in thresholds]
    return torch.stack(rows)
