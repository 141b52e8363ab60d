"""Joint cross-entropy and Hinton's distillation against the golden vectors."""

import pytest
import torch

from erde_hub.losses import CELoss, KDLoss, ce_loss, kd_loss


def cases_of(data, prefix):
    cases = [case for case in data["cases"] if case["name"].startswith(prefix)]
    assert cases, f"no case {prefix}*"
    return cases


def leaf(values, dtype):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def test_hinton(golden, precision, assert_matches):
    data = golden("baselines")
    for case in cases_of(data, "hinton"):
        given, expected = case["inputs"], case["expected"]
        student, teacher = leaf(given["student_logits"], precision), leaf(given["teacher_logits"], precision)
        loss = KDLoss(given["temperature"], kl_weight=given["kd_fraction"], ce_weight=1 - given["kd_fraction"])
        result = loss([student], [teacher], torch.tensor(given["labels"]))
        result.loss.backward()
        assert_matches(result.loss, expected["loss"], data["tolerance"], case["name"])
        assert_matches(student.grad, expected["grad_student_logits"], data["tolerance"], case["name"])
        assert teacher.grad is None


def test_multi_exit(golden, precision, assert_matches):
    data = golden("baselines")
    for case in cases_of(data, "multi_exit"):
        given, expected, name = case["inputs"], case["expected"], case["name"]
        student = leaf(given["student_logits"], precision)
        teacher = torch.tensor(given["teacher_logits"], dtype=precision)
        fraction = given["kd_fraction"]
        loss = KDLoss(
            given["temperature"],
            kl_weight=fraction,
            ce_weight=1 - fraction,
            exit_weights=given["exit_weights"],
            teacher_exits=given["teacher_exit_of_student_exit"],
        )
        result = loss(student.unbind(0), teacher.unbind(0), torch.tensor(given["labels"]))
        result.loss.backward()
        per_exit = fraction * result.exit_terms["kl"] + (1 - fraction) * result.exit_terms["ce"]
        assert_matches(per_exit, expected["loss_per_exit"], data["tolerance"], name)
        assert_matches(result.loss, expected["loss"], data["tolerance"], name)
        assert_matches(student.grad, expected["grad_student_logits"], data["tolerance"], name)


def test_joint(golden, precision, assert_matches):
    data = golden("baselines")
    for case in cases_of(data, "joint"):
        given, expected, name = case["inputs"], case["expected"], case["name"]
        logits, labels, weights = leaf(given["logits"], precision), torch.tensor(given["labels"]), given["exit_weights"]
        result = CELoss(exit_weights=weights)(logits.unbind(0), None, labels)
        result.loss.backward()
        assert_matches(result.exit_terms["ce"], expected["ce_per_exit"], data["tolerance"], name)
        assert_matches(result.loss, expected["loss"], data["tolerance"], name)
        assert_matches(logits.grad, expected["grad_logits"], data["tolerance"], name)
        normalised = ce_loss(logits.unbind(0), labels, exit_weights=[w / sum(weights) for w in weights])
        assert_matches(normalised, expected["loss_weights_normalised"], data["tolerance"], name)
        linear = ce_loss(logits.unbind(0), labels, exit_weights="linear")
        assert_matches(linear, expected["loss_linear_weights"], data["tolerance"], name)


def test_branchynet_weights_are_those_of_the_early_heavy_case(golden):
    weights = next(c for c in golden("baselines")["cases"] if c["name"] == "joint_early_heavy")["inputs"][
        "exit_weights"
    ]
    assert CELoss(exit_weights="branchynet").weights_for(3) == weights


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_that_of_torch(smoothing):
    logits, labels = [torch.randn(7, 4) for _ in range(3)], torch.randint(4, (7,))
    expected = sum(torch.nn.functional.cross_entropy(e, labels, label_smoothing=smoothing) for e in logits)
    torch.testing.assert_close(CELoss(label_smoothing=smoothing)(logits, None, labels).loss, expected)
    zero = [torch.zeros(7, 4)]
    kd = KDLoss(kl_weight=0.0, ce_weight=1.0, label_smoothing=smoothing)(logits, zero, labels)
    torch.testing.assert_close(kd.loss, expected)
    assert set(kd.terms) == {"ce", "teacher_right"}


def test_cross_entropy_ignores_a_teacher():
    logits, labels = [torch.randn(3, 4)], torch.randint(4, (3,))
    assert CELoss()(logits, [torch.randn(3, 9)], labels).loss == CELoss()(logits, None, labels).loss


def test_a_student_with_more_exits_than_the_teacher_learns_from_the_mapped_ones():
    teacher, labels = [torch.randn(4, 3) for _ in range(2)], torch.randint(3, (4,))
    student = [torch.randn(4, 3) for _ in range(4)]
    assert KDLoss().teacher_exit_map(4, 2) == [0, 0, 0, 1]
    expected = sum(
        kd_loss([exit_], [teacher[index]], labels) for exit_, index in zip(student, [0, 0, 0, 1], strict=True)
    )
    torch.testing.assert_close(KDLoss()(student, teacher, labels).loss, expected)


def test_teacher_right_is_the_share_of_samples_per_exit():
    labels = torch.tensor([0, 1, 1, 0])
    first, last = torch.eye(2)[[0, 0, 0, 0]], torch.eye(2)[[0, 1, 1, 1]]
    result = KDLoss()([torch.zeros(4, 2)] * 2, [first, last], labels)
    assert result.exit_terms["teacher_right"].tolist() == [0.5, 0.75]
    assert result.terms["teacher_right"].item() == 0.625
