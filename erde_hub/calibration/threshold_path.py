"""One walk from nobody leaving to everybody, with a factor per exit that a few samples are enough to find."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from erde_hub.policies import ExitPolicy

#: Speeds of an exit relative to the fastest one; 0 keeps it shut.
FACTORS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Steps of a walk, and samples that search its factors, at most.
STEPS, _SAMPLES = 200, 10_000
#: Losses, as multiples of the bound, at which a walk's saving is judged: 16 from a third of it to three times as much.
_LOSSES = tuple(0.35 * (3 / 0.35) ** (i / 15) for i in range(16))
#: Ratios of the factors of neighbouring exits with which the search of factors begins; the best one counts.
_RAMPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_ROUNDS = 5


def walk(
    policy: ExitPolicy, grid: Sequence[float], factors: Sequence[float], between: bool = True, steps: int = STEPS
) -> list[list[float]]:
    """Returns thresholds of every step: at step s of 1, exit e is at place s * factors[e] of the policy's own grid.

    Between two places of the grid the threshold is between theirs, or the more careful one where nothing lies
    between. Nobody leaves at the first step.

    Args:
        policy: Says what a threshold is.
        grid: Its thresholds from nobody leaving to everybody.
        factors: One per early exit, in [0, 1].
        between: Thresholds between those of the grid may be taken.
        steps: Number of steps, at most; twice those of the grid where nothing between them may be taken.
    """
    between = between and not policy.whole_thresholds
    last = len(grid) - 1
    steps = steps if between else min(steps, 2 * last)
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
    """Searches the factors whose walk saves most at losses around the bound, one exit at a time, in five rounds.

    A choice among few curves, judged at many losses at once, holds on other samples where one among all combinations of
    thresholds, judged at the bound alone, is mostly luck. The search begins with the best of some walks on which every
    exit is slower than the next by the same factor: from equal speeds it often stops at once, since the exits pay
    together. A guarantee needs other samples to test the walk on.

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
    samples, flat = scores.shape[1], scores.reshape(1, -1)
    # Of every exit in turn on each walk; a policy's own grid may have fewer steps than a walk.
    walks = {factor: walk(policy, grid, [factor], between) for factor in FACTORS}
    count = len(walks[1.0])
    first = {factor: first_steps(flat, policy, rows).view_as(scores) for factor, rows in walks.items()}
    tables = losses.double(), costs.double()[:, None].expand(-1, samples)

    def saving(factors: Sequence[float]) -> float:
        loss, cost = step_sums(torch.stack([first[f][e] for e, f in enumerate(factors)]), tables, count) / samples
        return -float(torch.where(loss <= levels, cost, math.inf).amin(1).sum())

    levels = torch.tensor(_LOSSES, dtype=torch.float64)[:, None] * bound + 1e-12
    starts = [[_nearest_factor(ramp ** (early - 1 - e)) for e in range(early)] for ramp in _RAMPS]
    found = max(starts, key=saving)
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


def first_steps(scores: Tensor, policy: ExitPolicy, thresholds: Sequence[Sequence[float]]) -> Tensor:
    """Returns the first step of a walk at which each sample leaves each exit; the number of steps where at none.

    Shape:
        scores: (E - 1, N). thresholds: one row of E - 1 per step. Returns (E - 1, N) int64.
    """
    count = len(thresholds)
    first = torch.empty_like(scores, dtype=torch.int64)
    for e, score in enumerate(scores):
        column = [row[e] for row in thresholds]
        steps = torch.tensor(column, dtype=scores.dtype)
        # An exit never turns back on a walk, so that halving finds the step, for all samples at once.
        low = torch.full_like(score, sum(policy.never_leaves(threshold) for threshold in column), dtype=torch.int64)
        high = torch.full_like(low, count)
        for _ in range(count.bit_length()):
            middle = (low + high) // 2
            leaves = policy.compare(score, steps[middle.clamp(max=count - 1)]) & (middle < count)
            high = torch.where(leaves, middle, high)
            low = torch.where(leaves, low, middle + 1).minimum(high)
        first[e] = high
    return first


def step_sums(first: Tensor, tables: Sequence[Tensor], count: int) -> Tensor:
    """What all samples together have at each step of a walk, in each of several tables of what an exit gives a sample.

    Args:
        first: Of :func:`first_steps`.
        tables: Values of each exit, for each sample.
        count: Number of steps.

    Shape:
        first: (E - 1, N). tables: T of (E, N) float64. Returns (T, count) float64.
    """
    early = len(first)
    earliest = first.cummin(0).values
    changes = torch.zeros(len(tables), count + 1, dtype=torch.float64)
    following = torch.full((first.shape[1],), early)
    for e in reversed(range(early)):
        # At its first step of exit e the sample moves there, from the exit where it left until then.
        moves = earliest[e] < earliest[e - 1] if e else earliest[e] < count
        steps, rows, left = earliest[e][moves], moves.nonzero().flatten(), following[moves]
        for row, table in zip(changes, tables, strict=True):
            row.index_add_(0, steps, table[e, rows] - table[left, rows])
        following = torch.where(moves, e, following)
    return torch.stack([table[-1].sum() for table in tables])[:, None] + changes.cumsum(1)[:, :count]


def _nearest_factor(value: float) -> float:
    return min(FACTORS, key=lambda factor: abs(factor - value))
