"""Choosing thresholds from records: for a budget, or for a bound on what leaving early may lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from erde_hub._arguments import check_flag
from erde_hub.errors import ConfigError
from erde_hub.policies import ExitPolicy, as_policy, policy_name
from erde_hub.policies.recorded import exit_indices, score_exits
from erde_hub.records import check_kind

from .choice import ThresholdChoice, describe_bound, samples_without_loss
from .guarantees import candidate_losses, candidate_sums, certify, certify_sums, reads_sums, supported_bound
from .objective import BINARY, BUDGETS, check_records, read_candidates, read_costs, read_method, read_target
from .search import Wish, at_most, best_on_grid, best_per_exit, shared_curve, within
from .threshold_path import STEPS, find_factors, walk

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords

#: Share of the samples that finds the candidates of a per-exit search with a guarantee, and the seed of that split.
_FINDING, _SPLIT_SEED = 0.2, 0
#: Tested samples times bound from which the exact test of the difference is sharper than that of the losses alone.
_MANY = 5
#: Steps of a walk whose samples need not be kept apart: fine ones end nearer to what the samples support.
_FINE_STEPS = 4 * STEPS


def choose_threshold(
    records: ExitRecords,
    policy: str | ExitPolicy = "entropy",
    *,
    max_accuracy_drop: float | None = None,
    max_disagreement: float | None = None,
    max_brier_increase: float | None = None,
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

    Exactly one of the ``max_`` arguments says what is wanted. Without ``confidence`` the choice is the best on the
    records: over every shared threshold that makes a difference, or over all combinations of one per exit (quantiles,
    refined around the best; from eight exits on a pruned search). Nothing is promised for other samples, and on few
    samples the bound is easily exceeded on new ones.

    With ``confidence`` the bound holds for new samples of the same kind with that probability over the draw of the
    calibration samples. Candidates are tested from nobody leaving to everybody, and the last one before the first that
    fails is taken. A shared threshold walks along the policy's own grid, which no data have touched; one per exit
    walks along the same grid at a speed of its own for each exit; the speeds are found on a fifth of the samples, and
    the walk is tested on the others. Where the samples cannot support what is asked, nobody leaves, and the report says
    what is missing.

    Args:
        records: Of held-out data, calibrated if the model has a calibrator.
        policy: A key of the policies table, or a policy.
        max_accuracy_drop: Accuracy that may be lost against the last exit, a fraction such as 0.01.
        max_disagreement: Share of samples whose answer may differ from the last exit's.
        max_brier_increase: How much the Brier score (0 to 2) may exceed the last exit's.
        max_mean_macs: Budget of mean multiply-accumulates per sample.
        max_mean_milliseconds: Budget of mean time per sample; needs ``exit_milliseconds``.
        exit_milliseconds: Measured time of a sample that leaves at each exit, last exit included. With a bound on a
            loss it replaces MACs as what is saved.
        per_exit: One threshold per early exit in place of a shared one.
        confidence: In (0, 1). It speaks of other samples than those that a calibrator or a learned policy were fitted
            on: leave these out of the records (``calibrate.py`` does).
        method: ``ltt`` tests the share of samples that lose, gains not counted, so that a bound of 0.01 holds for them
            alone; ``exact`` tests losses minus gains; ``ucb`` does the same by betting, for losses that are no counts
            too; ``crc`` bounds the loss on average over calibration sets and takes no confidence. None with a
            confidence: ``exact`` where the bound times the tested samples is at least 5 and the losses are counts,
            otherwise ``ltt``; the number of samples decides, never what they show.
        candidates: Thresholds to choose from, in place of all; they must not come from these records where a
            confidence is asked for.
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
        for finding the order of per-exit candidates on a part of the data. Deviations: the order is one of few walks,
        which a fifth of the data finds, in place of a front over all combinations.
    """
    targets = {
        "accuracy_drop": max_accuracy_drop,
        "disagreement": max_disagreement,
        "brier_increase": max_brier_increase,
        "mean_macs": max_mean_macs,
        "mean_milliseconds": max_mean_milliseconds,
    }
    check_kind(records)
    policy = as_policy(policy)
    target, bound = read_target(targets)
    check_flag("per_exit", per_exit)
    costs = read_costs(records.cumulative_macs, exit_milliseconds, target, bound)
    tested = records.num_samples - (int(_FINDING * records.num_samples) if per_exit else 0)
    if method is None and confidence is not None and target in BINARY:
        method = "exact" if tested * bound >= _MANY else "ltt"
    method = read_method(method, confidence, target)
    check_records(records, policy, training_index, allow_missing_classes)
    early = records.num_exits - 1
    scores = score_exits(records.logits, policy)
    losses, scale = exit_losses(records.logits, records.labels, target)
    wish = within(bound) if target in BUDGETS else at_most(bound / scale)
    grid = None if candidates is None else read_candidates(candidates, policy, early)
    if method != "search" and bound == 0:
        thresholds, tested, upper = [policy.never_threshold] * early, records.num_samples, None
    elif method == "search":
        thresholds = _search(scores, losses, costs, policy, wish, per_exit, grid)
        tested, upper = records.num_samples, None
    else:
        thresholds, tested, upper = _guaranteed(
            scores, losses, costs, policy, bound / scale, confidence, method, per_exit, grid, records.num_classes,
            expected_losses(records.logits) if per_exit and target == "accuracy_drop" else None,
        )  # fmt: skip
    return _report(
        records, scores, losses, costs, policy, thresholds,
        target=target, bound=bound, scale=scale, confidence=confidence, method=method, per_exit=per_exit,
        tested=tested, upper_bound=None if upper is None else upper * scale,
        timed=exit_milliseconds is not None,
    )  # fmt: skip


