"""Batch-first tensors inside tensors, tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies ``function`` to every tensor of a nested structure and rebuilds it with the same types."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: map_tensors(function, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **values)
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Returns the tensors of a nested structure, depth first."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, tree)
    return found


def select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor[rows]`` along the batch axis, keeping the memory format."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        # index_select would return the default memory format, and every later convolution would pay for it.
        return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows)


def shrink(tree: Any, rows: Tensor, batch: int) -> Any:
    """Keeps the rows of every tensor whose first axis is the live batch; everything else stays as it is.

    Args:
        tree: Output of a stage.
        rows: Indices of the samples that go on, (M,) int64.
        batch: Number of live samples before.
    """
    if isinstance(tree, Tensor):  # nearly every stage
        return select_rows(tree, rows)
    return map_tensors(lambda t: select_rows(t, rows) if t.ndim and t.shape[0] == batch else t, tree)
