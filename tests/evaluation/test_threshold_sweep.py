"""Routing and sweeps on records: golden cases, a slow loop as reference, the ends and the cost of a sweep, files."""

import csv
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erde_hub.errors import (
    CheckpointWriteError,
    ConfigError,
    InputTypeError,
    ShapeError,
    ThresholdError,
    UnknownNameError,
)
from erde_hub.evaluation import (
    accuracy_at_cost,
    default_thresholds,
    exit_metrics,
    exit_scores,
    fine_thresholds,
    pareto_front,
    per_exit_metrics,
    route_records,
    sweep_thresholds,
    write_sweep_csv,
)
from erde_hub.policies import ExitPolicy, create_policy, list_policies
from tests.fakes.policies import PLAIN, make_policy
from tests.fakes.records import records_of


def make_records(seed=0, exits=3, samples=40, classes=7, scale=2.0, sharper=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = scale * torch.randn(exits, samples, classes, generator=generator)
    logits[:, torch.arange(samples), labels] += sharper * torch.arange(1, exits + 1)[:, None]
    return records_of(logits, labels, cumulative_macs=[1000 * (e + 1) ** 2 for e in range(exits)])


def slow_route(records, name, thresholds):
    """Sample by sample in plain Python, from the rules in words."""
    index = []
    for n in range(records.num_samples):
        answers = []
        taken = records.num_exits - 1
        for e in range(records.num_exits - 1):
            z = [float(v) for v in records.logits[e, n]]
            total = sum(math.exp(v - max(z)) for v in z)
            p = sorted((math.exp(v - max(z)) / total for v in z), reverse=True)
            answers.append(z.index(max(z)))
            agreements = 0
            for earlier in reversed(answers[:-1]):
                if earlier != answers[-1]:
                    break
                agreements += 1
            leaves = {
                "entropy": -sum(v * math.log(v) for v in p if v > 0) < thresholds[e],
                "confidence": p[0] >= thresholds[e],
                "margin": p[0] - p[1] >= thresholds[e],
                "patience": agreements >= thresholds[e],
                "never": False,
                "always": True,
            }[name]
            if leaves:
                taken = e
                break
        index.append(taken)
    return index


@st.composite
def routing_cases(draw):
    name = draw(st.sampled_from(PLAIN))
    exits = draw(st.integers(2, 5))
    seed = draw(st.integers(0, 10_000))
    records = make_records(seed, exits, draw(st.integers(1, 25)), draw(st.integers(2, 8)))
    if name == "patience":
        one = st.integers(1, 5)
    elif name == "entropy":
        one = st.floats(0, 2.5) | st.sampled_from([0.0, math.inf])
    else:
        one = st.floats(0, 1.2) | st.sampled_from([0.0, math.inf])
    threshold = draw(one | st.lists(one, min_size=exits - 1, max_size=exits - 1))
    return records, name, threshold


@given(routing_cases())
def test_routing_equals_a_loop_over_samples(case):
    records, name, threshold = case
    thresholds = threshold if isinstance(threshold, list) else [threshold] * (records.num_exits - 1)
    scores = exit_scores(records, name)
    limits = torch.tensor(thresholds, dtype=torch.float64)[:, None]
    near = ((scores.double() - limits).abs() < 1e-5).any(0)  # float32 against float64
    if name in ("patience", "never", "always"):
        near[:] = False
    index, logits = route_records(records, name, threshold)
    expected = torch.tensor(slow_route(records, name, thresholds))
    assert torch.equal(index[~near], expected[~near])
    for n, e in enumerate(index.tolist()):
        assert torch.equal(logits[n], records.logits[e, n])


@given(routing_cases())
def test_rows_of_a_sweep_are_metrics_of_the_routed_logits(case):
    records, name, threshold = case
    (row,) = sweep_thresholds(records, [threshold], name)
    index, logits = route_records(records, name, threshold)
    for key, value in exit_metrics(logits, records.labels).items():
        assert row[key] == pytest.approx(value, rel=1e-12, abs=1e-15)
    assert sum(row["exit_share"]) == pytest.approx(1)
    assert row["exit_share"] == pytest.approx([(index == e).double().mean().item() for e in range(records.num_exits)])
    macs = records.cumulative_macs
    assert macs[0] <= row["mean_macs"] <= macs[-1]
    assert row["mean_macs"] == pytest.approx(sum(macs[e] for e in index.tolist()) / len(index))
    json.dumps(row, allow_nan=False)


def test_golden_threshold_policies(golden):
    data = golden("exit_policy")
    case = next(case for case in data["cases"] if case["name"] == "threshold_policies")
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
    costs = case["inputs"]["cumulative_cost"]
    exits, samples, classes = logits.shape
    labels = torch.zeros(samples, dtype=torch.int64)
    records = records_of(logits, labels, cumulative_macs=[round(100 * cost) for cost in costs])
    names = {"entropy": "entropy", "max_prob": "confidence", "margin": "margin", "normalised_confidence": "entropy"}
    scores = case["expected"]["scores"]
    tolerance = data["tolerance"]
    for key in ("entropy", "max_prob", "margin"):
        expected = torch.tensor(scores[key], dtype=torch.float64)
        policy = create_policy(names[key])
        exact = torch.stack([policy.score(z.log_softmax(-1).unsqueeze(0)) for z in logits])
        torch.testing.assert_close(exact, expected, rtol=tolerance["float64_rtol"], atol=tolerance["float64_atol"])
        torch.testing.assert_close(
            exit_scores(records, policy).double(),
            expected[:-1],
            rtol=tolerance["float32_rtol"],
            atol=tolerance["float32_atol"],
        )
    assert {policy["score"] for policy in case["expected"]["policies"]} == set(names)
    for policy in case["expected"]["policies"]:
        thresholds = policy["thresholds"][: exits - 1]  # the last exit has none here
        if policy["score"] == "normalised_confidence":  # 1 - H / log K at or above t: H at or below (1 - t) log K
            thresholds = [(1 - t) * math.log(classes) for t in thresholds]
        name = names[policy["score"]]
        index, routed = route_records(records, name, thresholds)
        assert index.tolist() == policy["exit_index"], policy
        assert routed.argmax(1).tolist() == policy["prediction"], policy
        (row,) = sweep_thresholds(records, [thresholds], name)
        assert [round(share * samples) for share in row["exit_share"]] == policy["exit_counts"]
        assert row["mean_macs"] / 100 == pytest.approx(policy["mean_cost"])


def test_rules_at_equality():
    logits = torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]]])  # entropy log 2, confidence 0.5, margin 0 at exit 0
    records = records_of(logits, torch.tensor([0]))
    entropy = exit_scores(records, "entropy").item()
    assert route_records(records, "entropy", entropy)[0].tolist() == [1]  # strictly below
    assert route_records(records, "entropy", entropy + 1e-6)[0].tolist() == [0]
    assert route_records(records, "confidence", 0.5)[0].tolist() == [0]  # at or above
    assert route_records(records, "margin", 0.0)[0].tolist() == [0]


