"""Records of a regression: errors and intervals of every exit, and what routing by the width of intervals does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from erde_hub._arguments import plain_threshold
from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.policies import ExitPolicy
from erde_hub.policies.interval_width import IntervalWidthPolicy
from erde_hub.policies.recorded import exit_indices
from erde_hub.prediction_sets import interval_metrics
from erde_hub.records import ExitRecords

from .sweep import exit_scores, fine_thresholds


def regression_per_exit(records: ExitRecords, intervals: Tensor | None = None) -> list[dict[str, Any]]:
    """Evaluates each exit as if every sample took it.

    Args:
        records: Of a regression.
        intervals: Of every exit and sample, as of :meth:`IntervalWidthPolicy.intervals`.

    Shape:
        intervals: (E, N, D, 2), NaN where empty.

    Returns:
        Rows with ``exit``, ``macs``, ``mae`` and ``rmse`` (means over samples and targets, in the targets' unit); with
        intervals also ``width``, ``coverage``, ``coverage_so_far`` (of this exit and all before), ``nested`` (what is
        left of an interval after cutting it with those before) and ``empty``, fractions all but the first.

    Raises:
        ConfigError: Records of classes.
        ShapeError: Intervals of other samples.
    """
    records.require_regression("regression_per_exit")
    errors = (records.logits - records.labels).double()
    metrics = None if intervals is None else interval_metrics(intervals, records.labels)
    rows = []
    for e, (name, macs) in enumerate(zip(records.exit_names, records.cumulative_macs, strict=True)):
        row = {"exit": name, "macs": macs, **_errors(errors[e])}
        if metrics is not None and intervals is not None:
            row |= {
                "width": metrics.size[e],
                "coverage": metrics.coverage[e],
                "coverage_so_far": metrics.coverage_so_far[e],
                "nested": metrics.consistency[e],
                "empty": intervals[e].isnan().any(-1).double().mean().item(),
            }
        rows.append(row)
    return rows


def sweep_widths(
    records: ExitRecords, policy: ExitPolicy, thresholds: Iterable[float | Sequence[float]] | None = None
) -> list[dict[str, Any]]:
    """Evaluates routing by the width of intervals, at each threshold.

    Args:
        records: Of a regression, with features, that the policy was not fitted on.
        policy: Fitted :class:`~erde_hub.policies.IntervalWidthPolicy`, or ``never``.
        thresholds: Each one width for all early exits, or one per early exit; None takes quantiles of the widths.

    Returns:
        One row per threshold: ``threshold``, ``mae``, ``rmse``, ``mean_macs``, ``exit_share``, and ``width``,
        ``coverage`` and ``empty`` of the intervals at the exits that samples took.

    Raises:
        ThresholdError: NaN, outside the policy's range, or of the wrong length.
        ConfigError: Records of classes, or no thresholds.
        InputTypeError: ``thresholds`` is a single number.
    """
    records.require_regression("sweep_widths")
    if isinstance(thresholds, (int, float, str)):
        raise InputTypeError(f"thresholds must be a sequence with one entry per row, got {thresholds!r}: write [...]")
    requested = [plain_threshold(t) for t in (fine_thresholds(records, policy) if thresholds is None else thresholds)]
    if not requested:
        raise ConfigError("there are no thresholds to sweep: give at least one, or None for quantiles of the widths")
    early, samples = records.num_exits - 1, torch.arange(records.num_samples)
    checked = [policy.check_threshold(threshold, early) for threshold in requested]
    scores = exit_scores(records, policy)
    errors = (records.logits - records.labels).double()
    intervals = policy.intervals(records) if isinstance(policy, IntervalWidthPolicy) else None
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    rows = []
    for threshold, per_exit in zip(requested, checked, strict=True):
        index = exit_indices(scores, policy, per_exit)
        counts = torch.bincount(index, minlength=records.num_exits).double()
        row = {
            "threshold": threshold,
            **_errors(errors[index, samples]),
            "mean_macs": macs[index].mean().item(),
            "exit_share": (counts / records.num_samples).tolist(),
        }
        if intervals is not None:
            taken = intervals[index, samples][None]
            metrics = interval_metrics(taken, records.labels)
            empty = taken.isnan().any(-1).double().mean().item()
            row |= {"width": metrics.size[0], "coverage": metrics.coverage[0], "empty": empty}
        rows.append(row)
    return rows


def _errors(errors: Tensor) -> dict[str, float]:
    return {"mae": errors.abs().mean().item(), "rmse": errors.square().mean().sqrt().item()}
