"""Learned policies against golden vectors; fitted ones beat a bare score where the score misleads, and are stored."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, InputTypeError, ShapeError, ThresholdError
from erde_hub.evaluation import collect_exit_records, exit_metrics, route_records
from erde_hub.evaluation.ranking import auroc, eefp, mean_of_defined
from erde_hub.policies import EEFPPolicy, EENetPolicy, create_policy
from erde_hub.policies.eefp import (
    WEIGHT_DECAYS,
    _folds,
    _gates,
    _newton,
    _unseen_gates,
    gate_features,
    platt,
    should_exit,
)
from erde_hub.policies.eenet import _end, _Scheduler, fraction_thresholds, head_inputs
from erde_hub.policies.recorded import exit_indices, score_exits
from tests.fakes.networks import resnet8
from tests.fakes.records import records_of


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def make_records(samples=600, exits=3, classes=4, seed=0):
    """The first exit is sure and wrong about class 0; the others are right about most samples, whatever they say."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(exits, samples, classes, generator=generator)
    answer = labels.clone()
    answer[labels == 0] = 1
    logits[0, torch.arange(samples), answer] += torch.where(answer == 1, 6.0, 3.0)
    for e in range(1, exits):
        logits[e, torch.arange(samples), labels] += 3.0 + e
    return records_of(logits, labels, cumulative_macs=[100 * (e + 1) for e in range(exits)])


