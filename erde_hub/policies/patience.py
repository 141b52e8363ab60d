"""Exit when consecutive exits agree."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import ExitPolicy


class PatiencePolicy(ExitPolicy):
    """Exits after ``threshold`` consecutive agreements: ``threshold + 1`` exits in a row with the same prediction.

    References:
        Zhou et al., BERT loses patience (PABEE), 2020, arXiv 2006.04152.
    """

    #: Agreements are counted, so 2.5 would act as 3; infinity never exits.
    whole_thresholds: ClassVar[bool] = True
    threshold_range: ClassVar[tuple[float, float]] = (1.0, math.inf)
    default_threshold: ClassVar[float] = 1.0

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns how many exits just before the deepest one gave its prediction without a break, (N,) float."""
        predictions = log_probs.argmax(-1)
        if len(predictions) == 1:
            return torch.zeros(predictions.shape[1], device=predictions.device)
        agrees = (predictions[:-1] == predictions[-1]).flip(0)
        # A row of NaN has an argmax too; it agrees with none.
        valid = ~log_probs.isnan().any(-1)
        agrees &= (valid[:-1].flip(0)) & valid[-1]
        return agrees.cumprod(0).sum(0).to(torch.float32)

    def grid(self, num_classes: int, num_early_exits: int) -> list[float]:
        """Returns every number of agreements that is possible, falling, after one that is not."""
        return [self.never_threshold, *(float(k) for k in range(max(num_early_exits - 1, 1), 0, -1))]

    def never_leaves(self, threshold: float) -> bool:
        """An infinite patience never ends, nor does one longer than any network."""
        return threshold >= self.never_threshold
