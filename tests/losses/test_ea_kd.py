"""EA-KD against the golden vectors: weights, values, gradients; and joined to other losses."""

import math

import pytest
import torch

from erde_hub.errors import ConfigError
from erde_hub.losses import (
    CELoss,
    DKDLoss,
    EAKDLoss,
    EntropyWeight,
    ERDELoss,
    ExitBatch,
    FeatureKDLoss,
    KDLoss,
    ea_kd_loss,
    functional,
)

WEIGHTINGS = {"weight": "both", "weight_base": "base", "weight_interact": "interaction"}


def tensors(case, dtype):
    given = case["inputs"]
    student = torch.tensor(given["student_logits"], dtype=dtype, requires_grad=True)
    return student, torch.tensor(given["teacher_logits"], dtype=dtype), torch.tensor(given["labels"])


def test_weights(golden, precision, assert_matches):
    data = golden("ea_kd")
    assert len(data["cases"]) >= 7
    for case in data["cases"]:
        student, teacher, labels = tensors(case, precision)
        batch = ExitBatch(student[None], labels, teacher[None])
        for key, weighting in WEIGHTINGS.items():
            weight = EntropyWeight(case["inputs"]["entropy_temperature"], entropy_weighting=weighting)
            values = weight.weights(batch)
            assert not values.requires_grad
            assert_matches(values[0], case["expected"][key], data["tolerance"], f"{case['name']} {key}")
        exact = EntropyWeight(case["inputs"]["entropy_temperature"]).weights(batch)[0]
        tight = {"float64_rtol": 1e-12, "float64_atol": 1e-13, "float32_rtol": 1e-4, "float32_atol": 1e-5}
        assert_matches(exact, case["expected"]["weight_exact_no_eps"], tight, case["name"])
        assert (exact <= math.log(case["inputs"]["n_classes"]) + 1e-6).all()


def test_values_and_gradients(golden, precision, assert_matches):
    data = golden("ea_kd")
    for case in data["cases"]:
        given, expected, name = case["inputs"], case["expected"], case["name"]
        temperatures = {"temperature": given["kd_temperature"], "entropy_temperature": given["entropy_temperature"]}
        student, teacher, labels = tensors(case, precision)
        result = EAKDLoss(**temperatures, kl_weight=1.0, ce_weight=0.0)([student], [teacher], labels)
        result.loss.backward()
        assert_matches(result.loss, expected["loss_ea_kd"], data["tolerance"], name)
        assert_matches(student.grad, expected["grad_ea_kd"], data["tolerance"], name)
        student.grad = None
        plain = KDLoss(given["kd_temperature"], kl_weight=1.0, ce_weight=0.0)([student], [teacher], labels)
        plain.loss.backward()
        assert_matches(plain.loss, expected["loss_plain_kd"], data["tolerance"], name)
        assert_matches(student.grad, expected["grad_plain_kd"], data["tolerance"], name)
        for key, logits in (("teacher_entropy", teacher), ("student_entropy", student.detach())):
            softened = functional.log_probs(logits, given["entropy_temperature"])
            assert_matches(functional.entropy(softened), expected[key], data["tolerance"], f"{name} {key}")
        total = ea_kd_loss([student], [teacher], labels, **temperatures)  # the defaults are 0.9 and 0.1
        assert_matches(total, expected["loss_total_ce0.1_kd0.9"], data["tolerance"], name)


def test_the_released_code_bounds_the_entropy_by_100(golden, precision, assert_matches):
    data, seen = golden("ea_kd"), 0
    for case in data["cases"]:
        if "released_cifar_h_ub" not in case["expected"]:
            continue
        seen += 1
        given, expected = case["inputs"], case["expected"]
        student, teacher, labels = tensors(case, precision)
        bound = {"entropy_temperature": given["entropy_temperature"], "entropy_bound": expected["released_cifar_h_ub"]}
        weights = EntropyWeight(**bound).weights(ExitBatch(student[None], labels, teacher[None]))[0]
        assert_matches(weights, expected["released_cifar_weight"], data["tolerance"], case["name"])
        value = ea_kd_loss(
            [student], [teacher], labels, temperature=given["kd_temperature"], kl_weight=1.0, ce_weight=0.0, **bound
        )
        assert_matches(value, expected["released_cifar_loss_ea_kd"], data["tolerance"], case["name"])
    assert seen >= 2


def test_decoupled_distillation_weighed(golden, precision, assert_matches):
    data, seen = golden("ea_kd"), 0
    for case in data["cases"]:
        if "dkd" not in case["expected"]:
            continue
        seen += 1
        expected, name = case["expected"]["dkd"], case["name"]
        settings = {
            "temperature": case["inputs"]["kd_temperature"],
            "target_weight": expected["alpha"],
            "nontarget_weight": expected["beta"],
            "ce_weight": 0.0,
        }
        student, teacher, labels = tensors(case, precision)
        plain = DKDLoss(**settings)([student], [teacher], labels).loss
        assert_matches(plain, expected["loss_dkd"], data["tolerance"], name)
        weighed = DKDLoss(**settings).add(EntropyWeight(expected["entropy_temperature"]))
        result = weighed([student], [teacher], labels)
        result.loss.backward()
        assert_matches(result.loss, expected["loss_ea_dkd"], data["tolerance"], name)
        assert_matches(student.grad, expected["grad_ea_dkd"], data["tolerance"], name)
    assert seen >= 2


