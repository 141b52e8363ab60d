"""Exact searches over thresholds on recorded scores: every shared threshold, or every combination of one per exit.

Scores are handed in as *ranks* u: larger ones leave first, whichever way the policy compares. A threshold is then a
*level* v, and u >= v leaves; infinity lets nobody leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Combinations of per-exit levels that are tried at a time, at most.
_CELLS = 400_000
#: Early exits up to which all combinations are tried; beyond, partial choices are pruned exit by exit.
_EXHAUSTIVE = 6
#: Partial choices kept per exit, and levels tried for each, in the pruned search.
_STATES, _LEVELS = 192, 20


@dataclass(frozen=True)
class Point:
    """One choice of levels, one per early exit, with what it does on the records."""

    levels: tuple[float, ...]
    loss: float
    cost: float


#: Tells which of two points is wanted: the smaller key.
Wish = Callable[[Tensor, Tensor], Tensor]


def at_most(bound: float) -> Wish:
    """The cheapest among those with a mean loss of at most ``bound``; among equally cheap ones the smallest loss."""

    def key(loss: Tensor, cost: Tensor) -> Tensor:
        return torch.where(loss <= bound + 1e-12, cost + 1e-9 * loss, math.inf)

    return key


def within(budget: float) -> Wish:
    """The smallest loss among those with a mean cost of at most ``budget``; among equally good ones the cheapest."""

    def key(loss: Tensor, cost: Tensor) -> Tensor:
        return torch.where(cost <= budget * (1 + 1e-12), loss + 1e-9 * cost, math.inf)

    return key


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
        # At a level of best[e] the sample moves to exit e, from the exit where it left until then.
        record = best[e] > best[e - 1] if e else best[e] > -math.inf
        levels.append(best[e][record])
        loss_steps.append((losses[e] - losses.gather(0, following[None])[0])[record])
        cost_steps.append((costs[e] - costs[following])[record])
        following = torch.where(record, torch.full_like(following, e), following)
    level, order = torch.cat(levels).sort(descending=True)
    loss = losses[-1].sum() + torch.cat(loss_steps)[order].cumsum(0)
    cost = costs[-1] * samples + torch.cat(cost_steps)[order].cumsum(0)
    last = torch.ones_like(level, dtype=torch.bool)
    last[:-1] = level[:-1] != level[1:]  # equal scores leave together
    first = torch.tensor([math.inf], dtype=torch.float64)
    return (
        torch.cat([first, level[last]]),
        torch.cat([losses[-1].sum()[None], loss[last]]) / samples,
        torch.cat([costs[-1:] * samples, cost[last]]) / samples,
    )


def best_per_exit(ranks: Tensor, losses: Tensor, costs: Tensor, wish: Wish, start: Sequence[float]) -> Point:
    """Searches one level per exit: all combinations of quantiles, then again between the neighbours of the best.

    Args:
        ranks: (E - 1, N).
        losses: (E, N).
        costs: (E,).
        wish: What is wanted.
        start: Levels that are tried too, such as the best shared one, so that the result is never worse.
    """
    early = ranks.shape[0]
    if early > _EXHAUSTIVE:
        return _pruned(ranks, losses, costs, wish, start)
    count = max(3, min(200, int(_CELLS ** (1 / early))))
    grids = [_levels(ranks[e], count, [start[e]]) for e in range(early)]
    point = best_on_grid(ranks, losses, costs, grids, wish)
    for _ in range(3):
        around = []
        for e, grid in enumerate(grids):
            at = (grid == point.levels[e]).nonzero()[0, 0]
            high, low = grid[max(int(at) - 1, 0)], grid[min(int(at) + 1, len(grid) - 1)]
            inside = ranks[e][(ranks[e] <= high) & (ranks[e] >= low)]
            around.append(_levels(inside, count, [point.levels[e]]))
        grids = around
        point = best_on_grid(ranks, losses, costs, grids, wish)
    return point


def best_on_grid(ranks: Tensor, losses: Tensor, costs: Tensor, grids: Sequence[Tensor], wish: Wish) -> Point:
    """Returns the best of all combinations of the grids' levels (falling, one grid per early exit)."""
    loss, cost = grid_tables(ranks, losses, costs, grids)
    cell = int(wish(loss, cost).flatten().argmin())
    index = torch.unravel_index(torch.tensor(cell), loss.shape)
    levels = tuple(float(grid[i]) for grid, i in zip(grids, index, strict=True))
    return Point(levels, float(loss.flatten()[cell]), float(cost.flatten()[cell]))


