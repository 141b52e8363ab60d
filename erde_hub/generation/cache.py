"""A cache in which deeper layers may be behind: they owe the tokens that exited before them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from erde_hub.engine.routing import RoutingPlan
from erde_hub.errors import ConfigError, InputTypeError

from ._transformers import kinds_that_cannot_owe


class Span(NamedTuple):
    """Consecutive tokens on their way through the layers.

    Attributes:
        hidden: (N, Q, C), the state after the layers so far.
        arguments: What layers are called with besides, by name; tensors of positions have an axis 1 of Q.
    """

    hidden: Tensor
    arguments: dict[str, Any]

    def then(self, later: Span) -> Span:
        """Returns this span and the one that follows it as one."""
        sizes = (self.hidden.shape[1], later.hidden.shape[1])
        joined = {name: _join(self.arguments[name], value, sizes) for name, value in later.arguments.items()}
        return Span(torch.cat([self.hidden, later.hidden], 1), joined)


def _join(first: Any, second: Any, sizes: tuple[int, int]) -> Any:
    if isinstance(second, (tuple, list)):
        return type(second)(_join(a, b, sizes) for a, b in zip(first, second, strict=True))
    if isinstance(second, Tensor) and second.ndim > 1 and (first.shape[1], second.shape[1]) == sizes:
        return torch.cat([first, second], 1)
    return second


class OwedCache(DynamicCache):
    """Keys and values of all layers, and the tokens that exited before the deeper ones.

    Attributes:
        owed: By exit, the tokens that exited there since a token last went deeper.
        plan: Decides which tokens exit; None where none do by themselves.
        copies: Deeper layers get keys and values made from the state at the exit, and owe nothing.
        padding: Mask (N, tokens so far) of the latest step, None where no text is padded.
        seen: Number of tokens at the start of the next input that are here already, in the first layers at least.
        exit_index: Of every generated token, tensors (N,).
    """

    layers: list[Any]

    def __init__(self, config: Any, given: Cache | None = None) -> None:
        super().__init__(config=config)
        self.owed: dict[int, Span] = {}
        self.plan: RoutingPlan | None = None
        self.copies = False
        self.padding: Tensor | None = None
        self.seen = 0
        self.exit_index: list[Tensor] = []
        if kinds := kinds_that_cannot_owe(config, self):
            raise ConfigError(
                f"tokens cannot exit early: some layers of this model ({', '.join(kinds)}) cannot be given skipped"
                " tokens later; generate without threshold and assistant_early_exit"
            )
        if given is not None:
            self._take_over(given, config)

    def _take_over(self, given: Cache, config: Any) -> None:
        kinds = [type(layer) for layer in self.layers]
        if not isinstance(given, DynamicCache) or [type(layer) for layer in given.layers] != kinds:
            raise ConfigError(
                "the cache is another model's, or of a kind that early exits cannot use: it must be a DynamicCache"
                f" with the {len(kinds)} layers of this model, got {type(given).__name__} with {len(given.layers)}"
            )
        lengths = {layer.get_seq_length() for layer in given.layers}
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shapes = {(layer.keys.shape[1], layer.keys.shape[3]) for layer in given.layers if layer.get_seq_length()}
        if len(lengths) > 1 or not shapes <= {(heads, width)}:
            raise ConfigError(
                f"the cache is another model's: this one keeps {heads} heads of {width} numbers, the cache holds"
                f" {sorted(shapes)} and tokens {sorted(lengths)}"
            )
        self.layers = given.layers

    def owe(self, exit_index: int, span: Span) -> None:
        """Notes tokens that have exited; they come after those that are owed there already."""
        self.owed[exit_index] = self.owed[exit_index].then(span) if exit_index in self.owed else span

    @property
    def is_croppable(self) -> bool:
        """Whether the latest tokens can be taken back: where none of them exited by itself."""
        return self.plan is None

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        self.owed.clear()


@contextlib.contextmanager
def unchanged_on_error(cache: Cache | None) -> Iterator[None]:
    """Gives a cache back what it held where the body of the context raises."""
    before = [(layer, dict(vars(layer))) for layer in cache.layers] if isinstance(cache, DynamicCache) else []
    try:
        yield
    except BaseException:
        if isinstance(cache, DynamicCache):
            cache.layers[:] = [layer for layer, _ in before]
            for layer, values in before:
                vars(layer).clear()
                vars(layer).update(values)
        raise


def check_cache(cache: object, config: Any) -> None:
    """Refuses what is no cache, and one of more layers than the model has, which would be used without a word.

    Raises:
        InputTypeError: Something else than a cache.
        ConfigError: More layers than the model's.
    """
    if not isinstance(cache, Cache):
        raise InputTypeError(
            f"cache must be one of transformers, such as DynamicCache(config=...), got {type(cache).__name__}"
        )
    if isinstance(cache, DynamicCache) and len(cache.layers) > config.num_hidden_layers:
        raise ConfigError(
            f"the cache is another model's: it has {len(cache.layers)} layers, this model {config.num_hidden_layers}"
        )


def explain_cache(cache: Cache | None) -> ConfigError | None:
    """Returns why a model may have failed on a cache; None where it held nothing."""
    if not isinstance(cache, DynamicCache) or not cache.get_seq_length():
        return None
    return ConfigError(
        f"the cache is not one of this model and these texts: it has {len(cache.layers)} layers, the first with keys of"
        f" shape {tuple(cache.layers[0].keys.shape)}; leave it out"
    )
