"""What an exit policy is: a pure function of the log-probabilities of the exits so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from erde_hub._arguments import plain_threshold
from erde_hub.errors import ConfigError, ShapeError, ThresholdError

#: Steps of a policy's grid of thresholds.
GRID = 100


class ExitPolicy(nn.Module):
    """Decides which samples exit.

    A policy sees log-probabilities only, never the network, so the same object routes a live batch and sweeps
    thresholds over recorded logits. It is a module so that a learned policy keeps its parameters in the checkpoint.

    Subclasses implement :meth:`score` and :meth:`compare`.
    """

    #: The score is at or above the threshold for samples that exit (False: strictly below it).
    leaves_above: ClassVar[bool] = True
    #: :meth:`score` reads earlier exits too; if False, callers may pass the current exit alone.
    uses_history: ClassVar[bool] = True
    #: The decision depends on the threshold.
    uses_threshold: ClassVar[bool] = True
    #: :meth:`score` reads :meth:`density_terms`, from the input of an exit's last linear layer, in place of
    #: log-probabilities.
    uses_features: ClassVar[bool] = False
    #: The decision can be written into an ONNX graph.
    exportable: ClassVar[bool] = False
    #: Closed range of thresholds.
    threshold_range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    #: Thresholds are whole numbers.
    whole_thresholds: ClassVar[bool] = False
    #: Used where no threshold is given.
    default_threshold: ClassVar[float] = 0.5
    #: A finite threshold at which no sample exits.
    never_threshold: ClassVar[float] = 1e8

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The shortcuts of a parent's score do not hold for a subclass with another score."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        if "score" in own and "score_last" not in own:
            cls.score_last = ExitPolicy.score_last  # type: ignore[method-assign]
        if "score_last" in own and "score" not in own:
            cls.score = _score_by_last  # type: ignore[assignment]
        if ("score" in own or "score_last" in own) and "score_one" not in own:
            cls.score_one = ExitPolicy.score_one  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__()

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for the config of a checkpoint."""
        return {}

    def density_terms(self, exit_index: int, feature: Tensor) -> Tensor:
        """Returns what :meth:`score` reads of an exit in place of log-probabilities, where :attr:`uses_features`.

        Shape:
            feature: (N, H), the input of the exit's last linear layer. Returns (N, M), M alike for all exits.
        """
        raise NotImplementedError

    def score(self, log_probs: Tensor) -> Tensor:
        """Scores the deepest exit given.

        Shape:
            log_probs: (exits so far, N, K). Returns (N,).
        """
        raise NotImplementedError

    def score_last(self, log_probs: Tensor) -> Tensor:
        """Scores an exit by itself; for policies without history, the same as :meth:`score` with fewer operators.

        Shape:
            log_probs: (N, K). Returns (N,).
        """
        return self.score(log_probs.unsqueeze(0))

    def score_one(self, log_probs: Tensor) -> float:
        """Scores one sample, (1, K), with as few operators as possible: of a short network they are a visible part."""
        return self.score_last(log_probs).item()

    def compare(self, score: Any, threshold: float | Tensor) -> Any:
        """Turns scores (N,) into a boolean mask (N,) of the samples that exit; NaN never exits.

        One score as a float gives one bool: a single sample is decided without an operator more than needed.
        """
        return score >= threshold if self.leaves_above else score < threshold

    def forward(self, log_probs: Tensor, threshold: float | Tensor) -> Tensor:
        """Returns the mask (N,) of samples that exit at the deepest exit of ``log_probs`` (exits so far, N, K)."""
        if log_probs.ndim != 3:
            raise ShapeError(f"log_probs must be (exits so far, N, K), got shape {tuple(log_probs.shape)}")
        return self.compare(self.score(log_probs), threshold)

    def grid(self, num_classes: int, num_early_exits: int) -> list[float]:
        """Returns round thresholds from no sample exiting to all, chosen without any data.

        Searches with a guarantee try them in this order: thresholds read off the samples that test them would void the
        guarantee. Denser where few samples exit. This grid is for scores in [0, 1].
        """
        return [self.never_threshold, *(round(1 - (i / GRID) ** 2, 6) for i in range(1, GRID + 1))]

    def never_leaves(self, threshold: float) -> bool:
        """Returns whether no sample can exit at this threshold, whatever the scores, so that the head need not run."""
        return False

    def check_threshold(self, threshold: float | Sequence[float], num_early_exits: int) -> list[float]:
        """Returns one float per early exit.

        Raises:
            ThresholdError: NaN, outside :attr:`threshold_range`, or neither one number nor one per early exit.
        """
        plain = plain_threshold(threshold)
        values = plain if isinstance(plain, list) else [plain] * num_early_exits
        low, high = self.threshold_range
        for value in values:
            if math.isnan(value) or not low <= value <= high:
                raise ThresholdError(
                    f"threshold {value!r} is not allowed for {type(self).__name__}: give a number in"
                    f" [{low:g}, {high:g}]"
                )
            if self.whole_thresholds and not math.isinf(value) and value != int(value):
                raise ThresholdError(f"threshold {value!r} is no whole number, which {type(self).__name__} needs")
        if len(values) != num_early_exits:
            raise ThresholdError(
                f"got {len(values)} thresholds for {num_early_exits} early exits: give one number for all, or one per"
                " early exit (the last exit, the backbone's own classifier, has none)"
            )
        return values


def _score_by_last(policy: ExitPolicy, log_probs: Tensor) -> Tensor:
    """Scores the deepest exit given, (exits so far, N, K) to (N,), for policies that read no other."""
    return policy.score_last(log_probs[-1])


class LearnedPolicy(ExitPolicy):
    """A policy with parameters of its own, fitted on held-out records; its scores may be any real numbers."""

    threshold_range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    #: Its ``fit`` takes a ``budget``, and ``costs`` of the exits in the unit of the budget.
    uses_budget: ClassVar[bool] = False

    def never_leaves(self, threshold: float) -> bool:
        """No score reaches 1e8."""
        return threshold >= self.never_threshold

    @classmethod
    def check_fitted(cls, num_exits: Any) -> int:
        """Returns the number of exits.

        Raises:
            ConfigError: None: the policy was named where a fitted one is needed.
        """
        if num_exits is None:
            raise ConfigError(
                f"{cls.__name__} is learned and has nothing to decide with yet: fit it on held-out records with"
                f" {cls.__name__}.fit(records) and give it to the model with model.set_policy(...), or run"
                " recipes/calibrate.py --policy"
            )
        if isinstance(num_exits, bool) or not isinstance(num_exits, int) or num_exits < 2:
            raise ConfigError(f"num_exits must be an integer of at least 2, got {num_exits!r}")
        return num_exits


def check_no_early_exit(policy: ExitPolicy, thresholds: Sequence[float]) -> None:
    """Raises :class:`ThresholdError` for a threshold at which a token could exit early."""
    if not all(policy.never_leaves(threshold) for threshold in thresholds):
        raise ThresholdError(
            f"threshold={list(thresholds)}: a forward pass of a language model gives logits for every token and is"
            " not routed: give the threshold to model.generate(threshold=...), or set it on model.generation_config"
        )
