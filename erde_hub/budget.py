"""Thresholds that keep to a budget while the data change. Needs neither torch nor NumPy."""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._arguments import check_number, check_whole, plain_numbers
from .errors import CheckpointError, ConfigError, InputTypeError, NotSupportedError, ShapeError

#: Levels end here: thresholds then lie 1e-7 of the range of scores from its ends.
_FARTHEST = 16.0
#: Samples after which :attr:`BudgetController.recent_cost` has forgotten most of what was before.
_MEMORY = 500


class BudgetController:
    """Moves a model's thresholds so that the mean cost per sample stays at a target while the data change.

    Call the controller in place of the model. After each call all thresholds move by one amount, on a scale on which
    scores are spread out (the logit of a threshold's place in the range of scores): towards earlier exits if the
    samples cost more than the target, towards later ones if they cost less. So thresholds follow the quantile of the
    scores at which the target is met. What distinguishes the exits is kept, and an exit that the first thresholds
    close stays closed. Only the exits that samples took are read: scores at later exits do not exist, and are not
    needed, since the cost of a sample is known in full.

    For any data, the mean cost over T samples misses the target by at most ``|change of the level| / (step T)``, as
    a fraction of the range of costs, while the level is within its bounds and batches have at most ``max_step / step``
    samples. Accuracy has no such bound: a promise of :func:`~erde_hub.calibration.choose_threshold` holds for the
    thresholds that it chose, not for those that have moved.

    All methods may be called from several threads.

    Args:
        model: :class:`~erde_hub.EarlyExitWrapper` in eval mode, or :class:`~erde_hub.export.EarlyExitSession`.
        target_macs: Mean multiply-accumulates per sample.
        target_milliseconds: Mean time per sample, in place of ``target_macs``.
        exit_milliseconds: Goes with it: the time of a sample that takes each exit, shallow to deep, classifier last;
            ``erde-hub latency`` measures it.
        threshold: First thresholds, one number or one per early exit; None takes those of the model.
        bounds: Lowest and highest threshold of any exit. Policies other than ``entropy``, ``confidence`` and ``margin``
            need them, because the range of their scores is not known.
        step: How far a sample moves the level at most; larger follows faster, smaller is steadier.
        max_step: How far a batch moves the level at most. The cost follows about a logistic curve of the level, whose
            slope is at most 1/4, so steps above 4 overshoot with large batches.

    Attributes:
        target: What is kept.
        unit: ``macs`` or ``milliseconds``.
        samples: Number of samples so far.
        recent_cost: Mean cost of about the last 500 samples; None before the first.

    Raises:
        InputTypeError: Not such a model, or an argument of another type.
        NotSupportedError: A language model, or a policy without thresholds between which cost changes gradually.
        ConfigError: No target or two, a target outside what exits cost, bounds or steps that are not allowed.
        ThresholdError: A threshold that the policy does not take.
        ShapeError: Not one time per exit.

    References:
        Gibbs and Candès, Adaptive conformal inference under distribution shift, 2021, arXiv 2106.00170, equation 2 and
        proposition 4.1. Deviations: what is controlled is cost and not coverage, on the scale above.

    Example:
        >>> controller = BudgetController(model, target_macs=12e6)  # doctest: +SKIP
        >>> out = controller(images)  # doctest: +SKIP
        >>> controller.thresholds, controller.recent_cost  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        *,
        target_macs: float | None = None,
        target_milliseconds: float | None = None,
        exit_milliseconds: Sequence[float] | None = None,
        threshold: float | Sequence[float] | None = None,
        bounds: Sequence[float] | None = None,
        step: float = 0.1,
        max_step: float = 4.0,
    ) -> None:
        facts = _read(model)
        self._policy = facts.policy
        if (target_macs is None) == (target_milliseconds is None):
            raise ConfigError("give one target, target_macs= or target_milliseconds=")
        if (target_milliseconds is None) != (exit_milliseconds is None):
            raise ConfigError("target_milliseconds= and exit_milliseconds=, one time per exit, go together")
        name, target, self._costs = "target_macs", target_macs, facts.macs
        if exit_milliseconds is not None:
            name, target = "target_milliseconds", target_milliseconds
            self._costs = _check_times(exit_milliseconds, len(facts.macs))
        self.unit = name.removeprefix("target_")
        self._model = model
        self._step = check_number("step", step, zero=False)
        self._max_step = check_number("max_step", max_step, zero=False)
        self._first: list[float] = facts.check_threshold(facts.threshold if threshold is None else threshold)
        self._scale = facts.scale(bounds)
        levels = [self._scale.level(value) for value in self._first]
        opened = [level for level in levels if level is not None]
        if not opened:
            raise ConfigError(f"the thresholds {self._first} let no sample exit early: give threshold= others")
        low, high = self._scale.bounds
        moving = [value for value, level in zip(self._first, levels, strict=True) if level is not None]
        if bounds is not None and not all(low <= value <= high for value in moving):
            raise ConfigError(f"bounds {[low, high]} leave out the first thresholds {moving}")
        cheapest, dearest = self._costs[levels.index(opened[0])], self._costs[-1]
        self.target = check_number(name, target, zero=False)
        if not cheapest <= self.target <= dearest or cheapest == dearest:
            raise ConfigError(f"{name}={target!r} cannot be met: samples cost from {cheapest:g} to {dearest:g}")
        self._range = dearest - cheapest
        self._levels = levels
        ends = self._scale.ends()  # the shift ends where all exits have reached theirs
        self._shifts = ends[0] - max(opened), ends[1] - min(opened)
        self._lock = threading.Lock()
        self._shift, self.samples = 0.0, 0
        self.recent_cost: float | None = None

    @property
    def thresholds(self) -> list[float]:
        """The present thresholds, one per early exit."""
        shift = self._shift
        pairs = zip(self._levels, self._first, strict=True)
        return [first if level is None else self._scale.threshold(level + shift) for level, first in pairs]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model at the present thresholds, then moves them; arguments and output are the model's."""
        if "threshold" in kwargs or kwargs.get("return_dict") is False:
            raise ConfigError(
                "a controller gives the threshold and reads exit_index: leave threshold= and return_dict= out"
            )
        policy = _read(self._model).policy
        if policy != self._policy:
            raise ConfigError(
                f"the model's policy is {policy!r} now, the controller was made for {self._policy!r}: make a new one"
            )
        out = self._model(*args, **kwargs, threshold=self.thresholds)
        self.update(out.exit_index)
        return out

    def update(self, exit_index: Any) -> None:
        """Moves the thresholds; for those who call the model themselves.

        Args:
            exit_index: (N,) integers, the exits that the samples of a batch took at :attr:`thresholds`.

        Raises:
            InputTypeError: Not such integers.
        """
        indices = exit_index.tolist() if hasattr(exit_index, "tolist") else exit_index
        exits = range(len(self._costs))
        if not isinstance(indices, (list, tuple)) or not all(type(e) is int and e in exits for e in indices):
            raise InputTypeError(f"exit_index must be integers from 0 to {exits[-1]}, got {exit_index!r:.200}")
        number = len(indices)
        if number == 0:
            return
        mean = sum(self._costs[e] * count for e, count in Counter(indices).items()) / number
        move = min(number * self._step, self._max_step) * (mean - self.target) / self._range
        with self._lock:
            self._shift = min(max(self._shift + move, self._shifts[0]), self._shifts[1])
            self.samples += number
            before = mean if self.recent_cost is None else self.recent_cost
            weight = max(1 - math.exp(-number / _MEMORY), number / self.samples)
            self.recent_cost = before + weight * (mean - before)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the controller has learned, numbers for a JSON file."""
        with self._lock:
            return {
                "costs": list(self._costs),
                "first_threshold": [str(value) if math.isinf(value) else value for value in self._first],
                "shift": self._shift,
                "samples": self.samples,
                "recent_cost": self.recent_cost,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where another controller was; target, bounds and steps stay this controller's.

        Raises:
            CheckpointError: No state, or that of a model with other costs or other first thresholds.
        """
        try:
            costs, first = ([float(value) for value in state[key]] for key in ("costs", "first_threshold"))
            shift, recent, samples = (
                float(state["shift"]),
                state["recent_cost"],
                check_whole("samples", state["samples"], 0),
            )
            recent = None if recent is None else check_number("recent_cost", recent, zero=True)
            if not math.isfinite(shift) or (recent is None) != (samples == 0):
                raise ConfigError(f"shift={shift}, samples={samples}, recent_cost={recent}")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"this is no state of a BudgetController ({error}): pass what state_dict() returned"
            ) from error
        if costs != self._costs or first != self._first:
            raise CheckpointError(
                f"the state belongs to a controller with costs {costs} and first thresholds {first}, here are"
                f" {self._costs} and {self._first}"
            )
        with self._lock:
            self._shift = min(max(shift, self._shifts[0]), self._shifts[1])
            self.samples, self.recent_cost = samples, recent

    def __deepcopy__(self, memo: dict[int, Any]) -> BudgetController:
        raise NotSupportedError("a controller belongs to one model: make another, and pass it state_dict()")

    def __reduce__(self) -> Any:
        raise NotSupportedError("a controller is not pickled: store state_dict() and make another from it")

    def __repr__(self) -> str:
        spent = "" if self.recent_cost is None else f", recent cost {self.recent_cost:.4g}"
        return f"{type(self).__name__}(target {self.target:.4g}{spent}, thresholds {self.thresholds})"


