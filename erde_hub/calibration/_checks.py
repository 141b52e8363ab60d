"""What is asked of a search for thresholds, checked before any time is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erde_hub.errors import ConfigError, RecordsError, ThresholdError, unknown_name
from erde_hub.held_out import check_calibration_data
from erde_hub.policies import ExitPolicy

from .choice import METHODS

if TYPE_CHECKING:
    from erde_hub.evaluation import ExitRecords

#: Targets that bound a cost instead of a loss.
BUDGETS = ("mean_macs", "mean_milliseconds")
#: Targets whose loss is 0 or 1, or a difference of these.
BINARY = ("accuracy_drop", "disagreement")


def read_target(targets: dict[str, float | None]) -> tuple[str, float]:
    """Returns name and value of the one target that is given."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(f"max_{name}" for name in targets)
        raise ConfigError(f"choose_threshold needs exactly one of {names}; got {len(given)}")
    name, bound = next(iter(given.items()))
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound) or bound < 0:
        raise ConfigError(f"max_{name} must be a number of at least 0, got {bound!r}")
    highest = {"accuracy_drop": 1, "disagreement": 1, "brier_increase": 2}.get(name, math.inf)
    if bound >= highest:
        raise ConfigError(f"max_{name} must be below {highest}, got {bound!r}: it is a fraction, 0.01 is one point")
    return name, float(bound)


def read_costs(records: ExitRecords, milliseconds: Sequence[float] | None, target: str) -> Tensor:
    """Returns the cost of each exit, (E,) float64, in the unit of the target."""
    if milliseconds is None:
        if target == "mean_milliseconds":
            raise ConfigError("max_mean_milliseconds needs exit_milliseconds: the measured time of each exit")
        return torch.tensor(records.cumulative_macs, dtype=torch.float64)
    if target == "mean_macs":
        raise ConfigError("max_mean_macs counts MACs and takes no exit_milliseconds: use max_mean_milliseconds")
    values = [float(value) for value in milliseconds]
    if len(values) != records.num_exits or any(not math.isfinite(v) or v <= 0 for v in values):
        raise ConfigError(
            f"exit_milliseconds must be {records.num_exits} positive times, one per exit, the last one included, got"
            f" {list(milliseconds)}"
        )
    return torch.tensor(values, dtype=torch.float64)


def read_method(method: str | None, confidence: float | None, target: str) -> str:
    """Returns the method, which is ``search`` without a confidence and ``ltt`` with one where none is named."""
    if method is not None and method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if confidence is not None:
        number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
        if not number or not 0 < confidence < 1:
            raise ConfigError(
                f"confidence must be between 0 and 1, both excluded, got {confidence!r}: certainty needs infinitely"
                " many samples; 0.9 is usual"
            )
    chosen = method or ("search" if confidence is None else "ltt")
    if target in BUDGETS and chosen != "search":
        raise ConfigError(
            f"{chosen!r} bounds a loss, and max_{target} is a budget: leave confidence and method out; the mean cost on"
            " the records is reported"
        )
    if chosen == "exact" and target not in BINARY:
        raise ConfigError(f"method 'exact' counts samples, which max_{target} does not: use 'ltt' or 'ucb'")
    if chosen in ("ltt", "exact", "ucb") and confidence is None:
        raise ConfigError(f"method {chosen!r} needs a confidence, such as 0.9")
    if chosen in ("search", "crc") and confidence is not None:
        raise ConfigError(f"method {chosen!r} takes no confidence: it gives none; use 'ltt', 'exact' or 'ucb'")
    return chosen


def read_candidates(candidates: Sequence[float], policy: ExitPolicy, early: int) -> list[float]:
    """Returns the candidates as thresholds that the policy takes, with one where nobody leaves among them."""
    values = [policy.check_threshold(float(threshold), early)[0] for threshold in candidates]
    if not values:
        raise ConfigError("candidates is empty: give at least one threshold, or None for all")
    never = [] if any(policy.never_leaves(value) for value in values) else [policy.never_threshold]
    return [*never, *values]


def check_records(
    records: ExitRecords, policy: ExitPolicy, training_index: Any | None, allow_missing_classes: bool
) -> None:
    """Refuses records and policies between which there is nothing to choose, and :func:`check_calibration_data`."""
    if records.num_exits == 1:
        raise RecordsError("the records have no early exit, so there is no threshold to choose")
    if not policy.uses_threshold:
        raise ThresholdError(f"{type(policy).__name__} has no threshold to choose: take entropy, confidence or margin")
    check_calibration_data(records, training_index, allow_missing_classes)
