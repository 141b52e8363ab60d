"""Paths of thresholds from no early exit to all, with a speed per exit that few samples are enough to fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from erde_hub.policies import ExitPolicy

from .outcomes import ExitOutcomes

#: Speeds of an exit relative to the fastest one; at 0 no sample takes it.
SPEEDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Steps of a path, and samples that fit its speeds, at most.
STEPS, _SAMPLES = 200, 10_000
#: Losses, as multiples of the bound, at which paths are compared: 16 from a third of it to three times as much.
_LOSSES = tuple(0.35 * (3 / 0.35) ** (i / 15) for i in range(16))
#: Ratios of the speeds of neighbouring exits with which the fit begins; the best one counts.
_RAMPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_ROUNDS = 5


def threshold_path(
    policy: ExitPolicy, grid: Sequence[float], speeds: Sequence[float], between: bool = True, steps: int = STEPS
) -> list[list[float]]:
    """Returns the thresholds of every step: at step s of 1, exit e is at place s * speeds[e] of the policy's grid.

    No sample exits early at the first step. Between two places of the grid the threshold is interpolated, or the more
    careful one of the two where ``between`` is False.

    Args:
        policy: Says what a threshold is.
        grid: Thresholds of the policy, from no early exit to all.
        speeds: One per early exit, in [0, 1].
        between: Thresholds between those of the grid may be taken.
        steps: Number of steps, at most; twice those of the grid where ``between`` is False.
    """
    between = between and not policy.whole_thresholds
    last = len(grid) - 1
    steps = steps if between else min(steps, 2 * last)
    rows = []
    for step in range(steps + 1):
        row = []
        for speed in speeds:
            place = last * speed * step / steps
            below = math.floor(place + 1e-9)
            fraction = place - below
            if below < 1:  # the first entry stands for "no sample" and is no end of a range
                row.append(policy.never_threshold)
            elif below == last or not between or fraction < 1e-9:
                row.append(grid[below])
            else:
                row.append(round((1 - fraction) * grid[below] + fraction * grid[below + 1], 6))
        rows.append(row)
    return rows


def fit_exit_speeds(outcomes: ExitOutcomes, grid: Sequence[float], bound: float, between: bool = True) -> list[float]:
    """Fits the speeds whose path saves most at losses around a bound, one exit at a time, in at most five rounds.

    The best of few paths, judged at many losses at once, is good on other samples too; the best of all combinations of
    thresholds, judged at the bound alone, is mostly luck. The fit begins with the best of some paths on which every
    exit is slower than the next by the same ratio: from equal speeds it often stops at once, since the exits pay
    together. A guarantee needs other samples to test the path on.

    Args:
        outcomes: Of the samples that the speeds are fitted on; at most 10,000 are read.
        grid: Thresholds of the policy, from no early exit to all.
        bound: On the mean loss.
        between: Thresholds between those of the grid may be taken.

    Returns:
        One number in [0, 1] per early exit, the largest is 1.
    """
    policy, early = outcomes.policy, outcomes.early
    scores, losses = outcomes.scores[:, :_SAMPLES], outcomes.losses[:, :_SAMPLES]
    samples, flat = scores.shape[1], scores.reshape(1, -1)
    # First steps of every exit on the path of each speed; a policy's own grid may have fewer steps than a path.
    paths = {speed: threshold_path(policy, grid, [speed], between) for speed in SPEEDS}
    count = len(paths[1.0])
    first = {speed: first_steps(flat, policy, rows).view_as(scores) for speed, rows in paths.items()}
    tables = losses.double(), outcomes.costs.double()[:, None].expand(-1, samples)

    def saving(speeds: Sequence[float]) -> float:
        loss, cost = step_sums(torch.stack([first[f][e] for e, f in enumerate(speeds)]), tables, count) / samples
        return -float(torch.where(loss <= levels, cost, math.inf).amin(1).sum())

    levels = torch.tensor(_LOSSES, dtype=torch.float64)[:, None] * bound + 1e-12
    starts = [[_nearest_speed(ramp ** (early - 1 - e)) for e in range(early)] for ramp in _RAMPS]
    found = max(starts, key=saving)
    best = saving(found)
    for _ in range(_ROUNDS):
        before = list(found)
        for e in range(early):
            for speed in SPEEDS:
                tried = [*found[:e], speed, *found[e + 1 :]]
                value = saving(tried) if speed != found[e] and max(tried) > 0 else -math.inf
                if value > best + 1e-12:
                    best, found = value, tried
        if found == before:
            break
    return [speed / max(found) for speed in found]


def first_steps(scores: Tensor, policy: ExitPolicy, thresholds: Sequence[Sequence[float]]) -> Tensor:
    """Returns the first step of a path at which each sample passes each exit; the number of steps where it never does.

    Shape:
        scores: (E - 1, N). thresholds: one row of E - 1 per step. Returns (E - 1, N) int64.
    """
    count = len(thresholds)
    first = torch.empty_like(scores, dtype=torch.int64)
    for e, score in enumerate(scores):
        column = [row[e] for row in thresholds]
        steps = torch.tensor(column, dtype=scores.dtype)
        # Along a path a sample that passes keeps passing, so that bisection finds the step, for all samples at once.
        low = torch.full_like(score, sum(policy.never_leaves(threshold) for threshold in column), dtype=torch.int64)
        high = torch.full_like(low, count)
        for _ in range(count.bit_length()):
            middle = (low + high) // 2
            passes = policy.compare(score, steps[middle.clamp(max=count - 1)]) & (middle < count)
            high = torch.where(passes, middle, high)
            low = torch.where(passes, low, middle + 1).minimum(high)
        first[e] = high
    return first


def step_sums(first: Tensor, tables: Sequence[Tensor], count: int) -> Tensor:
    """Sums tables of one value per exit and sample over all samples, at each step of a path.

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
        # At its first step of exit e the sample moves there, from the exit that it took until then.
        moves = earliest[e] < earliest[e - 1] if e else earliest[e] < count
        steps, rows, left = earliest[e][moves], moves.nonzero().flatten(), following[moves]
        for row, table in zip(changes, tables, strict=True):
            row.index_add_(0, steps, table[e, rows] - table[left, rows])
        following = torch.where(moves, e, following)
    return torch.stack([table[-1].sum() for table in tables])[:, None] + changes.cumsum(1)[:, :count]


def _nearest_speed(value: float) -> float:
    return min(SPEEDS, key=lambda speed: abs(speed - value))
