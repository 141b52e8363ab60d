"""Which candidates samples support, by tests in a fixed order (Learn then Test) or by conformal risk control."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from erde_hub.policies import ExitPolicy
from erde_hub.policies.recorded import exit_indices

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
    weights = (torch.ones(losses.shape[1]) if weights is None else weights).double()
    losses = losses.double()
    if method == "crc":
        return _last_accepted(conformal_risk(losses.clamp(min=0), weights) <= bound)
    if method == "ucb" and not binary:
        return _last_accepted(betting_p_values(losses, bound, weights) <= 1 - float(confidence or 0))
    sums = losses.clamp(min=0) @ weights, (-losses).clamp(min=0) @ weights
    return certify_sums(*sums, int(weights.sum()), bound, confidence, method, binary)


def certify_sums(
    lost: Tensor, won: Tensor, samples: int, bound: float, confidence: float | None, method: str, binary: bool = True
) -> int:
    """The same for methods that read nothing but what all samples together lose and win at each candidate, (C,)."""
    level = 1 - float(confidence or 0)
    if method == "exact":  # one by one, since p-values take a while and the walk ends at the first that fails
        region = acceptance_region(samples, bound, level)
        return sum(1 for _ in itertools.takewhile(region.__contains__, _outcomes(lost[1:], won[1:])))
    return _last_accepted(_p_values_of_sums(lost, won, samples, bound, method, binary, level) <= level)


def reads_sums(method: str, binary: bool) -> bool:
    """Tells whether :func:`certify_sums` is enough for a method; the others look at single samples."""
    return method in ("ltt", "exact") or (method == "ucb" and binary)


def _p_values_of_sums(
    lost: Tensor, won: Tensor, samples: int, bound: float, method: str, binary: bool, level: float
) -> Tensor:
    """Of the hypothesis that the expected loss exceeds a bound, for every candidate, to be judged at a level."""
    if method == "ltt":
        return hoeffding_bentkus_p_values(lost / samples, samples, bound, binary)
    if method == "ucb":
        return betting_p_values_of_counts(lost, won, samples, bound)
    return torch.tensor([difference_p_value(a, b, samples, bound, level) for a, b in _outcomes(lost, won)])


def _outcomes(lost: Tensor, won: Tensor) -> Iterator[tuple[int, int]]:
    """Numbers of samples that lose and win, candidate by candidate."""
    return zip(lost.round().long().tolist(), won.round().long().tolist(), strict=True)


def supported_bound(losses: Tensor, confidence: float | None, method: str, binary: bool = True) -> float:
    """Returns the smallest bound that samples support for the last of some candidates.

    Shape:
        losses: (C, N), the candidates up to the one in question; only ``crc`` looks at those before it.
    """
    losses, level = losses.double(), 1 - float(confidence or 0)
    if method == "crc":
        return float(conformal_risk(losses.clamp(min=0))[-1])
    if method == "ucb" and not binary:
        return smallest_bound(lambda a: float(betting_p_values(losses[-1:], a)[0]), level, 1e-9)
    lost, won = losses[-1:].clamp(min=0).sum(1), (-losses[-1:]).clamp(min=0).sum(1)
    samples = losses.shape[1]
    return smallest_bound(
        lambda a: float(_p_values_of_sums(lost, won, samples, a, method, binary, level)[0]), level, 1e-9
    )


def _last_accepted(accepted: Tensor) -> int:
    failed = (~accepted[1:]).nonzero()
    return int(failed[0, 0]) if len(failed) else len(accepted) - 1


def candidate_losses(
    scores: Tensor, losses: Tensor, policy: ExitPolicy, thresholds: Sequence[Sequence[float]]
) -> Tensor:
    """Loss of every sample under every candidate, (C, N) float32."""
    rows = [losses.gather(0, exit_indices(scores, policy, values)[None])[0].float() for values in thresholds]
    return torch.stack(rows)


def candidate_sums(
    scores: Tensor, losses: Tensor, policy: ExitPolicy, thresholds: Sequence[Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """What all samples together lose and win under every candidate, each (C,), without a table of all samples.

    Candidates must be steps of a walk: who leaves an exit at one of them leaves it at all later ones too.
    """
    first = first_steps(scores, policy, thresholds)
    lost, won = step_sums(first, (losses.double().clamp(min=0), (-losses.double()).clamp(min=0)), len(thresholds))
    return lost, won
