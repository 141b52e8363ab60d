"""Notices trainings in which the exits learn nothing, which raises no error anywhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class LearningCheck:
    """Warns once per model: its exits are frozen while the backbone is trained, or the loss does not reach them."""

    def __init__(self) -> None:
        self._done = False
        self._reached: list[bool] = []

    def watch(self, backbone: nn.Module, heads: nn.Module, exit_logits: Sequence[Tensor]) -> None:
        """Looks at what the last backward pass has reached, and watches the next one.

        Args:
            backbone: The model without its exits.
            heads: The heads of the exits.
            exit_logits: What a forward pass in train mode has just computed.
        """
        if self._done or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        own = [parameter.requires_grad for parameter in heads.parameters()]
        if own and not any(own):  # heads without parameters read with the backbone's
            if any(parameter.requires_grad for parameter in backbone.parameters()):
                self._warn(
                    "the heads of the early exits are frozen while the backbone is trained: they stay random unless"
                    " they were trained before. Under PEFT, LoraConfig(..., modules_to_save=['heads']) trains them"
                )
            return
        if any(self._reached[:-1]):
            self._done = True
            return
        if self._reached and self._reached[-1]:
            self._warn(
                "the last step computed its loss from the logits of the last exit alone, so the early exits learn"
                " nothing: use the loss that the model returns for labels, or all of output.exit_logits; in the Trainer"
                " of transformers pass compute_loss_func=erde_hub.training.all_exits_loss(...)"
            )
            return
        reached = self._reached = [False] * len(exit_logits)
        for index, logits in enumerate(exit_logits):
            if logits.requires_grad:
                logits.register_hook(lambda _, index=index: reached.__setitem__(index, True))

    def _warn(self, text: str) -> None:
        self._done = True
        logger.warning(text)
