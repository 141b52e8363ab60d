"""One walk from nobody leaving to everybody, with a factor per exit that a few samples are enough to find."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from erde_hub.policies import ExitPolicy

from ._search import shared_curve

#: Speeds of an exit relative to the fastest one; 0 keeps it shut.
FACTORS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Steps of a walk, and samples that search its factors, at most.
_STEPS, _SAMPLES = 200, 10_000
#: Losses, as multiples of the bound, at which a walk's saving is judged.
_LOSSES = (0.5, 1.0, 2.0, 4.0)
_ROUNDS = 3


def walk(
    policy: ExitPolicy, grid: Sequence[float], factors: Sequence[float], between: bool = True
) -> list[list[float]]:
    """Returns thresholds of every step: at step s of 1, exit e is at place s * factors[e] of the policy's own grid.

    Between two places of the grid the threshold is between theirs, or the more careful one where nothing lies
    between. Nobody leaves at the first step.

    Args:
        policy: Says what a threshold is.
        grid: Its thresholds from nobody leaving to everybody.
        factors: One per early exit, in [0, 1].
        between: Thresholds between those of the grid may be taken.
    """
    between = between and not policy.whole_thresholds
    last = len(grid) - 1
    steps = min(_STEPS, 2 * last)
    rows = []
    for step in range(steps + 1):
        row = []
        for factor in factors:
            place = last * factor * step / steps
            below = math.floor(place + 1e-9)
            share = place - below
            if below < 1:  # the first entry stands for nobody and is no end of a range
                row.append(policy.never_threshold)
            elif below == last or not between or share < 1e-9:
                row.append(grid[below])
            else:
                row.append(round((1 - share) * grid[below] + share * grid[below + 1], 6))
        rows.append(row)
    return rows


def find_factors(
    scores: Tensor,
    losses: Tensor,
    costs: Tensor,
    policy: ExitPolicy,
    grid: Sequence[float],
    bound: float,
    between: bool = True,
) -> list[float]:
    """Searches the factors whose walk saves most at losses around the bound, one exit at a time, in three rounds.

    A choice among few curves, judged at four losses at once, holds on other samples where one among all combinations of
    thresholds, judged at the bound alone, is mostly luck. A guarantee needs other samples to test the walk on.

    Args:
        scores: Of each early exit.
        losses: Of each exit against the last one.
        costs: Of each exit.
        policy: Gave the scores.
        grid: Its thresholds from nobody leaving to everybody.
        bound: On the mean loss.
        between: Thresholds between those of the grid may be taken.

    Shape:
        scores: (E - 1, N). losses: (E, N). costs: (E,). Returns E - 1 numbers in [0, 1], one of them 1.
    """
    scores, losses = scores[:, :_SAMPLES], losses[:, :_SAMPLES]
    early = len(scores)
    # A walk is a shared threshold on the steps at which samples leave an exit: the earlier, the higher the rank.
    ranks = {factor: _ranks_on_walk(scores, policy, grid, factor, between) for factor in FACTORS}

    def saving(factors: Sequence[float]) -> float:
        chosen = torch.stack([ranks[factor][e] for e, factor in enumerate(factors)])
        if not chosen.isfinite().any():
            return -math.inf
        _, loss, cost = shared_curve(chosen, losses, costs)
        return -sum(float(cost[loss <= level * bound + 1e-12].min()) for level in _LOSSES)

    found = [1.0] * early
    best = saving(found)
    for _ in range(_ROUNDS):
        before = list(found)
        for e in range(early):
            for factor in FACTORS:
                tried = [*found[:e], factor, *found[e + 1 :]]
                value = saving(tried) if factor != found[e] and max(tried) > 0 else -math.inf
                if value > best + 1e-12:
                    best, found = value, tried
        if found == before:
            break
    return [factor / max(found) for factor in found]


def _ranks_on_walk(scores: Tensor, policy: ExitPolicy, grid: Sequence[float], factor: float, between: bool) -> Tensor:
    """Minus the step at which each sample leaves each exit that walks with a factor; minus infinity if at none."""
    thresholds = [row[0] for row in walk(policy, grid, [factor], between)]
    stays = torch.zeros_like(scores, dtype=torch.int64)
    for threshold in thresholds:
        stays += 1 if policy.never_leaves(threshold) else policy.compare(scores, threshold).logical_not()
    return torch.where(stays < len(thresholds), -stays.double(), -math.inf)