def exit_losses(logits: Tensor, labels: Tensor, target: str) -> tuple[Tensor, float]:
    """What leaving at each exit loses against the last one, per sample, divided by a scale so that it is in [-1, 1].

    Shape:
        logits: (E, N, K). labels: (N,). Returns (E, N) float64, the last row 0, and the scale.
    """
    if target == "brier_increase":
        parts = []
        for exit_logits in logits:
            probs = exit_logits.double().softmax(-1)
            parts.append(probs.square().sum(-1) - 2 * probs.gather(1, labels[:, None])[:, 0])
        brier = torch.stack(parts)
        return (brier - brier[-1]) / 2, 2.0
    answers = logits.argmax(-1)
    wrong = (answers != (answers[-1] if target == "disagreement" else labels)).double()
    return wrong - wrong[-1], 1.0


def expected_losses(logits: Tensor) -> Tensor:
    """The accuracy that leaving at each exit loses if the last exit's probabilities are right; every sample tells some.

    Shape:
        logits: (E, N, K). Returns (E, N) float64 in [0, 1], the last row 0.
    """
    probs, answers = logits[-1].double().softmax(-1), logits.argmax(-1)
    believed = torch.stack([probs.gather(1, answer[:, None])[:, 0] for answer in answers])
    return believed[-1] - believed


def _search(
    scores: Tensor,
    losses: Tensor,
    costs: Tensor,
    policy: ExitPolicy,
    wish: Wish,
    per_exit: bool,
    grid: list[float] | None,
) -> list[float]:
    """The best thresholds on the records, one per exit."""
    ranks, early = _ranks(scores, policy), len(scores)
    if grid is not None:
        if per_exit:
            # The level of a threshold: the lowest score that passes it. Others that share it act alike.
            levels = [
                torch.tensor([_level(ranks[e], scores[e], policy, t) for t in grid]).double() for e in range(early)
            ]
            best = best_on_grid(ranks, losses, costs, [level.unique().flip(0) for level in levels], wish)
            return [grid[int((levels[e] == best.levels[e]).nonzero()[0, 0])] for e in range(early)]
        index = torch.stack([exit_indices(scores, policy, [t] * early) for t in grid])
        loss = torch.stack([losses.gather(0, i[None])[0].mean() for i in index])
        return [grid[int(wish(loss, costs[index].mean(1)).argmin())]] * early
    levels_, loss, cost = shared_curve(ranks, losses, costs)
    shared = float(levels_[int(wish(loss, cost).argmin())])
    if not per_exit:
        return [_threshold(policy, ranks, shared)] * early
    best = best_per_exit(ranks, losses, costs, wish, [shared] * early)
    return [_threshold(policy, ranks[e], level) for e, level in enumerate(best.levels)]


