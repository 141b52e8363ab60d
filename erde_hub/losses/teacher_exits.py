"""Which exit of the teacher each exit of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence

from erde_hub.errors import ConfigError, InputTypeError


def check_teacher_exits(teacher_exits: object) -> tuple[int, ...] | None:
    """Returns the override as a tuple, or None where there is none.

    Raises:
        InputTypeError: Not a sequence of whole numbers.
        ConfigError: Empty.
    """
    if teacher_exits is None:
        return None
    if not isinstance(teacher_exits, Sequence) or isinstance(teacher_exits, str):
        raise InputTypeError(
            f"teacher_exits must be a list with one teacher exit per student exit, got {teacher_exits!r}"
        )
    for position, index in enumerate(teacher_exits):
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputTypeError(
                f"teacher_exits[{position}] must be the index of a teacher exit (0 is the first, -1 the final one),"
                f" got {index!r}"
            )
    if not teacher_exits:
        raise ConfigError("teacher_exits is empty: give one teacher exit per student exit, the final one included")
    return tuple(teacher_exits)


def map_teacher_exits(num_student: int, num_teacher: int, teacher_exits: Sequence[int] | None = None) -> list[int]:
    """Returns, for each student exit, the index of the teacher exit that it learns from.

    The rule: the final exit learns from the final exit. Equal counts pair by index. Otherwise early exit i of S learns
    from the teacher's early exit floor((i + 1/2) T / S), with S and T the numbers of *early* exits and i from 0, which
    spreads the student's exits evenly over the teacher's. A teacher without early exits (T = 0) teaches every exit with
    its only one.

    Args:
        num_student: Exits of the student, the final classifier included.
        num_teacher: Exits of the teacher, the final classifier included.
        teacher_exits: Overrides the rule: one teacher exit per student exit, the final one included; negative numbers
            count from the end, so ``[-1] * num_student`` lets every exit learn from the teacher's final one.

    Raises:
        ConfigError: A count is below 1; the override has the wrong length or names an exit that the teacher has not.
        InputTypeError: The override is not a sequence of whole numbers.

    Example:
        >>> map_teacher_exits(3, 4)
        [0, 2, 3]
        >>> map_teacher_exits(4, 4), map_teacher_exits(3, 1)
        ([0, 1, 2, 3], [0, 0, 0])
        >>> map_teacher_exits(3, 4, teacher_exits=[0, 1, -1])
        [0, 1, 3]
    """
    for who, count in (("student", num_student), ("teacher", num_teacher)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"the {who} must have at least one exit, its final classifier; got {count!r}")
    override = check_teacher_exits(teacher_exits)
    if override is None:
        return _by_rule(num_student, num_teacher)
    if len(override) != num_student:
        raise ConfigError(
            f"teacher_exits has {len(override)} entries, {list(override)}, but the student has {num_student} exits:"
            " give one teacher exit per student exit, the final one included"
        )
    for position, index in enumerate(override):
        if not -num_teacher <= index < num_teacher:
            raise ConfigError(
                f"teacher_exits[{position}] is {index}, but the teacher has {num_teacher} exits: allowed are"
                f" 0 to {num_teacher - 1}, or -1 to {-num_teacher} counted from the end"
            )
    return [index % num_teacher for index in override]


def _by_rule(num_student: int, num_teacher: int) -> list[int]:
    student, teacher = num_student - 1, num_teacher - 1
    if teacher == 0:
        return [0] * num_student
    # (2i + 1) T // 2S is floor((i + 1/2) T / S) without rounding; for S = T it is i.
    return [(2 * i + 1) * teacher // (2 * student) for i in range(student)] + [teacher]
