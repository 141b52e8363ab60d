"""What a forward pass returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class EarlyExitOutput(ModelOutput):
    """Output of :class:`~erde_hub.EarlyExitWrapper`; fields that do not apply are None.

    Attributes:
        loss: Scalar, with ``labels`` only. All exits run: the sum over exits of ``exit_weights`` x cross-entropy.
            Routed: the cross-entropy of the routed logits.
        logits: (N, K). Routed: of the exit that each sample took. All exits run: of the last exit.
        exit_index: (N,) int64, routed only: 0 is the first exit, ``num_exits - 1`` the backbone's own classifier.
        exit_logits: ``num_exits`` tensors (N, K), shallow to deep, where all exits were run.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_index: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None
