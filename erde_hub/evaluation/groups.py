"""Metrics per group of samples: how a model does on the part of the data that it does worst on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from erde_hub._arguments import check_choice
from erde_hub.calibration import ThresholdChoice
from erde_hub.errors import InputTypeError, ShapeError
from erde_hub.policies import ExitPolicy, PolicyKey, as_policy
from erde_hub.policies.recorded import exit_indices
from erde_hub.records import ExitRecords, check_kind

from .drift import TARGETS, check_bound, losses_taken
from .sweep import exit_scores, sweep_thresholds


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


def slice_metrics(
    records: ExitRecords,
    groups: Tensor,
    group_names: Sequence[str],
    policy: PolicyKey | ExitPolicy,
    threshold: float | Sequence[float],
    profile: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measures what a threshold does on every slice of the data, the slice with the lowest accuracy first.

    Args:
        records: Of a split, calibrated if the model has a calibrator.
        groups: Group of every sample, in the order of the records.
        group_names: In the order of their numbers.
        policy: A key of the policies table, or a policy.
        threshold: One for all early exits, or one per early exit.
        profile: What the threshold was chosen for, such as ``config.threshold_profile``: where it has a confidence,
            its bound is checked on each slice alone.

    Returns:
        Per slice ``slice``, ``samples``, ``accuracy``, ``full_accuracy`` (at the last exit), ``mean_macs``,
        ``exit_share``, ``ece``, ``nll``, ``selective_risk`` (the error among those that exit early, None if none does).
        With a bound also ``value`` (of the target), ``supported_bound`` and ``promise``: ``holds`` where the slice
        alone supports the bound, ``broken`` where it speaks against it, ``open`` where too few samples tell.

    Raises:
        InputTypeError, ShapeError: Groups that do not fit the records.
        ThresholdError: A threshold that the policy does not take.
    """
    check_kind(records)
    records.require_classes("slice_metrics")
    if not isinstance(groups, Tensor):
        raise InputTypeError(f"groups must be a tensor of whole numbers, one per sample, got {type(groups).__name__}")
    if profile is not None and profile.get("confidence") is not None:
        profile = ThresholdChoice.from_dict(profile).to_dict()  # raises where it is damaged
        check_choice("target", profile["target"], TARGETS)
    policy = as_policy(policy)
    group_accuracies(torch.ones(len(records), dtype=torch.bool), groups, len(group_names))  # checks them
    thresholds = policy.check_threshold(threshold, records.num_exits - 1)
    rows = []
    for number, name in enumerate(group_names):
        member = groups == number
        if not member.any():
            continue
        own = records.select(member)
        metrics = sweep_thresholds(own, [threshold], policy)[0]
        index = exit_indices(exit_scores(own, policy), policy, thresholds)
        early = index < own.num_exits - 1
        full = (own.logits[-1].argmax(-1) == own.labels).double().mean()
        row = {
            "slice": name,
            "samples": len(own),
            "accuracy": metrics["accuracy"],
            "full_accuracy": float(full),
            **{key: metrics[key] for key in ("mean_macs", "exit_share", "ece", "nll")},
            "selective_risk": float(losses_taken(own, index, "selective_risk").mean()) if early.any() else None,
        }
        if profile is not None and profile.get("confidence") is not None:
            losses = losses_taken(own, index, profile["target"])
            supported, verdict = check_bound(losses, profile["target"], profile["bound"], profile["confidence"])
            row |= {"value": float(losses.mean()), "supported_bound": supported, "promise": verdict}
        rows.append(row)
    return sorted(rows, key=lambda row: row["accuracy"])
