"""What a threshold is chosen for: the cheapest choice under a bound on a loss, or the best one under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erde_hub._arguments import check_choice, plain_numbers
from erde_hub.errors import ConfigError, ThresholdError
from erde_hub.policies import ExitPolicy

from .choice import METHODS, check_confidence, describe_bound

#: Targets that bound a cost instead of a loss.
BUDGETS = ("mean_macs", "mean_milliseconds")
#: Targets whose loss is 0 or 1, or a difference of these.
BINARY = ("accuracy_drop", "disagreement")


@dataclass(frozen=True)
class Objective:
    """One target and its bound; it says which of several operating points is the best.

    Attributes:
        target: What is bounded: a key of :data:`~erde_hub.calibration.choice.TARGETS`.
        bound: Highest value allowed, in the unit of the target.
    """

    target: str
    bound: float

    @property
    def is_budget(self) -> bool:
        """The target is a cost."""
        return self.target in BUDGETS

    @property
    def counts_samples(self) -> bool:
        """The loss of a sample is -1, 0 or 1."""
        return self.target in BINARY

    @property
    def scale(self) -> float:
        """Losses are divided by this number, so that they lie in [-1, 1]."""
        return 2.0 if self.target == "brier_increase" else 1.0

    @property
    def loss_bound(self) -> float:
        """The bound on the mean of the losses in [-1, 1]; 0 for the selective risk, whose losses contain it."""
        return 0.0 if self.target == "selective_risk" else self.bound / self.scale

    def rank(self, loss: Tensor, cost: Tensor) -> Tensor:
        """Returns a number per operating point; the best point has the smallest, points above the bound infinity.

        Under a bound on the loss the cheapest point is the best, among equally cheap points the one with the smallest
        loss. Under a budget the point with the smallest loss is the best, among equal ones the cheapest.

        Args:
            loss: Mean losses in [-1, 1].
            cost: Mean costs.

        Shape:
            loss, cost: the same. Returns the same.
        """
        if self.is_budget:
            return torch.where(cost <= self.bound * (1 + 1e-12), loss + 1e-9 * cost, math.inf)
        return torch.where(loss <= self.loss_bound + 1e-12, cost + 1e-9 * loss, math.inf)


def read_objective(targets: Mapping[str, float | None]) -> Objective:
    """Returns the objective of the one target that is given.

    Args:
        targets: The bound of each target, None for those that are not given.

    Raises:
        ConfigError: None or several targets are given, or a bound is negative, not finite or too high.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        names = ", ".join(f"max_{name}" for name in targets)
        raise ConfigError(f"choose_threshold needs exactly one of {names}; got {len(given)}")
    name, bound = next(iter(given.items()))
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound) or bound < 0:
        raise ConfigError(f"max_{name} must be a number of at least 0, got {bound!r}")
    highest = {"accuracy_drop": 1, "disagreement": 1, "selective_risk": 1, "brier_increase": 2}.get(name, math.inf)
    if bound >= highest:
        raise ConfigError(f"max_{name} must be below {highest}, got {bound!r}: it is a fraction, 0.01 is one point")
    return Objective(name, float(bound))


def read_costs(cumulative_macs: Sequence[int], milliseconds: Sequence[float] | None, objective: Objective) -> Tensor:
    """Returns the cost of each exit, (E,) float64, in milliseconds where they are given, otherwise in MACs.

    Raises:
        ConfigError: The times do not fit, or the budget is below the cost of the cheapest exit.
    """
    times = read_milliseconds(milliseconds, objective)
    exits = len(cumulative_macs)
    if times is not None and len(times) != exits:
        raise ConfigError(
            f"exit_milliseconds must be {exits} positive times, one per exit, the last one included, got {milliseconds}"
        )
    costs = torch.tensor(cumulative_macs if times is None else times, dtype=torch.float64)
    if objective.is_budget and objective.bound < float(costs.min()):
        given, least = (describe_bound(objective.target, value) for value in (objective.bound, float(costs.min())))
        raise ConfigError(f"a budget of {given} is below the cheapest exit's cost, {least}")
    return costs


def read_milliseconds(milliseconds: Sequence[float] | None, objective: Objective) -> list[float] | None:
    """Returns the times of the exits, None without; checks what can be checked before the exits are known."""
    if milliseconds is None:
        if objective.target == "mean_milliseconds":
            raise ConfigError("max_mean_milliseconds needs exit_milliseconds: the measured time of each exit")
        return None
    if objective.target == "mean_macs":
        raise ConfigError("max_mean_macs counts MACs and takes no exit_milliseconds: use max_mean_milliseconds")
    times = plain_numbers(milliseconds)
    if times is None or any(not math.isfinite(value) or value <= 0 for value in times):
        raise ConfigError(
            f"exit_milliseconds must be positive times, one per exit, the last one included, got {milliseconds!r:.80}"
        )
    return times


def read_method(method: str | None, confidence: float | None, objective: Objective) -> str:
    """Returns the method: the one that is named, otherwise ``search`` without a confidence and ``ltt`` with one."""
    if method is not None:
        check_choice("method", method, list(METHODS))
    if confidence is not None:
        check_confidence(confidence)
    chosen = method or ("search" if confidence is None else "ltt")
    if objective.is_budget and chosen != "search":
        given = [] if confidence is None else [f"confidence {confidence}"]
        given += [] if method is None else [f"method {method!r}"]
        raise ConfigError(
            f"max_{objective.target} is a budget, which has no guarantee: leave {' and '.join(given)} out; the mean"
            " cost on the records is reported"
        )
    if objective.target == "selective_risk" and chosen not in ("search", "ltt"):
        raise ConfigError(f"max_selective_risk has one test, an exact one: leave method {chosen!r} out")
    if chosen == "exact" and not objective.counts_samples:
        raise ConfigError(f"method 'exact' counts samples, which max_{objective.target} does not: use 'ltt' or 'ucb'")
    if chosen in ("ltt", "exact", "ucb") and confidence is None:
        raise ConfigError(f"method {chosen!r} needs a confidence, such as 0.9")
    if chosen in ("search", "crc") and confidence is not None:
        raise ConfigError(f"method {chosen!r} takes no confidence: it gives none; use 'ltt', 'exact' or 'ucb'")
    return chosen


def read_candidates(candidates: Sequence[float], policy: ExitPolicy, early: int) -> list[float]:
    """Returns the candidates as thresholds that the policy takes; one at which no sample exits early is added."""
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