def _guaranteed(
    scores: Tensor,
    losses: Tensor,
    costs: Tensor,
    policy: ExitPolicy,
    bound: float,
    confidence: float | None,
    method: str,
    per_exit: bool,
    grid: list[float] | None,
    classes: int,
    expected: Tensor | None,
) -> tuple[list[float], int, float | None]:
    early, samples = scores.shape
    part = torch.arange(samples)
    free = grid is None
    # In the order of the policy: nobody leaving first.
    grid = policy.grid(classes, early) if grid is None else sorted(grid, reverse=policy.leaves_above)
    grid = [policy.never_threshold, *(threshold for threshold in grid if not policy.never_leaves(threshold))]
    binary = bool((losses == losses.round()).all())
    fine = reads_sums(method, binary)
    steps = _FINE_STEPS if fine else STEPS
    if per_exit:
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(_SPLIT_SEED))
        finding, part = order[: int(_FINDING * samples)], order[int(_FINDING * samples) :]
        lost = losses[:, finding].clamp(min=0) if method in ("ltt", "crc") else losses[:, finding]
        if expected is not None:
            lost = _smoothed(lost, expected[:, finding])
        factors = find_factors(scores[:, finding], lost, costs, policy, grid, bound, between=free)
        path = walk(policy, grid, factors, free, steps)
    elif free and fine and not policy.whole_thresholds:
        path = walk(policy, grid, [1.0] * early, free, steps)
    else:
        path = [[threshold] * early for threshold in grid]
    scores, losses = scores[:, part], losses[:, part]
    if fine:
        sums = candidate_sums(scores, losses, policy, path)
        index = certify_sums(*sums, len(part), bound, confidence, method, binary)
        table = candidate_losses(scores, losses, policy, path[index : index + 1])
    else:
        table = candidate_losses(scores, losses, policy, path)
        index = certify(table, bound, confidence, method, binary)
        table = table[: index + 1]
    return path[index], len(part), supported_bound(table, confidence, method, binary)


def _smoothed(losses: Tensor, expected: Tensor) -> Tensor:
    """Half of what samples lose and half of what they are expected to lose, brought to the same mean.

    Few samples lose anything; the expectation says of all others how near they are to it. Only the search of candidates
    reads this, the test never does.
    """
    ratio = (losses[:-1].sum() / expected[:-1].sum().clamp(min=1e-12)).clamp(0.2, 5.0)
    return (losses + ratio * expected) / 2


def _report(
    records: ExitRecords,
    scores: Tensor,
    losses: Tensor,
    costs: Tensor,
    policy: ExitPolicy,
    thresholds: list[float],
    *,
    target: str,
    bound: float,
    scale: float,
    confidence: float | None,
    method: str,
    per_exit: bool,
    tested: int,
    upper_bound: float | None,
    timed: bool,
) -> ThresholdChoice:
    index = exit_indices(scores, policy, thresholds)
    never = bool((index == len(scores)).all())
    if never:  # a threshold that just does not reach any of these samples would be an accident
        thresholds = [policy.never_threshold] * len(scores)
    shares = torch.bincount(index, minlength=records.num_exits).double() / records.num_samples
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    right = records.logits.argmax(-1) == records.labels
    value = float(losses.gather(0, index[None]).mean()) * scale
    saving = 1 - float(costs @ shares) / float(costs[-1])
    possible = saving
    if target in BUDGETS:
        value = float(costs @ shares)
        if value > bound * (1 + 1e-9):
            raise ConfigError(
                f"no threshold of the policy {policy_name(policy)!r} keeps a mean cost of"
                f" {describe_bound(target, bound)} on these records: ask for more, or take another policy"
            )
    else:
        _, loss, cost = shared_curve(_ranks(scores, policy), losses, costs)
        cheapest = float(cost[loss <= bound / scale + 1e-12].min())
        possible = max(saving, 1 - cheapest / float(costs[-1]))
    return ThresholdChoice(
        threshold=thresholds if per_exit else thresholds[0],
        policy=policy_name(policy),
        target=target,
        bound=bound,
        confidence=confidence,
        method=method,
        per_exit=per_exit,
        samples=records.num_samples,
        tested=tested,
        value=value,
        upper_bound=upper_bound,
        accuracy=float(right.gather(0, index[None]).double().mean()),
        full_accuracy=float(right[-1].double().mean()),
        mean_macs=float(macs @ shares),
        full_macs=records.cumulative_macs[-1],
        saving=saving,
        possible_saving=possible,
        exit_share=shares.tolist(),
        never_exits=never,
        advice=_advice(never, method, bound / scale, confidence, records.num_samples, tested, saving, possible),
        dataset=records.info.get("dataset", ""),
        split=records.info.get("split", ""),
        fingerprint=records.fingerprint,
    )


