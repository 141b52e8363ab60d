"""Accuracy per group: how a model does on the part of the data that it does worst on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erde_hub.errors import InputTypeError, ShapeError
from erde_hub.records import ExitRecords


def group_accuracies(correct: Tensor, groups: Tensor, num_groups: int | None = None) -> Tensor:
    """Returns the accuracy within each group; NaN for a group without samples.

    Args:
        correct: Whether each prediction is correct.
        groups: Group of each sample, from 0.
        num_groups: Number of groups; None takes the largest number plus one.

    Shape:
        correct: (..., N). groups: (N,). Returns (..., G), float64.

    Raises:
        InputTypeError: Groups that are not whole numbers.
        ShapeError: Another number of samples, or a group outside 0 to G - 1.
    """
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise InputTypeError(f"groups must be whole numbers (int64), got {groups.dtype}")
    if groups.ndim != 1 or correct.shape[-1:] != groups.shape or not len(groups):
        raise ShapeError(f"groups must have one entry per sample, got {tuple(groups.shape)} for {tuple(correct.shape)}")
    low, high = (int(bound) for bound in torch.aminmax(groups))
    number = high + 1 if num_groups is None else num_groups
    if low < 0 or high >= number:
        raise ShapeError(f"groups run from {low} to {high}, allowed is 0 to {number - 1}")
    member = torch.nn.functional.one_hot(groups.long(), number).double()
    return (correct.double() @ member) / member.sum(0)


def group_metrics(records: ExitRecords, groups: Tensor, group_names: Sequence[str]) -> list[dict[str, Any]]:
    """Measures every exit on every group.

    Args:
        records: Of a split.
        groups: Group of every sample, in the order of the records.
        group_names: In the order of their numbers.

    Returns:
        Per exit ``exit``, ``accuracy`` over all samples, ``groups`` (accuracy by name; groups without samples are left
        out), ``worst_group`` and ``mean_of_groups``. The last two are what methods against misleading cues report: the
        mean weighs groups alike, whatever their size.

    Raises:
        InputTypeError, ShapeError: Groups that do not fit the records.
    """
    records.require_classes("group_metrics")
    correct = records.logits.argmax(-1) == records.labels
    table = group_accuracies(correct, groups, len(group_names))
    rows = []
    for name, accuracies, hits in zip(records.exit_names, table, correct, strict=True):
        seen = {group: value for group, value in zip(group_names, accuracies.tolist(), strict=True) if value == value}
        rows.append(
            {
                "exit": name,
                "accuracy": hits.double().mean().item(),
                "groups": seen,
                "worst_group": min(seen.values()),
                "mean_of_groups": sum(seen.values()) / len(seen),
            }
        )
    return rows
