"""The heads of a model as one module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .base import ExitHead


class ExitHeads(nn.Module):
    """The heads of the early exits, shallow to deep.

    It is used like an ``nn.ModuleList`` and has its names of weights. PEFT trains and saves what ``modules_to_save``
    names, but no lists: ``LoraConfig(..., modules_to_save=["heads"])`` takes this.
    """

    def __init__(self, heads: Iterable[ExitHead]) -> None:
        super().__init__()
        for index, head in enumerate(heads):
            self.add_module(str(index), head)

    @property
    def active(self) -> ExitHeads:
        """The heads that run; asked of what PEFT puts in their place, those of the adapter in use."""
        return self

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __getitem__(self, index: Any) -> Any:
        return [*self._modules.values()][index]

    def __setitem__(self, index: int, head: nn.Module) -> None:
        setattr(self, [*self._modules][index], head)