def _advice(
    never: bool,
    method: str,
    bound: float,
    confidence: float | None,
    samples: int,
    tested: int,
    saving: float,
    possible: float,
) -> str:
    """Says what is missing, in one or two sentences."""
    if method == "search":
        return "Nobody leaves: no candidate keeps what was asked." if never else ""
    needed = math.ceil(1 / max(bound, 1e-9)) - 1
    if method != "crc" and 0 < bound < 1:
        needed = samples_without_loss(bound, float(confidence or 0))
        if method == "ucb":  # the wealth is spread over eight bets
            needed = samples_without_loss(bound, 1 - (1 - float(confidence or 0)) / 8)
    seen = (
        f"On these {samples:,} samples a bolder threshold, which saves {100 * possible:.1f} %, keeps the bound, but so"
        " few cannot show that it does on others too; with more, the promise comes nearer to that."
    )
    seen = seen if possible > saving + 0.005 else ""
    if bound == 0:
        return "Nobody leaves: a bound of 0 cannot be promised from any number of samples; give a positive one."
    reason = ""
    if never and tested < needed:
        reason = (
            f"Nobody leaves: even if no sample lost anything, {needed:,} are needed for this bound and confidence, and"
            f" there are {tested:,}. Collect more, or ask for a wider bound or a lower confidence."
        )
    elif never:
        reason = f"Nobody leaves: the most careful candidate loses too much on {tested:,} samples to promise the bound."
    return " ".join(part for part in (reason, seen) if part)


# Thresholds and ranks


def _ranks(scores: Tensor, policy: ExitPolicy) -> Tensor:
    """Scores turned so that larger ones leave first; those that no threshold lets leave are minus infinity."""
    ranks = (scores if policy.leaves_above else -scores).double()
    stuck = ranks.isnan()
    if policy.leaves_above:
        stuck |= ranks < policy.threshold_range[0]
    return ranks.masked_fill(stuck, -math.inf)


def _level(ranks: Tensor, scores: Tensor, policy: ExitPolicy, threshold: float) -> float:
    """The lowest rank that leaves at a threshold; infinity if none does."""
    if policy.never_leaves(threshold):
        return math.inf
    leaving = ranks[policy.compare(scores, threshold)]
    return float(leaving.min()) if len(leaving) else math.inf


def _threshold(policy: ExitPolicy, ranks: Tensor, level: float) -> float:
    """A short threshold that lets exactly the ranks of at least ``level`` leave."""
    if math.isinf(level):
        return policy.never_threshold
    if policy.whole_thresholds:
        return float(level)
    below = ranks[ranks < level]
    following = float(below.max()) if len(below) else level - max(1e-4 * abs(level), 1e-6)
    low, high = policy.threshold_range
    if policy.leaves_above:  # leaves at score >= threshold: anything in (following, level]
        return min(max(_short(following, level, level), low), high)
    # leaves at score < threshold: anything in (-level, -following]
    return min(max(_short(-level, -following, -following), low), high)


def _short(low: float, high: float, otherwise: float) -> float:
    """The shortest decimal strictly between two numbers, in float32 too, or ``otherwise``."""
    middle = (low + high) / 2
    for digits in range(2, 9):
        value = float(f"{middle:.{digits}g}")
        if low < value < high and low < float(torch.tensor(value)) < high:
            return value
    return otherwise
