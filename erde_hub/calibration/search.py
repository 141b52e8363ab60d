"""Exact searches over thresholds on recorded scores: every shared threshold, or combinations of one per exit.

Scores are handed in as *ranks* u: larger ones exit first, whichever way the policy compares. A threshold is then a
*level* v: samples with u >= v exit, at infinity none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import Objective

#: Combinations of levels per exit up to which all are tried; with more, partial choices are pruned exit by exit.
_CELLS = 400_000
#: Early exits up to which all combinations of quantiles are tried.
_EXHAUSTIVE = 6
#: Partial choices kept per exit, and levels tried for each, in the pruned search.
_STATES, _LEVELS = 192, 20
#: Samples that the pruned search looks at in one product of matrices.
_ROWS = 8192


@dataclass(frozen=True)
class Point:
    """One choice of levels, one per early exit, with its mean loss and cost on the records."""

    levels: tuple[float, ...]
    loss: float
    cost: float


def shared_curve(ranks: Tensor, losses: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluates every shared threshold that makes a difference.

    Shape:
        ranks: (E - 1, N). losses: (E, N). costs: (E,). Returns levels, mean losses and mean costs, each (M,): falling
        levels, infinity first.
    """
    exits, samples = losses.shape
    levels, loss_steps, cost_steps = [], [], []
    best = ranks.double().cummax(0).values
    following = torch.full((samples,), exits - 1)
    for e in reversed(range(exits - 1)):
        # At the level best[e] the sample moves to exit e, from the exit that it took until then.
        record = best[e] > best[e - 1] if e else best[e] > -math.inf
        levels.append(best[e][record])
        loss_steps.append((losses[e] - losses.gather(0, following[None])[0])[record])
        cost_steps.append((costs[e] - costs[following])[record])
        following = torch.where(record, torch.full_like(following, e), following)
    level, order = torch.cat(levels).sort(descending=True)
    loss = losses[-1].sum() + torch.cat(loss_steps)[order].cumsum(0)
    cost = costs[-1] * samples + torch.cat(cost_steps)[order].cumsum(0)
    last = torch.ones_like(level, dtype=torch.bool)
    last[:-1] = level[:-1] != level[1:]  # equal scores exit together
    first = torch.tensor([math.inf], dtype=torch.float64)
    return (
        torch.cat([first, level[last]]),
        torch.cat([losses[-1].sum()[None], loss[last]]) / samples,
        torch.cat([costs[-1:] * samples, cost[last]]) / samples,
    )


def best_per_exit(ranks: Tensor, losses: Tensor, costs: Tensor, objective: Objective, start: Sequence[float]) -> Point:
    """Searches one level per exit among quantiles of the ranks, then again between the neighbours of the best.

    With more than six early exits the search is pruned, see :func:`best_on_grids`, and quantiles are not refined.

    Args:
        ranks: Of each early exit.
        losses: Of each exit.
        costs: Of each exit.
        objective: Says which point is the best.
        start: Levels that are tried too, such as the best shared one, so that the result is never worse.

    Shape:
        ranks: (E - 1, N). losses: (E, N). costs: (E,). start: E - 1 numbers.
    """
    early = ranks.shape[0]
    exhaustive = early <= _EXHAUSTIVE
    count = max(3, min(200, int(_CELLS ** (1 / early)))) if exhaustive else _LEVELS
    grids = [_levels(ranks[e], count, [start[e]]) for e in range(early)]
    point = best_on_grids(ranks, losses, costs, grids, objective, start)
    for _ in range(3 if exhaustive else 0):
        around = []
        for e, grid in enumerate(grids):
            at = (grid == point.levels[e]).nonzero()[0, 0]
            high, low = grid[max(int(at) - 1, 0)], grid[min(int(at) + 1, len(grid) - 1)]
            inside = ranks[e][(ranks[e] <= high) & (ranks[e] >= low)]
            around.append(_levels(inside, count, [point.levels[e]]))
        grids = around
        point = best_on_grids(ranks, losses, costs, grids, objective, point.levels)
    return point


def best_on_grids(
    ranks: Tensor,
    losses: Tensor,
    costs: Tensor,
    grids: Sequence[Tensor],
    objective: Objective,
    start: Sequence[float],
) -> Point:
    """Returns the best combination of the grids' levels.

    All combinations are tried where there are few enough; otherwise :func:`pruned_front` leaves some to choose from,
    and ``start`` is kept where it is better. Work and memory are then linear in exits and samples.

    Args:
        ranks: Of each early exit.
        losses: Of each exit.
        costs: Of each exit.
        grids: Falling levels, one grid per early exit.
        objective: Says which point is the best.
        start: One level of each grid.

    Shape:
        ranks: (E - 1, N). losses: (E, N). costs: (E,).
    """
    if math.prod(len(grid) + 1 for grid in grids) <= 4 * _CELLS:
        loss, cost = grid_tables(ranks, losses, costs, grids)
        cell = int(objective.rank(loss, cost).flatten().argmin())
        index = torch.unravel_index(torch.tensor(cell), loss.shape)
        levels = tuple(float(grid[i]) for grid, i in zip(grids, index, strict=True))
        return Point(levels, float(loss.flatten()[cell]), float(cost.flatten()[cell]))
    known = evaluate_levels(ranks, losses, costs, start)
    choices, loss, cost = pruned_front(ranks, losses, costs, grids)
    rank = objective.rank(loss, cost)
    best = int(rank.argmin())
    if float(rank[best]) > float(objective.rank(torch.tensor(known.loss), torch.tensor(known.cost))):
        return known
    return Point(tuple(choices[best].tolist()), float(loss[best]), float(cost[best]))


