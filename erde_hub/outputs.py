"""What a forward pass returns."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass(init=False)
class EarlyExitOutput(ModelOutput):
    """Output of :class:`~erde_hub.EarlyExitWrapper`; fields that do not apply are None.

    Attributes:
        loss: Scalar, with ``labels`` only. All exits run: the sum over exits of ``exit_weights`` x cross-entropy.
            Routed: the cross-entropy of the routed logits. Of a regression: the mean squared error in its place.
        logits: (N, K). Routed: of the exit that each sample took. All exits run: of the last exit.
        exit_index: (N,) int64, routed only: 0 is the first exit, ``num_exits - 1`` the backbone's own classifier.
        exit_logits: ``num_exits`` tensors (N, K), shallow to deep, where all exits were run.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_index: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None

    # A routed image can take less than a millisecond, of which the general versions of these two are a visible part.

    def __init__(
        self,
        loss: Any = None,
        logits: torch.Tensor | None = None,
        exit_index: torch.Tensor | None = None,
        exit_logits: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        values = {"loss": loss, "logits": logits, "exit_index": exit_index, "exit_logits": exit_logits}
        self.__dict__.update(values)
        for name, value in values.items():
            if value is not None:
                OrderedDict.__setitem__(self, name, value)
        if loss is not None and not isinstance(loss, torch.Tensor):  # keys and values, as a gather gives them
            self.__post_init__()

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in _FIELDS:
            OrderedDict.__setitem__(self, name, value)
            if name == "loss":  # set last, when the rest is known, and still first in the tuple
                OrderedDict.move_to_end(self, name, last=False)
        object.__setattr__(self, name, value)


_FIELDS = frozenset(EarlyExitOutput.__dataclass_fields__)