def test_golden_eefp(golden):
    for case in golden("eefp")["cases"]:
        logits, labels = f64(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"])
        expected = case["expected"]
        correct = logits.argmax(-1) == labels
        confidence = logits.softmax(-1).amax(-1)
        assert correct.tolist() == expected["correct"]
        assert should_exit(correct).tolist() == expected["should_exit"]
        assert should_exit(correct).double().mean(1).tolist() == pytest.approx(expected["base_rate"])
        plain = [auroc(c, right) for c, right in zip(confidence, correct, strict=True)]
        for found, wanted in ((eefp(confidence, correct), "eefp_auroc"), (plain, "failure_prediction_auroc")):
            assert [v is None for v in found] == [v is None for v in expected[wanted]]
            assert [v or 0 for v in found] == pytest.approx([v or 0 for v in expected[wanted]], rel=1e-9)
        mean = mean_of_defined(eefp(confidence, correct))
        assert mean == (None if expected["eefp_mean"] is None else pytest.approx(expected["eefp_mean"], rel=1e-9))


def logistic_sample(samples=400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    odds = x @ torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64) + 0.5
    return x, odds, torch.rand(samples, generator=generator) < odds.sigmoid()


def test_newton_finds_a_logistic_regression_with_a_ridge():
    x, _, target = logistic_sample()
    design, target = torch.nn.functional.pad(x, (0, 1), value=1.0), target.double()
    ridge, prior = f64([1e-2, 1e-2, 1e-2, 0.0]), f64([0.5, 0.5, 0.5, 0.0])
    for around in (prior, torch.zeros(4).double()):
        found = _newton(design, target, ridge, around).requires_grad_()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(design @ found, target)
        (gradient,) = torch.autograd.grad(loss + (ridge * (found - around).square()).sum() / 2, found)
        assert gradient.abs().max() < 1e-6, "the minimum"
        again = _newton(design, target, ridge, around, start=found.detach() + 1)
        torch.testing.assert_close(again, found.detach(), rtol=0, atol=1e-6)
    sklearn = pytest.importorskip("sklearn.linear_model")
    other = sklearn.LogisticRegression(C=1 / (400 * 1e-2), tol=1e-10, max_iter=1000).fit(x.numpy(), target.numpy())
    assert found[:3].tolist() == pytest.approx(other.coef_[0].tolist(), abs=1e-4)
    assert _newton(design, (x[:, 0] > 0).double(), ridge + 1e-6, prior).isfinite().all(), "separable"


def test_platt_turns_gates_into_honest_odds():
    _, odds, target = logistic_sample(4000)
    slope, shift = platt(3 * odds + 1, target)
    assert slope == pytest.approx(1 / 3, rel=0.1)
    assert shift == pytest.approx(-1 / 3, abs=0.15)
    assert platt(-odds, target)[0] == pytest.approx(0.01), "a surer gate never counts less"
    assert float((0.01 * -odds + platt(-odds, target)[1]).sigmoid().mean()) == pytest.approx(
        float(target.double().mean()), abs=0.01
    )
    for same in (torch.ones(50).bool(), torch.zeros(50).bool()):
        slope, shift = platt(odds[:50], same)
        assert slope == 1
        assert math.isfinite(shift)


def test_folds_are_even_and_a_gate_has_not_seen_what_it_scores():
    records = make_records(103)
    target = should_exit(records.logits.argmax(-1) == records.labels)[0]
    fold = _folds(target, 5, torch.Generator().manual_seed(0))
    for part in (fold, fold[target], fold[~target]):
        counts = torch.bincount(part, minlength=5)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(fold, _folds(target, 5, torch.Generator().manual_seed(0)))
    x = gate_features(records.logits[0].log_softmax(-1)).double()
    unseen = _unseen_gates(x, target, fold, (1.0, 0.001))
    for k in range(5):
        inside = fold == k
        other = _unseen_gates(x, target ^ inside, fold, (1.0, 0.001))  # its own answers turned around
        assert torch.equal(other[:, inside], unseen[:, inside])
        assert not torch.isclose(other[:, ~inside], unseen[:, ~inside]).all(1).any()
        weight, bias = next(_gates(x[~inside], target[~inside], (0.001,)))
        torch.testing.assert_close(x[inside] @ weight + bias, unseen[1, inside], rtol=1e-5, atol=1e-5)


def test_cross_fitted_scores_do_not_flatter():
    seen, unseen = [], []
    for seed in range(8):
        records = make_records(60, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(60, generator=generator)  # labels that have nothing to do with the logits
        noise = dataclasses.replace(records, labels=records.labels[order])
        policy = EEFPPolicy.fit(noise, 1e-4, seed=seed)
        target = should_exit(noise.logits.argmax(-1) == noise.labels)[0]
        seen.append(auroc(policy.score(noise.logits[:1].log_softmax(-1)), target))
        unseen.append(auroc(policy.cross_fitted_scores[0], target))
    assert sum(seen) / 8 > 0.65
    assert sum(unseen) / 8 == pytest.approx(0.5, abs=0.1)
    assert policy.cross_fitted_scores.shape == (2, 60)
    assert policy.fitted_weight_decay == 1e-4
    assert EEFPPolicy.fit(noise).fitted_weight_decay == WEIGHT_DECAYS[0], "nothing to learn"
    large = EEFPPolicy.fit(make_records(3000))
    assert large.fitted_weight_decay <= 0.1, "much to learn"
    again = EEFPPolicy.fit(make_records(3000))
    assert torch.equal(large.cross_fitted_scores, again.cross_fitted_scores)
    assert EEFPPolicy(3).cross_fitted_scores.shape == (2, 0)


def test_one_threshold_means_the_same_at_every_exit():
    records, fresh = make_records(2000), make_records(4000, seed=1)
    policy = EEFPPolicy.fit(records)
    targets = should_exit(fresh.logits.argmax(-1) == fresh.labels).double()
    for e, score in enumerate(score_exits(fresh.logits, policy)):
        for low, high in ((0.0, 0.7), (0.7, 0.9), (0.9, 0.97), (0.97, 1.0)):
            inside = (score >= low) & (score < high)
            if inside.sum() > 200:
                assert float(targets[e][inside].mean()) == pytest.approx(float(score[inside].mean()), abs=0.07)


@pytest.mark.parametrize("weight_decay", [None, 100.0])
def test_the_gates_that_are_kept_score_like_those_that_had_not_seen_the_samples(weight_decay):
    records = make_records(2000)
    policy = EEFPPolicy.fit(records, weight_decay)
    kept = score_exits(records.logits, policy)
    assert (kept - policy.cross_fitted_scores).abs().mean(1).max() < 0.01


@pytest.mark.parametrize("wrong", [0, 1, 20])
def test_few_samples_and_exits_that_are_always_right(wrong):
    records = make_records(20, classes=4)
    logits = 0.3 * records.logits
    logits[:, torch.arange(20), records.labels] += 4.0
    logits[0, torch.arange(wrong), (records.labels[:wrong] + 1) % 4] += 9.0
    sure = dataclasses.replace(records, logits=logits)
    for folds in (2, 20):
        policy = EEFPPolicy.fit(sure, folds=folds, allow_missing_classes=True)
        assert policy.weight.isfinite().all()
        assert policy.cross_fitted_scores.isfinite().all()
        levels = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.97, 0.01, 0.01, 0.01]]).log()
        always = policy.score(levels.expand(2, -1, -1))  # the second exit
        assert (always.diff() >= 0).all(), "surer answers leave first"
        assert float(policy.cross_fitted_scores[1].mean()) > 0.9


