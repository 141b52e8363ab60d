"""What LayerSkip adds to a training: layers that are skipped at random, and exits that take turns.

References:
    Elhoushi et al., LayerSkip, 2024, arXiv 2404.16710. Deviations: the dropout does not change over the training, which
    the paper has for models that are trained before; exit weights are those of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.backbones.decoders import read_decoder
from erde_hub.errors import ConfigError


def skip_probabilities(depth: int, largest: float) -> list[float]:
    """Returns how often each layer is skipped: ``largest * (2 ** (l / (depth - 1)) - 1)`` for layer l from 0.

    Example:
        >>> [round(p, 3) for p in skip_probabilities(3, 0.2)]
        [0.0, 0.083, 0.2]
    """
    return [largest * (2 ** (layer / max(1, depth - 1)) - 1) for layer in range(depth)]


def enabled_exits(step: int, num_exits: int, every: int) -> list[bool]:
    """Returns which exits are trained at a step: early exit e where (e + step) % every is 0, and the last one.

    Example:
        >>> enabled_exits(1, 4, 2)
        [False, True, False, True]
    """
    return [(exit_ + step) % every == 0 for exit_ in range(num_exits - 1)] + [True]


def check_layers(model: nn.Module) -> None:
    """Raises :class:`ConfigError` where the layers of a model are not those of a causal language model."""
    if getattr(getattr(model, "config", None), "task", None) != "causal_lm":
        raise ConfigError(
            f"layer_dropout is for language models with exits, not for {type(model).__name__}: set it to 0"
        )


@contextmanager
def layer_dropout(model: Any, largest: float) -> Iterator[None]:
    """Lets each text of a batch skip layers at random while the model is in train mode."""
    handles = []
    if largest:
        decoder = read_decoder(model.backbone)
        layers = model.backbone.get_submodule(decoder.layers)
        for layer, probability in zip(layers, skip_probabilities(decoder.depth, largest), strict=True):
            hook = partial(_skip, probability)
            handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))  # before exits read
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _skip(probability: float, layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> Any:
    if not layer.training or not probability:
        return None
    before: Tensor = args[0] if args else kwargs["hidden_states"]
    after = output if isinstance(output, Tensor) else output[0]
    kept = torch.rand(len(before), 1, 1, device=before.device) >= probability
    mixed = torch.where(kept, after, before)
    return mixed if isinstance(output, Tensor) else (mixed, *output[1:])
