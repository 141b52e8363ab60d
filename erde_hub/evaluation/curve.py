"""One number for a whole curve of accuracy against cost, with the uncertainty of a finite test set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erde_hub._arguments import check_number, check_whole
from erde_hub.errors import ConfigError, RecordsError
from erde_hub.policies import ExitPolicy, PolicyKey, as_policy
from erde_hub.policies.recorded import exit_indices
from erde_hub.records import ExitRecords, check_kind, distinct_samples

from .sweep import exit_scores, fine_thresholds


@dataclass(frozen=True)
class CurveArea:
    """Mean accuracy over a range of mean costs, of the best points up to each cost.

    Areas are comparable over the same range only: give ``low`` and ``high`` of one to the other, or use
    :func:`area_difference`, which takes the range that both curves reach.

    Attributes:
        area: Between 0 and 1: the accuracy at a cost that is drawn evenly from the range.
        low: Lower end of the range, a fraction of the full model's cost.
        high: Upper end.
        interval: Bootstrap interval over the samples, percentiles.
        level: Probability of the interval.
        resamples: Number of bootstrap samples.
    """

    area: float
    low: float
    high: float
    interval: tuple[float, float]
    level: float
    resamples: int


def curve_area(
    records: ExitRecords,
    policy: PolicyKey | ExitPolicy = "entropy",
    low: float | None = None,
    high: float = 1.0,
    *,
    full_macs: float | None = None,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> CurveArea:
    """Area under the accuracy-MACs curve of all shared thresholds, divided by the width of the range.

    The curve is linear between neighbours, which drawing between their two thresholds at random would give; a point
    that a cheaper one beats counts as that one. Costs that the policy cannot reach have no accuracy: a policy with
    ``patience``, for instance, uses the second exit at least.

    Args:
        records: Of test data; calibrated if the model is.
        policy: A key of the policies table, or a policy.
        low: Lower end of the range as a fraction of the full cost; None is the lowest mean cost that the policy reaches
            on these records.
        high: Upper end.
        full_macs: What fractions refer to; None is the last exit's cost. Give the same to methods that are compared.
        resamples: Bootstrap samples, 0 for no interval (it is then the area twice).
        level: Probability of the interval.
        seed: Of the bootstrap.

    Raises:
        ConfigError: An empty range, or one that begins below what the policy reaches; a number out of its range.
        InputTypeError: No records, or an argument of another type.
    """
    check_kind(records)
    _check_resampling(resamples, level, seed)
    records = distinct_samples(records)
    hits, costs, _ = _curves(records, policy, full_macs)
    low, high = _range([costs], low, high)
    return _summary(_areas(hits, costs, low, high, resamples, seed), low, high, level)


def area_difference(
    records: ExitRecords,
    policy: PolicyKey | ExitPolicy,
    other_records: ExitRecords,
    other_policy: PolicyKey | ExitPolicy,
    low: float | None = None,
    high: float = 1.0,
    *,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> CurveArea:
    """How much larger the first area is than the second, on the same samples, drawn together in each resample.

    Without ``low`` the range begins where both curves do. Fractions of cost refer to the first records' last exit. See
    :func:`curve_area` for the arguments.

    Raises:
        RecordsError: The records are of different samples.
        ConfigError: As :func:`curve_area`.
        InputTypeError: Likewise.
    """
    check_kind(records)
    check_kind(other_records, "other_records")
    _check_resampling(resamples, level, seed)
    if not torch.equal(records.index, other_records.index) or not torch.equal(records.labels, other_records.labels):
        raise RecordsError("the two records are of different samples: collect both on the same split, in one order")
    records, other_records = distinct_samples(records), distinct_samples(other_records)
    hits, costs, reference = _curves(records, policy, None)
    others, other_costs, _ = _curves(other_records, other_policy, reference)
    low, high = _range([costs, other_costs], low, high)
    areas = _areas(hits, costs, low, high, resamples, seed)
    areas = areas - _areas(others, other_costs, low, high, resamples, seed)
    return _summary(areas, low, high, level)


def lowest_cost(
    records: ExitRecords, policy: PolicyKey | ExitPolicy = "entropy", full_macs: float | None = None
) -> float:
    """Returns the lowest mean cost that a policy reaches with a shared threshold, a fraction of the full cost.

    Args:
        records: Of test data.
        policy: A key of the policies table, or a policy.
        full_macs: What the fraction refers to; None is the last exit's cost.
    """
    return _cheapest(_curves(records, policy, full_macs)[1])


def _cheapest(costs: Tensor) -> float:
    """The lowest mean cost of a curve of costs (T, N)."""
    return float(costs.mean(1, dtype=torch.float64).min())


def _summary(areas: Tensor, low: float, high: float, level: float) -> CurveArea:
    """The area of the sample itself, which comes first, and the interval from those of its resamples, if any."""
    resamples = len(areas) - 1
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    bounds = areas[1:].quantile(ends) if resamples else areas[:1].expand(2)
    return CurveArea(float(areas[0]), low, high, (float(bounds[0]), float(bounds[1])), level, resamples)


def _check_resampling(resamples: int, level: float, seed: int) -> None:
    check_whole("resamples", resamples, 0)
    check_number("level", level, zero=False, below=1)
    check_whole("seed", seed, 0)


def _curves(
    records: ExitRecords, policy: PolicyKey | ExitPolicy, full_macs: float | None
) -> tuple[Tensor, Tensor, float]:
    """Correct predictions (T, N) and fractions of cost (T, N) at every threshold, and the cost that these refer to."""
    records.require_classes("the area under a curve of accuracy")
    policy = as_policy(policy)
    scores, early = exit_scores(records, policy), records.num_exits - 1
    correct = (records.logits.argmax(-1) == records.labels).float()
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float32)
    full = records.cumulative_macs[-1] if full_macs is None else check_number("full_macs", full_macs, zero=False)
    thresholds = [*fine_thresholds(records, policy), policy.never_threshold]
    hits, costs = torch.empty(2, len(thresholds), len(records))
    for row, threshold in enumerate(thresholds):
        index = exit_indices(scores, policy, policy.check_threshold(threshold, early))
        hits[row], costs[row] = correct.gather(0, index[None])[0], macs[index] / full
    return hits, costs, float(full)


def _range(curves: list[Tensor], low: float | None, high: float) -> tuple[float, float]:
    """Returns the range of costs, as fractions, that all curves of costs (T, N) reach."""
    cheapest = max(map(_cheapest, curves))
    low = cheapest if low is None else check_number("low", low, zero=True)
    high = check_number("high", high, zero=False)
    if not cheapest - 1e-9 <= low < high:
        raise ConfigError(
            f"the cost range {low:g} to {high:g} must rise and begin at the lowest cost that can be reached,"
            f" {cheapest:.4g} of the full cost, or above"
        )
    return low, high


def _areas(hits: Tensor, costs: Tensor, low: float, high: float, resamples: int, seed: int) -> Tensor:
    """Areas of the sample itself and of its resamples, (1 + B,) float64."""
    samples = hits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for b in range(resamples + 1):
        if b == 0:
            weights = torch.ones(samples)
        else:
            drawn = torch.randint(samples, (samples,), generator=generator)
            weights = torch.bincount(drawn, minlength=samples).float()
        accuracy, cost = (hits @ weights).double() / samples, (costs @ weights).double() / samples
        found.append(_area(cost, accuracy, low, high))
    return torch.tensor(found, dtype=torch.float64)


def _area(cost: Tensor, accuracy: Tensor, low: float, high: float) -> float:
    order = cost.argsort()
    x, y = cost[order], accuracy[order].cummax(0).values
    grid = torch.linspace(low, high, 513, dtype=torch.float64)
    right = torch.searchsorted(x, grid).clamp(1, len(x) - 1)
    left = right - 1
    width = (x[right] - x[left]).clamp_min(1e-12)
    fraction = ((grid - x[left]) / width).clamp(0, 1)
    return float(torch.trapezoid(y[left] + fraction * (y[right] - y[left]), grid) / (high - low))
