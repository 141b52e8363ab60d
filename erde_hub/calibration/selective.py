"""Selective risk: the error among the samples that exit early, at every exit or at all of them together.

Outcomes here are those of the target ``selective_risk``: the loss of an early exit is above 0 where it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .outcomes import ExitOutcomes
from .p_values import upper_limit
from .threshold_path import first_steps, step_sums

#: Risks, as multiples of the bound, for which thresholds per exit are fitted, from careful to bold.
_RISKS = [0.05 * step for step in range(1, 41)]
#: A fitted exit is tried where its p-value, as the fitting samples foretell it, is below the level divided by this.
_MARGIN = 10


def count_early_exits(outcomes: ExitOutcomes, path: Sequence[list[float]], per_exit: bool) -> tuple[Tensor, Tensor]:
    """Counts the samples that exit early, and how many of them are wrong, for each candidate.

    Args:
        outcomes: Of the samples.
        path: Candidates, one threshold per early exit each. Unless ``per_exit``, no sample that passes an exit at one
            candidate may fail to pass it at a later one.
        per_exit: Count each early exit for itself.

    Shape:
        Returns two tensors (C, G), with G early exits or one group for all of them.
    """
    wrong = outcomes.losses > 0
    if not per_exit:
        early = torch.ones_like(outcomes.losses, dtype=torch.float64)
        early[-1] = 0
        first = first_steps(outcomes.scores, outcomes.policy, path)
        taken, errors = step_sums(first, (early, early * wrong), len(path)).round().long()
        return taken[:, None], errors[:, None]
    rows = []
    for thresholds in path:
        index = outcomes.route(thresholds)
        missed = index[wrong.gather(0, index[None])[0]]
        rows.append([torch.bincount(taken, minlength=outcomes.early + 1)[:-1] for taken in (index, missed)])
    taken, errors = (torch.stack(column) for column in zip(*rows, strict=True))
    return taken, errors


def selective_risk(taken: Tensor, wrong: Tensor) -> float:
    """Returns the largest error of a group (G,), 0 where no sample exits early."""
    return float((wrong / taken.clamp(min=1)).max())


def supported_risk(taken: Tensor, wrong: Tensor, level: float) -> float:
    """Returns the smallest bound that is accepted at a level: Clopper and Pearson's limit of the worst group (G,)."""
    counts = zip(wrong.tolist(), taken.tolist(), strict=True)
    return max((upper_limit(errors, samples, level) for errors, samples in counts if samples), default=1.0)


def risk_p_values(taken: Tensor, wrong: Tensor, bound: float) -> Tensor:
    """P-values of "the error of this group is above the bound".

    Given how many samples take a group, their errors are binomial, so that the test of each is exact. A candidate is
    accepted where those of all its groups are small, which needs no correction for their number (intersection-union
    test); a group that no sample takes has 0, or 1 where no sample exits early at all.

    Shape:
        taken, wrong: (..., G). Returns (..., G) float64.
    """
    from scipy.stats import binom  # noqa: PLC0415 - takes a second to import

    values = torch.from_numpy(binom.cdf(wrong.numpy(), taken.numpy(), bound))
    return torch.where(taken > 0, values, (~(taken > 0).any(-1, keepdim=True)).double())


def thresholds_at_risks(
    outcomes: ExitOutcomes,
    grid: Sequence[float],
    risks: Sequence[float],
    promising: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[list[float]]:
    """Returns, per risk, the boldest threshold of a grid at which every exit keeps it on these samples.

    Exits choose one after the other, shallow to deep, among the samples that the earlier ones leave; no sample takes an
    exit that cannot keep the risk.

    Args:
        outcomes: Of the samples.
        grid: Thresholds from no early exit to all.
        risks: Errors among the samples that take an exit.
        promising: Which numbers of samples and errors, (C,) each, may be chosen; None allows all.
    """
    steps = first_steps(outcomes.scores, outcomes.policy, [[threshold] * outcomes.early for threshold in grid])
    wrong, rows, size = outcomes.losses > 0, [], len(grid)
    for risk in risks:
        left, row = torch.ones(outcomes.samples, dtype=torch.bool), []
        for e in range(outcomes.early):
            some = left, left & wrong[e]
            taken, errors = (torch.bincount(steps[e][rows], minlength=size + 1)[:size].cumsum(0) for rows in some)
            kept = (errors <= risk * taken) & (taken > 0)
            kept = (kept if promising is None else kept & promising(taken, errors)).nonzero()
            place = int(kept[-1, 0]) if len(kept) else 0
            row.append(grid[place])
            left &= steps[e] > place
        rows.append(row)
    return rows


def last_supported(
    fitting: ExitOutcomes, testing: ExitOutcomes, grid: Sequence[float], bound: float, level: float, per_exit: bool
) -> list[float] | None:
    """Returns the last thresholds that a test in a fixed order accepts, None where the first fails.

    Candidates are the thresholds of the grid, for all exits alike, or thresholds per exit that keep rising risks on the
    samples ``fitting``. Where few samples exit, no bound on their error can be shown. So the order begins at the
    candidate that looks easiest to show on other samples, goes on to bolder ones, and ends before the first that fails.

    References:
        Learn then Test, arXiv 2110.01052, section 4.2 (fixed sequences), for the error of a selection, which SAFE-KD
        bounds, arXiv 2602.03043. Deviations: exact binomial tests; the order is made on a part of the data.
    """
    scale = testing.samples / max(fitting.samples, 1)

    def foretold(taken: Tensor, wrong: Tensor) -> Tensor:
        """P-values of as many samples as are tested, if one more of the fitting samples were wrong."""
        return risk_p_values((taken * scale).ceil(), ((wrong + 1) * scale).ceil(), bound)

    if per_exit:
        path = thresholds_at_risks(
            fitting,
            grid,
            [factor * bound for factor in _RISKS],
            lambda taken, wrong: foretold(taken[:, None], wrong[:, None])[:, 0] <= level / _MARGIN,
        )
    else:
        path = [[threshold] * fitting.early for threshold in grid]
    start = int(foretold(*count_early_exits(fitting, path, per_exit)).amax(1).argmin())
    accepted = risk_p_values(*count_early_exits(testing, path[start:], per_exit), bound).amax(1) <= level
    failed = (~accepted).nonzero()
    count = int(failed[0, 0]) if len(failed) else len(accepted)
    return path[start + count - 1] if count else None
