"""A hash of a model's weights, by which records, thresholds and reports know the model that they speak of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from erde_hub.errors import RecordsError

#: Parts of a model that read the logits and do not change them: records stay valid when these are fitted later.
_READERS = ("policy", "calibrator")


def model_fingerprint(model: nn.Module, accelerator: Any | None = None) -> str:
    """Hashes names, types, shapes and values of a model's weights and buffers.

    Parts that only read the logits (``policy``, ``calibrator``) are left out, so that fitting them on records does not
    make the records foreign. Every process returns the same string.
    """
    several = accelerator is not None and accelerator.num_processes > 1
    state = accelerator.get_state_dict(model) if several and accelerator is not None else model.state_dict()
    found = [hash_tensors({name: value for name, value in state.items() if name.split(".", 1)[0] not in _READERS})]
    if several:
        broadcast_object_list(found)  # a sharded model gives its weights to the main process only
    return found[0]


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """Hashes names, types, shapes and values; what is no tensor is left out."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, Tensor):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()[:32]


def check_fingerprint(known: str, model: nn.Module, what: str) -> None:
    """Raises :class:`RecordsError` where a hash is not that of a model's weights.

    Args:
        known: Hash of the weights that something was made with.
        model: The model that it is used with.
        what: What was made, for the message.
    """
    found = model_fingerprint(model)
    if known != found:
        raise RecordsError(
            f"{what} that were not collected with this model ({known[:8]} and {found[:8]}): its weights differ; collect"
            " them anew with the model as it is now"
        )
