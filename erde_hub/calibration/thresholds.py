"""Choosing thresholds from records: an objective gives candidates, a test accepts some of them, a choice comes out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from erde_hub._arguments import check_flag
from erde_hub.errors import ConfigError, RecordsError
from erde_hub.policies import ExitPolicy, PolicyKey, as_policy, policy_name
from erde_hub.records import ExitRecords, check_calibration_data, check_kind

from .choice import ThresholdChoice, describe_bound, samples_without_loss
from .guarantees import LossTest, candidate_losses, candidate_sums
from .objective import (
    Objective,
    check_has_threshold,
    read_candidates,
    read_costs,
    read_method,
    read_objective,
)
from .outcomes import ExitOutcomes, expected_losses
from .search import best_on_grids, best_per_exit, shared_curve
from .selective import count_early_exits, last_supported, selective_risk, supported_risk, thresholds_at_risks
from .threshold_path import STEPS, fit_exit_speeds, threshold_path

#: Fraction of the samples that the speeds of a path per exit are fitted on, and the seed of that split.
_FITTING, _SPLIT_SEED = 0.2, 0
#: Tested samples times bound from which the exact test of the difference is sharper than that of the losses alone.
_MANY = 5
#: Steps of a path whose samples need not be kept apart: fine ones end nearer to what the samples support.
_FINE_STEPS = 4 * STEPS


def choose_threshold(
    records: ExitRecords,
    policy: PolicyKey | ExitPolicy = "entropy",
    *,
    max_accuracy_drop: float | None = None,
    max_disagreement: float | None = None,
    max_brier_increase: float | None = None,
    max_selective_risk: float | None = None,
    max_mean_macs: float | None = None,
    max_mean_milliseconds: float | None = None,
    exit_milliseconds: Sequence[float] | None = None,
    per_exit: bool = False,
    confidence: float | None = None,
    method: str | None = None,
    candidates: Sequence[float] | None = None,
    training_index: Tensor | Sequence[int] | None = None,
    allow_missing_classes: bool = False,
) -> ThresholdChoice:
    """Chooses the threshold, or one per early exit, that saves most within a bound or loses least within a budget.

    Exactly one of the ``max_`` arguments is given. Without ``confidence`` the choice is the best on the records: over
    every shared threshold that makes a difference, or over combinations of one per exit (quantiles, refined around the
    best; a pruned search with more than six early exits). There is no guarantee for other samples, and on few samples
    the bound is easily exceeded on new ones.

    With ``confidence`` the bound holds for new samples of the same kind with that probability over the draw of the
    calibration samples. Candidates are tested in order, from no early exit to all, and the last one before the first
    that fails is taken. Candidates for a shared threshold are the policy's own grid, which does not depend on the
    data. Candidates for one threshold per exit move along the same grid with a speed per exit; the speeds are fitted on
    a fifth of the samples, and the candidates are tested on the others. Where the samples cannot support the request,
    no sample exits early, and the report says what is missing.

    A sample index that occurs more than once in the records counts once, with a warning.

    Args:
        records: Of held-out data, calibrated if the model has a calibrator.
        policy: A key of the policies table, or a policy.
        max_accuracy_drop: Accuracy that may be lost against the last exit, a fraction such as 0.01.
        max_disagreement: Fraction of samples whose prediction may differ from the last exit's.
        max_brier_increase: How much the Brier score (0 to 2) may exceed the last exit's.
        max_selective_risk: Error among the samples that exit early, a fraction such as 0.02; with ``per_exit`` among
            those that take each exit. What the other samples get is not bounded.
        max_mean_macs: Budget of mean multiply-accumulates per sample.
        max_mean_milliseconds: Budget of mean time per sample; needs ``exit_milliseconds``.
        exit_milliseconds: Measured time of a sample that takes each exit, last exit included. With a bound on a loss
            it replaces MACs as what is saved.
        per_exit: One threshold per early exit in place of a shared one.
        confidence: In (0, 1). The records must not hold samples that a calibrator or a learned policy were fitted on
            (``calibrate.py`` leaves them out).
        method: ``ltt`` tests the fraction of samples that lose and does not count gains; ``exact`` tests losses minus
            gains; ``ucb`` tests the same by betting, also for losses that are no counts; ``crc`` bounds the mean loss
            over calibration sets and takes no confidence. None with a confidence: ``exact`` where the bound times the
            tested samples is at least 5 and the losses are counts, otherwise ``ltt``; the number of samples decides,
            not what they show.
        candidates: Thresholds to choose from; None allows all. With a confidence they must not come from these records.
        training_index: Sample indices that the model was trained on, of the same data set; none may be in the records.
        allow_missing_classes: Go on where a class has no sample.

    Raises:
        ConfigError: None or several targets, a bound below 0, a confidence outside (0, 1), a budget below the first
            exit's cost, a method that does not fit.
        UnknownNameError: No such policy or method.
        ThresholdError: A candidate that the policy does not take.
        DataError: The records overlap training data, are too few, or lack a class.
        RecordsError: The model has no early exit.

    References:
        Laufer-Goldshtein et al., Efficiently controlling multiple risks with Pareto testing, 2023, arXiv 2210.07913,
        for finding the order of per-exit candidates on a part of the data. Deviations: the order is one of few paths,
        fitted on a fifth of the data, in place of a front over all combinations.
    """
    check_kind(records)
    policy = as_policy(policy)
    objective = read_objective(
        {
            "accuracy_drop": max_accuracy_drop,
            "disagreement": max_disagreement,
            "brier_increase": max_brier_increase,
            "selective_risk": max_selective_risk,
            "mean_macs": max_mean_macs,
            "mean_milliseconds": max_mean_milliseconds,
        }
    )
    check_flag("per_exit", per_exit)
    costs = read_costs(records.cumulative_macs, exit_milliseconds, objective)
    requested = read_method(method, confidence, objective)
    _check_policy(records, policy)
    records = check_calibration_data(records, training_index, allow_missing_classes)
    grid = None if candidates is None else read_candidates(candidates, policy, records.num_exits - 1)
    outcomes = ExitOutcomes.of(records, policy, objective, costs)
    if requested == "search":
        found = _Found(_best_thresholds(records, outcomes, objective, per_exit, grid), len(records))
        return _report(records, outcomes, objective, found, None, per_exit)
    selective = objective.target == "selective_risk"
    rows = _split(len(records), per_exit or selective)
    if method is None and objective.counts_samples and len(rows[1]) * objective.bound >= _MANY:
        requested = "exact"  # the number of samples decides, not what they show
    test = LossTest(requested, confidence, outcomes.binary)
    if objective.bound == 0:
        found = _Found([policy.never_threshold] * outcomes.early, len(records))
    elif selective:
        found = _last_selective(records, outcomes, objective, test, per_exit, grid, rows)
    else:
        path = _candidate_path(records, outcomes, objective, test, per_exit, grid, rows[0])
        found = _last_supported(outcomes.select(rows[1]), path, test, objective)
    return _report(records, outcomes, objective, found, test, per_exit)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Thresholds of the early exits, on how many samples their guarantee rests, and the smallest bound they support."""

    thresholds: list[float]
    tested: int
    supported_bound: float | None = None


