"""Searches over thresholds find what trying every choice, sample by sample, finds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulate_guarantee import EARLYON_GRID, earlyon_thresholds

from erde_hub.calibration import choose_threshold
from erde_hub.calibration.objective import Objective
from erde_hub.calibration.outcomes import ExitOutcomes, exit_losses
from erde_hub.calibration.search import best_per_exit, grid_tables, pruned_front, shared_curve
from erde_hub.calibration.threshold_path import fit_exit_speeds, threshold_path
from erde_hub.errors import ConfigError
from erde_hub.evaluation import route_records, sweep_thresholds
from erde_hub.policies import create_policy
from erde_hub.policies.recorded import exit_indices, score_exits
from tests.fakes.records import make_logits, make_records


def evaluate(ranks, losses, costs, levels):
    """Mean loss and cost, one sample after the other."""
    loss = cost = 0.0
    for n in range(ranks.shape[1]):
        taken = next((e for e, level in enumerate(levels) if float(ranks[e, n]) >= level), len(levels))
        loss += float(losses[taken, n])
        cost += float(costs[taken])
    return loss / ranks.shape[1], cost / ranks.shape[1]


def made_up(seed, exits, samples, steps):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(steps, (exits - 1, samples), generator=generator).double() / steps  # with ties
    losses = torch.randint(-1, 2, (exits, samples), generator=generator).double()
    losses[-1] = 0
    costs = torch.rand(exits, generator=generator, dtype=torch.float64).cumsum(0)
    return ranks, losses, costs


@given(st.integers(0, 9999), st.integers(2, 5), st.integers(1, 30), st.integers(1, 9))
def test_the_shared_curve_holds_every_threshold_that_makes_a_difference(seed, exits, samples, steps):
    ranks, losses, costs = made_up(seed, exits, samples, steps)
    levels, loss, cost = shared_curve(ranks, losses, costs)
    assert levels[0] == math.inf
    assert (levels[:-1] > levels[1:]).all()
    for i, level in enumerate(levels.tolist()):
        expected = evaluate(ranks, losses, costs, [level] * (exits - 1))
        assert (float(loss[i]), float(cost[i])) == pytest.approx(expected, abs=1e-12)
    effects = {tuple(evaluate(ranks, losses, costs, [v] * (exits - 1))) for v in {*ranks.flatten().tolist(), 2.0}}
    found = {(round(a, 9), round(b, 9)) for a, b in zip(loss.tolist(), cost.tolist(), strict=True)}
    assert {(round(a, 9), round(b, 9)) for a, b in effects} <= found


@given(st.integers(0, 9999), st.integers(2, 4), st.integers(1, 12))
def test_tables_of_all_combinations_equal_a_loop(seed, exits, samples):
    ranks, losses, costs = made_up(seed, exits, samples, 4)
    grids = [torch.tensor([math.inf, 0.75, 0.5, 0.25, 0.0])[: 2 + (seed + e) % 4].double() for e in range(exits - 1)]
    loss, cost = grid_tables(ranks, losses, costs, grids)
    for index in itertools.product(*(range(len(grid)) for grid in grids)):
        levels = [float(grid[i]) for grid, i in zip(grids, index, strict=True)]
        assert (float(loss[index]), float(cost[index])) == pytest.approx(evaluate(ranks, losses, costs, levels))


@pytest.mark.parametrize("seed", range(6))
def test_per_exit_search_on_few_samples_is_exhaustive(seed):
    ranks, losses, costs = made_up(seed, 3, 12, 40)
    for objective, feasible, key in (
        (Objective("accuracy_drop", 0.1), lambda p: p[0] <= 0.1 + 1e-9, lambda p: p[1]),
        (Objective("mean_macs", float(costs.mean())), lambda p: p[1] <= float(costs.mean()), lambda p: p[0]),
    ):
        every = itertools.product(*([math.inf, *row.tolist()] for row in ranks))
        best = min(key(p) for p in (evaluate(ranks, losses, costs, levels) for levels in every) if feasible(p))
        point = best_per_exit(ranks, losses, costs, objective, [math.inf] * 2)
        assert evaluate(ranks, losses, costs, point.levels) == pytest.approx((point.loss, point.cost))
        assert key((point.loss, point.cost)) == pytest.approx(best, abs=1e-9)


def test_many_exits_are_searched_with_pruning():
    records = make_records(400, exits=9)
    objective = Objective("accuracy_drop", 0.02)
    ranks = score_exits(records.logits, create_policy("confidence")).double()
    losses = exit_losses(records.logits, records.labels, "accuracy_drop")
    costs = torch.tensor(records.cumulative_macs).double()
    levels, loss, cost = shared_curve(ranks, losses, costs)
    start = float(levels[int(objective.rank(loss, cost).argmin())])
    point = best_per_exit(ranks, losses, costs, objective, [start] * 8)
    assert evaluate(ranks, losses, costs, point.levels) == pytest.approx((point.loss, point.cost), abs=1e-5)
    assert point.loss <= 0.02
    assert point.cost < float(cost[loss <= 0.02].min()) - 100, "better than one threshold for all"
    grids = [torch.linspace(1, 0, 20, dtype=torch.float64) for _ in range(8)]
    _, loss, cost = pruned_front(ranks, losses, costs, grids)
    assert (loss[:-1] <= loss[1:]).all()
    assert (cost[:-1] > cost[1:]).all()


@pytest.mark.parametrize("name", ["entropy", "confidence", "margin", "patience"])
def test_a_path_goes_from_nobody_to_everybody_and_an_exit_never_turns_back(name):
    policy, records = create_policy(name), make_records(300, exits=4)
    scores = score_exits(records.logits, policy)
    path = threshold_path(policy, policy.grid(10, 3), [0.5, 1.0, 0.0])
    leaving = torch.stack(
        [torch.stack([policy.compare(s, t) for s, t in zip(scores, row, strict=True)]) for row in path]
    )
    assert (exit_indices(scores, policy, path[0]) == 3).all()
    assert (leaving[1:] >= leaving[:-1]).all()
    assert not leaving[:, 2].any()
    if name != "patience":  # no exit can follow one that does not exist
        assert leaving[-1, 1].all()
        assert not leaving[-1, 0].all()
    given = [policy.never_threshold, *policy.grid(10, 3)[1::7]]
    values = {value for row in threshold_path(policy, given, [0.3, 0.8, 1.0], between=False) for value in row}
    assert values <= set(given)


def test_speeds_are_those_that_save_most():
    records = make_records(2000)
    policy = create_policy("confidence")
    scores = score_exits(records.logits, policy)
    losses = exit_losses(records.logits, records.labels, "accuracy_drop")
    costs = torch.tensor(records.cumulative_macs).double()
    grid = policy.grid(10, 2)

    def saving(speeds):
        index = torch.stack([exit_indices(scores, policy, row) for row in threshold_path(policy, grid, speeds)])
        loss, cost = losses.gather(0, index).mean(1), costs[index].mean(1)
        levels = [0.35 * (3 / 0.35) ** (i / 15) for i in range(16)]
        return -sum(float(cost[loss <= 0.01 * level].min()) for level in levels)

    found = fit_exit_speeds(ExitOutcomes(policy, scores, losses, costs), grid, 0.01)
    assert max(found) == 1
    assert saving(found) >= max(saving(f) for f in ([1.0, 1.0], [0.5, 1.0], [1.0, 0.5], [0.2, 1.0])) - 1e-9
    assert saving(found) > saving([1.0, 1.0])
    useless = losses.clone()
    useless[0] = 1.0
    assert fit_exit_speeds(ExitOutcomes(policy, scores, useless, costs), grid, 0.01)[0] == 0, (
        "an exit that is always wrong stays shut"
    )


@pytest.mark.parametrize("seed", range(8))
def test_saves_at_least_what_a_greedy_search_on_the_same_grid_saves(seed):
    records = make_records(300, exits=4, seed=seed)
    ranks = score_exits(records.logits, create_policy("confidence"))
    losses = exit_losses(records.logits, records.labels, "accuracy_drop")
    costs = torch.tensor(records.cumulative_macs).double()
    greedy = earlyon_thresholds(ranks, losses, costs, 0.01)
    _, greedy_cost = evaluate(ranks, losses, costs, greedy)
    args = {"max_accuracy_drop": 0.01, "per_exit": True}
    same_grid = choose_threshold(records, "confidence", candidates=EARLYON_GRID, **args)
    every = choose_threshold(records, "confidence", **args)
    assert set(same_grid.threshold) <= {*EARLYON_GRID, 2.0}
    assert same_grid.mean_macs <= greedy_cost + 1e-9
    assert every.mean_macs <= same_grid.mean_macs + 1e-9
    assert every.accuracy >= every.full_accuracy - 0.01 - 1e-9


@pytest.mark.parametrize("policy", ["entropy", "confidence", "margin", "patience"])
@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("wanted", [{"max_accuracy_drop": 0.02}, {"max_disagreement": 0.05}, {"max_mean_macs": 3200.0},
                                    {"max_brier_increase": 0.02}])  # fmt: skip
def test_the_report_is_what_routing_does(policy, per_exit, wanted):
    records = make_records(250, exits=4, classes=4)
    if policy == "patience" and "max_mean_macs" in wanted:
        with pytest.raises(ConfigError, match="no threshold of the policy 'patience' keeps a mean cost of 3,200"):
            choose_threshold(records, policy, per_exit=per_exit, **wanted)
        wanted = {"max_mean_macs": 4000.0}
    choice = choose_threshold(records, policy, per_exit=per_exit, **wanted)
    assert isinstance(choice.threshold, list) == per_exit
    (row,) = sweep_thresholds(records, [choice.threshold], policy)
    assert choice.accuracy == pytest.approx(row["accuracy"])
    assert choice.mean_macs == pytest.approx(row["mean_macs"])
    assert choice.exit_share == pytest.approx(row["exit_share"])
    assert choice.saving == pytest.approx(1 - row["mean_macs"] / records.cumulative_macs[-1])
    index, _ = route_records(records, policy, choice.threshold)
    losses = exit_losses(records.logits, records.labels, choice.target)
    value = row["mean_macs"] if "macs" in choice.target else float(losses.gather(0, index[None]).mean())
    assert choice.value == pytest.approx(value, abs=1e-9)
    assert choice.value <= choice.bound + 1e-9
    if not per_exit and policy != "patience":
        better = [r for r in sweep_thresholds(records, torch.linspace(0, 1.5, 100).tolist(), policy)
                  if row["accuracy"] - r["accuracy"] <= 0]  # fmt: skip
        assert better
        if "max_accuracy_drop" in wanted:
            limit = choice.full_accuracy - 0.02
            cheapest = min(r["mean_macs"] for r in better if r["accuracy"] >= limit - 1e-12)
            assert choice.mean_macs <= cheapest + 1e-9


def test_milliseconds_change_what_is_saved():
    records = make_records(300)
    times = [1.0, 9.0, 10.0]  # the second exit saves hardly any time
    by_time = choose_threshold(records, max_mean_milliseconds=6.0, exit_milliseconds=times, per_exit=True)
    spent = sum(t * share for t, share in zip(times, by_time.exit_share, strict=True))
    assert spent <= 6.0
    assert by_time.value == pytest.approx(spent)
    assert by_time.saving == pytest.approx(1 - spent / 10)
    drop = choose_threshold(records, max_accuracy_drop=0.02, exit_milliseconds=times, per_exit=True)
    drop_macs = choose_threshold(records, max_accuracy_drop=0.02, per_exit=True)
    assert drop.saving == pytest.approx(1 - sum(t * s for t, s in zip(times, drop.exit_share, strict=True)) / 10)
    assert drop_macs.mean_macs <= drop.mean_macs


def test_seconds_for_fifty_thousand_samples():
    import time  # noqa: PLC0415

    logits, labels = make_logits(5_000, exits=4, classes=100)
    records = make_records(5_000, exits=4, classes=100)
    start = time.perf_counter()
    choose_threshold(records, max_accuracy_drop=0.01, confidence=0.9)
    choose_threshold(records, max_accuracy_drop=0.01, per_exit=True)
    assert time.perf_counter() - start < 5  # a tenth of the size that has to be done in seconds; about 0.3 s
    assert len(labels) == logits.shape[1]
