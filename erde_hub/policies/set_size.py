"""Exit when few classes remain."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from erde_hub.errors import ShapeError
from erde_hub.prediction_sets import probability_before
from erde_hub.prediction_sets.base import check_alpha
from erde_hub.records import ExitRecords, check_fit_data, row_chunks

from .base import GRID, LearnedPolicy


class SetSizePolicy(LearnedPolicy):
    """Exits when fewer classes than the threshold are in the conformal sets of this exit and all before.

    Each exit's set takes classes in order of probability until their sum reaches a quantile that was fitted so that the
    truth is in it with probability 1 - alpha. 2 exits with a single class, 4 with at most three. Where the exits
    contradict each other and no class is left, the sample goes on.

    Args:
        num_exits: Number of exits, the last one included.

    References:
        Sets: Romano et al., 2020, arXiv 2006.02544 (APS). Stopping on their size is ours, after arXiv 2311.05931.
    """

    leaves_above: ClassVar[bool] = False
    threshold_range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    default_threshold: ClassVar[float] = 2.0
    never_threshold: ClassVar[float] = 0.0

    quantile: Tensor

    def __init__(self, num_exits: int | None = None) -> None:
        super().__init__()
        self.num_exits = self.check_fitted(num_exits)
        self.register_buffer("quantile", torch.ones(self.num_exits - 1))

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"num_exits": self.num_exits}

    @classmethod
    def fit(cls, records: ExitRecords, alpha: float = 0.1, **checks: Any) -> SetSizePolicy:
        """Takes each exit's quantile from held-out records.

        Args:
            records: Held-out.
            alpha: Error rate of an exit's set.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.

        Raises:
            ConfigError: ``alpha`` is not between 0 and 1.
            DataError: The records are of training data, too few, or lack a class.
        """
        records = check_fit_data(cls.fit, records, checks)
        policy = cls(records.num_exits)
        rank = math.ceil((records.num_samples + 1) * (1 - check_alpha(alpha)))
        for e in range(records.num_exits - 1):
            logits = records.logits[e]
            sums = torch.cat(
                [
                    taken_before(logits[rows].softmax(-1)).gather(1, records.labels[rows, None])[:, 0]
                    for rows in row_chunks(*logits.shape)
                ]
            )
            policy.quantile[e] = sums.sort().values[rank - 1] if rank <= records.num_samples else 1.0
        return policy

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns how many classes are left, (N,) float32."""
        exits, _, classes = log_probs.shape
        if exits > len(self.quantile):
            raise ShapeError(f"this policy was fitted for {self.num_exits} exits, got {exits} early ones: fit it anew")
        probs = log_probs.exp()
        # By probability before a class rather than with it, the best class is always in.
        inside = taken_before(probs) <= self.quantile[:exits, None, None].to(probs)
        left = inside.all(0).sum(-1).to(torch.float32)
        left = torch.where(left == 0, float(classes), left)
        return torch.where(probs.isnan().any(-1).any(0), math.nan, left)

    def grid(self, num_classes: int, num_early_exits: int) -> list[float]:
        """Returns 0, then halves between whole numbers, up to more than all classes."""
        sizes = (
            range(1, num_classes + 1) if num_classes <= GRID else torch.linspace(1, num_classes, GRID).int().tolist()
        )
        return [0.0, *(size + 0.5 for size in sizes)]

    def never_leaves(self, threshold: float) -> bool:
        """No set holds fewer than no class."""
        return threshold <= 0


def taken_before(probs: Tensor) -> Tensor:
    """For each class the sum of all larger probabilities, (..., K); 0 for the best."""
    _, order, before = probability_before(probs)
    return torch.empty_like(probs).scatter_(-1, order, before)
