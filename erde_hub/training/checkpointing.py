"""Checkpoints of a run, from which it continues bit for bit. Each is complete or does not count.

A checkpoint is a folder ``step-000123`` with

* ``state/``: what Accelerate's ``save_state`` writes: weights, optimizer and scaler,
* ``extra.pt``: averaged weights, loss, and the random generators and sums of the epoch of every process. Accelerate
  would read registered objects as pickles, which may run code, so these are read with ``weights_only`` here,
* ``trainer_state.json``: position, history and settings, for people too,
* ``manifest.json``: size and SHA-256 of every other file, written last.

The folder is written under another name, synced and renamed. A process may die, and a disk may fill, at any moment:
a folder whose files do not match its manifest is not a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pickle
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load
from torch import nn

from erde_hub._files import replacing_folder
from erde_hub.errors import CheckpointError

from ._launch import gather, is_sharded, run_on_main
from .run_identity import check_same_run
from .state import TrainingState

logger = logging.getLogger(__name__)

#: Folder of a run that holds its checkpoints.
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 2
_STATE = "state"
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    accelerator: Accelerator,
    root: Path,
    state: TrainingState,
    modules: Mapping[str, nn.Module],
    run: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint and returns its folder; every process calls it, the main one writes.

    Args:
        accelerator: Has prepared the student and the optimizer.
        root: Folder of the checkpoints.
        state: Where the training stands.
        modules: What is saved in addition to the student, by name: the averaged weights, the loss.
        run: See :func:`~erde_hub.training.run_identity.describe_run`.
        keep: How many of the newest checkpoints stay.

    Raises:
        CheckpointWriteError: See :func:`write_checkpoint`.
    """
    processes = gather(accelerator, {"random": random_state(), "meter": state.meter.state()})
    shards = root / ".shards"
    if is_sharded(accelerator):  # every process writes its part of weights and optimizer
        accelerator.save_state(str(shards))
    info = {"position": dataclasses.asdict(state.position), "history": state.history, "run": run}

    def write(folder: Path) -> None:
        (folder / "trainer_state.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
        try:
            extra = {name: module.state_dict() for name, module in modules.items()}
            torch.save({**extra, "processes": processes}, folder / "extra.pt")
            if is_sharded(accelerator):
                shards.rename(folder / _STATE)
            else:  # safetensors would leave out tensors that share memory with others
                accelerator.save_state(str(folder / _STATE), safe_serialization=False)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error)) from error

    return run_on_main(accelerator, lambda: write_checkpoint(root, state.position.step, write, keep))


def load_checkpoint(
    accelerator: Accelerator, root: Path, state: TrainingState, modules: Mapping[str, nn.Module], run: Mapping[str, Any]
) -> Path | None:
    """Continues from the newest complete checkpoint and returns its folder; None if there is none.

    Args:
        accelerator: Has prepared the student and the optimizer.
        root: Folder of the checkpoints.
        state: Gets position, history and the sums of the epoch.
        modules: As for :func:`save_checkpoint`.
        run: What is to be continued.

    Raises:
        ConfigError: The checkpoint belongs to another run: other settings, data, loss, teacher or processes.
        CheckpointError: Its weights do not fit the student, this process does not see it, or another version wrote it.
    """
    folder = run_on_main(accelerator, lambda: newest_checkpoint(root))
    if folder is None:
        return None
    if not (folder / "trainer_state.json").is_file():
        raise CheckpointError(
            f"process {accelerator.process_index} does not see {folder}: resuming on several machines needs an"
            " output_dir that all of them share"
        )
    info = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    check_same_run(info["run"], run, folder.name)
    try:
        accelerator.load_state(str(folder / _STATE))
        extra = load(folder / "extra.pt", map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(extra[name])
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{folder.name} holds more than tensors and plain values, and nothing in a checkpoint is run as code: it"
            f" was not written by this trainer ({' '.join(str(error).split())[:200]})"
        ) from error
    except RuntimeError as error:  # torch lists tensors that are missing, unexpected or of another shape
        raise CheckpointError(f"the weights of {folder.name} do not fit: {error}") from error
    for name, value in info["position"].items():
        setattr(state.position, name, value)
    state.history[:] = info["history"]
    own = extra["processes"][accelerator.process_index]
    state.meter.restart(own["meter"])
    set_random_state(own["random"])
    logger.info("resumed %s", folder.name)
    return folder


def write_checkpoint(root: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Writes one checkpoint and removes the oldest ones beyond ``keep``.

    Args:
        root: Folder of the checkpoints; made if it is missing. One process at a time writes there.
        step: Number in the name.
        write: Fills the folder that it is given.
        keep: How many of the newest checkpoints stay, the new one included.

    Raises:
        CheckpointWriteError: The disk is full, or the folder cannot be written; the checkpoints before are intact and
            nothing half written is left.
    """
    final = root / f"step-{step:06d}"
    with replacing_folder(final) as staging:
        write(staging)
        files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
        entries = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
        manifest = {"format": FORMAT, "step": step, "files": entries}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for old in _folders(root)[keep:]:
        (old / MANIFEST).unlink(missing_ok=True)  # first: killed half way, what is left does not look complete
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(root: Path) -> Path | None:
    """Returns the newest complete checkpoint below ``root``, or None; incomplete ones are logged and passed over.

    Raises:
        CheckpointError: Another version of erde_hub wrote it.
    """
    for folder in _folders(root):
        try:
            version = verify_checkpoint(folder)
        except CheckpointError as error:
            logger.warning("%s; it is ignored", error)
            continue
        if version != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder.name} has format {version}, and this erde_hub continues format {FORMAT} only: use"
                " the version that wrote it, or start a new run in another output_dir"
            )
        return folder
    return None


def verify_checkpoint(folder: Path) -> int:
    """Compares every file with the manifest and returns the format.

    Raises:
        CheckpointError: A file is missing, cut off or altered; the message names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, version = dict(manifest["files"]), int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder.name} is incomplete: it has no readable {MANIFEST}") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            size = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            raise CheckpointError(
                f"checkpoint {folder.name} is incomplete: {name} is {size}, it should have {expected['bytes']} bytes"
            )
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {folder.name} is damaged: {name} does not match its hash")
    return version


def random_state() -> dict[str, Any]:
    """Returns the state of every global random generator, in types that Accelerate reads back."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global state is what is meant
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what :func:`random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - see above
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(root: Path) -> list[Path]:
    """Returns the checkpoint folders, newest first, complete or not."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
