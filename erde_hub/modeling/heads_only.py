"""Checkpoints of heads alone: the backbone's weights stay where they were published, named by their hash.

``config.backbone_weights`` says which file that is: ``{"repo_id": ..., "revision": ..., "sha256": ...}``, or
``timm_tag`` in place of ``repo_id``. Saving compares the backbone with that file tensor by tensor, so that
nothing that was trained is left out; loading fetches safetensors only, and reads nothing of a file whose hash is
another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from erde_hub.errors import CheckpointError

from ._quiet import quiet_loading


def read_backbone(backbone_cls: type[nn.Module] | None, config: Any, path: Path) -> dict[str, Tensor]:
    """Reads a verified file as tensors by the names that the backbone gives them; what it does not hold is left out.

    Args:
        backbone_cls: Class of a transformers backbone, whose stored names may be older than its own; None for others.
        config: The backbone's own config, for these.
        path: The file.

    Raises:
        CheckpointError: It is no safetensors file.
    """
    try:
        if backbone_cls is None:
            return load_file(path)
        with quiet_loading(), torch.random.fork_rng(devices=[]):  # what the file does not hold is drawn at random
            # The tensors of this very file: a folder would be searched for one with the usual name.
            loaded, info = backbone_cls.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=load_file(path),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        others = (entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
        drawn = {*info["missing_keys"], *others}
        return {name: tensor for name, tensor in loaded.state_dict().items() if name not in drawn}
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} is no safetensors file, or was cut short: {error}") from error


def own_tensors(
    state: Mapping[str, Tensor], published: Mapping[str, Tensor], classifier: tuple[str, ...]
) -> dict[str, Tensor]:
    """Returns what a heads-only checkpoint has to hold: heads, what the published file lacks, a classifier of its own.

    Raises:
        CheckpointError: Other weights of the backbone differ from the published ones too, or none of them is there.
    """
    own: dict[str, Tensor] = {}
    changed: list[str] = []
    found = False
    for name, tensor in state.items():
        inner = name.removeprefix("backbone.")
        there = published.get(inner) if name != inner else None
        if there is not None and there.shape == tensor.shape and torch.equal(there.to(tensor), tensor):
            found = True
            continue
        own[name] = tensor
        if there is not None and not inner.startswith(classifier):
            changed.append(inner)
    if changed:
        raise CheckpointError(
            f"heads_only: {len(changed)} tensors of the backbone are not those published, first {changed[0]!r}: they"
            " were trained (freeze_backbone() keeps them) or come from elsewhere; save without heads_only"
        )
    if not found:
        raise CheckpointError(
            f"heads_only: the published file holds none of the backbone's tensors (its first is"
            f" {next(iter(published), None)!r}): backbone_weights names another model"
        )
    return own
