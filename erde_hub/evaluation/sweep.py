"""What a policy and its thresholds would do, from records alone: no network runs here."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from erde_hub._arguments import check_whole, plain_threshold
from erde_hub._files import write_text
from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.policies import ExitPolicy, NeverPolicy, PolicyKey, as_policy
from erde_hub.policies.recorded import exit_indices, features_of, score_exits, score_features
from erde_hub.records import ExitRecords, check_kind

from .metrics import ECE_BINS, SampleMetrics, sample_metrics
from .ranking import Decisions, eefp

#: Rows of a default sweep, and thresholds that these are chosen from.
DEFAULT_STEPS, _CANDIDATES = 11, 200


def exit_scores(records: ExitRecords, policy: PolicyKey | ExitPolicy) -> Tensor:
    """Scores every sample at every early exit, as the running model would: in float32.

    Shape:
        Returns (E - 1, N).

    Raises:
        ConfigError: Records of classes and a policy for real numbers, or the other way round.
    """
    policy = as_policy(policy)
    if policy.uses_features:
        return score_features(features_of(records, type(policy).__name__), policy)
    if not isinstance(policy, NeverPolicy):
        records.require_classes(type(policy).__name__, labels=False)
    return score_exits(records.logits, policy)


def route_records(
    records: ExitRecords, policy: PolicyKey | ExitPolicy, threshold: float | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Routes recorded samples as the model would route them live.

    Args:
        records: Logits of every exit.
        policy: A key of the policies table, or a policy.
        threshold: One number, or one per early exit.

    Shape:
        Returns exit indices (N,) int64, 0 for the first exit, and the logits (N, K) of the exit each sample took.

    Raises:
        ThresholdError: NaN, outside the policy's range, or of the wrong length.
        UnknownNameError: There is no policy of that name.
    """
    check_kind(records)
    policy = as_policy(policy)
    thresholds = policy.check_threshold(threshold, records.num_exits - 1)
    index = exit_indices(exit_scores(records, policy), policy, thresholds)
    return index, records.logits[index, torch.arange(records.num_samples)]