@dataclass(frozen=True)
class _Scale:
    """Thresholds as levels, real numbers: the higher, the more samples exit.

    Attributes:
        scores: Lowest and highest score.
        above: Scores above the threshold exit.
        bounds: Lowest and highest threshold.
    """

    scores: tuple[float, float]
    above: bool
    bounds: tuple[float, float]

    def level(self, threshold: float) -> float | None:
        """Returns the level of a threshold; None where no score passes."""
        low, high = self.scores
        fraction = (threshold - low) / (high - low)
        if not 0 < fraction < 1:
            return None if (fraction >= 1) == self.above else _FARTHEST
        level = math.log(fraction / (1 - fraction))
        return min(max(-level if self.above else level, -_FARTHEST), _FARTHEST)

    def threshold(self, level: float) -> float:
        """Returns the threshold of a level, within the bounds."""
        (low, high), level = self.scores, min(max(level, -_FARTHEST), _FARTHEST)
        value = low + (high - low) / (1 + math.exp(level if self.above else -level))
        return min(max(value, self.bounds[0]), self.bounds[1])

    def ends(self) -> list[float]:
        """Returns the levels of the bounds, the lower one first."""
        closed = -_FARTHEST
        return sorted(closed if (level := self.level(bound)) is None else level for bound in self.bounds)


