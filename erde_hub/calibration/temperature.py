"""One temperature per exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from erde_hub.errors import ConfigError
from erde_hub.held_out import check_calibration_data

from .base import Calibrator

if TYPE_CHECKING:
    from erde_hub.evaluation import ExitRecords

#: The temperatures that the released code of arXiv 2302.06359 tries.
TEMPERATURES = (0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0)
#: Range of a search without a grid.
_LOWEST, _HIGHEST = 0.02, 50.0
#: Samples that narrow such a search down.
_FEW = 1000


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

        Args:
            records: Held-out.
            grid: Temperatures to choose from; None searches all between 0.02 and 50.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.
        """
        check_calibration_data(records, **checks)
        found = cls(records.num_exits)
        for e, logits in enumerate(records.logits):
            found.temperature[e] = best_temperature(logits, records.labels, grid)
        return found

    def forward(self, exit_index: int, logits: Tensor, feature: Tensor | None, state: list[Tensor]) -> Tensor:
        """Returns scaled logits."""
        return logits / self.temperature[exit_index].to(logits.dtype)


def nlpd(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-probability of the labels: (..., N, K) and (N,) give (...,)."""
    return -log_probs.gather(-1, labels.expand(log_probs.shape[:-1])[..., None])[..., 0].mean(-1)


def best_temperature(logits: Tensor, labels: Tensor, grid: Sequence[float] | None = None) -> float:
    """Returns the temperature with the smallest negative log-likelihood.

    Without a grid it is found by golden section in 1/T, in which the likelihood has one minimum.

    Shape:
        logits: (N, K). labels: (N,).
    """
    z = logits.double()

    def score(temperature: float, rows: slice = slice(None)) -> float:
        return float(nlpd((z[rows] / temperature).log_softmax(-1), labels[rows]))

    if grid is not None:
        return min(check_temperatures(grid), key=score)
    # Some samples say about where, all of them where exactly.
    some = slice(None, None, max(1, len(z) // _FEW))
    near = golden_section(lambda inverse: score(1 / inverse, some), 1 / _HIGHEST, 1 / _LOWEST, 45)
    low, high = max(near / 2, 1 / _HIGHEST), min(near * 2, 1 / _LOWEST)
    return 1 / golden_section(lambda inverse: score(1 / inverse), low, high, 30)


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


def check_temperatures(grid: Sequence[float]) -> list[float]:
    """Returns the grid as floats, or raises :class:`ConfigError`."""
    values = [float(value) for value in grid]
    if not values or not all(0 < value < float("inf") for value in values):
        raise ConfigError(f"temperatures must be positive numbers, got {list(grid)}")
    return values
