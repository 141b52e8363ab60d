"""Which teacher exit teaches which student exit."""

import math

import pytest
import torch

from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.losses import ERDELoss, KDLoss, map_teacher_exits


@pytest.mark.parametrize("student", range(1, 9))
@pytest.mark.parametrize("teacher", range(1, 9))
def test_the_rule(student, teacher):
    mapped = map_teacher_exits(student, teacher)
    assert len(mapped) == student
    assert mapped[-1] == teacher - 1
    assert mapped == sorted(mapped)
    early = mapped[:-1]
    if student == teacher:
        assert mapped == list(range(student))
    elif teacher == 1:
        assert early == [0] * (student - 1)
    else:
        assert early == [math.floor((i + 0.5) * (teacher - 1) / (student - 1)) for i in range(student - 1)]
        assert all(index < teacher - 1 for index in early)


def test_cases_by_hand():
    assert map_teacher_exits(4, 3) == [0, 1, 1, 2]  # floor of 1/3, 1, 5/3
    assert map_teacher_exits(3, 5) == [1, 3, 4]  # floor of 1, 3
    assert map_teacher_exits(2, 4) == [1, 3]  # floor of 3/2
    assert map_teacher_exits(1, 4) == [3]


def test_an_override_wins_and_may_count_from_the_end():
    assert map_teacher_exits(3, 3, [2, 2, 2]) == map_teacher_exits(3, 3, [-1, -1, -1]) == [2, 2, 2]
    assert KDLoss(teacher_exits=[0, 0, -1]).teacher_exit_map(3, 4) == [0, 0, 3]


def test_an_override_decides_whom_the_student_imitates():
    labels, student = torch.randint(3, (4,)), [torch.randn(4, 3) for _ in range(2)]
    teacher = [torch.randn(4, 3) for _ in range(2)]
    crossed = KDLoss(teacher_exits=[1, 0])(student, teacher, labels).loss
    torch.testing.assert_close(crossed, KDLoss()(student, teacher[::-1], labels).loss)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ([0, 1], ConfigError, r"2 entries, \[0, 1\], but the student has 3 exits"),
        ([0, 4, 3], ConfigError, r"teacher_exits\[1\] is 4, but the teacher has 4 exits: allowed are 0 to 3"),
        ([0, 1, -5], ConfigError, r"teacher_exits\[2\] is -5"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(override, error, message):
    loss = ERDELoss(teacher_exits=override)
    with pytest.raises(error, match=message):
        loss.teacher_exit_map(3, 4)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ([], ConfigError, "empty"),
        ([0, 1.0], InputTypeError, r"teacher_exits\[1\].*1.0"),
        ([True], InputTypeError, r"teacher_exits\[0\].*True"),
        ("012", InputTypeError, "'012'"),
        (2, InputTypeError, "one teacher exit per student exit"),
    ],
)
def test_an_override_of_the_wrong_kind_is_refused_when_the_loss_is_built(override, error, message):
    with pytest.raises(error, match=message):
        KDLoss(teacher_exits=override)


@pytest.mark.parametrize(("student", "teacher", "who"), [(0, 3, "student"), (3, 0, "teacher"), (3, 1.5, "teacher")])
def test_counts_that_cannot_be(student, teacher, who):
    with pytest.raises(ConfigError, match=f"the {who} must have at least one exit"):
        map_teacher_exits(student, teacher)