@dataclass(frozen=True)
class _Facts:
    """What a controller has to know of a model or a session."""

    policy: str
    above: bool | None
    classes: int
    macs: list[float]
    threshold: Any
    check_threshold: Callable[[Any], list[float]]

    def scale(self, bounds: Any) -> _Scale:
        """Returns the scale of the thresholds, within bounds if there are any."""
        known = {
            "entropy": ((0.0, math.log(self.classes)), False),
            "confidence": ((1 / self.classes, 1.0), True),
            "margin": ((0.0, 1.0), True),
        }
        given = None if bounds is None else _check_bounds(bounds)
        scores, above = known.get(self.policy, (given, self.above))
        if above is None:
            raise NotSupportedError(
                f"thresholds of policy {self.policy!r} in a file do not move: {', '.join(known)} do"
            )
        if scores is None:
            raise ConfigError(f"policy {self.policy!r} has scores of no known range: give bounds=(lowest, highest)")
        for bound in given or ():
            self.check_threshold([bound] * (len(self.macs) - 1))
        if given is not None and not (scores[0] <= given[0] and given[1] <= scores[1]):
            known_range = f"{scores[0]:.4g} to {scores[1]:.4g}"
            raise ConfigError(f"bounds {list(given)} are outside the scores of policy {self.policy!r}, {known_range}")
        return _Scale(scores, above, given or scores)


def _read(model: Any) -> _Facts:
    if hasattr(getattr(model, "info", None), "cumulative_macs"):
        info = model.info
        macs = [float(macs) for macs in info.cumulative_macs]
        return _Facts(info.policy, None, len(info.id2label), macs, info.threshold, info.check_threshold)
    if not hasattr(model, "exit_table") or not hasattr(model, "policy"):
        raise InputTypeError(
            f"a model with exits is needed, EarlyExitWrapper or EarlyExitSession, got {type(model).__name__}"
        )
    policy, config = model.policy, model.config
    if config.task != "classification":
        raise NotSupportedError(
            f"a model of task {config.task!r} is not routed when it is called: there is no mean cost"
        )
    if not policy.uses_threshold or policy.whole_thresholds:
        raise NotSupportedError(
            f"policy {config.policy!r} has no thresholds between which the cost changes gradually: entropy, confidence"
            " and margin have"
        )
    macs = [float(macs) for macs in model.exit_table().cumulative_macs]
    check = functools.partial(policy.check_threshold, num_early_exits=len(macs) - 1)
    return _Facts(str(config.policy), policy.leaves_above, config.num_labels, macs, model.threshold, check)


def _check_times(times: Any, exits: int) -> list[float]:
    found = plain_numbers(times)
    if found is None or not all(0 < time < math.inf for time in found) or sorted(found) != found:
        raise ConfigError(f"exit_milliseconds must be rising positive numbers, one per exit, got {times!r:.200}")
    if len(found) != exits:
        raise ShapeError(f"exit_milliseconds has {len(found)} numbers for {exits} exits, the classifier included")
    return found


def _check_bounds(bounds: Any) -> tuple[float, float]:
    found = plain_numbers(bounds)
    if found is None or len(found) != 2 or not -math.inf < found[0] < found[1] < math.inf:
        raise ConfigError(f"bounds must be two finite numbers, the lower one first, got {bounds!r:.200}")
    return found[0], found[1]