def test_features_weighed(golden, precision, assert_matches):
    data = golden("ea_kd")
    case = next(case for case in data["cases"] if "feature_mse" in case["expected"])
    student, teacher, labels = tensors(case, precision)
    feature, target = (
        torch.tensor(case["inputs"][f"{who}_feature"], dtype=precision) for who in ("student", "teacher")
    )
    feature.requires_grad_()
    last = [x.permute(0, 2, 3, 1) for x in (feature, target)]
    loss = FeatureKDLoss(kl_weight=0.0, projection="none").add(EntropyWeight(case["inputs"]["entropy_temperature"]))
    result = loss([student], [teacher], labels, student_features=last[:1], teacher_features=last[1:])
    result.loss.backward()
    expected = case["expected"]["feature_mse"]
    assert_matches(result.terms["feature"], expected["loss"], data["tolerance"], "feature")
    assert_matches(feature.grad, expected["grad_student_feature"], data["tolerance"], "feature")


def make_batch(exits=3, samples=6, classes=4):
    labels = torch.arange(samples) % classes
    student = [torch.randn(samples, classes, dtype=torch.float64, requires_grad=True) for _ in range(exits)]
    teacher = [torch.randn(samples, classes, dtype=torch.float64) for _ in range(exits)]
    for logits in teacher:
        logits[::2] += 6 * torch.nn.functional.one_hot(labels[::2], classes)
    return student, teacher, labels


def test_on_top_of_erde_it_weighs_the_samples_that_the_teacher_gets_right():
    student, teacher, labels = make_batch()
    plain = ERDELoss(entropy_weight=0.5)(student, teacher, labels)
    result = ERDELoss(entropy_weight=0.5).add(EntropyWeight(2.0))(student, teacher, labels)
    for term in ("ce", "entropy", "teacher_right"):
        assert torch.equal(result.exit_terms[term], plain.exit_terms[term])
    weight = EntropyWeight(2.0).weights(ExitBatch(torch.stack(student).detach(), labels, torch.stack(teacher)))
    for exit_, (s, t) in enumerate(zip(student, teacher, strict=True)):
        right = t.argmax(-1) == labels
        assert 0 < right.sum() < len(right)
        kl = functional.kl_divergence(functional.log_probs(t, 2.0), functional.log_probs(s, 2.0)) * 4 / 4
        torch.testing.assert_close(result.exit_terms["kl"][exit_], (weight[exit_] * kl)[right].sum().detach() / 6)
    result.loss.backward()
    wrong = teacher[0].argmax(-1) != labels
    only_entropy = [exit_.detach().requires_grad_() for exit_ in student]
    ERDELoss(kl_weight=0.0, ce_weight=0.0, entropy_weight=0.5)(only_entropy, teacher, labels).loss.backward()
    torch.testing.assert_close(student[0].grad[wrong], only_entropy[0].grad[wrong])


def test_each_exit_has_weights_of_its_own():
    student, teacher, labels = make_batch()
    student[1] = torch.zeros_like(student[1])
    weights = EAKDLoss()(student, teacher, labels).exit_terms["ea_kd_weight"]
    assert len(set(weights.tolist())) == 3
    swapped = EAKDLoss()(student[::-1], teacher[::-1], labels).exit_terms["ea_kd_weight"]
    torch.testing.assert_close(weights.flip(0), swapped)


def test_normalized_weights_leave_the_mean_as_it_is():
    student, teacher, labels = make_batch()
    result = EAKDLoss(normalize_weights=True)(student, teacher, labels)
    torch.testing.assert_close(result.exit_terms["ea_kd_weight"], torch.ones(3).double())
    one_hot = [100.0 * torch.nn.functional.one_hot(labels, 4).double()] * 3
    assert torch.isfinite(EAKDLoss(normalize_weights=True)(one_hot, one_hot, labels).loss)  # all weights are 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CELoss().add(EntropyWeight()),
            "'ea_kd' weighs the samples of .*, and CELoss has none",
        ),
        (lambda: KDLoss(kl_weight=0.0).add(EntropyWeight()), "KDLoss has none .its weight may be 0."),
        (lambda: EAKDLoss(kl_weight=0.0), "EAKDLoss has none"),
        (lambda: EAKDLoss().add(EntropyWeight()), "EAKDLoss has 'ea_kd' already"),
        (lambda: EntropyWeight(entropy_weighting="half"), "unknown entropy_weighting 'half'.*base, both, interaction"),
        (lambda: EntropyWeight(entropy_temperature=0.0), "entropy_temperature must be finite and above 0, got 0.0"),
        (lambda: EAKDLoss(entropy_bound=-1.0), "entropy_bound.*-1.0"),
    ],
)
def test_what_cannot_be_weighed(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
