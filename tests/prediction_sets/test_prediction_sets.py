"""Prediction sets against golden vectors; coverage that is promised is reached on new samples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from erde_hub.errors import ConfigError, DataError, ShapeError, UnknownNameError
from erde_hub.policies import SetSizePolicy
from erde_hub.prediction_sets import (
    AVCSClassifier,
    BayesianLinearRegression,
    ConformalClassifier,
    avcs_quadratics,
    avcs_ratios,
    avcs_sets,
    concentrations,
    dirichlet_draws,
    draw_weights,
    intersect_intervals,
    interval_metrics,
    running_intersection,
    search_relu_thresholds,
    set_metrics,
    solve_intervals,
)
from tests.fakes.records import records_of


def f64(value):
    return torch.tensor(np.array(value, dtype=float), dtype=torch.float64)


def as_lists(sets):
    return [[torch.nonzero(sets[e, n]).flatten().tolist() for e in range(len(sets))] for n in range(sets.shape[1])]


def make_records(samples=800, exits=3, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(exits, samples, classes, generator=generator)
    for e in range(exits):
        logits[e, torch.arange(samples), labels] += 2.0 + e
    return records_of(1.5 * logits, labels)


def test_golden_avcs_classification(golden):
    cases = [c for c in golden("avcs_classification")["cases"] if c["name"] != "threshold_search"]
    assert len(cases) == 7
    for case in cases:
        inputs, expected = case["inputs"], case["expected"]
        logits, draws = f64(inputs["logits"]), f64(inputs["dirichlet_draws"])
        evidence = concentrations(logits, inputs["relu_threshold"])
        torch.testing.assert_close(evidence, f64(expected["concentration"]), rtol=1e-12, atol=1e-12)
        mean = evidence / evidence.sum(-1, keepdim=True).clamp_min(1e-300)
        torch.testing.assert_close(mean, f64(expected["predictive"]), rtol=1e-12, atol=1e-12)
        ratio = f64([[[float(v) for v in row] for row in sample] for sample in expected["ratio"]])
        torch.testing.assert_close(avcs_ratios(evidence, draws), ratio, rtol=1e-8, atol=1e-10)
        raw = avcs_sets(logits, inputs["relu_threshold"], draws, inputs["alpha"])
        assert as_lists(raw) == expected["sets"], case["name"]
        nested = running_intersection(raw)
        assert as_lists(nested) == expected["running_intersection"], case["name"]
        labels = torch.tensor(inputs["labels"])
        found = set_metrics(raw, labels)
        assert found.coverage == pytest.approx(expected["coverage"])
        assert set_metrics(nested, labels).coverage == pytest.approx(expected["coverage_intersection"])
        assert found.consistency == pytest.approx(f64(expected["consistency"]).mean(0).tolist())
        assert raw.sum(-1).T.tolist() == expected["sizes"]
        classifier = AVCSClassifier(inputs["relu_threshold"], inputs["alpha"])
        assert torch.equal(classifier.sets(logits, draws), nested)


def test_golden_threshold_search(golden):
    case = next(c for c in golden("avcs_classification")["cases"] if c["name"] == "threshold_search")
    inputs, expected = case["inputs"], case["expected"]
    logits, labels = f64(inputs["logits"]), torch.tensor(inputs["labels"])

    def sets(thresholds):
        np.random.seed(inputs["legacy_seed"])  # noqa: NPY002 - the released code draws from it
        evidence = concentrations(logits, thresholds)
        draws = torch.zeros_like(evidence)
        for n in range(logits.shape[1]):
            for e in range(len(logits)):
                support = evidence[e, n] > 0
                if support.any():
                    drawn = np.random.dirichlet(evidence[e, n][support].numpy())  # noqa: NPY002 - as above
                    draws[e, n, support] = torch.from_numpy(drawn)
        return avcs_sets(logits, thresholds, draws, inputs["alpha"])

    found = search_relu_thresholds(
        lambda t: min(set_metrics(sets(t), labels).coverage), 3, inputs["alpha"], inputs["initial_threshold"],
        inputs["step"],
    )  # fmt: skip
    assert found == expected["relu_threshold"]
    metrics = set_metrics(sets(found), labels)
    assert metrics.coverage == pytest.approx(expected["coverage"])
    assert metrics.size == pytest.approx(expected["mean_size"])


def test_golden_avcs_regression(golden):
    for case in golden("avcs_regression")["cases"]:
        inputs, expected = case["inputs"], case["expected"]
        exits = inputs["n_exits"]
        fits = [
            BayesianLinearRegression.fit(f64(inputs["train_features"][e]), f64(inputs["train_targets"]))
            for e in range(exits)
        ]
        features = [f64(inputs["test_features"][e]) for e in range(exits)]
        for e, fit in enumerate(fits):
            torch.testing.assert_close(fit.mean, f64(expected["post_mean"][e]), rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(fit.covariance, f64(expected["post_cov"][e]), rtol=1e-6, atol=1e-8)
            assert fit.noise == pytest.approx(expected["sigma_likelihood"][e], rel=1e-6)
            assert fit.prior == pytest.approx(expected["sigma_prior"][e], rel=1e-6)
            mean, variance = fit.predict(features[e])
            torch.testing.assert_close(mean, f64(expected["predictive_mean"][e]), rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(variance, f64(expected["epistemic_variance"][e]), rtol=1e-6, atol=1e-8)
            plain = torch.stack(
                [mean - 2 * (variance + fit.noise**2).sqrt(), mean + 2 * (variance + fit.noise**2).sqrt()], 1
            )
            torch.testing.assert_close(plain, f64(expected["bayes_interval_2std"])[:, e], rtol=1e-6, atol=1e-6)
        draws = [f64(inputs["weight_draws"][e]) for e in range(exits)]
        quadratics = avcs_quadratics(fits, features, draws, inputs["alpha"])
        torch.testing.assert_close(quadratics, f64(expected["quadratic"]), rtol=1e-6, atol=1e-6)
        raw = solve_intervals(quadratics)
        empty = torch.tensor(expected["empty"]).T
        assert torch.equal(raw.isnan().any(-1), empty)
        torch.testing.assert_close(raw[~empty], f64(expected["interval"]).transpose(0, 1)[~empty], rtol=1e-6, atol=1e-6)
        nested = intersect_intervals(raw)
        wanted = f64(expected["interval_running_intersection"]).transpose(0, 1)
        gone = nested.isnan().any(-1)
        torch.testing.assert_close(nested[~gone], wanted[~gone], rtol=1e-6, atol=1e-6)
        assert (wanted[gone] == 0).all()
        targets = f64(inputs["test_targets"])
        found = interval_metrics(nested, targets)
        assert found.coverage == pytest.approx(expected["coverage"])
        behind_the_first = f64(expected["consistency_running"]).mean(0).tolist() if exits > 1 else []
        assert found.consistency[1:] == pytest.approx(behind_the_first)


@pytest.mark.parametrize("method", ["aps", "raps"])
def test_conformal_sets_cover_what_they_promise(method):
    records, fresh = make_records(), make_records(4000, seed=1)
    for alpha in (0.05, 0.2):
        conformal = ConformalClassifier.fit(records, alpha, method)
        found = set_metrics(conformal.sets(fresh.logits), fresh.labels)
        error = 3 * (alpha * (1 - alpha) * (1 / 800 + 1 / 4000)) ** 0.5
        assert all(value >= 1 - alpha - error for value in found.coverage)
        assert found.size == sorted(found.size, reverse=True), "better exits, smaller sets"
        assert all(size >= 1 for size in found.size)
    tiny = ConformalClassifier.fit(records.select(range(20)), 0.04)
    assert tiny.sets(fresh.logits).all(), "too few samples: every class"


@pytest.mark.parametrize("kind", [ConformalClassifier, AVCSClassifier])
def test_sets_of_one_sample_at_a_time_have_draws_of_their_own(kind):
    """From one seed per call all of 2,000 single samples would share one draw, and coverage would be off by points."""
    alpha, worst = 0.1, []
    for seed in range(8):
        records, fresh = make_records(2000, seed=seed), make_records(1500, seed=100 + seed)
        fitted = kind.fit(records, alpha, seed=seed)
        singly = torch.cat([fitted.sets(fresh.logits[:, i : i + 1]) for i in range(1500)], 1)
        together = kind.fit(records, alpha, seed=seed).sets(fresh.logits)
        found, expected = (set_metrics(sets, fresh.labels).coverage for sets in (singly, together))
        worst.append(max(abs(a - b) for a, b in zip(found, expected, strict=True)))
        assert min(found) > 1 - alpha - 0.035
    assert max(worst) < 0.03
    assert len({tuple(fitted.sets(torch.full((3, 1, 6), 1.5)).flatten().tolist()) for _ in range(200)}) > 1, (
        "sets are random"
    )


def test_nested_sets_cover_at_all_exits_at_once():
    records, fresh = make_records(), make_records(2000, seed=1)
    avcs = AVCSClassifier.fit(records, 0.1)
    sets = avcs.sets(fresh.logits)
    again = AVCSClassifier(avcs.relu_threshold, 0.1, avcs.seed)
    assert torch.equal(sets, again.sets(fresh.logits)), "the same seed, the same sets"
    assert avcs.fitted_coverage > 0.9
    drawn = [AVCSClassifier(avcs.relu_threshold, 0.1, seed).sets(records.logits) for seed in range(20)]
    drawn = [min(set_metrics(own, records.labels).coverage) for own in drawn]
    assert avcs.fitted_coverage == pytest.approx(sum(drawn) / 20, abs=0.006), "labels alone tell the same"
    faint = AVCSClassifier.fit(dataclasses.replace(records, logits=records.logits / 20), 0.1)
    assert faint.relu_threshold == [0, 0, 0]
    assert faint.fitted_coverage < 0.9, "and says that it falls short"
    found = set_metrics(sets, fresh.labels)
    assert found.consistency == pytest.approx([1, 1, 1])
    assert found.size == sorted(found.size, reverse=True)
    assert found.coverage == pytest.approx(found.coverage_so_far)
    assert found.coverage[-1] > 0.87
    wide = AVCSClassifier([0.0] * 3, 0.1).sets(fresh.logits)
    assert wide.sum() > sets.sum()


def test_dirichlet_draws_are_probabilities_on_the_support():
    evidence = torch.rand(2, 400, 5, dtype=torch.float64) * 3
    evidence[evidence < 0.5] = 0
    draws = dirichlet_draws(evidence, torch.Generator().manual_seed(0))
    assert ((draws > 0) <= (evidence > 0)).all()
    some = (evidence > 0).any(-1)
    torch.testing.assert_close(draws.sum(-1)[some], torch.ones(int(some.sum()), dtype=torch.float64))
    mean = (draws - evidence / evidence.sum(-1, keepdim=True).clamp_min(1e-9))[some].mean(0)
    assert mean.abs().max() < 0.03


def test_intervals_by_hand():
    raw = solve_intervals(f64([[[1.0, 0.0, -4.0]], [[1.0, -4.0, 3.0]], [[1.0, 0.0, 1.0]], [[1.0, 0.0, -4.0]]]))
    assert raw[:2, 0].tolist() == [[-2, 2], [1, 3]]
    assert raw[2].isnan().all()
    nested = intersect_intervals(raw)
    assert nested[1, 0].tolist() == [1, 2]
    assert nested[2:].isnan().all(), "empty from then on"
    metrics = interval_metrics(raw, f64([2.5]))
    assert metrics.size == [4, 2, 0, 4]
    assert metrics.coverage == [0, 1, 0, 0]
    assert metrics.consistency == [1, 0.5, 1, 0]


def test_regression_intervals_hold_the_truth():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    y = (
        x @ torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
        + 0.3 * torch.randn(400, generator=generator).double()
    )
    features = [x[:, :2], x[:, :3], x]
    fits = [BayesianLinearRegression.fit(f[:300], y[:300]) for f in features]
    assert [round(fit.noise, 1) for fit in fits] == [0.6, 0.3, 0.3]
    draws = draw_weights(fits, generator)
    intervals = intersect_intervals(solve_intervals(avcs_quadratics(fits, [f[300:] for f in features], draws, 0.05)))
    found = interval_metrics(intervals, y[300:])
    assert found.coverage[-1] >= 0.9
    assert found.size[0] > found.size[-1]


def test_set_size_leaves_with_few_classes():
    policy = SetSizePolicy(3)
    policy.quantile.copy_(torch.tensor([0.5, 0.9]))
    log_probs = torch.tensor([[[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]], [[0.2, 0.7, 0.1], [0.95, 0.03, 0.02]]]).log()
    assert policy.score(log_probs[:1]).tolist() == [1, 2]  # 0.4 + 0.35 is beyond one half before the third
    assert policy.score(log_probs).tolist() == [1, 1]
    assert policy(log_probs[:1], 2.0).tolist() == [True, False]
    contradiction = torch.tensor([[[0.9, 0.05, 0.05]], [[0.01, 0.98, 0.01]]]).log()
    assert policy.score(contradiction).tolist() == [3], "no class is left: the sample goes on"
    records, fresh = make_records(), make_records(3000, seed=1)
    fitted = SetSizePolicy.fit(records, 0.1)
    one = fitted(fresh.logits[:1].log_softmax(-1), 2.0)
    right = fresh.logits[0].argmax(-1) == fresh.labels
    assert right[one].double().mean() > right[~one].double().mean() + 0.1


def test_bad_input():
    records = make_records(50)
    for alpha in (0.0, 1.0, -0.1, True):
        with pytest.raises(ConfigError, match="alpha must be between 0 and 1"):
            ConformalClassifier.fit(records, alpha)
        with pytest.raises(ConfigError, match="alpha must be between 0 and 1"):
            SetSizePolicy.fit(records, alpha)
    for fit in (ConformalClassifier.fit, AVCSClassifier.fit):
        with pytest.raises(DataError, match="5 samples are too few"):
            fit(records.select(range(5)))
        with pytest.raises(DataError, match="records are of the training split"):
            fit(dataclasses.replace(records, info={"split": "train"}))
    with pytest.raises(UnknownNameError, match="unknown method 'rap'; did you mean 'raps'"):
        ConformalClassifier.fit(records, 0.1, "rap")
    with pytest.raises(ShapeError, match="one relu_threshold per exit, 3"):
        concentrations(records.logits, [1.0])
    with pytest.raises(ShapeError, match="fitted for 3 exits, got 2"):
        ConformalClassifier.fit(records).sets(records.logits[:2])
    with pytest.raises(ShapeError, match=r"features must be \(N, H\)"):
        BayesianLinearRegression.fit(torch.zeros(3), torch.zeros(3))
    assert math.isclose(AVCSClassifier([1.0], 0.05).alpha, 0.05)
