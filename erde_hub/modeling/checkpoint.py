"""The files of a checkpoint: written so that a reader sees what belongs together, and read that way.

Weights and config cannot be replaced at one moment: a process that is killed in between, or a reader, meets the files
of two saves. So each file of weights carries in its header the hash of all tensors (``save_id``, which the config holds
too) and the config that they were saved with. Where the hashes differ, the weights and the config in their header are
the checkpoint; where they agree, ``config.json`` counts, which people edit. The hash of a variant ends in its name: the
one config of a folder is that of the variant saved last. Shards have names of their own, so that none is overwritten.
Nothing marks ``preprocessor_config.json``: where it changes, there is none while the others are replaced.
Weights without a hash, of earlier versions and other programs, go with a config without one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from erde_hub._files import read_json
from erde_hub.config import EarlyExitConfig
from erde_hub.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

#: Arguments of ``from_pretrained`` that say how to reach the Hub.
REACHING = ("token", "cache_dir", "local_files_only", "force_download", "subfolder", "revision", "proxies")
_WEIGHTS = re.compile(r"model(-[0-9a-f]{8})?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
#: Names that an index may hold: no path leads out of the folder.
_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], config: EarlyExitConfig, max_shard_size: int | str, variant: str | None
) -> None:
    """Writes tensors, none of which share memory, as safetensors.

    Args:
        folder: Is empty.
        tensors: By name.
        config: With its ``save_id``; it is stored in the header.
        max_shard_size: In bytes, or as text such as ``"5GB"``: above it there are several files and an index.
        variant: Part of the files' names.

    Raises:
        ConfigError: ``max_shard_size`` is neither.
    """
    pattern = _variant(f"model-{config.save_id:.8}{{suffix}}.safetensors", variant)
    try:
        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f'max_shard_size={max_shard_size!r} is no number of bytes, nor text as "5GB"') from error
    metadata = {"format": "pt", "save_id": str(config.save_id), "config": config.to_json_string()}
    shards = split.filename_to_tensors if split.is_sharded else {_variant(SAFE_WEIGHTS_NAME, variant): [*tensors]}
    for name, keys in shards.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / _variant(SAFE_WEIGHTS_INDEX_NAME, variant)).write_text(text, encoding="utf-8")


def add_save_id(folder: Path, config: EarlyExitConfig, variant: str | None) -> None:
    """Marks a config, and weights that transformers has written, as one save; one file is in memory at a time."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    config.save_id = ".".join(filter(None, (digest.hexdigest()[:32], variant)))
    config.save_pretrained(folder)
    metadata = {"format": "pt", "save_id": config.save_id, "config": config.to_json_string()}
    for path in files:
        marked = path.with_suffix(".marked")
        save_file(load_file(path), marked, metadata)
        marked.replace(path)


def remove_other_weights(folder: Path, written: set[str]) -> None:
    """Deletes the weights of earlier saves: one file next to newer shards, shards next to a newer file."""
    for path in sorted(folder.iterdir(), reverse=True):  # an index before its shards
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink(missing_ok=True)


def check_size(described: int, held: int) -> None:
    """Raises :class:`CheckpointError` where a config needs far more memory than its weights: it would be filled.

    Args:
        described: Bytes of what the config describes and the files do not hold.
        held: Bytes of what they hold.
    """
    if described > 8 * held + 2**25:
        raise CheckpointError(
            f"the config describes a network of {described + held:,} bytes, but the weights are {held:,} bytes: it was"
            " edited, or belongs to other weights"
        )


@dataclass(frozen=True)
class _Weights:
    """Tensors of one save, in files that are open and read when they are used."""

    tensors: dict[str, Any]
    save_id: str | None
    config: str


