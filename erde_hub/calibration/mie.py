"""The exits so far as an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from erde_hub.records import check_fit_data

from .base import Calibrator, log_of
from .temperature import TEMPERATURES, check_temperatures, label_log_probs

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords


class MIECalibrator(Calibrator):
    """Averages the probabilities of the exits so far, deep ones weighing more: sum w_m p_m / sum w_m.

    The weights are the cumulative costs up to each exit. Costs nothing beyond the heads, which all have to run, also
    those of exits at which no sample can exit. Predictions change, mostly for the better.

    Args:
        num_exits: Number of exits, the last one included.

    References:
        Meronen et al., Fixing overconfidence in dynamic neural networks, 2024, arXiv 2302.06359, section 3.3 (model-
        internal ensembling). Deviations: none.
    """

    uses_history: ClassVar[bool] = True

    temperature: Tensor
    weight: Tensor

    def __init__(self, num_exits: int) -> None:
        super().__init__(num_exits)
        self.register_buffer("temperature", torch.ones(num_exits))
        self.register_buffer("weight", torch.ones(num_exits))

    @classmethod
    def fit(cls, records: ExitRecords, grid: Sequence[float] | None = TEMPERATURES, **checks: Any) -> MIECalibrator:
        """Sets the weights, and exit by exit the temperature with which the ensemble so far has the smallest NLPD.

        Args:
            records: Held-out.
            grid: Temperatures to choose from; None leaves all at 1, as published without Laplace.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.
        """
        records = check_fit_data(cls.fit, records, checks)
        found = cls(records.num_exits)
        found.weight.copy_(ensemble_weights(records.cumulative_macs))
        if grid is not None:
            found.temperature.copy_(ensemble_temperatures(records.logits, records.labels, found.weight, grid)[0])
        return found

    def forward(self, exit_index: int, logits: Tensor, feature: Tensor | None, state: list[Tensor]) -> Tensor:
        """Returns log-probabilities of the ensemble so far."""
        probs = (logits.float() / self.temperature[exit_index].float()).softmax(-1)
        return ensemble_step(exit_index, probs, self.weight, state)


def ensemble_weights(cumulative_macs: Sequence[float]) -> Tensor:
    """Cumulative costs divided by the last one; equal weights where there is no cost."""
    costs = torch.tensor([float(macs) for macs in cumulative_macs], dtype=torch.float64)
    return (costs / costs[-1] if costs[0] > 0 else torch.ones_like(costs)).float()


def ensemble_step(exit_index: int, probs: Tensor, weight: Tensor, state: list[Tensor]) -> Tensor:
    """Adds an exit to the weighted sum in ``state`` and returns the log-probabilities of the mean so far."""
    own = weight[exit_index].to(probs.dtype) * probs
    if state:
        state[0] = state[0] + own
    else:
        state.append(own)
    return log_of(state[0] / weight[: exit_index + 1].to(probs.dtype).sum())


def ensemble_temperatures(
    logits: Tensor, labels: Tensor, weight: Tensor, grid: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Temperatures chosen exit by exit, earlier ones fixed, by the NLPD of the ensemble up to that exit.

    Shape:
        logits: (E, N, K). labels: (N,). weight: (E,). Returns temperatures (E,) and what they were chosen by, the NLPD
        of each exit at each value of the grid (E, values), both float64.
    """
    values = check_temperatures(grid)
    chosen, scores = [], []
    total = torch.zeros(len(labels), dtype=torch.float64)  # weighted probability of the label so far
    for e, exit_logits in enumerate(logits):
        norm = weight[: e + 1].double().sum()
        sums = [total + weight[e].double() * label_log_probs(exit_logits, labels, t).exp() for t in values]
        scores.append(torch.stack([-log_of(own / norm).mean() for own in sums]))
        best = int(scores[-1].argmin())
        chosen.append(values[best])
        total = sums[best]
    return torch.tensor(chosen, dtype=torch.float64), torch.stack(scores)