def test_gate_features_by_hand():
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    half, quarter = math.log(0.5), math.log(0.25)
    expected = [0.5, 0.25, 1.5 * math.log(2) / math.log(3), half, quarter, quarter]
    found = gate_features(log_probs)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert found[1].tolist() == pytest.approx([1, 1, 0, 0, -20, -20], abs=1e-6)
    assert gate_features(torch.zeros(2, 2).log_softmax(-1))[0, -1] == -20


def test_a_fitted_gate_sees_what_confidence_does_not():
    records, fresh = make_records(), make_records(seed=1)
    policy = EEFPPolicy.fit(records)
    targets = should_exit(fresh.logits.argmax(-1) == fresh.labels)
    log_probs = fresh.logits.log_softmax(-1)
    for e in range(2):
        score = policy.score(log_probs[: e + 1])
        assert score.min() >= 0
        assert score.max() <= 1
        learned, plain = auroc(score, targets[e]), auroc(log_probs[e].amax(-1), targets[e])
        assert learned >= plain - 0.02
        assert float(score.mean()) == pytest.approx(float(targets[e].double().mean()), abs=0.06)  # honest
    assert auroc(policy.score(log_probs[:1]), targets[0]) > auroc(log_probs[0].amax(-1), targets[0]) + 0.05


