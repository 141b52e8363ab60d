"""Reads the features of exits: what the heads of a wrapped model are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from erde_hub.errors import ConfigError
from erde_hub.heads import ExitHead, FeatureSpec


class FeatureTap:
    """Keeps what the head of each early exit read in the last forward pass, in the backbone's own layout."""

    def __init__(self, model: nn.Module) -> None:
        self.heads = exit_heads(model)
        self.latest: list[Tensor | None] = []

    @property
    def widths(self) -> list[int | None]:
        """Channels per exit; the last exit, the backbone's classifier, has no head of ours and so no feature."""
        return [*(head.spec.width for head in self.heads), None]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps features as long as this lasts."""
        self.latest = [None] * (len(self.heads) + 1)
        with ExitStack() as stack:
            for exit_, head in enumerate(self.heads):
                handle = head.register_forward_pre_hook(lambda _, args, exit_=exit_: self._keep(exit_, args))
                stack.callback(handle.remove)
            yield
        self.latest = []

    def take(self, channels_last: bool = False) -> list[Tensor | None]:
        """Returns the features of the last pass and lets go of them."""
        latest, self.latest = self.latest, [None] * (len(self.heads) + 1)
        if not channels_last:
            return latest
        specs = [head.spec for head in self.heads]
        moved = [_channels_last(feature, spec) for feature, spec in zip(latest[:-1], specs, strict=True)]
        return [*moved, None]

    def _keep(self, exit_: int, args: tuple[Any, ...]) -> None:
        self.latest[exit_] = args[0]


def exit_heads(model: nn.Module) -> list[ExitHead]:
    """Returns the heads of a model's early exits.

    Raises:
        ConfigError: It has none of ours.
    """
    heads = getattr(model, "heads", None)
    found = [head for head in heads if isinstance(head, ExitHead)] if isinstance(heads, nn.ModuleList) else []
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no early exits whose features could be read: wrap it by EarlyExitWrapper"
        )
    return found


def _channels_last(feature: Tensor | None, spec: FeatureSpec) -> Tensor | None:
    return feature.permute(0, 2, 3, 1) if feature is not None and spec.format == "NCHW" else feature
