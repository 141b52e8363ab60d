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
from transformers import PreTrainedModel

from erde_hub._published_weights import check_backbone_weights, fetch, published_weights
from erde_hub.backbones import get_adapter
from erde_hub.config import EarlyExitConfig
from erde_hub.errors import CheckpointError, ConfigError

from ._quiet import quiet_loading
from .checkpoint import check_size


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


def published_tensors(config: EarlyExitConfig, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """Fetches the backbone's weights of a heads-only checkpoint, by the names that the model with exits gives them.

    Args:
        config: Names the file and its hash.
        hub: ``token``, ``cache_dir`` and the like where given.

    Raises:
        CheckpointError: No such file, another hash, no safetensors, or one for a much smaller network.
        ConfigError: The config names no file, or no hash.
    """
    weights = check_backbone_weights(config.backbone_weights)
    if "sha256" not in weights:
        raise ConfigError("backbone_weights of a stored config must hold the sha256 of the file")
    path, _ = fetch(weights, hub)
    backbone_cls = own_config = None
    if config.library == "transformers":
        with torch.device("meta"):
            backbone = get_adapter(config.library).build(config)
        check_size(sum(t.nbytes for t in (*backbone.parameters(), *backbone.buffers())), path.stat().st_size)
        backbone_cls, own_config = type(backbone), backbone.config
    return {f"backbone.{name}": tensor for name, tensor in read_backbone(backbone_cls, own_config, path).items()}


def without_published(
    state: Mapping[str, Tensor],
    backbone: nn.Module,
    classifier: tuple[str, ...],
    weights: dict[str, str] | None,
    token: str | bool | None,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns where the backbone's weights are published, and the tensors that a heads-only checkpoint has to hold.

    Args:
        state: All tensors of the model.
        backbone: Says where it comes from if ``weights`` does not.
        classifier: How the names of the backbone's classifier begin.
        weights: From the user; see :func:`~erde_hub._published_weights.check_backbone_weights`.
        token: Of the Hub.

    Raises:
        CheckpointError: See :func:`own_tensors`; or the file cannot be fetched.
    """
    weights = published_weights(backbone) if weights is None else check_backbone_weights(weights)
    path, digest = fetch(weights, {} if token is None else {"token": token})
    known = isinstance(backbone, PreTrainedModel)
    published = read_backbone(type(backbone) if known else None, getattr(backbone, "config", None), path)
    return {**weights, "sha256": digest}, own_tensors(state, published, classifier)


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
