"""Where a backbone's weights are published: a file on the Hub, known by its hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from .errors import CheckpointError, ConfigError, nearest

_KEYS = ("repo_id", "timm_tag", "revision", "sha256", "filename")
FILENAME = "model.safetensors"


def check_backbone_weights(values: Any) -> dict[str, str]:
    """Returns where a backbone's weights are, with the defaults filled in.

    Args:
        values: ``repo_id`` (``org/name`` on the Hub) or ``timm_tag`` (``resnet50.a1_in1k``), and ``sha256`` of the
            file; ``revision`` (default ``main``) and ``filename`` (default ``model.safetensors``) are optional.

    Raises:
        ConfigError: A key that does not exist, a value that is none, or a place that is no Hub repository.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"backbone_weights must be a dict with repo_id or timm_tag, and sha256, got {values!r}")
    for key, value in values.items():
        if key not in _KEYS:
            raise ConfigError(f"backbone_weights has no {key!r}{nearest(str(key), _KEYS)} (it has: {', '.join(_KEYS)})")
        if not isinstance(value, str) or not value:
            raise ConfigError(f"backbone_weights[{key!r}] must be text, got {value!r}")
    if ("repo_id" in values) == ("timm_tag" in values):
        raise ConfigError(f"backbone_weights must name either repo_id or timm_tag, got {sorted(values)}")
    if "timm_tag" in values and not _hub_of_tag(values["timm_tag"]):
        raise ConfigError(f"backbone_weights: timm has no weights {values['timm_tag']!r} on the Hub")
    if "repo_id" in values:
        try:
            validate_repo_id(values["repo_id"])
        except HFValidationError as error:
            raise ConfigError(f"backbone_weights: repo_id {values['repo_id']!r} is no 'org/name': {error}") from error
    filled = {"revision": "main", "filename": FILENAME, **values}
    if not re.fullmatch(r"[\w./-]+", filled["revision"]) or ".." in filled["revision"]:
        raise ConfigError(f"backbone_weights: revision {filled['revision']!r} is no branch, tag or commit")
    if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", filled["filename"]):
        raise ConfigError(f"backbone_weights: filename {filled['filename']!r} must be a .safetensors file")
    if "sha256" in filled and not re.fullmatch(r"[0-9a-f]{64}", filled["sha256"]):
        raise ConfigError(f"backbone_weights: sha256 must be 64 hexadecimal digits, got {filled['sha256']!r}")
    return filled


def _hub_of_tag(tag: str) -> str | None:
    """Repository of a timm tag, None where there is none."""
    if ":" in tag or "/" in tag or not timm.is_model(tag):
        return None
    try:
        cfg = timm.get_pretrained_cfg(tag, allow_unregistered=False)
    except RuntimeError:  # the architecture has no such tag
        return None
    return str(cfg.hf_hub_id) if cfg is not None and cfg.hf_hub_id else None


def published_weights(backbone: nn.Module) -> dict[str, str]:
    """Returns where a living backbone says that it comes from.

    Raises:
        CheckpointError: It does not say it.
    """
    cfg = getattr(backbone, "pretrained_cfg", None)
    source: str | None = None
    if isinstance(cfg, dict):
        source = cfg.get("hf_hub_id")
    elif isinstance(backbone, PreTrainedModel):
        source = getattr(backbone.config, "_name_or_path", None)
    if not isinstance(source, str) or not source or Path(source).exists():
        raise CheckpointError(
            f"{type(backbone).__name__} does not say which published weights it has: pass"
            " backbone_weights={'repo_id': 'org/name', 'revision': ...}"
        )
    return check_backbone_weights({"repo_id": source})


def fetch(weights: Mapping[str, str], hub: Mapping[str, Any]) -> tuple[Path, str]:
    """Returns the file and its hash; fetches it where it is not in the cache.

    Args:
        weights: From :func:`check_backbone_weights`.
        hub: ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` where given.

    Raises:
        CheckpointError: The file is not there, or its hash is another than ``weights`` says.
    """
    repo_id = weights.get("repo_id") or str(_hub_of_tag(weights["timm_tag"]))
    try:
        path = Path(hf_hub_download(repo_id, weights["filename"], revision=weights["revision"], **hub))
    except (OSError, ValueError) as error:  # the Hub's errors are these
        raise CheckpointError(
            f"the backbone's weights, {weights['filename']} of {repo_id} at {weights['revision']}, could not be had:"
            f" {error}"
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if "sha256" in weights and digest != weights["sha256"]:
        raise CheckpointError(
            f"{weights['filename']} of {repo_id} at {weights['revision']} has the hash {digest}, the checkpoint was"
            f" saved with {weights['sha256']}: other weights were published there, which these heads are not for"
        )
    return path, digest
