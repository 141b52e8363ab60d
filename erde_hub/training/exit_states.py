"""Reads what the exits of a causal language model read, so that a loss computes logits a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.losses._tokens import TokenLogits
from erde_hub.modeling.pretrained import EarlyExitPreTrainedModel

from ._checks import all_exits


class ExitStates:
    """Runs a causal language model and returns the states of its exits in place of their logits.

    While the model runs, hooks shorten what its heads and its output embedding read to one token, so that they cost
    nothing. What they should have read becomes :class:`~erde_hub.losses._tokens.TokenLogits`. A model without an output
    embedding of its own hands in its logits.

    Args:
        model: An :class:`~erde_hub.EarlyExitWrapper` of a causal model, a causal model of transformers, or any module
            that maps ``input_ids`` to logits (N, L, V).
    """

    def __init__(self, model: nn.Module) -> None:
        wrapped: Any = model if isinstance(model, EarlyExitPreTrainedModel) else None
        self.backbone: Any = wrapped.backbone if wrapped else model
        self.heads: list[Any] = [*wrapped.heads.active] if wrapped else []
        self.embedding: Any = getattr(self.backbone, "get_output_embeddings", lambda: None)()
        self._checked = False

    @property
    def widths(self) -> list[int]:
        """Width of the states of each exit.

        Raises:
            ConfigError: The model has no output embedding.
        """
        if self.embedding is None:
            raise ConfigError(f"{type(self.backbone).__name__} has no output embedding, whose inputs could be compared")
        return [*(head.spec.width for head in self.heads), int(self.embedding.weight.shape[1])]

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[TokenLogits]:
        """Returns the logits of all N * L tokens per exit, shallow to deep, of a model or of what DDP wraps around it.

        Raises:
            InputTypeError: The model does something else than its output embedding after its last layer.
        """
        if self.embedding is None:
            return [TokenLogits(logits.flatten(0, 1)) for logits in all_exits(model, inputs)]
        seen: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for index, layer in enumerate([*self.heads, self.embedding]):
                handle = layer.register_forward_pre_hook(partial(_keep_first, seen, index))
                stack.callback(handle.remove)
            logits = all_exits(model, inputs)
        readouts: list[Callable[[Tensor], Tensor]] = [*(partial(_per_token, head) for head in self.heads), self._last]
        states = [seen[index] for index in range(len(readouts))]
        if not self._checked:
            self._check(logits[-1], states[-1])
        return [TokenLogits(own.flatten(0, 1), head) for own, head in zip(states, readouts, strict=True)]

    def _last(self, states: Tensor) -> Tensor:
        logits = self.embedding(states)
        cap = getattr(self.backbone.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def _check(self, logits: Tensor, states: Tensor) -> None:
        if not torch.allclose(self._last(states[:, :1]).float(), logits.float(), rtol=1e-3, atol=1e-4):
            raise InputTypeError(
                f"{type(self.backbone).__name__} does more with its last states than its output embedding, so that"
                " losses cannot compute its logits a few tokens at a time"
            )
        self._checked = True


def _keep_first(seen: dict[int, Tensor], index: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keeps what a layer is called with; the output embedding is also called by heads, for one token."""
    if args[0].shape[1] > 1 or index not in seen:
        seen[index] = args[0]
    return (args[0][:, :1], *args[1:])


def _per_token(head: nn.Module, states: Tensor) -> Tensor:
    return head(states[None])[0]