def test_the_two_ends():
    records = make_records()
    never = sweep_thresholds(records, [0.0])[0]
    last = per_exit_metrics(records)[-1]
    assert never["mean_macs"] == records.cumulative_macs[-1]
    assert never["exit_share"] == [0, 0, 1]
    assert all(never[key] == last[key] for key in ("accuracy", "nll", "ece", "brier", "top5"))
    first = per_exit_metrics(records)[0]
    always = sweep_thresholds(records, [math.inf])[0]
    assert always["threshold"] == "inf"
    assert math.isinf(float(always["threshold"]))
    assert always["exit_share"] == [1, 0, 0]
    assert always["accuracy"] == first["accuracy"]
    nobody, everybody = sweep_thresholds(records, [math.inf, 0], policy="confidence")
    assert nobody["exit_share"] == [0, 0, 1]
    assert everybody["exit_share"] == [1, 0, 0]


def test_per_exit_rows():
    records = make_records()
    rows = per_exit_metrics(records)
    assert [row["exit"] for row in rows] == ["stage0", "stage1", "classifier"]
    assert [row["macs"] for row in rows] == [1000, 4000, 9000]
    for row, logits in zip(rows, records.logits, strict=True):
        metrics = exit_metrics(logits, records.labels)
        assert {key: row[key] for key in metrics} == metrics


@pytest.mark.parametrize("name", list_policies())
@pytest.mark.parametrize("classes", [2, 7, 100])
def test_a_default_sweep_is_spaced_by_what_it_saves(name, classes):
    records = make_records(samples=2000, exits=4, classes=classes)
    rows = sweep_thresholds(records, policy=make_policy(name, 4, classes))
    json.dumps(rows, allow_nan=False)
    costs = [row["mean_macs"] for row in rows]
    assert len(set(costs)) == len(costs) <= 11, "no two rows act alike"
    if name in ("always", "never"):
        return
    assert costs in (sorted(costs), sorted(costs, reverse=True))
    assert max(costs) == 16_000, "no sample exits early"
    if name in ("entropy", "confidence", "margin"):
        assert min(costs) == 1000, "all samples take the first exit"
        assert len(rows) == 11
        assert max(abs(a - b) for a, b in itertools.pairwise(costs)) < 1.6 * 15_000 / 10
    if name == "entropy":
        assert rows[0]["threshold"] == 0
        assert rows[-1]["threshold"] <= 1.1 * math.log(classes)
    if name in ("confidence", "margin"):
        assert rows[-1]["threshold"] == "inf"


