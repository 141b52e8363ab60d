"""What a forward pass returns."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from ._tables import html_table


@dataclass(init=False)
class EarlyExitOutput(ModelOutput):
    """Output of :class:`~erde_hub.EarlyExitWrapper`; fields that do not apply are None.

    Attributes:
        loss: Scalar, with ``labels`` only. All exits run: the sum over exits of ``exit_weights`` x cross-entropy.
            Routed: the cross-entropy of the routed logits. Of a regression: the mean squared error in its place.
        logits: (N, K). Routed: of the exit that each sample took. All exits run: of the last exit.
        exit_index: (N,) int64, routed only: 0 is the first exit, ``num_exits - 1`` the backbone's own classifier.
        exit_logits: ``num_exits`` tensors (N, K), shallow to deep, where all exits were run.
        sets: (N, K) bool, the classes in the prediction set of ``logits``; with ``output_sets`` only.
        num_exits: Number of exits of the model; None where it is not known. Not a key.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_index: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None
    sets: torch.Tensor | None = None

    def exit_counts(self) -> list[int]:
        """Returns how many samples took each exit, shallow to deep; empty where the output was not routed.

        Without ``num_exits`` the list ends at the deepest exit that was taken.
        """
        if self.exit_index is None:
            return []
        return torch.bincount(self.exit_index.long(), minlength=self.num_exits or 0).tolist()

    def __repr__(self) -> str:
        counts = self.exit_counts()
        parts = [f"{len(self.logits)} samples"] if self.logits is not None else []
        parts += [f"exits {'/'.join(map(str, counts))}"] if counts else []
        parts += [f"logits {tuple(self.logits.shape)}"] if self.logits is not None else []
        parts += [f"all {len(self.exit_logits)} exits run"] if self.exit_logits is not None else []
        parts += [f"loss {float(self.loss):.4g}"] if self.loss is not None and self.loss.numel() == 1 else []
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_html_(self) -> str:
        counts = self.exit_counts()
        total = max(sum(counts), 1)
        rows = [(str(e), str(count), f"{count / total:.1%}") for e, count in enumerate(counts)]
        return html_table(("exit", "samples", ""), rows, repr(self))

    # A routed image can take less than a millisecond, of which the general versions of these two are a visible part.

    def __init__(
        self,
        loss: Any = None,
        logits: torch.Tensor | None = None,
        exit_index: torch.Tensor | None = None,
        exit_logits: tuple[torch.Tensor, ...] | None = None,
        sets: torch.Tensor | None = None,
        *,
        num_exits: int | None = None,
    ) -> None:
        self.num_exits: int | None
        values = {"loss": loss, "logits": logits, "exit_index": exit_index, "exit_logits": exit_logits, "sets": sets}
        self.__dict__.update(values, num_exits=num_exits)
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
