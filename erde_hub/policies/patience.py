"""Leave when consecutive exits agree."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import ExitPolicy


class PatiencePolicy(ExitPolicy):
    """Leaves after ``threshold`` consecutive agreements, that is ``threshold + 1`` exits in a row with the same answer.

    References:
        Zhou et al., BERT loses patience (PABEE), 2020, arXiv 2006.04152.
    """

    #: Agreements are counted, so 2.5 would act as 3; infinity never leaves.
    whole_thresholds: ClassVar[bool] = True
    threshold_range: ClassVar[tuple[float, float]] = (1.0, math.inf)
    default_threshold: ClassVar[float] = 1.0

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns how many exits just before the deepest one gave its answer without a break, (N,) float."""
        answers = log_probs.argmax(-1)
        if len(answers) == 1:
            return torch.zeros(answers.shape[1], device=answers.device)
        agrees = (answers[:-1] == answers[-1]).flip(0)
        # A row of NaN has an argmax too; it agrees with nobody.
        valid = ~log_probs.isnan().any(-1)
        agrees &= (valid[:-1].flip(0)) & valid[-1]
        return agrees.cumprod(0).sum(0).to(torch.float32)

    def grid(self, num_classes: int, num_early_exits: int) -> list[float]:
        """Returns every number of agreements that is possible, falling, behind one that is not."""
        return [self.never_threshold, *(float(k) for k in range(max(num_early_exits - 1, 1), 0, -1))]

    def never_leaves(self, threshold: float) -> bool:
        """An infinite patience never ends, nor does one longer than any network."""
        return threshold >= self.never_threshold