def test_default_thresholds_have_few_digits():
    thresholds = default_thresholds(make_records(samples=2000, exits=4))
    assert sum(len(str(value)) for value in thresholds) < 5 * len(thresholds)
    with pytest.raises(ConfigError, match="n must be at least 2, got 1"):
        default_thresholds(make_records(), n=1)


@pytest.mark.parametrize("name", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize("scale", [0.1, 2.0, 12.0])
def test_a_fine_sweep_is_smooth_between_its_ends(name, scale):
    records = make_records(samples=3000, scale=scale)
    thresholds = fine_thresholds(records, name, n=100)
    assert thresholds == sorted(set(thresholds))
    assert 50 <= len(thresholds) <= 104
    rows = sweep_thresholds(records, thresholds, name)
    costs = sorted(row["mean_macs"] for row in rows)
    assert costs[0] == records.cumulative_macs[0]
    assert costs[-1] == records.cumulative_macs[-1]
    span = costs[-1] - costs[0]
    tied = (exit_scores(records, name) == exit_scores(records, name).max()).float().mean().item()  # saturated ones
    assert max(b - a for a, b in itertools.pairwise(costs)) < (0.05 + 2 * tied) * span


def test_fine_thresholds_of_other_policies():
    records = make_records(exits=4)
    assert fine_thresholds(records, "patience") == [1, 2, 3]
    assert fine_thresholds(records, "never") == [0]

    class Learned(ExitPolicy):
        """A score without a fixed range."""

        threshold_range = (-math.inf, math.inf)
        uses_history = False

        def score(self, log_probs):
            return 10 * log_probs[-1, :, 0]

    rows = sweep_thresholds(records, policy=Learned())  # no round steps exist: a few quantiles are taken
    shares = [row["exit_share"] for row in rows]
    assert shares[0] == [1, 0, 0, 0]
    assert shares[-1] == [0, 0, 0, 1]
    assert 10 < len(rows) < 20
    assert rows[0]["threshold"] < 0


def test_saturated_scores_still_have_both_ends():
    logits = torch.zeros(2, 6, 3)
    logits[0, :, 0] = 1000.0  # entropy exactly 0, confidence exactly 1
    records = records_of(logits, torch.zeros(6).long())
    for name in ("entropy", "confidence", "margin"):
        shares = {tuple(row["exit_share"]) for row in sweep_thresholds(records, fine_thresholds(records, name), name)}
        assert shares == {(1, 0), (0, 1)}


def test_a_single_exit_is_routed_to_itself():
    records = make_records(exits=1)
    index, logits = route_records(records, "entropy", 0.5)
    assert index.tolist() == [0] * len(records)
    assert torch.equal(logits, records.logits[0])
    rows = sweep_thresholds(records, fine_thresholds(records))
    assert all(row["exit_share"] == [1] for row in rows)


def test_thresholds_come_as_lists_tensors_and_rows_of_an_earlier_sweep():
    records = make_records()
    rows = sweep_thresholds(records, [0.2, [0.1, 0.4], math.inf])
    again = sweep_thresholds(records, [row["threshold"] for row in rows])
    assert rows == again
    assert sweep_thresholds(records, torch.tensor([0.25, 0.5])) == sweep_thresholds(records, [0.25, 0.5])
    assert sweep_thresholds(records, [torch.tensor([0.25, 0.5])]) == sweep_thresholds(records, [[0.25, 0.5]])


@pytest.mark.parametrize(
    ("thresholds", "policy", "error", "words"),
    [
        ([math.nan], "entropy", ThresholdError, "nan"),
        ([-0.1], "entropy", ThresholdError, "-0.1"),
        ([[0.1, 0.2, 0.3]], "entropy", ThresholdError, "3 thresholds for 2 early exits"),
        (["high"], "entropy", ThresholdError, "'high'"),
        ([True], "entropy", ThresholdError, "True"),
        ([0.5], "patience", ThresholdError, "0.5"),
        ([], "entropy", ConfigError, "no thresholds"),
        (0.5, "entropy", InputTypeError, "0.5"),
        ([0.5], "entrpy", UnknownNameError, "did you mean 'entropy'"),
        ([0.5], 3, InputTypeError, "got 3"),
    ],
)
def test_bad_sweeps(thresholds, policy, error, words):
    with pytest.raises(error) as caught:
        sweep_thresholds(make_records(), thresholds, policy)
    assert words in str(caught.value)
    with pytest.raises(ConfigError):
        fine_thresholds(make_records(), "entropy", n=1)


def test_accuracy_at_cost_by_hand():
    rows = [
        {"mean_macs": 10, "accuracy": 0.5},
        {"mean_macs": 20, "accuracy": 0.9},
        {"mean_macs": 30, "accuracy": 0.8},  # beaten by the one before
        {"mean_macs": 40, "accuracy": 0.95},
        {"mean_macs": 20, "accuracy": 0.7},
    ]
    assert [row["mean_macs"] for row in pareto_front(rows)] == [10, 20, 40]
    assert accuracy_at_cost(rows, 9.9) is None
    assert accuracy_at_cost(rows, 10) == 0.5
    assert accuracy_at_cost(rows, 15) == pytest.approx(0.7)
    assert accuracy_at_cost(rows, 20) == 0.9
    assert accuracy_at_cost(rows, 30) == pytest.approx(0.925)
    assert accuracy_at_cost(rows, 100) == 0.95
    with pytest.raises(ConfigError):
        accuracy_at_cost([], 1)


def test_csv(tmp_path):
    records = make_records()
    rows = sweep_thresholds(records, [0.2, [0.1, 0.4], math.inf])
    path = tmp_path / "sweep.csv"
    write_sweep_csv(rows, path, records.exit_names)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0])[:3] == ["threshold", "accuracy", "mean_macs"]
    assert [row["threshold"] for row in read] == ["0.2", "0.1 0.4", "inf"]
    for row, expected in zip(read, rows, strict=True):
        assert float(row["accuracy"]) == expected["accuracy"]
        assert [float(row[f"exit_share:{name}"]) for name in records.exit_names] == expected["exit_share"]
    assert b"\r" not in path.read_bytes()
    write_sweep_csv(rows, path)
    assert "exit_share:0,exit_share:1,exit_share:2" in path.read_text()
    with pytest.raises(ConfigError, match="no rows"):
        write_sweep_csv([], path)
    with pytest.raises(ConfigError, match="2 exit_names for 3"):
        write_sweep_csv(rows, path, ["a", "b"])
    with pytest.raises(CheckpointWriteError):
        write_sweep_csv(rows, tmp_path / "missing" / "sweep.csv")