def _check_policy(records: ExitRecords, policy: ExitPolicy) -> None:
    """Refuses records without early exits and policies without a threshold for them."""
    if records.num_exits == 1:
        raise RecordsError("the records have no early exit, so there is no threshold to choose")
    check_has_threshold(type(policy))
    if policy.uses_features:
        raise ConfigError(
            f"{type(policy).__name__} is for real numbers and reads no probabilities: take another policy"
        )


def _split(samples: int, per_exit: bool) -> tuple[Tensor, Tensor]:
    """Returns the rows that fit the speeds of a path per exit, none for a shared threshold, and those that test it."""
    if not per_exit:
        return torch.arange(0), torch.arange(samples)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return order[: int(_FITTING * samples)], order[int(_FITTING * samples) :]


def _best_thresholds(
    records: ExitRecords, outcomes: ExitOutcomes, objective: Objective, per_exit: bool, grid: list[float] | None
) -> list[float]:
    """Returns the best thresholds on the records, one per early exit."""
    if objective.target == "selective_risk" and per_exit:  # every exit keeps the bound, not only all of them together
        return thresholds_at_risks(outcomes, _grid(records, outcomes.policy, grid), [objective.bound])[0]
    if grid is not None:
        return _best_candidates(outcomes, objective, per_exit, grid)
    ranks, early = outcomes.ranks(), outcomes.early
    levels, loss, cost = shared_curve(ranks, outcomes.losses, outcomes.costs)
    shared = float(levels[int(objective.rank(loss, cost).argmin())])
    if not per_exit:
        return [outcomes.threshold_of(ranks, shared)] * early
    best = best_per_exit(ranks, outcomes.losses, outcomes.costs, objective, [shared] * early)
    return [outcomes.threshold_of(ranks[e], level) for e, level in enumerate(best.levels)]


