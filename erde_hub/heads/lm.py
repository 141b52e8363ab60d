"""The read-out of a language model, shared with the backbone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.errors import ConfigError

from .base import ExitHead, FeatureSpec


class LMHead(ExitHead):
    """The final norm and the output embedding of the backbone itself, on the hidden state of an earlier layer.

    It has no parameters of its own unless it is told to: it reads those of the backbone, which are stored once, and
    moved, loaded and replaced with the backbone. With ``rank=r`` the normalised state n becomes n + B A n, where A is
    (r, width) and B, which begins as zeros, (width, r).

    Args:
        spec: What the exit reads: unpooled tokens, (N, L, C).
        num_labels: Number of tokens of the vocabulary.
        own_norm: Give the exit a norm of its own, which begins as a copy of the backbone's.
        rank: Of the correction; 0 for none.

    Raises:
        ConfigError: Features that are no tokens, or a rank that is no integer of at least 0.

    References:
        One read-out for all exits as in LayerSkip, arXiv 2404.16710.
    """

    def __init__(self, spec: FeatureSpec, num_labels: int, *, own_norm: bool = False, rank: int = 0) -> None:
        super().__init__(spec, num_labels)
        if spec.format != "NLC" or spec.pool != "none":
            raise ConfigError(
                f"head 'lm' reads every token of a causal language model, and this exit gives {spec.format} with pool"
                f" {spec.pool!r}: take head='fc' or 'linear'"
            )
        if not isinstance(own_norm, bool):
            raise ConfigError(f"own_norm must be True or False, got {own_norm!r}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ConfigError(f"rank must be an integer of at least 0, got {rank!r}")
        self.own_norm = own_norm
        self.norm: nn.Module | None = None
        self.down: nn.Linear | None = None
        self.up: nn.Linear | None = None
        if rank:
            self.down = nn.Linear(spec.width, rank, bias=False)
            self.up = nn.Linear(rank, spec.width, bias=False)
            nn.init.zeros_(self.up.weight)
        self._shared: tuple[Any, str | None] | None = None

    def bind(self, backbone: nn.Module, norm: str | None) -> None:
        """Takes the read-out of a backbone; modules are looked up at each call, so that replaced ones are followed.

        Args:
            backbone: A causal language model of transformers. It is no submodule of the head.
            norm: Name of its final norm, None where it has none.

        Raises:
            ConfigError: ``own_norm`` without a norm to copy.
        """
        self._shared = (backbone, norm)  # in a tuple: modules in attributes would be stored with the head
        if self.own_norm and self.norm is None:
            if norm is None:
                raise ConfigError(f"own_norm=True: {type(backbone).__name__} has no final norm: leave it out")
            self.norm = copy.deepcopy(backbone.get_submodule(norm))

    def shared_modules(self) -> list[nn.Module]:
        """Returns the modules of the backbone that building and running the head needs."""
        if self._shared is None:
            return []
        backbone, norm = self._shared
        return [*([] if norm is None else [backbone.get_submodule(norm)]), backbone.get_output_embeddings()]

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, L, num_labels)."""
        if self._shared is None:
            raise ConfigError("head 'lm' belongs to a backbone: build it with EarlyExitWrapper(model, head='lm')")
        backbone, name = self._shared
        norm = self.norm if self.norm is not None else None if name is None else backbone.get_submodule(name)
        if norm is not None:
            x = norm(x)
        if self.down is not None and self.up is not None:
            x = x + self.up(self.down(x))
        logits = backbone.get_output_embeddings()(x)
        cap = getattr(backbone.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)
