"""The per-sample quantities against the golden vectors, and at the ends of their ranges."""

import math

import pytest
import torch

from erde_hub.errors import UnknownNameError
from erde_hub.losses import functional


def test_quantities_of_every_erde_case(golden, precision, assert_matches):
    data = golden("erde")
    assert len(data["cases"]) >= 11
    for case in data["cases"]:
        given, expected, name = case["inputs"], case["expected"], case["name"]
        student = torch.tensor(given["student_logits"], dtype=precision)
        teacher = torch.tensor(given["teacher_logits"], dtype=precision)
        labels, temperature = torch.tensor(given["labels"]), given["temperature"]
        kl = functional.kl_divergence(
            functional.log_probs(teacher, temperature), functional.log_probs(student, temperature)
        )
        scaled = kl * functional.kl_factor("T2_over_K", temperature, given["n_classes"])
        log_probs = functional.log_probs(student)
        for key, actual in (
            ("kl", kl),
            ("kl_scaled", scaled),
            ("ce", functional.cross_entropy(log_probs, labels)),
            ("student_entropy", functional.entropy(log_probs)),
        ):
            assert_matches(actual, expected[key], data["tolerance"], f"{name} {key}")
        assert functional.correct(teacher, labels).tolist() == expected["teacher_correct"], name


def test_quantities_of_every_hinton_case(golden, precision, assert_matches):
    data = golden("baselines")
    cases = [case for case in data["cases"] if case["name"].startswith("hinton")]
    assert len(cases) >= 5
    for case in cases:
        given, expected, name = case["inputs"], case["expected"], case["name"]
        student = torch.tensor(given["student_logits"], dtype=precision)
        teacher = torch.tensor(given["teacher_logits"], dtype=precision)
        temperature = given["temperature"]
        kl = functional.kl_divergence(
            functional.log_probs(teacher, temperature), functional.log_probs(student, temperature)
        )
        ce = functional.cross_entropy(functional.log_probs(student), torch.tensor(given["labels"]))
        assert_matches(kl, expected["kl_per_sample"], data["tolerance"], name)
        assert_matches(ce, expected["ce_per_sample"], data["tolerance"], name)
        elementwise = kl.mean() * functional.kl_factor("T2_over_K", temperature, given["n_classes"])
        assert_matches(elementwise, expected["loss_kd_elementwise_mean"], data["tolerance"], name)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_saturated_logits_have_no_entropy_and_a_finite_gradient(size):
    logits = torch.tensor([[size, 0.0, -size], [0.0, 0.0, -size]], requires_grad=True)
    entropy = functional.entropy(functional.log_probs(logits))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2.0)]))
    entropy.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2, 3))


def test_classes_of_probability_zero_have_no_entropy():
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(functional.entropy(probs.log()), torch.tensor([0.0, math.log(2.0)]))


def test_divergence_is_zero_for_equal_sides_and_exact_for_impossible_classes():
    logits = torch.randn(4, 7) * 5
    same = functional.log_probs(logits, 3.0)
    assert functional.kl_divergence(same, same).tolist() == [0.0] * 4
    teacher = torch.tensor([0.5, 0.5, 0.0]).log()
    student = torch.tensor([0.25, 0.25, 0.5]).log()
    assert functional.kl_divergence(teacher, student).item() == pytest.approx(math.log(2.0))


def test_small_values_survive_bf16_logits():
    # -log p_y of these is 5.4e-6 and 6.8e-5: bf16 arithmetic would give 0 for both.
    logits = torch.tensor([[12.125, 0.0], [0.0, 9.625]], dtype=torch.bfloat16)
    log_probs = functional.log_probs(logits)
    assert log_probs.dtype == torch.float32
    exact = -torch.log_softmax(logits.double(), -1).gather(1, torch.tensor([[0], [1]])).squeeze(1)
    actual = functional.cross_entropy(log_probs, torch.tensor([0, 1]))
    torch.testing.assert_close(actual.double(), exact, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_torch(smoothing):
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    actual = functional.cross_entropy(functional.log_probs(logits), labels, smoothing)
    torch.testing.assert_close(actual, expected)


def test_the_divergence_sends_no_gradient_to_the_teacher():
    teacher, student = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    value = functional.kl_divergence(functional.log_probs(teacher), functional.log_probs(student)).sum()
    value.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach())


def test_of_equal_logits_the_first_answers():
    assert functional.correct(torch.zeros(2, 3), torch.tensor([0, 1])).tolist() == [True, False]


def test_unknown_scale_is_named():
    with pytest.raises(UnknownNameError, match=r"kl_scale 'T2_over_k'; did you mean 'T2_over_K'"):
        functional.kl_factor("T2_over_k", 2.0, 10)
