"""Hooks that hand a module the rows of the samples that are left, of what was computed before others left."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub._tree import map_tensors, select_rows
from erde_hub.routing import pass_of


class Follower:
    """Forward pre-hook on a module that gets tensors of larger batches: from the frame that calls it, not from a stage.

    Args:
        arguments: Names of arguments with one row per sample, and the number of axes from which on they have: a table
            of 64 positions is not a batch of 64 samples, and tables have fewer axes.
    """

    def __init__(self, arguments: Mapping[str, int]) -> None:
        self.arguments = dict(arguments)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Takes rows where the pass that owns this follower has let samples go."""
        visitor, memory = pass_of(self)
        if getattr(visitor, "live", None) is None:
            return None

        def take(name: str, value: Any) -> Any:
            axes = self.arguments.get(name)
            return value if axes is None else map_tensors(lambda t: rows(t, axes), value)

        def rows(tensor: Tensor, axes: int) -> Tensor:
            before = visitor.lives.get(tensor.shape[0]) if tensor.ndim >= axes else None
            if before is None:
                return tensor
            key = (id(tensor), visitor.count)  # every layer gets the same mask; the entry keeps it, and so its id
            if key not in memory:
                left = torch.searchsorted(before, visitor.live)  # both rise
                memory[key] = (tensor, select_rows(tensor, left.to(tensor.device)))
            return memory[key][1]

        names = _parameters(type(module))  # type: ignore[arg-type]
        taken = [take(name, value) for name, value in zip(names, args, strict=False)]
        return (*taken, *args[len(taken) :]), {name: take(name, value) for name, value in kwargs.items()}


@functools.cache
def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]
