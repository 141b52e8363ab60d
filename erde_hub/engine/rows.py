"""Batch-first tensors inside tensors, tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from erde_hub.errors import ShapeError


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies ``function`` to every tensor of a nested structure and rebuilds it with the same types."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped: Any = copy.copy(tree)  # a defaultdict, say, cannot be made from its items alone
        for key, value in tree.items():
            mapped[key] = map_tensors(function, value)
        return mapped
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


def shrink(tree: Any, rows: Tensor, batch: int, batch_outputs: Sequence[int] = ()) -> Any:
    """Keeps the rows of every tensor whose first axis is the batch; everything else stays as it is.

    Args:
        tree: Output of a stage: one batch-first tensor, or a structure.
        rows: Indices of the samples that go on, (M,) int64.
        batch: Number of samples before.
        batch_outputs: Positions of the batch-first tensors of a structure. Their lengths alone do not tell: a table of
            64 positions is not a batch of 64 samples.

    Raises:
        ShapeError: A batch-first tensor has another number of rows.
    """
    positions = itertools.count()

    def select(tensor: Tensor) -> Tensor:
        if not isinstance(tree, Tensor) and next(positions) not in batch_outputs:
            return tensor
        if not isinstance(tree, Tensor) and batch and tensor.shape[0] > batch and tensor.shape[0] % batch == 0:
            # several rows per sample, one sample after the other, as tnt's pixels of each patch
            return tensor.unflatten(0, (batch, -1)).index_select(0, rows).flatten(0, 1)
        if tensor.shape[0] != batch:
            raise ShapeError(f"a stage returned a tensor of shape {tuple(tensor.shape)} for {batch} active samples")
        return select_rows(tensor, rows)

    return map_tensors(select, tree)


def cut_rows(tree: Any, start: int, stop: int, batch: int, batch_outputs: Sequence[int] = ()) -> Any:
    """Returns the samples from ``start`` to ``stop`` of every batch-first tensor, as views; see :func:`shrink`."""
    positions = itertools.count()

    def cut(tensor: Tensor) -> Tensor:
        if not isinstance(tree, Tensor) and next(positions) not in batch_outputs:
            return tensor
        rows, rest = divmod(tensor.shape[0], batch)
        if rest or (rows != 1 and isinstance(tree, Tensor)):
            raise ShapeError(f"a stage returned a tensor of shape {tuple(tensor.shape)} for {batch} active samples")
        return tensor[start * rows : stop * rows]

    return map_tensors(cut, tree)


def join_rows(trees: Sequence[Any], batch_outputs: Sequence[int] = ()) -> Any:
    """Concatenates the batches of several structures of one kind; the rest comes from the first.

    Several rows per sample lie one sample after the other, so that they stay with theirs.
    """
    first = trees[0]
    if len(trees) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(trees))
    parts = [tensors(tree) for tree in trees]
    positions = itertools.count()

    def join(tensor: Tensor) -> Tensor:
        position = next(positions)
        return torch.cat([own[position] for own in parts]) if position in batch_outputs else tensor

    return map_tensors(join, first)
