"""One temperature per exit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from erde_hub._arguments import plain_numbers
from erde_hub.errors import ConfigError
from erde_hub.records import check_fit_data

from .base import Calibrator

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords

#: The temperatures that the released code of arXiv 2302.06359 tries.
TEMPERATURES = (0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0)
#: Range of a search without a grid. An optimum at its edge is no optimum.
_LOWEST, _HIGHEST = 0.02, 50.0
#: So near, as a factor, is at the edge.
_EDGE = 1.001
#: Samples that narrow such a search down.
_FEW = 1000

_logger = logging.getLogger(__name__)


class TemperatureCalibrator(Calibrator):
    """Divides each exit's logits by a temperature of its own.

    Neither an exit's answers nor the order of its classes change; the order of samples by confidence may, and with it
    who leaves. It makes probabilities honest and is no remedy for exits that are wrong.

    Args:
        num_exits: Number of exits, the last one included.

    References:
        Guo et al., On calibration of modern neural networks, 2017, arXiv 1706.04599, section 4.2. Deviations: one
        temperature per exit.
    """

    affine: ClassVar[bool] = True

    temperature: Tensor

    def __init__(self, num_exits: int) -> None:
        super().__init__(num_exits)
        self.register_buffer("temperature", torch.ones(num_exits))

    @classmethod
    def fit(cls, records: ExitRecords, grid: Sequence[float] | None = None, **checks: Any) -> TemperatureCalibrator:
        """Takes the temperatures with the smallest negative log-likelihood.

        Without a grid, an exit keeps a temperature of 1 where it is right on every sample, since these only say "the
        smaller the better", and takes 0.3 or 3, the ends of :data:`TEMPERATURES`, where the search ends at its own; a
        warning is logged that names the exit.

        Args:
            records: Held-out.
            grid: Temperatures to choose from; None searches all between 0.02 and 50.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.
        """
        check_fit_data(cls.fit, records, checks)
        found = cls(records.num_exits)
        for e, logits in enumerate(records.logits):
            found.temperature[e] = best_temperature(logits, records.labels, grid, f"exit {records.exit_names[e]!r}")
        return found

    def forward(self, exit_index: int, logits: Tensor, feature: Tensor | None, state: list[Tensor]) -> Tensor:
        """Returns scaled logits."""
        return logits / self.temperature[exit_index].to(logits.dtype)


def nlpd(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-probability of the labels: (..., N, K) and (N,) give (...,)."""
    return -log_probs.gather(-1, labels.expand(log_probs.shape[:-1])[..., None])[..., 0].mean(-1)


def best_temperature(
    logits: Tensor, labels: Tensor, grid: Sequence[float] | None = None, name: str = "an exit"
) -> float:
    """Returns the temperature with the smallest negative log-likelihood.

    Without a grid it is found by golden section in 1/T, in which the likelihood has one minimum; where that lies at
    no temperature, see :meth:`TemperatureCalibrator.fit`.

    Args:
        logits: Of one exit.
        labels: Of its samples.
        grid: Temperatures to choose from; None searches.
        name: What a warning calls it.

    Shape:
        logits: (N, K). labels: (N,).
    """
    z = logits.double()

    def score(temperature: float, rows: slice = slice(None)) -> float:
        return float(nlpd((z[rows] / temperature).log_softmax(-1), labels[rows]))

    if grid is not None:
        return min(check_temperatures(grid), key=score)
    if bool((z.argmax(-1) == labels).all()):
        _logger.warning(
            "%s is right on all %d samples, which tell no temperature: it stays 1. Fit on more samples", name, len(z)
        )
        return 1.0
    # Some samples say about where, all of them where exactly.
    some = slice(None, None, max(1, len(z) // _FEW))
    near = golden_section(lambda inverse: score(1 / inverse, some), 1 / _HIGHEST, 1 / _LOWEST, 45)
    low, high = max(near / 2, 1 / _HIGHEST), min(near * 2, 1 / _LOWEST)
    found = 1 / golden_section(lambda inverse: score(1 / inverse), low, high, 30)
    if _LOWEST * _EDGE < found < _HIGHEST / _EDGE:
        return found
    kept = min(max(found, TEMPERATURES[0]), TEMPERATURES[-1])
    _logger.warning(
        "the best temperature of %s on %d samples lies at an edge, %.3g, of the search: it gets %g. Are its logits of"
        " an unusual scale, or its answers no better than chance?", name, len(z), found, kept,
    )  # fmt: skip
    return kept


def golden_section(function: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """Returns where a function with one minimum has it."""
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


def check_temperatures(grid: Sequence[float], name: str = "temperatures") -> list[float]:
    """Returns the grid as floats, or raises :class:`ConfigError`."""
    values = plain_numbers(grid)
    if not values or not all(0 < value < float("inf") for value in values):
        raise ConfigError(f"{name} must be positive numbers, such as [0.5, 1, 2], got {grid!r:.80}")
    return values
