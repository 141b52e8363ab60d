"""Learned policies against golden vectors; fitted ones beat a bare score where the score misleads, and are stored."""

from __future__ import annotations

import json
import math

import pytest
import torch
from engine_fakes import resnet8

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, InputTypeError, ShapeError, ThresholdError
from erde_hub.evaluation import ExitRecords, collect_exit_records, route_records
from erde_hub.evaluation.ranking import auroc, eefp, mean_of_defined
from erde_hub.policies import EEFPPolicy, EENetPolicy, create_policy
from erde_hub.policies.eefp import _logistic, gate_features, should_exit
from erde_hub.policies.eenet import _Scheduler, share_thresholds


def golden(shared, name):
    content = json.loads((shared / "reference" / "golden" / f"{name}.json").read_text())
    return {case["name"]: case for case in content["cases"]}


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def records_of(samples=600, exits=3, classes=4, seed=0):
    """The first exit is sure and wrong about class 0; the others are right about most samples, whatever they say."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(exits, samples, classes, generator=generator)
    answer = labels.clone()
    answer[labels == 0] = 1
    logits[0, torch.arange(samples), answer] += torch.where(answer == 1, 6.0, 3.0)
    for e in range(1, exits):
        logits[e, torch.arange(samples), labels] += 3.0 + e
    return ExitRecords(
        logits, labels, torch.arange(samples), [str(e) for e in range(exits)], [100 * (e + 1) for e in range(exits)],
        [str(k) for k in range(classes)], info={"split": "validation"},
    )  # fmt: skip


def test_golden_eefp(shared):
    for case in golden(shared, "eefp").values():
        logits, labels = f64(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"])
        expected = case["expected"]
        correct = logits.argmax(-1) == labels
        confidence = logits.softmax(-1).amax(-1)
        assert should_exit(correct).tolist() == expected["should_exit"]
        plain = [auroc(c, right) for c, right in zip(confidence, correct, strict=True)]
        for found, wanted in ((eefp(confidence, correct), "eefp_auroc"), (plain, "failure_prediction_auroc")):
            assert [v is None for v in found] == [v is None for v in expected[wanted]]
            assert [v or 0 for v in found] == pytest.approx([v or 0 for v in expected[wanted]], rel=1e-9)
        mean = mean_of_defined(eefp(confidence, correct))
        assert mean == (None if expected["eefp_mean"] is None else pytest.approx(expected["eefp_mean"], rel=1e-9))


def test_the_gate_is_a_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    target = (torch.rand(400, generator=generator) < (x @ truth + 0.5).sigmoid()).double()
    weight, bias = _logistic(x, target, 1e-2)
    found = torch.cat([weight, bias[None]]).requires_grad_()
    logits = x @ found[:3] + found[3]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target) + 1e-2 * found[:3].square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-6, "the minimum"
    sklearn = pytest.importorskip("sklearn.linear_model")
    other = sklearn.LogisticRegression(C=1 / (400 * 1e-2), tol=1e-10, max_iter=1000).fit(x.numpy(), target.numpy())
    assert weight.tolist() == pytest.approx(other.coef_[0].tolist(), abs=1e-4)
    separable = _logistic(x, (x[:, 0] > 0).double(), 1e-3)
    assert separable[0].isfinite().all()


def test_gate_features_by_hand():
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    half, quarter = math.log(0.5), math.log(0.25)
    expected = [0.5, 0.25, 1.5 * math.log(2) / math.log(3), half, quarter, quarter]
    found = gate_features(log_probs)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert found[1].tolist() == pytest.approx([1, 1, 0, 0, -20, -20], abs=1e-6)
    assert gate_features(torch.zeros(2, 2).log_softmax(-1))[0, -1] == -20


def test_a_fitted_gate_sees_what_confidence_does_not():
    records, fresh = records_of(), records_of(seed=1)
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


def test_golden_eenet(shared):
    cases = golden(shared, "eenet")
    for name in ("three_exits", "two_classes"):
        inputs, expected = cases[name]["inputs"], cases[name]["expected"]
        exits = inputs["n_exits"]
        generator = torch.Generator().manual_seed(0)
        scheduler = _Scheduler(exits, inputs["n_classes"], inputs["hidden_ratio"], False, generator).double()
        with torch.no_grad():
            for e, values in enumerate(inputs["parameters"]):
                for key, value in values.items():
                    getattr(scheduler, key)[e].copy_(f64(value).view(getattr(scheduler, key)[e].shape))
        probs, labels = f64(inputs["probs"]), torch.tensor(inputs["labels"])
        scores, shares = scheduler(probs)
        torch.testing.assert_close(scores.T, f64(expected["score"]), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(shares, f64(expected["assignment"]), rtol=1e-9, atol=1e-11)
        terms = scheduler.losses(
            probs, labels, f64(inputs["cumulative_cost"]), inputs["budget"], inputs["beta"], inputs["alpha_kl"],
            inputs["alpha_cost"],
        )  # fmt: skip
        for key, value in (("score", "loss_score"), ("kl", "loss_kl_elementwise_mean"), ("cost", "loss_cost"),
                           ("total", "loss_total")):  # fmt: skip
            assert terms[key].item() == pytest.approx(expected[value], rel=1e-9), key
        policy = EENetPolicy(exits, inputs["n_classes"]).double()
        for e in range(exits - 1):
            policy.q_prob[e] = scheduler.q_prob[e].detach()
            policy.q_extra[e, : 2 + e] = scheduler.q_extra[e].detach()
        for e in range(exits - 1):
            found = policy.score(probs[: e + 1].log())
            torch.testing.assert_close(found, f64(expected["score"])[:, e], rtol=1e-7, atol=1e-9)
        assert share_thresholds(scores.T, shares.mean(0).tolist(), 1.0) == pytest.approx(expected["thresholds"])
    for name, case in cases.items():
        if name.startswith("thresholds"):
            found = share_thresholds(f64(case["inputs"]["score"]), case["inputs"]["exit_fractions"], 1.0)
            assert found == pytest.approx(case["expected"]["thresholds"])


def test_golden_budget_thresholds(shared):
    for case in golden(shared, "exit_policy").values():
        for budget in case["expected"].get("budgets", []):
            scores = f64(case["inputs"]["val_logits"]).softmax(-1).amax(-1).T
            found = share_thresholds(scores, budget["exit_fractions"])
            assert found[:-1] == pytest.approx(budget["thresholds"][:-1], rel=1e-9)


def test_eenet_keeps_its_budget_about():
    records = records_of(800)
    for budget in (150.0, 240.0):
        policy = EENetPolicy.fit(records, budget, epochs=20, restarts=1)
        index, logits = route_records(records, policy, policy.fitted_thresholds)
        cost = float(torch.tensor(records.cumulative_macs).double()[index].mean())
        assert cost == pytest.approx(budget, rel=0.2)
        assert float((logits.argmax(-1) == records.labels).double().mean()) > 0.6
    again = EENetPolicy.fit(records, 200.0, epochs=3, restarts=1)
    assert torch.equal(again.q_prob, EENetPolicy.fit(records, 200.0, epochs=3, restarts=1).q_prob)
    with pytest.raises(ConfigError, match="budget 90 is outside the costs of the exits, 100 to 300"):
        EENetPolicy.fit(records, 90.0)


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
    model = resnet8(4, exits=["layer1"])
    with pytest.raises(InputTypeError, match="a policy is needed, got str"):
        model.set_policy("eefp")
    with pytest.raises(ThresholdError, match="nan"):
        model.set_policy(EEFPPolicy(2), math.nan)