def evaluate_levels(ranks: Tensor, losses: Tensor, costs: Tensor, levels: Sequence[float]) -> Point:
    """Returns the mean loss and cost of one choice of levels.

    Shape:
        ranks: (E - 1, N). losses: (E, N). costs: (E,). levels: E - 1 numbers.
    """
    taken = torch.full((ranks.shape[1],), len(ranks))
    for e in reversed(range(len(ranks))):
        taken[ranks[e] >= levels[e]] = e
    return Point(tuple(levels), float(losses.gather(0, taken[None]).double().mean()), float(costs[taken].mean()))


def grid_tables(ranks: Tensor, losses: Tensor, costs: Tensor, grids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss and mean cost of every combination of levels, from histograms instead of one pass per combination.

    A sample passes exit e at the j-th level of its grid if j >= b_e, the first level that its rank reaches. It takes
    exit e where that holds and j_i < b_i for all earlier exits i; so weights summed into cells (b_0, ..., b_e) and
    accumulated along each axis give the sums of all combinations at once.

    Shape:
        grids: E - 1 falling vectors of lengths G_0, G_1, ... Returns two tensors (G_0, G_1, ...).
    """
    samples, early = ranks.shape[1], len(grids)
    shape = [len(grid) for grid in grids]
    totals = [losses[-1].sum().expand(shape).clone(), (costs[-1] * samples).expand(shape).clone()]
    place = torch.zeros(samples, dtype=torch.int64)
    sides: list[int] = []
    for e, grid in enumerate(grids):
        bins = torch.searchsorted(-grid, -ranks[e].double())  # levels above the score
        sides.append(len(grid) + 1)
        place = place * sides[-1] + bins
        cells = math.prod(sides)
        for total, weights in zip(
            totals, (losses[e] - losses[-1], (costs[e] - costs[-1]).expand(samples)), strict=True
        ):
            table = torch.zeros(cells, dtype=torch.float64).scatter_add_(0, place, weights.double()).view(sides)
            for axis in range(e):  # those with b > j: all minus the running sum up to j
                table = table.sum(axis, keepdim=True) - table.cumsum(axis).narrow(axis, 0, sides[axis] - 1)
            table = table.cumsum(e).narrow(e, 0, sides[e] - 1)
            total += table.view(*table.shape, *[1] * (early - e - 1))
    return totals[0] / samples, totals[1] / samples


def _front(loss: Tensor, cost: Tensor) -> Tensor:
    """Returns the indices of the points that no other point beats in both, by rising loss."""
    order = torch.argsort(cost, stable=True)
    order = order[torch.argsort(loss[order], stable=True)]  # by loss, equal ones by cost
    sorted_cost = cost[order]
    cheaper = torch.ones(len(order), dtype=torch.bool)
    cheaper[1:] = sorted_cost[1:] < sorted_cost.cummin(0).values[:-1] - 1e-12
    return order[cheaper]


def _levels(values: Tensor, count: int, more: Sequence[float]) -> Tensor:
    """Returns falling levels: infinity, quantiles of the values, and those of ``more``."""
    distinct = values[values > -math.inf].double().unique()
    if len(distinct) > count - 1:
        distinct = distinct[torch.linspace(0, len(distinct) - 1, count - 1, dtype=torch.float64).round().long()]
    extra = torch.tensor([math.inf, *more], dtype=torch.float64)
    return torch.cat([extra, distinct]).unique().flip(0)


def pruned_front(
    ranks: Tensor, losses: Tensor, costs: Tensor, grids: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Searches exit by exit; partial choices that others beat in loss and cost are dropped.

    A partial choice is judged by what it does if no sample exits later. Which samples remain matters too, so that the
    best choice may be dropped.

    Shape:
        ranks: (E - 1, N). losses: (E, N). costs: (E,). grids: E - 1 vectors. Returns levels (M, E - 1), mean losses
        (M,) and mean costs (M,) by rising loss.
    """
    samples = ranks.shape[1]
    active = torch.ones(1, samples, dtype=torch.bool)
    levels = torch.empty(1, 0, dtype=torch.float64)
    loss, cost = losses[-1].mean()[None].double(), costs[-1][None].double()
    for e, grid in enumerate(grids):
        exits = ranks[e].double() >= grid[:, None]
        gain = losses[e] - losses[-1]
        gains, fractions = torch.zeros(2, len(active), len(grid), dtype=torch.float64)
        for start in range(0, samples, _ROWS):
            rows = slice(start, start + _ROWS)
            here, exiting = active[:, rows].float(), exits[:, rows].float()
            gains += (here @ (exiting * gain[rows].float()).T).double() / samples
            fractions += (here @ exiting.T).double() / samples
        all_loss = (loss[:, None] + gains).flatten()
        all_cost = (cost[:, None] + fractions * float(costs[e] - costs[-1])).flatten()
        kept = _front(all_loss, all_cost)
        kept = kept[torch.linspace(0, len(kept) - 1, min(_STATES, len(kept))).round().long()]
        state, level = kept // len(grid), kept % len(grid)
        active = active[state] & ~exits[level]
        levels = torch.cat([levels[state], grid[level][:, None]], 1)
        loss, cost = all_loss[kept], all_cost[kept]
    return levels, loss, cost
