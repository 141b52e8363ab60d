"""Running some layers of a causal language model on some tokens, without a word about its family.

How hidden states begin, and what every layer is called with, is what the model's own forward hands to its first layer:
it is run on the new tokens in a view of the model whose one layer raises. So embeddings, learned positions and rotary
tables stay the model's business. Masks are made for each layer anew, since layers may have seen different numbers of
tokens. That this gives the model's own answer is checked once for each model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from erde_hub.backbones.decoders import create_heads, exit_layers, read_decoder
from erde_hub.backbones.rebuild import same_values
from erde_hub.engine.modes import evaluating
from erde_hub.errors import InputTypeError
from erde_hub.heads import FeatureSpec

from ._transformers import window_mask
from .cache import OwedCache, Span


class DecoderLayers:
    """The layers of a causal language model in stages, with an exit at the end of each but the last.

    Args:
        backbone: The model; it is not changed.
        exits: Names of the early exits.

    Attributes:
        edges: Numbers of layers between which the stages lie: stage e runs layers ``edges[e]`` to ``edges[e + 1] - 1``.
        readout: The backbone's own read-out.

    Raises:
        ExitPointError: Exits that are no whole layers.
        InputTypeError: The model does more between its layers than handing one the state of the other, or its layers
            take no mask or cache.
    """

    def __init__(self, backbone: nn.Module, exits: Sequence[str]) -> None:
        decoder = read_decoder(backbone)
        self.backbone = backbone
        self.config: Any = backbone.config.get_text_config()  # type: ignore[union-attr,operator]
        self.path, _, self.list_name = decoder.layers.rpartition(".")
        self.edges = [0, *(number + 1 for number in exit_layers(backbone, exits)), decoder.depth]
        spec = FeatureSpec(int(self.config.hidden_size), "NLC", (), "none")
        (self.readout,) = create_heads("lm", [spec], int(self.config.vocab_size), backbone)
        self.signature = inspect.signature(self.layers[0].forward)
        with evaluating(backbone):
            self._check()

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, as they are now."""
        return self.backbone.get_submodule(f"{self.path}.{self.list_name}".lstrip("."))  # type: ignore[return-value]

    def begin(self, ids: Tensor, cache: OwedCache, padding: Tensor | None, position_ids: Tensor | None) -> Span:
        """Embeds tokens that come after those of the cache.

        Shape:
            ids: (N, Q). padding: (N, tokens of the cache + Q). position_ids: (N, Q), or (1, Q).
        """
        whole = self.backbone.get_submodule(self.path)
        view = object.__new__(type(whole))
        view.__dict__.update(whole.__dict__)
        view.__dict__["_modules"] = {**whole._modules, self.list_name: nn.ModuleList([_FirstLayer()])}
        if position_ids is None:
            past = cache.get_seq_length()
            position_ids = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        try:
            view(input_ids=ids, attention_mask=padding, position_ids=position_ids, cache=cache, use_cache=True)
        except _Reached as reached:
            bound = self.signature.bind(*reached.args, **reached.kwargs).arguments
        else:
            raise InputTypeError(f"the forward of {type(self.backbone).__name__} was replaced, and calls no layers")
        hidden = bound.pop(next(iter(bound)))
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        bound.pop("attention_mask", None)
        return Span(hidden, bound)

    def run(self, stage: int, span: Span, cache: OwedCache, padding: Tensor | None) -> Span:
        """Takes tokens through the layers of a stage."""
        hidden = span.hidden
        for layer, arguments in self._calls(self.edges[stage], self.edges[stage + 1], span, cache, padding):
            hidden = layer(hidden, **arguments)
            if not isinstance(hidden, Tensor):
                hidden = hidden[0]
        return span._replace(hidden=hidden)

    def store(self, stage: int, span: Span, cache: OwedCache, padding: Tensor | None) -> None:
        """Gives all layers from a stage on keys and values made from one state, as in CALM (arXiv 2207.07061).

        A layer is left as soon as it has stored them.
        """
        for layer, arguments in self._calls(self.edges[stage], self.edges[-1], span, cache, padding):
            name = next(key for key, value in arguments.items() if value is cache)
            try:
                layer(span.hidden, **{**arguments, name: _StoreOnly(cache)})
            except _Stored:
                continue

    def _calls(
        self, first: int, end: int, span: Span, cache: OwedCache, padding: Tensor | None
    ) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        masks: dict[bool, Any] = {}
        layers = self.layers
        for number in range(first, end):
            sliding = cache.layers[number].is_sliding
            if sliding not in masks:
                masks[sliding] = window_mask(sliding, self.config, span.hidden, padding, cache, number)
            yield layers[number], {**span.arguments, "attention_mask": masks[sliding]}

    @torch.no_grad()
    def _check(self) -> None:
        """Compares logits, keys and values with those of the model's own forward, all layers late by a token or two."""
        name, device = type(self.backbone).__name__, self.backbone.get_input_embeddings().weight.device  # type: ignore[operator]
        if "attention_mask" not in self.signature.parameters:
            raise InputTypeError(f"the layers of {name} take no attention_mask, so tokens cannot skip them")
        ids = torch.arange(5, device=device)[None] % int(self.config.vocab_size)
        try:
            own = OwedCache(self.config)
            theirs = self.backbone(input_ids=ids, cache=own, use_cache=True).logits
            again = OwedCache(self.config)  # its own answer in parts, where kernels of half precision round differently
            parts = [
                self.backbone(input_ids=part, cache=again, use_cache=True).logits for part in ids.split([2, 1, 2], 1)
            ]
            cache = OwedCache(self.config)
            span = self.begin(ids[:, :2], cache, None, None)
            if not any(value is cache for value in span.arguments.values()):
                raise InputTypeError(f"the layers of {name} take no cache, so tokens cannot skip them")
            for stage in range(len(self.edges) - 1):
                span = self.run(stage, span, cache, None)
            ours = [self.readout(span.hidden)]
            first = self.run(0, self.begin(ids[:, 2:3], cache, None, None), cache, None)
            span = first.then(self.run(0, self.begin(ids[:, 3:], cache, None, None), cache, None))
            for stage in range(1, len(self.edges) - 1):
                span = self.run(stage, span, cache, None)
            ours.append(self.readout(span.hidden))
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise InputTypeError(f"the layers of {name} cannot be run by themselves: {error}") from error
        found = [(torch.cat(ours, 1), theirs, torch.cat(parts, 1))]
        for layers in zip(cache.layers, own.layers, again.layers, strict=True):
            found += [tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)]
        if not all(same_values(a, b, other=max(1e-2, 4 * _difference(c, b))) for a, b, c in found):
            raise InputTypeError(
                f"{name} does more between its layers than handing one the state of the other, so tokens cannot skip"
                " some of them: generate without threshold and assistant_early_exit"
            )


def _difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference as a fraction of the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))


class _Reached(BaseException):
    """The first layer was called."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs


class _FirstLayer(nn.Module):
    """Stands where the layers are and hands over what they are called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(args, kwargs)


class _Stored(BaseException):
    """A layer has stored keys and values."""


class _StoreOnly(Cache):
    """Stands where a cache is, and ends the layer that has added to it."""

    def __init__(self, cache: Cache) -> None:
        self.__dict__ = cache.__dict__

    def update(self, *args: Any, **kwargs: Any) -> Any:
        super().update(*args, **kwargs)
        raise _Stored
