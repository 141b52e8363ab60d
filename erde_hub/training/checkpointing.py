"""Checkpoints that are whole or not there: written beside, synced, listed with their hashes, renamed.

A checkpoint is a folder ``step-000123`` with

* ``model.safetensors`` (and ``ema.safetensors``, ``loss.safetensors``): tensors,
* ``trainer_state.json``: position, history, arguments; for people too,
* ``state.pt``: optimizer, scaler and random states, read with ``torch.load(weights_only=True)``, which runs no code,
* ``manifest.json``: size and SHA-256 of every other file, written last.

A folder whose files do not match its manifest is not a checkpoint: a process may die, and a disk may fill, at any
moment. Accelerate's ``save_state`` does none of this, and its mid-epoch resume is not bit-exact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from erde_hub._files import set_default_mode
from erde_hub.errors import CheckpointError, CheckpointWriteError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


def write_checkpoint(root: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Writes one checkpoint and removes the oldest ones beyond ``keep``.

    Args:
        root: Folder of the checkpoints; made if it is not there.
        step: Number in the name.
        write: Fills the folder that it is given.
        keep: How many of the newest checkpoints stay, the new one included.

    Raises:
        CheckpointWriteError: The disk is full, or the folder cannot be written; the checkpoints before are intact and
            nothing half written is left.
    """
    final = root / f"step-{step:06d}"
    staging = root / f".tmp-{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        staging.mkdir()
        write(staging)
        files = {path.relative_to(staging).as_posix(): _seal(path) for path in _files(staging)}
        manifest = staging / MANIFEST
        manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
        _sync(manifest)
        for folder in {staging, *(path.parent for path in _files(staging))}:
            _sync(folder)
        if final.exists():  # the same step again, after an incomplete one was skipped: the new one takes its place
            final.rename(root / f".old-{final.name}")
        staging.rename(final)
        _sync(root)
    # torch and safetensors report a full disk as errors of their own, not as OSError
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointWriteError(
            f"checkpoint {final.name} could not be written to {root}: {error}{_space_left(root)}; earlier ones are"
            " untouched: make space or choose another output_dir, then continue with resume"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in _folders(root)[keep:]:
        _remove(old)
    _remove_leftovers(root)
    return final


def newest_checkpoint(root: Path) -> Path | None:
    """Returns the newest complete checkpoint below ``root``, or None; incomplete ones are logged and passed over."""
    for folder in _folders(root):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            logger.warning("%s; it is ignored", error)
        else:
            return folder
    return None


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: A file is missing, cut off or altered; the message names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, version = dict(manifest["files"]), int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder.name} is incomplete: it has no readable {MANIFEST}") from error
    if version > FORMAT:
        raise CheckpointError(f"checkpoint {folder.name} has format {version}, this erde_hub reads up to {FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            size = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            raise CheckpointError(
                f"checkpoint {folder.name} is incomplete: {name} is {size}, it should have {expected['bytes']} bytes"
            )
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {folder.name} is damaged: {name} does not match its hash")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors; tensors that share memory are written once or, if they only overlap, as copies."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in names:
            aliases[name] = names[place]
            continue
        names[place] = name
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in storages
        storages.add(storage)
        unique[name] = tensor.detach().clone().contiguous() if shared else tensor.detach().contiguous()
    save_file(unique, path, metadata={"aliases": json.dumps(aliases)})
    set_default_mode(path)


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Reads what :func:`save_tensors` wrote."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    return tensors | {name: tensors[original] for name, original in aliases.items()}


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors into a module whose names and shapes must all match.

    Raises:
        CheckpointError: Names or shapes differ; the message lists missing, unexpected and differently shaped tensors.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or unexpected or shapes:
        parts = [("missing", missing), ("unexpected", unexpected), ("other shapes", shapes)]
        text = "; ".join(f"{what}: {', '.join(names[:3])} ({len(names)})" for what, names in parts if names)
        raise CheckpointError(f"the weights of {source} do not fit {type(module).__name__}: {text}")
    module.load_state_dict(tensors)


def random_state() -> dict[str, Any]:
    """Returns the state of every global random generator, in types that ``weights_only`` loading accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the global state is what is meant
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what :func:`random_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002 - see above
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def fingerprint(module: torch.nn.Module) -> str:
    """Returns a SHA-256 over names, shapes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _seal(path: Path) -> dict[str, Any]:
    """Forces one file onto the disk and returns its entry in the manifest."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _folders(root: Path) -> list[Path]:
    """Returns the checkpoint folders, newest first, complete or not."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _remove(folder: Path) -> None:
    """Removes a checkpoint, its manifest first: killed half way, what is left does not look complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    """Removes what killed writers left behind."""
    for path in [*root.glob(".tmp-step-*"), *root.glob(".old-step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _space_left(root: Path) -> str:
    try:
        return f" ({shutil.disk_usage(root).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