def read_checkpoint(
    source: Any, reaching: Mapping[str, Any], variant: str | None, build: Callable[[dict[str, Any]], EarlyExitConfig]
) -> tuple[EarlyExitConfig, dict[str, Any]]:
    """Reads config and weights of one save.

    Args:
        source: Folder, or repository of the Hub.
        reaching: Those of :data:`REACHING` that were passed.
        variant: Part of the names of the weights' files.
        build: Makes a config of what is stored.

    Returns:
        The config, of the weights' header where ``config.json`` belongs to another save; and slices of open files by
        name of the tensor.

    Raises:
        CheckpointError: Config or weights are missing or damaged.
        OSError: The Hub has no such repository, or cannot be reached.
    """
    for is_last in (False, True):  # twice: another process may be saving
        config = build(EarlyExitConfig.read(cached_file(source, CONFIG_NAME, **reaching)))
        found = _read_weights(source, reaching, variant, or_raise=is_last)
        for weights in found:
            if weights.save_id == config.save_id:
                return config, weights.tensors
    weights = next((weights for weights in found if weights.save_id is not None), found[0])
    if weights.save_id is None and _is_of(config, variant):
        raise CheckpointError(
            f"{CONFIG_NAME} of {source} has a save_id and the weights have none: a save was killed, or another program"
            f" wrote the weights. Save the checkpoint again; if you know that the weights belong to this {CONFIG_NAME},"
            " delete its save_id"
        )
    if weights.save_id is not None:
        config = build(EarlyExitConfig.parse(weights.config, f"the config in the header of the weights of {source}"))
        logger.warning("%s of %s belongs to other weights: the config in their header is used", CONFIG_NAME, source)
    return config, weights.tensors


def read_weights(
    source: Any, reaching: Mapping[str, Any], variant: str | None, config: EarlyExitConfig | None
) -> dict[str, Any]:
    """Reads weights for a config that is there; see :func:`read_checkpoint`.

    Args:
        source: As there.
        reaching: As there.
        variant: As there.
        config: That was read from the same place; None, or one that belongs to another variant, takes any weights.

    Raises:
        CheckpointError: Also weights of another save.
    """
    save_id = None if config is None else config.save_id
    is_known = config is not None and _is_of(config, variant)
    for is_last in (False, True):
        for weights in _read_weights(source, reaching, variant, or_raise=is_last):
            if not is_known or weights.save_id == save_id:
                return weights.tensors
    why = (
        "they were saved anew in between, a save was killed, or another program wrote them"
        if save_id is not None
        else "they have a save_id and it holds none of theirs"
    )
    raise CheckpointError(
        f"the config that was read does not belong to the weights of {source}: {why}. Load it again; if that does not"
        " help, EarlyExitWrapper.from_pretrained loads what belongs together, and saving that mends the checkpoint"
    )


def _read_weights(source: Any, reaching: Mapping[str, Any], variant: str | None, or_raise: bool) -> list[_Weights]:
    """Reads what is there, of one file and of shards, which are both there only while a checkpoint is replaced."""
    find = partial(cached_file, source, _raise_exceptions_for_missing_entries=False, **reaching)
    found: list[_Weights] = []
    reason = "there is no file of that name; pickles are not read"
    for read in (_read_file, _read_shards):
        try:
            weights = read(find, variant)
        except (FileNotFoundError, SafetensorError, CheckpointError) as error:
            reason = f"damaged, cut short or incomplete: {error}"
        else:
            found += [weights] if weights is not None else []
    if or_raise and not found:
        raise CheckpointError(
            f"{source} has no weights that can be read, {_variant(SAFE_WEIGHTS_NAME, variant)} or shards with their"
            f" index ({reason}): save the checkpoint, or download it, again"
        )
    return found


def _read_file(find: Callable[[str], str | None], variant: str | None) -> _Weights | None:
    path = find(_variant(SAFE_WEIGHTS_NAME, variant))
    return None if path is None else _open([path])


def _read_shards(find: Callable[[str], str | None], variant: str | None) -> _Weights | None:
    index = find(_variant(SAFE_WEIGHTS_INDEX_NAME, variant))
    if index is None:
        return None
    places = read_json(Path(index)).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or not all(_FILE.fullmatch(name) for name in names):
        raise CheckpointError(f"{Path(index).name} must name files of weights next to it, it names {names[:2]}")
    paths = [find(name) for name in names]
    if None in paths:
        raise CheckpointError(f"{names[paths.index(None)]}, which {Path(index).name} names, is missing")
    return _open([path for path in paths if path is not None])


def _open(paths: list[str]) -> _Weights:
    tensors: dict[str, Any] = {}
    headers = []
    for path in paths:
        file = safe_open(path, "pt")
        headers.append(file.metadata() or {})
        tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    ids = {header.get("save_id") for header in headers}
    if len(ids) > 1:
        raise CheckpointError("its files of weights belong to several saves")
    return _Weights(tensors, ids.pop(), headers[0].get("config", ""))


def _is_of(config: EarlyExitConfig, variant: str | None) -> bool:
    """Whether a config was saved with this variant's weights, and not with those of another variant."""
    return (config.save_id or "").partition(".")[2] == (variant or "")


def _variant(name: str, variant: str | None) -> str:
    """Returns a file's name as transformers makes it, ``model.fp16.safetensors``."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"
