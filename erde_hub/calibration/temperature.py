"""One temperature per exit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from erde_hub._arguments import plain_numbers
from erde_hub.errors import ConfigError
from erde_hub.records import ExitRecords, check_fit_data, row_chunks

from .base import Calibrator

#: The temperatures that the released code of arXiv 2302.06359 tries.
TEMPERATURES = (0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0)
#: Range of a search without a grid, and the number of temperatures at which it looks first.
_LOWEST, _HIGHEST, _PLACES = 0.02, 50.0, 60
#: An optimum so near to the edge, as a factor, is no optimum.
_EDGE = 1.001
#: Samples that narrow such a search down.
_FEW = 1000
#: Standard deviation of the logarithm of a temperature in the prior of :meth:`TemperatureCalibrator.fit`.
PRIOR_SPREAD = 0.2
#: Change of a temperature by the prior, as a factor, from which it is reported.
_TOLD = 1.1

_logger = logging.getLogger(__name__)


class TemperatureCalibrator(Calibrator):
    """Divides each exit's logits by a temperature of its own.

    The predictions of an exit and the order of its classes do not change; the order of samples by confidence may, and
    with it which samples exit early. It corrects confidence and does not correct wrong predictions.

    Args:
        num_exits: Number of exits, the last one included.

    Attributes:
        report: Says how the latest fit found the temperatures; empty for a calibrator that was built or loaded.

    References:
        Guo et al., On calibration of modern neural networks, 2017, arXiv 1706.04599, section 4.2. Deviations: one
        temperature per exit, and a prior that matters on few samples.
    """

    affine: ClassVar[bool] = True

    temperature: Tensor

    def __init__(self, num_exits: int) -> None:
        super().__init__(num_exits)
        self.register_buffer("temperature", torch.ones(num_exits))

    @classmethod
    def fit(cls, records: ExitRecords, grid: Sequence[float] | None = None, **checks: Any) -> TemperatureCalibrator:
        """Takes the temperatures with the smallest negative log-likelihood of the labels.

        Without a grid, a normal prior on log T with mean 0 and standard deviation 0.2 is added to the log-likelihood
        of all samples. It keeps few samples from extreme temperatures (144 samples with one error may say 0.2) and
        fades as their number grows. :attr:`report` gives the temperatures with and without it. An exit keeps a
        temperature of 1 where it is correct on every sample, since these only say "the smaller the better", and takes
        0.3 or 3, the ends of :data:`TEMPERATURES`, where the search ends at its own; a warning is logged that names the
        exit.

        Args:
            records: Held-out.
            grid: Temperatures to choose from, without a prior; None searches all between 0.02 and 50.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.
        """
        records = check_fit_data(cls.fit, records, checks)
        found = cls(records.num_exits)
        lines = []
        for e, logits in enumerate(records.logits):
            name = f"exit {records.exit_names[e]!r}"
            value = best_temperature(logits, records.labels, grid, name, prior=None if grid else PRIOR_SPREAD)
            found.temperature[e] = value
            free = value if grid else best_temperature(logits, records.labels, None, "")
            moved = max(free / value, value / free) >= _TOLD
            lines.append(f"{name} {value:.3g}" + (f" (without the prior {free:.3g})" if moved else ""))
        found.report = f"temperatures from {len(records):,} samples: {', '.join(lines)}"
        if "without the prior" in found.report:
            _logger.warning("%s; more samples would give the prior less weight", found.report)
        return found

    def forward(self, exit_index: int, logits: Tensor, feature: Tensor | None, state: list[Tensor]) -> Tensor:
        """Returns scaled logits."""
        return logits / self.temperature[exit_index].to(logits.dtype)


def nlpd(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-probability of the labels: (..., N, K) and (N,) give (...,)."""
    return -log_probs.gather(-1, labels.expand(log_probs.shape[:-1])[..., None])[..., 0].mean(-1)


def label_log_probs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Returns the log-probability of each label at a temperature, computed in chunks of rows.

    Shape:
        logits: (N, K). labels: (N,). Returns (N,) float64.
    """
    found = torch.empty(len(logits), dtype=torch.float64)
    for rows in row_chunks(*logits.shape):
        z = logits[rows].double() / temperature
        found[rows] = z.gather(1, labels[rows, None])[:, 0] - z.logsumexp(1)
    return found


def best_temperature(
    logits: Tensor,
    labels: Tensor,
    grid: Sequence[float] | None = None,
    name: str = "an exit",
    prior: float | None = None,
) -> float:
    """Returns the temperature with the smallest negative log-likelihood.

    Without a grid some samples say about where it lies, and golden section on all of them says exactly; where it lies
    at no temperature, see :meth:`TemperatureCalibrator.fit`.

    Args:
        logits: Of one exit.
        labels: Of its samples.
        grid: Temperatures to choose from; None searches.
        name: What a warning calls the exit; empty for no warning.
        prior: Standard deviation of log T in a normal prior around 0; None has no prior.

    Shape:
        logits: (N, K). labels: (N,).
    """

    def score(temperature: float, rows: slice = slice(None)) -> float:
        penalty = 0.0 if prior is None else math.log(temperature) ** 2 / (2 * prior**2 * len(labels))
        return penalty - float(label_log_probs(logits[rows], labels[rows], temperature).mean())

    if grid is not None:
        return min(check_temperatures(grid), key=score)
    if bool((logits.argmax(-1) == labels).all()):
        if name:
            _logger.warning(
                "%s is correct on all %d samples, which tell no temperature: it stays 1. Fit on more samples",
                name, len(labels),
            )  # fmt: skip
        return 1.0
    some = slice(None, None, max(1, len(labels) // _FEW))
    ratio = (_HIGHEST / _LOWEST) ** (1 / (_PLACES - 1))
    near = min((_LOWEST * ratio**i for i in range(_PLACES)), key=lambda temperature: score(temperature, some))
    low, high = max(1 / near / 2, 1 / _HIGHEST), min(1 / near * 2, 1 / _LOWEST)
    found = 1 / golden_section(lambda inverse: score(1 / inverse), low, high, 30)
    if _LOWEST * _EDGE < found < _HIGHEST / _EDGE:
        return found
    kept = min(max(found, TEMPERATURES[0]), TEMPERATURES[-1])
    if name:
        _logger.warning(
            "the best temperature of %s on %d samples lies at an edge, %.3g, of the search: it gets %g. Are its logits"
            " of an unusual scale, or its predictions no better than chance?", name, len(labels), found, kept,
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