def _best_candidates(outcomes: ExitOutcomes, objective: Objective, per_exit: bool, grid: list[float]) -> list[float]:
    """Returns the best thresholds of a grid, one per early exit."""
    early = outcomes.early
    loss = torch.stack([outcomes.losses_at([t] * early).mean() for t in grid])
    cost = torch.stack([outcomes.costs[outcomes.route([t] * early)].mean() for t in grid])
    shared = int(objective.rank(loss, cost).argmin())
    if not per_exit:
        return [grid[shared]] * early
    ranks = outcomes.ranks()
    levels = [torch.tensor([outcomes.level_of(e, ranks[e], t) for t in grid]).double() for e in range(early)]
    grids = [level.unique().flip(0) for level in levels]  # thresholds with the same level act alike
    start = [float(level[shared]) for level in levels]
    best = best_on_grids(ranks, outcomes.losses, outcomes.costs, grids, objective, start)
    return [grid[int((levels[e] == best.levels[e]).nonzero()[0, 0])] for e in range(early)]


def _candidate_path(
    records: ExitRecords,
    outcomes: ExitOutcomes,
    objective: Objective,
    test: LossTest,
    per_exit: bool,
    candidates: list[float] | None,
    fitting: Tensor,
) -> list[list[float]]:
    """Returns the candidates of a guarantee in the order of their tests, from no early exit to all."""
    policy, early, free = outcomes.policy, outcomes.early, candidates is None
    grid = _grid(records, policy, candidates)
    steps = _FINE_STEPS if test.reads_sums else STEPS
    if per_exit:
        losses = outcomes.losses[:, fitting]
        losses = losses.clamp(min=0) if test.method in ("ltt", "crc") else losses
        if objective.target == "accuracy_drop":
            losses = _smoothed(losses, expected_losses(records.logits[:, fitting]))
        part = dataclasses.replace(outcomes.select(fitting), losses=losses)
        speeds = fit_exit_speeds(part, grid, objective.loss_bound, between=free)
        return threshold_path(policy, grid, speeds, free, steps)
    if free and test.reads_sums and not policy.whole_thresholds:
        return threshold_path(policy, grid, [1.0] * early, free, steps)
    return [[threshold] * early for threshold in grid]


def _last_supported(outcomes: ExitOutcomes, path: list[list[float]], test: LossTest, objective: Objective) -> _Found:
    """Tests the candidates of a path in order and returns the last before the first that fails."""
    bound = objective.loss_bound
    if test.reads_sums:
        index = test.last_accepted_of_sums(*candidate_sums(outcomes, path), outcomes.samples, bound)
        table = candidate_losses(outcomes, path[index : index + 1])
    else:
        table = candidate_losses(outcomes, path)
        index = test.last_accepted(table, bound)
        table = table[: index + 1]
    return _Found(path[index], outcomes.samples, test.supported_bound(table) * objective.scale)


def _grid(records: ExitRecords, policy: ExitPolicy, candidates: list[float] | None) -> list[float]:
    """Returns candidates for one exit from no early exit to all: those that are given, or the policy's own."""
    if candidates is None:
        grid = policy.grid(records.num_classes, records.num_exits - 1)
    else:
        grid = sorted(candidates, reverse=policy.leaves_above)
    return [policy.never_threshold, *(threshold for threshold in grid if not policy.never_leaves(threshold))]


def _last_selective(
    records: ExitRecords,
    outcomes: ExitOutcomes,
    objective: Objective,
    test: LossTest,
    per_exit: bool,
    candidates: list[float] | None,
    rows: tuple[Tensor, Tensor],
) -> _Found:
    """Returns the boldest thresholds whose selective risk a test in a fixed order accepts."""
    grid, (fitting, testing) = _grid(records, outcomes.policy, candidates), map(outcomes.select, rows)
    found = last_supported(fitting, testing, grid, objective.bound, test.level, per_exit)
    if found is None:
        return _Found([outcomes.policy.never_threshold] * outcomes.early, testing.samples)
    taken, wrong = count_early_exits(testing, [found], per_exit)
    return _Found(found, testing.samples, supported_risk(taken[0], wrong[0], test.level))


def _smoothed(losses: Tensor, expected: Tensor) -> Tensor:
    """Returns the mean of losses and expected losses, the latter scaled to the mean of the former.

    Few samples lose anything; the expectation shows how near the others are to a loss. Only the fit of the speeds reads
    this; the test never does.
    """
    ratio = (losses[:-1].sum() / expected[:-1].sum().clamp(min=1e-12)).clamp(0.2, 5.0)
    return (losses + ratio * expected) / 2


