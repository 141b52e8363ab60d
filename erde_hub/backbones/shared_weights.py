"""Weights that a network uses in several places: saved once, and shared again once a checkpoint is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import id_tensor_storage

from erde_hub.errors import CheckpointError


def shared_weights(module: nn.Module) -> list[list[str]]:
    """Returns the groups of names of one parameter, or of one buffer of a module that sits in several places.

    Buffers that two modules share are no such group: moving a network to another device separates them.
    """
    names: dict[Any, list[str]] = defaultdict(list)
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            names[id(parameter)].append(prefix + leaf)
        for leaf, _ in child.named_buffers(recurse=False, remove_duplicate=False):
            names[id(child), leaf].append(prefix + leaf)
    return [group for group in names.values() if len(group) > 1]


def shared_modules(module: nn.Module) -> list[list[str]]:
    """Returns the groups of names that stand for one submodule with weights or buffers of its own."""
    names: dict[int, list[str]] = defaultdict(list)
    for path, child in module.named_modules(remove_duplicate=False):
        if child._parameters or child._buffers:
            names[id(child)].append(path)
    return [group for group in names.values() if len(group) > 1]


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by each of their names."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return tensors | dict(module.named_buffers(remove_duplicate=False))


def save_once(
    state: Mapping[str, Tensor], groups: Sequence[Sequence[str]], ties: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns tensors without shared memory, which is what safetensors can store.

    Of names that loading ties to each other, one is kept. Other tensors in one piece of memory (views of one tensor, a
    head's weight that is the classifier's) are copied, each under its own name.

    Args:
        state: Tensors by name.
        groups: Names of one tensor; from :func:`shared_weights`.
        ties: Names that transformers ties, each to the one that is stored.

    Returns:
        The tensors to save, and the names of those that are stored more than once.
    """
    owner = {name: group[0] for group in groups for name in group}
    owner |= {target: owner.get(source, source) for target, source in ties.items()}
    by_storage: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:  # others know more memory than their own
            by_storage[id_tensor_storage(tensor)].append(name)
    kept, repeated = dict(state), []
    for names in by_storage.values():
        found: dict[Any, str] = {}
        views: set[Any] = set()
        for name in sorted(names, key=ties.__contains__):
            view = (state[name].storage_offset(), state[name].shape, state[name].stride(), state[name].dtype)
            if found.setdefault((owner.get(name, name), view), name) != name:
                del kept[name]
                continue
            if view in views:
                repeated.append(name)
            views.add(view)
        if len(found) > 1:
            kept |= {name: state[name].clone() for name in found.values()}
    return kept, repeated


@torch.no_grad()
def share_again(module: nn.Module, groups: Sequence[Sequence[str]], missing: set[str]) -> None:
    """Puts the tensor that was loaded under one name of a group under the others, and takes these out of ``missing``.

    Names that were loaded with other values stay as they are.
    """
    for group in groups:
        loaded = [name for name in group if name not in missing]
        source = _get(module, loaded[0]) if loaded else None
        if source is None or source.is_meta:
            continue
        for name in group:
            own = _get(module, name)
            if name in missing or own is source or torch.equal(own, source):
                _set(module, name, source)
                missing.discard(name)


@torch.no_grad()
def load_into(module: nn.Module, given: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Gives a module its own tensors back, with the values that were loaded in their place; yields them.

    So all that shares them goes on sharing them: two names, views of one tensor, a list that holds one.

    Args:
        module: With tensors as they were loaded.
        given: Its own, from :func:`all_tensors` before; those that no checkpoint holds have kept their values.

    Raises:
        CheckpointError: The checkpoint holds different values for two names of one tensor.
    """
    stored = set(module.state_dict())
    names: dict[int, str] = {}
    for name, own in given.items():
        loaded = _get(module, name)
        if loaded.is_meta:  # offloaded
            continue
        first = names.setdefault(id(own), name) if name in stored else None
        if first == name:
            alike = own.shape == loaded.shape and own.dtype == loaded.dtype and own.device == loaded.device
            if not alike or 0 in own.stride():  # an expanded tensor takes no values
                own.data = loaded.data.clone(memory_format=torch.preserve_format)
            elif own is not loaded:
                own.copy_(loaded)
        elif first is not None and not torch.equal(own, loaded):
            raise CheckpointError(
                f"the checkpoint holds different values for {first!r} and {name!r}, which are one tensor in the"
                f" {type(module).__name__} that was given as backbone: build it as the one that was saved"
            )
        _set(module, name, own)
        yield own


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, tensor)  # recurrent layers keep a list of their weights beside them
