"""What is asked of a search for thresholds, checked before any time is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erde_hub._arguments import check_choice, plain_numbers
from erde_hub.errors import ConfigError, RecordsError, ThresholdError
from erde_hub.policies import ExitPolicy
from erde_hub.records import check_calibration_data

from .choice import METHODS, check_confidence, describe_bound

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords

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


def read_costs(
    cumulative_macs: Sequence[int], milliseconds: Sequence[float] | None, target: str, bound: float
) -> Tensor:
    """Returns the cost of each exit, (E,) float64, in the unit of the target; a budget must pay for the cheapest."""
    times = read_milliseconds(milliseconds, target)
    exits = len(cumulative_macs)
    if times is not None and len(times) != exits:
        raise ConfigError(
            f"exit_milliseconds must be {exits} positive times, one per exit, the last one included, got {milliseconds}"
        )
    costs = torch.tensor(cumulative_macs if times is None else times, dtype=torch.float64)
    if target in BUDGETS and bound < float(costs.min()):
        given, least = describe_bound(target, bound), describe_bound(target, float(costs.min()))
        raise ConfigError(f"a budget of {given} is below the cheapest exit's cost, {least}")
    return costs


def read_milliseconds(milliseconds: Sequence[float] | None, target: str) -> list[float] | None:
    """Returns the times of the exits if there are any: what can be checked before the exits are known."""
    if milliseconds is None:
        if target == "mean_milliseconds":
            raise ConfigError("max_mean_milliseconds needs exit_milliseconds: the measured time of each exit")
        return None
    if target == "mean_macs":
        raise ConfigError("max_mean_macs counts MACs and takes no exit_milliseconds: use max_mean_milliseconds")
    times = plain_numbers(milliseconds)
    if times is None or any(not math.isfinite(value) or value <= 0 for value in times):
        raise ConfigError(
            f"exit_milliseconds must be positive times, one per exit, the last one included, got {milliseconds!r:.80}"
        )
    return times


def read_method(method: str | None, confidence: float | None, target: str) -> str:
    """Returns the method, which is ``search`` without a confidence and ``ltt`` with one where none is named."""
    if method is not None:
        check_choice("method", method, list(METHODS))
    if confidence is not None:
        check_confidence(confidence)
    chosen = method or ("search" if confidence is None else "ltt")
    if target in BUDGETS and chosen != "search":
        given = [] if confidence is None else [f"confidence {confidence}"]
        given += [] if method is None else [f"method {method!r}"]
        raise ConfigError(
            f"max_{target} is a budget, of which nothing is promised: leave {' and '.join(given)} out; the mean cost on"
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
    given = plain_numbers(candidates)
    if given is None:
        raise ThresholdError(f"candidates must be thresholds, such as [0.1, 0.2], got {candidates!r:.80}")
    if not given:
        raise ConfigError("candidates is empty: give at least one threshold, or None for all")
    values = [policy.check_threshold(threshold, early)[0] for threshold in given]
    never = [] if any(policy.never_leaves(value) for value in values) else [policy.never_threshold]
    return [*never, *values]


def check_has_threshold(policy: type[ExitPolicy]) -> None:
    """Raises :class:`ThresholdError` where there is nothing to choose."""
    if not policy.uses_threshold:
        raise ThresholdError(f"{policy.__name__} has no threshold to choose: take entropy, confidence or margin")


def check_records(
    records: ExitRecords, policy: ExitPolicy, training_index: Any | None, allow_missing_classes: bool
) -> None:
    """Refuses records and policies between which there is nothing to choose, and :func:`check_calibration_data`."""
    if records.num_exits == 1:
        raise RecordsError("the records have no early exit, so there is no threshold to choose")
    check_has_threshold(type(policy))
    if policy.uses_features:
        raise ConfigError(
            f"{type(policy).__name__} is for real numbers and reads no probabilities: take another policy"
        )
    check_calibration_data(records, training_index, allow_missing_classes)