def grid_tables(ranks: Tensor, losses: Tensor, costs: Tensor, grids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss and mean cost of every combination of levels, from histograms instead of one pass per combination.

    A sample leaves exit e at the j-th level of its grid if j >= b_e, the first level that its score reaches. It takes
    exit e where that holds and j_i < b_i for all exits i before; so weights summed into cells (b_0, ..., b_e) and
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
    """Indices of the points that no other one beats in both, by rising loss."""
    order = torch.argsort(cost, stable=True)
    order = order[torch.argsort(loss[order], stable=True)]  # by loss, equal ones by cost
    sorted_cost = cost[order]
    cheaper = torch.ones(len(order), dtype=torch.bool)
    cheaper[1:] = sorted_cost[1:] < sorted_cost.cummin(0).values[:-1] - 1e-12
    return order[cheaper]


def _levels(values: Tensor, count: int, more: Sequence[float]) -> Tensor:
    """Falling levels: infinity, quantiles of the values, and some more."""
    distinct = values[values > -math.inf].double().unique()
    if len(distinct) > count - 1:
        distinct = distinct[torch.linspace(0, len(distinct) - 1, count - 1, dtype=torch.float64).round().long()]
    extra = torch.tensor([math.inf, *more], dtype=torch.float64)
    return torch.cat([extra, distinct]).unique().flip(0)


def _pruned(ranks: Tensor, losses: Tensor, costs: Tensor, wish: Wish, start: Sequence[float]) -> Point:
    """Picks from :func:`_pruned_front`, or keeps the starting choice where that one is better."""
    single = [torch.tensor([level], dtype=torch.float64) for level in start]
    known = best_on_grid(ranks, losses, costs, single, wish)
    levels, loss, cost = _pruned_front(ranks, losses, costs, start)
    key = wish(loss, cost)
    best = int(key.argmin())
    if float(key[best]) > float(wish(torch.tensor(known.loss), torch.tensor(known.cost))):
        return known
    return Point(tuple(levels[best].tolist()), float(loss[best]), float(cost[best]))


def _pruned_front(
    ranks: Tensor, losses: Tensor, costs: Tensor, start: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic search over the exits: partial choices that others beat in loss and cost are dropped on the way.

    A partial choice is judged by what it would do if nobody left behind it. Which samples are left matters too, so that
    dropping may lose the best choice.

    Returns:
        Levels (M, E - 1), mean losses (M,) and mean costs (M,) by rising loss.
    """
    early, samples = ranks.shape
    stay = torch.ones(1, samples)
    levels = torch.empty(1, 0, dtype=torch.float64)
    loss, cost = losses[-1].mean()[None].double(), costs[-1][None].double()
    for e in range(early):
        grid = _levels(ranks[e], _LEVELS, [start[e]])
        leave = (ranks[e].double() >= grid[:, None]).float()
        gain = (losses[e] - losses[-1]).float()
        all_loss = (loss[:, None] + (stay @ (leave * gain).T).double() / samples).flatten()
        shares = (stay @ leave.T).double() / samples
        all_cost = (cost[:, None] + shares * float(costs[e] - costs[-1])).flatten()
        kept = _front(all_loss, all_cost)
        kept = kept[torch.linspace(0, len(kept) - 1, min(_STATES, len(kept))).round().long()]
        state, level = kept // len(grid), kept % len(grid)
        stay = stay[state] * (1 - leave[level])
        levels = torch.cat([levels[state], grid[level][:, None]], 1)
        loss, cost = all_loss[kept], all_cost[kept]
    return levels, loss, cost