def test_a_sweep_computes_scores_once_and_not_per_threshold():
    records = make_records(samples=2000, exits=4, classes=20)
    calls = []

    class Counting(type(create_policy("entropy"))):
        def score(self, log_probs):
            calls.append(log_probs.shape[1])
            return super().score(log_probs)

    sweep_thresholds(records, [i / 50 for i in range(100)], Counting())
    assert sum(calls) == 3 * 2000  # once per early exit and sample


@pytest.mark.slow
def test_a_large_sweep_agrees_with_its_first_rows():
    records = make_records(samples=20_000, exits=4, classes=100)
    part = records.select(torch.arange(500))
    whole, few = route_records(records, "entropy", 1.0), route_records(part, "entropy", 1.0)
    assert torch.equal(whole[0][:500], few[0])
    assert all(abs(sum(row["exit_share"]) - 1) < 1e-9 for row in sweep_thresholds(records, fine_thresholds(records)))


def test_sets_and_failure_prediction_of_routed_samples():
    records = make_records(samples=200)
    sets = records.logits.softmax(-1) > 0.08
    rows = sweep_thresholds(records, [0.3, 0.9, 1.7], sets=sets)
    for row in rows:
        index, _ = route_records(records, "entropy", row["threshold"])
        own = sets[index, torch.arange(200)]
        assert row["set_size"] == pytest.approx(own.sum(1).double().mean().item())
        assert row["coverage"] == pytest.approx(own[torch.arange(200), records.labels].double().mean().item())
        right = records.logits.argmax(-1) == records.labels
        good, bad = [], []  # confidences at the exits that samples come to
        for n in range(200):
            for e in range(min(int(index[n]) + 1, 2)):
                leave = bool(right[e, n]) or not bool(right[e:, n].any())
                (good if leave else bad).append(float(records.logits[e, n].softmax(0).max()))
        wins = sum((a > b) + 0.5 * (a == b) for a in good for b in bad)
        assert row["eefp"] == pytest.approx(wins / (len(good) * len(bad)))
    per_exit = per_exit_metrics(records, sets=sets)
    assert [row["set_size"] for row in per_exit] == pytest.approx(sets.sum(-1).double().mean(1).tolist())
    assert "coverage" not in sweep_thresholds(records, [0.3])[0]
    assert sweep_thresholds(make_records(exits=1), [0.3])[0]["eefp"] is None
    with pytest.raises(ShapeError, match=r"sets must be \(exits, samples, classes\)"):
        sweep_thresholds(records, [0.3], sets=sets[:, :50])
    with pytest.raises(InputTypeError, match="sets must be bool"):
        sweep_thresholds(records, [0.3], sets=sets.float())
