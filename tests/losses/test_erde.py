"""ERDE against the golden vectors and against a slow implementation written from the formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erde_hub.losses import ERDELoss, KDLoss, create_loss, erde_loss

SWITCHES = ("correctness", "entropy_exits", "reduction", "kl_scale", "kd_on_teacher_wrong",
            "kd_on_all_samples_at_final_exit")  # fmt: skip
READINGS = {"default", "correctness_final_exit", "entropy_all_exits", "final_exit_kd_all", "subset_mean", "sum",
            "kl_T2_only", "keep_kd_on_wrong", "plain_multi_exit_kd"}  # fmt: skip


def test_every_case_in_every_reading(golden, precision, assert_matches):
    data = golden("erde")
    assert set(data["readings"]) == READINGS
    assert len(data["cases"]) >= 11
    gradients = 0
    for case in data["cases"]:
        inputs, expected = case["inputs"], case["expected"]
        for reading, switches in data["readings"].items():
            assert set(switches) == {*SWITCHES, "entropy_term"}
            loss = ERDELoss(
                inputs["temperature"],
                kl_weight=inputs["w_kl"],
                ce_weight=inputs["w_ce"],
                entropy_weight=inputs["w_entropy"] if switches["entropy_term"] else 0.0,
                **{name: switches[name] for name in SWITCHES},
            )
            student = torch.tensor(inputs["student_logits"], dtype=precision, requires_grad=True)
            teacher = torch.tensor(inputs["teacher_logits"], dtype=precision)
            result = loss(student.unbind(0), teacher.unbind(0), torch.tensor(inputs["labels"]))
            where = f"{case['name']} {reading}"
            assert_matches(result.loss, expected["loss"][reading], data["tolerance"], where)
            result.loss.backward()
            assert torch.isfinite(student.grad).all(), where
            if reading in expected["grad_student_logits"]:
                gradients += 1
                assert_matches(student.grad, expected["grad_student_logits"][reading], data["tolerance"], where)
    assert gradients >= 20


def test_the_defaults_are_the_default_reading(golden):
    data = golden("erde")
    loss = ERDELoss()
    assert {name: getattr(loss, name) for name in SWITCHES} == {
        name: data["readings"]["default"][name] for name in SWITCHES
    }
    assert (loss.temperature, loss.kl_weight, loss.ce_weight, loss.entropy_weight) == (2.0, 1.0, 1.0, 0.005)
    case = data["cases"][0]["inputs"]
    student, teacher = torch.tensor(case["student_logits"]).double(), torch.tensor(case["teacher_logits"]).double()
    value = erde_loss(student.unbind(0), teacher.unbind(0), torch.tensor(case["labels"]))
    assert value.item() == pytest.approx(data["cases"][0]["expected"]["loss"]["default"], rel=1e-6)


def softmax(row):
    largest = max(row)
    powers = [math.exp(z - largest) for z in row]
    return [p / math.fsum(powers) for p in powers]


def log_softmax(row):
    largest = max(row)
    log_sum = largest + math.log(math.fsum(math.exp(z - largest) for z in row))
    return [z - log_sum for z in row]


def slow_erde(student, teacher, labels, *, temperature, kl_weight, ce_weight, entropy_weight, correctness,
              entropy_exits, reduction, kl_scale, kd_on_teacher_wrong, kd_on_all_samples_at_final_exit):  # fmt: skip
    """Value and gradient, one number at a time, from the formula and its closed-form derivative."""
    exits, samples, classes = student.shape
    answers = teacher.argmax(-1)
    scale = temperature**2 / (classes if kl_scale == "T2_over_K" else 1)
    total, gradient = 0.0, np.zeros_like(student)
    for e in range(exits):
        last = e == exits - 1
        right = [answers[-1 if correctness == "final_exit" else e][b] == labels[b] for b in range(samples)]
        distils = [r or kd_on_teacher_wrong or (last and kd_on_all_samples_at_final_exit) for r in right]
        raises = [not r and (not last or entropy_exits == "all") for r in right]
        divide = {
            "batch": (samples, samples),
            "subset": (max(sum(distils), 1), max(sum(raises), 1)),
            "sum": (1, 1),
        }[reduction]
        for b in range(samples):
            s, t, y = student[e, b].tolist(), teacher[e, b].tolist(), labels[b]
            p, log_p = softmax(s), log_softmax(s)
            if distils[b]:
                soft_s, soft_t = [z / temperature for z in s], [z / temperature for z in t]
                q_s, q_t = softmax(soft_s), softmax(soft_t)
                log_s, log_t = log_softmax(soft_s), log_softmax(soft_t)
                kl = math.fsum(q_t[k] * (log_t[k] - log_s[k]) for k in range(classes) if q_t[k] > 0)
                total += (kl_weight * scale * kl - ce_weight * log_p[y]) / divide[0]
                for k in range(classes):
                    gradient[e, b, k] += kl_weight * scale / temperature * (q_s[k] - q_t[k]) / divide[0]
                    gradient[e, b, k] += ce_weight * (p[k] - (k == y)) / divide[0]
            if raises[b]:
                entropy = -math.fsum(p[k] * log_p[k] for k in range(classes) if p[k] > 0)
                total -= entropy_weight * entropy / divide[1]
                for k in range(classes):
                    gradient[e, b, k] += entropy_weight * p[k] * (log_p[k] + entropy) / divide[1]
    return total, gradient


@settings(max_examples=150)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6)),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 5.0, 1000.0]),
    numbers=st.tuples(
        st.sampled_from([0.5, 1.0, 2.0, 4.0]),
        st.sampled_from([0.0, 0.3, 10.0]),
        st.sampled_from([0.0, 1.0]),
        st.sampled_from([0.005, 1.0]),
    ),
    switches=st.fixed_dictionaries(
        {
            "correctness": st.sampled_from(["per_exit", "final_exit"]),
            "entropy_exits": st.sampled_from(["intermediate", "all"]),
            "reduction": st.sampled_from(["batch", "subset", "sum"]),
            "kl_scale": st.sampled_from(["T2_over_K", "T2"]),
            "kd_on_teacher_wrong": st.booleans(),
            "kd_on_all_samples_at_final_exit": st.booleans(),
        }
    ),
)
def test_against_the_slow_implementation(sizes, seed, spread, numbers, switches):
    generator = np.random.default_rng(seed)
    student, teacher = generator.normal(size=(2, *sizes)) * spread
    labels = generator.integers(sizes[2], size=sizes[1])
    arguments = dict(zip(("temperature", "kl_weight", "ce_weight", "entropy_weight"), numbers, strict=True)) | switches
    expected, expected_gradient = slow_erde(student, teacher, labels, **arguments)
    logits = torch.tensor(student, requires_grad=True)
    result = ERDELoss(**arguments)(logits.unbind(0), torch.tensor(teacher).unbind(0), torch.tensor(labels))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)
    np.testing.assert_allclose(logits.grad.numpy(), expected_gradient, rtol=1e-9, atol=1e-11)


def batch(*, right, exits=3, samples=6, classes=5):
    """Random logits of a student and of a teacher that is right, or wrong, on every sample at every exit."""
    labels = torch.randint(classes, (samples,))
    answers = labels if right else (labels + 1) % classes
    teacher = [torch.randn(samples, classes) + 20 * torch.nn.functional.one_hot(answers, classes) for _ in range(exits)]
    return [torch.randn(samples, classes, requires_grad=True) for _ in range(exits)], teacher, labels


def test_a_batch_that_the_teacher_gets_all_wrong_trains_only_entropy_at_early_exits():
    student, teacher, labels = batch(right=False)
    result = ERDELoss()(student, teacher, labels)
    assert result.terms["kl"] == result.terms["ce"] == result.terms["teacher_right"] == 0.0
    assert result.exit_terms["entropy"][-1] == 0.0
    result.loss.backward()
    assert all(exit_.grad.abs().sum() > 0 for exit_ in student[:-1])
    # The final exit takes part with gradients of 0, so that no parameter is left without one under DDP.
    assert student[-1].grad.tolist() == torch.zeros_like(student[-1]).tolist()
    # A step against the gradient raises the entropy.
    before = torch.distributions.Categorical(logits=student[0].detach()).entropy().mean()
    after = torch.distributions.Categorical(logits=student[0].detach() - student[0].grad).entropy().mean()
    assert after > before


def test_a_batch_that_the_teacher_gets_all_right_has_no_entropy_term():
    student, teacher, labels = batch(right=True)
    result = ERDELoss(entropy_weight=5.0)(student, teacher, labels)
    assert result.terms["entropy"] == 0.0
    assert result.terms["teacher_right"] == 1.0
    torch.testing.assert_close(result.loss.detach(), result.terms["kl"] + result.terms["ce"])


def test_without_masks_and_entropy_it_is_distillation_on_all_samples():
    student, teacher, labels = batch(right=False)
    erde = ERDELoss(temperature=3.0, entropy_weight=0.0, kd_on_teacher_wrong=True, kl_scale="T2")
    kd = KDLoss(temperature=3.0, kl_weight=1.0, ce_weight=1.0)
    torch.testing.assert_close(erde(student, teacher, labels).loss, kd(student, teacher, labels).loss)


def test_final_exit_correctness_is_the_teachers_own_last_exit_whatever_the_map():
    labels = torch.tensor([0, 0])
    wrong, right = torch.tensor([[0.0, 9.0]] * 2), torch.tensor([[9.0, 0.0]] * 2)
    student = [torch.zeros(2, 2)] * 2
    loss = ERDELoss(correctness="final_exit", teacher_exits=[0, 0], reduction="batch")
    # Both student exits learn from the teacher's first exit, which is wrong; its last exit decides.
    assert loss(student, [wrong, right], labels).terms["ce"].item() == pytest.approx(2 * math.log(2))
    assert loss(student, [right, wrong], labels).terms["ce"].item() == 0.0


def test_terms_of_weight_zero_are_not_computed():
    student, teacher, labels = batch(right=True)
    assert set(ERDELoss(entropy_weight=0.0)(student, teacher, labels).terms) == {"kl", "ce", "teacher_right"}
    assert set(ERDELoss(kl_weight=0.0)(student, teacher, labels).terms) == {"ce", "entropy", "teacher_right"}


def test_created_by_name():
    loss = create_loss("erde", entropy_weight=0.05, reduction="subset")
    assert isinstance(loss, ERDELoss)
    assert loss.settings()["entropy_weight"] == 0.05
    assert "reduction='subset'" in repr(loss)
