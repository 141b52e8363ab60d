"""Which candidates the samples support, by tests in a fixed order (Learn then Test) or by conformal risk control."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .outcomes import ExitOutcomes
from .p_values import (
    acceptance_region,
    betting_p_values,
    betting_p_values_of_counts,
    conformal_risk,
    difference_p_value,
    hoeffding_bentkus_p_values,
    smallest_bound,
)
from .threshold_path import first_steps, step_sums


@dataclass(frozen=True)
class LossTest:
    """Tests candidates in a given order for "the expected loss is at most the bound".

    Attributes:
        method: ``ltt``, ``exact``, ``ucb`` or ``crc``, keys of :data:`~erde_hub.calibration.choice.METHODS`.
        confidence: In (0, 1); None for ``crc``.
        binary: Losses are -1, 0 or 1.
    """

    method: str
    confidence: float | None
    binary: bool = True

    @property
    def level(self) -> float:
        """Highest p-value that is accepted."""
        return 1 - float(self.confidence or 0)

    @property
    def reads_sums(self) -> bool:
        """:meth:`last_accepted_of_sums` is enough; other methods read the losses of single samples."""
        return self.method in ("ltt", "exact") or (self.method == "ucb" and self.binary)

    def last_accepted(self, losses: Tensor, bound: float, weights: Tensor | None = None) -> int:
        """Returns the index of the last candidate before the first that fails.

        Args:
            losses: Of every candidate, in the order of the tests; the first must lose nothing and is not tested.
            bound: On the expected loss.
            weights: How many samples each column stands for; None is one each.

        Shape:
            losses: (C, N) in [-1, 1]. weights: (N,).
        """
        weights = (torch.ones(losses.shape[1]) if weights is None else weights).double()
        losses = losses.double()
        if self.method == "crc":
            return _last_true(conformal_risk(losses.clamp(min=0), weights) <= bound)
        if not self.reads_sums:
            return _last_true(betting_p_values(losses, bound, weights) <= self.level)
        sums = losses.clamp(min=0) @ weights, (-losses).clamp(min=0) @ weights
        return self.last_accepted_of_sums(*sums, int(weights.sum()), bound)

    def last_accepted_of_sums(self, lost: Tensor, won: Tensor, samples: int, bound: float) -> int:
        """Does the same from what all samples together lose and win under each candidate, (C,) each."""
        if self.method == "exact":  # one by one: a p-value takes a while, and the first that fails ends the search
            region = acceptance_region(samples, bound, self.level)
            return sum(1 for _ in itertools.takewhile(region.__contains__, _outcomes(lost[1:], won[1:])))
        return _last_true(self._p_values(lost, won, samples, bound) <= self.level)

    def supported_bound(self, losses: Tensor) -> float:
        """Returns the smallest bound that the samples support for the last of some candidates.

        Shape:
            losses: (C, N), the candidates up to the one in question; only ``crc`` reads the earlier ones.
        """
        losses = losses.double()
        if self.method == "crc":
            return float(conformal_risk(losses.clamp(min=0))[-1])
        if not self.reads_sums:
            return smallest_bound(lambda a: float(betting_p_values(losses[-1:], a)[0]), self.level, 1e-9)
        lost, won = losses[-1:].clamp(min=0).sum(1), (-losses[-1:]).clamp(min=0).sum(1)
        samples = losses.shape[1]
        return smallest_bound(lambda a: float(self._p_values(lost, won, samples, a)[0]), self.level, 1e-9)

    def _p_values(self, lost: Tensor, won: Tensor, samples: int, bound: float) -> Tensor:
        """P-values of "the expected loss exceeds the bound", one per candidate."""
        if self.method == "ltt":
            return hoeffding_bentkus_p_values(lost / samples, samples, bound, self.binary)
        if self.method == "ucb":
            return betting_p_values_of_counts(lost, won, samples, bound)
        return torch.tensor([difference_p_value(a, b, samples, bound, self.level) for a, b in _outcomes(lost, won)])


def candidate_losses(outcomes: ExitOutcomes, candidates: Sequence[list[float]]) -> Tensor:
    """Returns the loss of every sample under every candidate, (C, N) float32."""
    return torch.stack([outcomes.losses_at(thresholds).float() for thresholds in candidates])


def candidate_sums(outcomes: ExitOutcomes, path: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Returns what all samples together lose and win at each step of a path, (C,) each, without a table of samples.

    Along the path a sample that passes an exit must pass it at all later steps too.
    """
    first, losses = first_steps(outcomes.scores, outcomes.policy, path), outcomes.losses.double()
    lost, won = step_sums(first, (losses.clamp(min=0), (-losses).clamp(min=0)), len(path))
    return lost, won


def _outcomes(lost: Tensor, won: Tensor) -> Iterator[tuple[int, int]]:
    """Numbers of samples that lose and win, candidate by candidate."""
    return zip(lost.round().long().tolist(), won.round().long().tolist(), strict=True)


def _last_true(accepted: Tensor) -> int:
    """Returns the last index before the first False; the first entry counts as True."""
    failed = (~accepted[1:]).nonzero()
    return int(failed[0, 0]) if len(failed) else len(accepted) - 1