def sweep_thresholds(
    records: ExitRecords,
    thresholds: Iterable[float | Sequence[float]] | None = None,
    policy: PolicyKey | ExitPolicy = "entropy",
    bins: int = ECE_BINS,
    sets: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a policy at each threshold; scores and per-sample metrics are computed once for all of them.

    Args:
        records: Logits of every exit.
        thresholds: Each one number for all early exits, or one per early exit. None takes
            :func:`default_thresholds`; pass :func:`fine_thresholds` for a smooth curve.
        policy: A key of the policies table, or a policy.
        bins: Number of right-closed bins of the calibration error.
        sets: Prediction sets of every exit, such as ``ConformalClassifier.fit(held_out).sets(records.logits)``; a
            sample's set is that of the exit that it takes.

    Shape:
        sets: (E, N, K) bool.

    Returns:
        One row per threshold, in the order given: ``threshold`` (infinity is the string ``"inf"``, which JSON can hold
        and ``float`` reads), ``accuracy``, ``mean_macs`` (per sample; heads on the way count, also where nobody can
        leave), ``exit_share`` (fractions, shallow to deep), ``top5`` (above five classes), ``nll``, ``brier``, ``ece``,
        ``aurc``, ``eefp`` (over the decisions that samples come to, see
        :meth:`~erde_hub.evaluation.ranking.Decisions.eefp`; None where it is not defined) and, with sets, ``coverage``
        and ``set_size``.

    Raises:
        ShapeError: The sets are not of these records.
        ThresholdError: NaN, outside the policy's range, or of the wrong length.
        ConfigError: There are no thresholds.
        InputTypeError: ``thresholds`` is a single number, or ``records`` are none.
        UnknownNameError: There is no policy of that name.
    """
    check_kind(records)
    records.require_classes("sweep_thresholds")
    policy = as_policy(policy)
    early = records.num_exits - 1
    if thresholds is None:
        thresholds = default_thresholds(records, policy)
    if isinstance(thresholds, (int, float, str)):
        raise InputTypeError(f"thresholds must be a sequence with one entry per row, got {thresholds!r}: write [...]")
    requested = [plain_threshold(_read_threshold(threshold)) for threshold in thresholds]
    if not requested:
        raise ConfigError("there are no thresholds to sweep: give at least one, or None for the default steps")
    checked = [policy.check_threshold(threshold, early) for threshold in requested]
    scores = exit_scores(records, policy)
    samples = _samples(records, sets)
    decisions = Decisions(samples.confidence, samples.correct)
    rows = []
    for threshold, per_exit in zip(requested, checked, strict=True):
        index = exit_indices(scores, policy, per_exit)
        counts = torch.bincount(index, minlength=records.num_exits)
        cost = sum(count * macs for count, macs in zip(counts.tolist(), records.cumulative_macs, strict=True))
        metrics = samples.at(index).summary(bins)
        rows.append(
            {
                "threshold": _json_threshold(threshold),
                "accuracy": metrics.pop("accuracy"),
                "mean_macs": cost / records.num_samples,
                "exit_share": (counts.double() / records.num_samples).tolist(),
                **metrics,
                "eefp": decisions.eefp(index),
            }
        )
    return rows


def per_exit_metrics(records: ExitRecords, bins: int = ECE_BINS, sets: Tensor | None = None) -> list[dict[str, Any]]:
    """Evaluates each exit as if every sample took it: rows with exit, accuracy, macs and metrics.

    These are top5 (above five classes), nll, brier, ece, aurc, with prediction sets coverage and set_size, and, for
    early exits, eefp, which is None where all samples should exit, or none; see
    :func:`~erde_hub.evaluation.ranking.eefp`.

    Shape:
        sets: (E, N, K) bool.

    Raises:
        ShapeError: The sets are not of these records.
    """
    records.require_classes("per_exit_metrics")
    samples = _samples(records, sets)
    failures = [*eefp(samples.confidence, samples.correct), None]
    rows = []
    for e, (name, macs) in enumerate(zip(records.exit_names, records.cumulative_macs, strict=True)):
        metrics = samples.at(torch.full((records.num_samples,), e)).summary(bins)
        row = {"exit": name, "accuracy": metrics.pop("accuracy"), "macs": macs, **metrics}
        rows.append(row | ({"eefp": failures[e]} if e < records.num_exits - 1 else {}))
    return rows


def _samples(records: ExitRecords, sets: Tensor | None) -> SampleMetrics:
    samples = SampleMetrics.stack([sample_metrics(logits, records.labels) for logits in records.logits])
    return samples if sets is None else samples.with_sets(sets, records.labels)


def default_thresholds(
    records: ExitRecords, policy: PolicyKey | ExitPolicy = "entropy", n: int = DEFAULT_STEPS
) -> list[float]:
    """Returns up to ``n`` rising thresholds whose mean costs are evenly spaced, from no early exit to all.

    They lie in the range of the policy's own scores (entropy: up to log K), have few digits, and no two of them act
    alike on the records. Where no sample exits the threshold is infinity, or 0 for policies that exit below it. For a
    policy that reads none there is one.

    Raises:
        ConfigError: ``n`` is below 2.
    """
    policy = as_policy(policy)
    if not policy.uses_threshold:
        check_whole("n", n, 2)
        return [policy.default_threshold]
    candidates = fine_thresholds(records, policy, max(check_whole("n", n, 2), _CANDIDATES))
    if len(candidates) == 1:
        return candidates
    scores, early = exit_scores(records, policy), records.num_exits - 1
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)

    def cost(threshold: float) -> float:
        return float(macs[exit_indices(scores, policy, [threshold] * early)].mean())

    costs = torch.tensor([cost(threshold) for threshold in candidates], dtype=torch.float64)
    low, high = float(costs.min()), float(costs.max())
    picks = {int((costs - target).abs().argmin()) for target in torch.linspace(low, high, n, dtype=torch.float64)}
    found: dict[float, float] = {}
    for pick in sorted(picks):
        own = float(costs[pick])
        room = 0.0 if own in (low, high) else (high - low) / (4 * n)
        short = (float(f"{candidates[pick]:.{digits}g}") for digits in range(1, 7))
        threshold = next((t for t in short if abs(cost(t) - own) <= room), candidates[pick])
        found.setdefault(cost(threshold), threshold)
    if high == macs[-1]:
        found[high] = policy.threshold_range[1 if policy.leaves_above else 0]
    return sorted(found.values())


def fine_thresholds(records: ExitRecords, policy: PolicyKey | ExitPolicy = "entropy", n: int = 100) -> list[float]:
    """Returns about ``n`` rising thresholds, from never exiting to always exiting or the other way round.

    They are quantiles of all exits' scores, so that neighbours differ for an equal fraction of samples and a curve
    through them is smooth, whatever the distribution. Rounded to six digits. Samples with equal scores exit together.

    Raises:
        ConfigError: ``n`` is below 2.
    """
    policy = as_policy(policy)
    check_whole("n", n, 2)
    if not policy.uses_threshold or records.num_exits == 1:
        return [policy.default_threshold if policy.uses_threshold else 0.0]
    scores = exit_scores(records, policy).flatten()
    scores = scores[scores.isfinite()].double().sort().values
    if not len(scores):  # intervals that are all empty: no sample exits, whatever the threshold
        return [policy.never_threshold]
    picks = torch.linspace(0, len(scores) - 1, n, dtype=torch.float64).round().long()
    lowest, highest = scores[0].item(), scores[-1].item()
    integers = bool((scores == scores.round()).all())
    values = [float(f"{value:.6g}") for value in scores[picks].tolist()]
    # The two ends, which rounding must not move to the wrong side of the outermost score.
    values += [_beyond(lowest, -1, integers), _beyond(highest, 1, integers)]
    low, high = policy.threshold_range
    if policy.never_leaves(low):
        values.append(low)
    return sorted({min(max(value, low), high) for value in values})


def pareto_front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows that no other row beats in both cost and accuracy, by rising cost."""
    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["mean_macs"], -r["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front


def accuracy_at_cost(rows: Sequence[Mapping[str, Any]], macs: float) -> float | None:
    """Returns the accuracy that a sweep reaches at a mean cost, for comparisons at matched cost.

    Linear between neighbours on the Pareto front: what drawing between their two thresholds at random would give.

    Args:
        rows: Rows of :func:`sweep_thresholds`, best of a fine sweep.
        macs: Mean multiply-accumulates per sample.

    Returns:
        A fraction; None where even the cheapest row costs more; the best accuracy where ``macs`` exceeds all rows.

    Raises:
        ConfigError: There are no rows.
    """
    front = pareto_front(rows)
    if not front:
        raise ConfigError("accuracy_at_cost needs at least one row")
    if macs < front[0]["mean_macs"]:
        return None
    for left, right in pairwise(front):
        if macs < right["mean_macs"]:
            fraction = (macs - left["mean_macs"]) / (right["mean_macs"] - left["mean_macs"])
            return left["accuracy"] + fraction * (right["accuracy"] - left["accuracy"])
    return front[-1]["accuracy"]


def write_sweep_csv(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], exit_names: Sequence[str] | None = None
) -> None:
    """Writes a sweep as CSV: one column per number, ``exit_share`` as one column per exit.

    Args:
        rows: Rows of :func:`sweep_thresholds`.
        path: The file; an earlier one is replaced only once the new one is complete.
        exit_names: Name the share columns ``exit_share:NAME`` instead of ``exit_share:0`` and so on.

    Raises:
        ConfigError: There are no rows, or not one name per exit.
        CheckpointWriteError: The file cannot be written.
    """
    if not rows:
        raise ConfigError("there are no rows to write")
    exits = len(rows[0]["exit_share"])
    names = [str(e) for e in range(exits)] if exit_names is None else list(exit_names)
    if len(names) != exits:
        raise ConfigError(f"got {len(names)} exit_names for {exits} exits: {names}")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    keys = [key for key in rows[0] if key != "exit_share"]
    writer.writerow([*keys, *(f"exit_share:{name}" for name in names)])
    for row in rows:
        cells = [" ".join(map(str, row[key])) if isinstance(row[key], list) else row[key] for key in keys]
        writer.writerow([*cells, *row["exit_share"]])
    write_text(path, buffer.getvalue())


def _json_threshold(threshold: float | list[float]) -> Any:
    if isinstance(threshold, list):
        return [_json_threshold(value) for value in threshold]
    return threshold if math.isfinite(threshold) else str(threshold)


def _read_threshold(threshold: Any) -> Any:
    """Undoes :func:`_json_threshold`: the rows of one sweep are thresholds of the next."""
    if isinstance(threshold, list):
        return [_read_threshold(value) for value in threshold]
    return float(threshold) if isinstance(threshold, str) and threshold in ("inf", "-inf") else threshold


def _beyond(value: float, side: int, integers: bool) -> float:
    """A short number just outside ``value``; below it for ``side`` -1, above it for 1."""
    if integers:
        return value + side
    return float(f"{value + side * max(abs(value) * 1e-5, 1e-9):.6g}")
