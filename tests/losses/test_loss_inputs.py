"""What a loss refuses, and that it says which exit."""

import math

import pytest
import torch

from erde_hub.errors import ConfigError, InputTypeError, LabelError, ShapeError
from erde_hub.losses import CELoss, ERDELoss, KDLoss

N, K = 4, 3
LABELS = torch.tensor([0, 1, 2, 0])


def logits(*shapes):
    return [torch.randn(shape) for shape in shapes or [(N, K)] * 2]


@pytest.mark.parametrize(
    ("student", "error", "message"),
    [
        (torch.randn(N, K), InputTypeError, r"one tensor of shape \(4, 3\); pass \[student_logits\]"),
        (torch.randn(2, N, K), InputTypeError, r"pass student_logits.unbind\(0\)"),
        (None, InputTypeError, "student_logits must be a sequence.*NoneType"),
        ("logits", InputTypeError, "student_logits must be a sequence.*str"),
        ([], ShapeError, "student_logits is empty"),
        (
            [torch.randn(N, K), [[1.0]]],
            InputTypeError,
            r"student_logits\[1\] \(exit 1 of 2\) must be a tensor, got list",
        ),
        ([torch.ones(N, K, dtype=torch.int64)], InputTypeError, r"student_logits\[0\].*torch.int64"),
        ([torch.randn(N)], ShapeError, r"student_logits\[0\].*\(4,\)"),
        ([torch.randn(N, K, 2)], ShapeError, r"\(4, 3, 2\)"),
        ([torch.randn(0, K)], ShapeError, r"at least one sample.*\(0, 3\)"),
        ([torch.randn(N, 1)], ShapeError, r"two classes.*\(4, 1\)"),
        (logits((N, K), (N, K), (N, K + 1)), ShapeError, r"student_logits\[2\] \(exit 2 of 3\).*\(4, 4\).*\(4, 3\)"),
        (logits((N, K), (N + 1, K)), ShapeError, r"student_logits\[1\].*\(5, 3\)"),
        ([torch.randn(N, K), torch.randn(N, K, device="meta")], InputTypeError, r"student_logits\[1\].*meta.*cpu"),
    ],
)
def test_bad_student_logits(student, error, message):
    with pytest.raises(error, match=message):
        CELoss()(student, None, LABELS)


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (None, InputTypeError, "ERDELoss learns from a teacher, got teacher_logits=None"),
        (torch.randn(N, K), InputTypeError, r"pass \[teacher_logits\]"),
        (logits((N, K), (N, K + 2)), ShapeError, r"teacher_logits\[1\] \(exit 1 of 2\)"),
        (logits((N, K + 2)), ShapeError, "the student has 3 classes and the teacher 5"),
        (logits((N + 1, K)), ShapeError, "4 samples and teacher_logits 5"),
        ([torch.randn(N, K, device="meta")], InputTypeError, "student_logits are on cpu and teacher_logits on meta"),
    ],
)
def test_bad_teacher_logits(teacher, error, message):
    with pytest.raises(error, match=message):
        ERDELoss()(logits(), teacher, LABELS)


def test_a_loss_of_ones_own_without_a_teacher_is_told_how_to_say_so():
    class Own(CELoss):
        needs_teacher = True

    with pytest.raises(InputTypeError, match="or set needs_teacher = False in the class Own"):
        Own()(logits(), None, LABELS)
    with pytest.raises(InputTypeError, match=r"train with the loss 'ce'$"):
        ERDELoss()(logits(), None, LABELS)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1, 2, 0], InputTypeError, "labels must be a tensor.*list"),
        (None, InputTypeError, "labels must be a tensor.*NoneType"),
        (LABELS.float(), InputTypeError, "torch.float32"),
        (LABELS.bool(), InputTypeError, "torch.bool"),
        (LABELS[:3], ShapeError, r"shape \(4,\).*\(3,\)"),
        (LABELS[:, None], ShapeError, r"\(4, 1\)"),
        (torch.tensor([0, 1, 3, 0]), LabelError, "label 3 of row 2 is outside the 3 classes, 0 to 2"),
        (torch.tensor([0, 1, 2, -100]), LabelError, "label -100 of row 3 is outside"),
        (LABELS.to("meta"), InputTypeError, "labels are on meta"),
    ],
)
@pytest.mark.parametrize("loss", [CELoss(), KDLoss(), ERDELoss()], ids=["ce", "kd", "erde"])
def test_bad_labels(loss, labels, error, message):
    for _ in range(2):  # every call checks, not only the first
        with pytest.raises(error, match=message):
            loss(logits(), logits(), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_small_integers_are_labels_too(dtype):
    student = logits()
    assert CELoss()(student, None, LABELS.to(dtype)).loss == CELoss()(student, None, LABELS).loss


def test_exits_may_come_as_a_tuple():
    student = logits()
    assert CELoss()(tuple(student), None, LABELS).loss == CELoss()(student, None, LABELS).loss


@pytest.mark.parametrize("cls", [KDLoss, ERDELoss])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0.0}, ConfigError, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": -1}, ConfigError, "temperature.*-1"),
        ({"temperature": math.nan}, ConfigError, "temperature.*nan"),
        ({"temperature": "2"}, InputTypeError, "temperature must be a number above 0, got '2' of type str"),
        ({"temperature": True}, InputTypeError, "temperature.*True"),
        ({"kl_weight": -0.1}, ConfigError, "kl_weight must be finite and at least 0, got -0.1"),
        ({"ce_weight": math.inf}, ConfigError, "ce_weight.*inf"),
        ({"label_smoothing": 1.0}, ConfigError, "label_smoothing must be finite and at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_numbers(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"entropy_weight": -0.005}, ConfigError, "entropy_weight.*-0.005"),
        ({"correctness": "per-exit"}, ConfigError, "unknown correctness 'per-exit'; did you mean 'per_exit'"),
        ({"entropy_exits": "none"}, ConfigError, "entropy_exits 'none'.*all, intermediate"),
        ({"reduction": "mean"}, ConfigError, "reduction 'mean'.*batch, subset, sum"),
        ({"kl_scale": None}, ConfigError, "kl_scale None"),
        ({"kd_on_teacher_wrong": "false"}, InputTypeError, "kd_on_teacher_wrong must be True or False, got 'false'"),
        ({"kd_on_all_samples_at_final_exit": 1}, InputTypeError, "kd_on_all_samples_at_final_exit.*got 1"),
        (
            {"kl_weight": 0, "ce_weight": 0, "entropy_weight": 0},
            ConfigError,
            "nothing to train: kl_weight, ce_weight, entropy_weight are all 0",
        ),
    ],
)
def test_bad_readings(arguments, error, message):
    with pytest.raises(error, match=message):
        ERDELoss(**arguments)


def test_distillation_without_any_weight():
    with pytest.raises(ConfigError, match="KDLoss has nothing to train"):
        KDLoss(kl_weight=0, ce_weight=0.0)


def test_errors_are_builtin_ones_too():
    with pytest.raises(ValueError, match="classes"):
        KDLoss()(logits(), logits((N, K + 1)), LABELS)
    with pytest.raises(TypeError):
        KDLoss()(logits(), None, LABELS)