def test_golden_eenet(golden):
    cases = {case["name"]: case for case in golden("eenet")["cases"]}
    for name in ("three_exits", "two_classes"):
        inputs, expected = cases[name]["inputs"], cases[name]["expected"]
        exits = inputs["n_exits"]
        scheduler = _Scheduler(exits, inputs["n_classes"], inputs["hidden_ratio"], False, [torch.Generator()]).double()
        with torch.no_grad():
            for e, values in enumerate(inputs["parameters"]):
                for key, value in values.items():
                    getattr(scheduler, key)[e].copy_(f64(value).view(getattr(scheduler, key)[e].shape))
        probs, labels = f64(inputs["probs"]), torch.tensor(inputs["labels"])
        own = head_inputs(probs)
        for e in range(exits):
            torch.testing.assert_close(own[e], f64(expected["features"][e])[:, : own.shape[-1]], rtol=1e-9, atol=1e-11)
        (scores,), (shares,) = scheduler(own)
        torch.testing.assert_close(scores.T, f64(expected["score"]), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(shares, f64(expected["assignment"]), rtol=1e-9, atol=1e-11)
        right = (probs.argmax(-1) == labels).double()
        assert right.T.tolist() == f64(expected["correct"]).tolist()
        costs = f64(inputs["cumulative_cost"])
        terms = scheduler.losses(
            own, right, costs, inputs["budget"], inputs["beta"], inputs["alpha_kl"], inputs["alpha_cost"]
        )
        for key, value in (("score", "loss_score"), ("kl", "loss_kl_elementwise_mean"), ("cost", "loss_cost"),
                           ("total", "loss_total")):  # fmt: skip
            assert terms[key].item() == pytest.approx(expected[value], rel=1e-9), key
        assert (shares @ costs).mean().item() == pytest.approx(expected["expected_cost"])
        policy = EENetPolicy(exits, inputs["n_classes"]).double()
        for e in range(exits - 1):
            policy.q_prob[e] = scheduler.q_prob[e][0].detach()
            policy.q_extra[e, : 2 + e] = scheduler.q_extra[e][0].detach()
        for e in range(exits - 1):
            found = policy.score(probs[: e + 1].log())
            torch.testing.assert_close(found, f64(expected["score"])[:, e], rtol=1e-7, atol=1e-9)
        thresholds = fraction_thresholds(scores.T, shares.mean(0).tolist(), 1.0)
        assert thresholds == pytest.approx(expected["thresholds"])
        last = [index if index >= 0 else exits - 1 for index in expected["exit_index"]]  # the last exit answers anyway
        assert exit_indices(scores[:-1], policy, thresholds[:-1]).tolist() == last
    for name, case in cases.items():
        if name.startswith("thresholds"):
            scores = f64(case["inputs"]["score"])
            found = fraction_thresholds(scores, case["inputs"]["exit_fractions"], 1.0)
            assert found == pytest.approx(case["expected"]["thresholds"])
            taken = exit_indices(scores.T[:-1], policy, found[:-1])
            assert taken.tolist() == case["expected"]["exit_index"]
            assert torch.bincount(taken, minlength=len(found)).tolist() == case["expected"]["exit_counts"]


def test_golden_budget_thresholds(golden):
    for case in golden("exit_policy")["cases"]:
        for budget in case["expected"].get("budgets", []):
            scores = f64(case["inputs"]["val_logits"]).softmax(-1).amax(-1).T
            found = fraction_thresholds(scores, budget["exit_fractions"])
            assert found[:-1] == pytest.approx(budget["thresholds"][:-1], rel=1e-9)
            for split in ("val", "test"):
                logits, labels = (
                    f64(case["inputs"][f"{split}_logits"]),
                    torch.tensor(case["inputs"][f"{split}_labels"]),
                )
                taken = exit_indices(logits.softmax(-1).amax(-1)[:-1], create_policy("confidence"), found[:-1])
                routed = exit_metrics(logits[taken, torch.arange(len(taken))], labels)
                cost = float(f64(case["inputs"]["cumulative_cost"])[taken].mean())
                assert 100 * routed["accuracy"] == pytest.approx(budget[f"{split}_accuracy_percent"])
                assert cost == pytest.approx(budget[f"{split}_cost"])
            assert routed["nll"] == pytest.approx(budget["test_nlpd"])


def test_eenet_keeps_its_budget_about():
    records = make_records(800)
    for budget in (150.0, 240.0):
        policy = EENetPolicy.fit(records, budget, epochs=20, restarts=1)
        index, logits = route_records(records, policy, policy.fitted_thresholds)
        cost = float(torch.tensor(records.cumulative_macs).double()[index].mean())
        assert cost == pytest.approx(budget, rel=0.2)
        assert float((logits.argmax(-1) == records.labels).double().mean()) > 0.6
    again = EENetPolicy.fit(records, 200.0, epochs=3, restarts=1)
    assert torch.equal(again.q_prob, EENetPolicy.fit(records, 200.0, epochs=3, restarts=1).q_prob)
    in_milliseconds = EENetPolicy.fit(records, 2.0, costs=[1, 2, 3], epochs=3, restarts=1)
    torch.testing.assert_close(in_milliseconds.q_prob, again.q_prob, rtol=1e-3, atol=1e-4)
    for budget, options, message in (
        (90.0, {}, "budget 90 is outside the costs of the exits, 100 to 300"),
        (3.5, {"costs": [1, 2, 3]}, "budget 3.5 is outside the costs of the exits, 1 to 3"),
        (2.0, {"costs": [1, 2]}, "costs must be 3 positive numbers, one per exit"),
        (2.0, {"costs": [0, 1, 2]}, "costs must be 3 positive numbers, one per exit"),
        (200.0, {"restarts": 0}, "restarts must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EENetPolicy.fit(records, budget, **options)


def test_several_starts_are_trained_side_by_side():
    records = make_records(200)
    inputs = head_inputs(records.logits.softmax(-1))
    right = (records.logits.argmax(-1) == records.labels).float()
    terms = (right, torch.tensor([1.0, 2.0, 3.0]), 2.0, 1.0, 1e-3, 1.0)

    def after_a_step(seeds):
        scheduler = _Scheduler(3, 4, 0.5, True, [torch.Generator().manual_seed(seed) for seed in seeds])
        optimizer = torch.optim.SGD(scheduler.parameters(), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            scheduler.losses(inputs, *terms)["total"].sum().backward()
            optimizer.step()
        return scheduler

    together, alone = after_a_step([0, 1, 2]), after_a_step([1])
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key][1], value[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(together.q_prob[0][0], together.q_prob[0][1])


def test_the_best_start_is_kept(monkeypatch):
    scores = torch.tensor([[0.9, 0.8, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5]])
    shares, costs = torch.tensor([[0.5, 0.5]] * 4), torch.tensor([1.0, 3.0])
    good, bad = (torch.tensor([[1, 1, 0, 0], [0, 0, own, own]]).bool() for own in (1, 0))
    better, thresholds = _end(scores, shares, good, costs, 2.0)
    assert better < _end(scores, shares, bad, costs, 2.0)[0] < _end(scores, shares, good, costs, 2.9)[0]
    assert thresholds == pytest.approx([0.8])
    found = []
    for best in range(3):
        ends = iter([((float(start != best), 0.0), [0.1 * start, 0.5]) for start in range(3)])
        monkeypatch.setattr("erde_hub.policies.eenet._end", lambda *given, ends=ends: next(ends))
        found.append(EENetPolicy.fit(make_records(100), epochs=1))
        assert found[-1].fitted_thresholds == [0.1 * best, 0.5]
    assert len({float(policy.q_prob.sum()) for policy in found}) == 3
    assert len({float(policy.q_extra.sum()) for policy in found}) == 3


@pytest.mark.parametrize("name", ["eefp", "eenet"])
def test_a_learned_policy_is_stored_with_the_model(name, tmp_path):
    model = resnet8(4, head="linear").eval()
    images = torch.randn(60, 3, 32, 32)
    labels = torch.arange(60) % 4
    records = collect_exit_records(model, [(images, labels)], progress=False)
    cls = {"eefp": EEFPPolicy, "eenet": EENetPolicy}[name]
    policy = cls.fit(records) if name == "eefp" else cls.fit(records, epochs=2, restarts=1)
    scores = torch.stack([policy.score(records.logits[: e + 1].log_softmax(-1)) for e in range(2)])
    threshold = [float(scores[0].quantile(0.6)) + 1e-6, float(scores[1].quantile(0.4)) + 1e-6]
    model.set_policy(policy, threshold)
    index, logits = route_records(records, policy, threshold)
    with torch.no_grad():
        out = model(images)
    clear = ((scores - torch.tensor(threshold)[:, None]).abs() > 1e-5).all(0)
    assert torch.equal(out.exit_index[clear], index[clear])
    torch.testing.assert_close(out.logits[clear], logits[clear], rtol=1e-4, atol=1e-5)
    assert len(set(index.tolist())) == 3
    model.save_pretrained(tmp_path)
    loaded = EarlyExitWrapper.from_pretrained(tmp_path)
    assert loaded.config.policy == name
    with torch.no_grad():
        assert torch.equal(loaded(images).exit_index, out.exit_index)
        assert (loaded(images, threshold=1e8).exit_index == 2).all()
        assert (loaded(images, threshold=-1e8).exit_index == 0).all()


def test_misuse():
    policy = EEFPPolicy(3)
    with pytest.raises(ShapeError, match="fitted for 3 exits, got 3 early ones"):
        policy.score(torch.zeros(3, 2, 4).log_softmax(-1))
    with pytest.raises(ShapeError, match="4 classes, got 1 early exits and 5 classes"):
        EENetPolicy(3, 4).score(torch.zeros(1, 2, 5).log_softmax(-1))
    with pytest.raises(ConfigError, match="num_exits must be an integer of at least 2, got 1"):
        create_policy("eefp", num_exits=1)
    records = make_records(30)
    for options, message in (
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"folds": 31}, "folds must be at most the number of samples, 30, got 31"),
        ({"weight_decay": 0.0}, "weight_decay must be finite and above 0"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EEFPPolicy.fit(records, **options)
    for options in ({"folds": 2.5}, {"folds": True}, {"weight_decay": "1"}):
        with pytest.raises(InputTypeError, match=next(iter(options))):
            EEFPPolicy.fit(records, **options)
    model = resnet8(4, exits=["layer1"])
    with pytest.raises(InputTypeError, match="a policy is needed, got str"):
        model.set_policy("eefp")
    with pytest.raises(ThresholdError, match="nan"):
        model.set_policy(EEFPPolicy(2), math.nan)