def _report(
    records: ExitRecords,
    outcomes: ExitOutcomes,
    objective: Objective,
    found: _Found,
    test: LossTest | None,
    per_exit: bool,
) -> ThresholdChoice:
    thresholds, policy, costs = found.thresholds, outcomes.policy, outcomes.costs
    index = outcomes.route(thresholds)
    never = bool((index == outcomes.early).all())
    if never:  # a threshold that just does not reach any of these samples would be an accident
        thresholds = [policy.never_threshold] * outcomes.early
    fractions = torch.bincount(index, minlength=records.num_exits).double() / len(records)
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    correct = records.logits.argmax(-1) == records.labels
    cost = float(costs @ fractions)
    saving = 1 - cost / float(costs[-1])
    possible = saving if objective.is_budget else max(saving, _possible_saving(outcomes, objective))
    if objective.is_budget:
        value = cost
    elif objective.target == "selective_risk":
        value = selective_risk(*(count[0] for count in count_early_exits(outcomes, [thresholds], per_exit)))
    else:
        value = float(outcomes.losses_at(thresholds).mean()) * objective.scale
    if objective.is_budget and value > objective.bound * (1 + 1e-9):
        raise ConfigError(
            f"no threshold of the policy {policy_name(policy)!r} keeps a mean cost of"
            f" {describe_bound(objective.target, objective.bound)} on these records: raise the budget, or take another"
            " policy"
        )
    return ThresholdChoice(
        threshold=thresholds if per_exit else thresholds[0],
        policy=policy_name(policy),
        target=objective.target,
        bound=objective.bound,
        confidence=None if test is None else test.confidence,
        method="search" if test is None else test.method,
        per_exit=per_exit,
        samples=len(records),
        tested=found.tested,
        value=value,
        upper_bound=found.supported_bound,
        accuracy=float(correct.gather(0, index[None]).double().mean()),
        full_accuracy=float(correct[-1].double().mean()),
        mean_macs=float(macs @ fractions),
        full_macs=records.cumulative_macs[-1],
        saving=saving,
        possible_saving=possible,
        exit_share=fractions.tolist(),
        never_exits=never,
        advice=_advice(objective, found.tested, len(records), test, never, saving, possible, per_exit),
        dataset=records.info.get("dataset", ""),
        split=records.info.get("split", ""),
        fingerprint=records.fingerprint,
    )


def _possible_saving(outcomes: ExitOutcomes, objective: Objective) -> float:
    """Returns what the best shared threshold saves if the bound only has to hold on these samples."""
    _, loss, cost = shared_curve(outcomes.ranks(), outcomes.losses, outcomes.costs)
    cheapest = float(cost[loss <= objective.loss_bound + 1e-12].min())
    return 1 - cheapest / float(outcomes.costs[-1])


def _advice(
    objective: Objective,
    tested: int,
    samples: int,
    test: LossTest | None,
    never: bool,
    saving: float,
    possible: float,
    per_exit: bool,
) -> str:
    """Says what is missing, in one or two sentences."""
    if test is None:
        return "No sample exits early: no candidate meets the objective." if never else ""
    if objective.bound == 0:
        return "No sample exits early: no number of samples can guarantee a bound of 0; give a positive bound."
    parts = []
    needed = _needed_samples(objective.bound / objective.scale, test)
    if never and objective.target == "selective_risk":
        which = "each exit" if per_exit else "an early exit"
        parts.append(
            f"No sample exits early: the {tested:,} samples that were tested cannot show the bound. Even where all"
            f" early answers are right, {needed:,} samples must take {which}, and"
            " several times as many where some are wrong. Collect more, or give a wider bound or a lower confidence."
        )
    elif never and tested < needed:
        parts.append(
            f"No sample exits early: even if no sample lost anything, {needed:,} are needed for this bound and"
            f" confidence, and there are {tested:,}. Collect more, or give a wider bound or a lower confidence."
        )
    elif never:
        parts.append(
            f"No sample exits early: the most careful candidate loses too much on {tested:,} samples to guarantee the"
            " bound."
        )
    if possible > saving + 0.005:
        parts.append(
            f"On these {samples:,} samples a bolder threshold, which saves {100 * possible:.1f} %, keeps the bound, but"
            " so few samples cannot show that it does on others too; more samples bring the guaranteed saving nearer to"
            " that."
        )
    return " ".join(parts)


def _needed_samples(bound: float, test: LossTest) -> int:
    """Returns how many samples a test needs to accept anything, if none of them loses."""
    if test.method == "crc" or not 0 < bound < 1:
        return math.ceil(1 / max(bound, 1e-9)) - 1
    level = test.level / 8 if test.method == "ucb" else test.level  # the wealth is spread over eight bets
    return samples_without_loss(bound, 1 - level)
