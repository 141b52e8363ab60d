"""What a checkpoint of a training holds, and how a run continues from it, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from erde_hub.errors import CheckpointError, NonFiniteLossError

from ._checks import check_same_run, describe_network
from ._launch import run_on_main
from .checkpointing import (
    fingerprint,
    load_into,
    load_tensors,
    random_state,
    save_tensors,
    set_random_state,
    write_checkpoint,
)
from .run_folder import CHECKPOINTS, find_checkpoint, warn_from_start

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .distiller import Distiller

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Position:
    """Where a training is. It is saved between two optimizer steps only, so that no gradient is half accumulated."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0


def identity(distiller: Distiller) -> dict[str, Any]:
    """Returns what a resumed run must share with the one that it continues."""
    loss, teacher = distiller.loss, distiller.teacher
    resolved = {"mixed_precision": distiller.accelerator.mixed_precision, "augment": distiller.augment}
    return {
        "args": distiller.args.resume_dict() | resolved,
        "processes": distiller.accelerator.num_processes,
        "loss": f"{type(loss).__name__}({loss.extra_repr()})",
        "data": distiller.data.fingerprint,
        "teacher": None if teacher is None else fingerprint(teacher),
        "student": describe_network(distiller.student),
    }


def save(distiller: Distiller) -> Path:
    """Writes a checkpoint; every process calls it, the main one writes.

    Raises:
        NonFiniteLossError: A weight is NaN or infinite.
        CheckpointWriteError: See :func:`~erde_hub.training.checkpointing.write_checkpoint`.
    """
    accelerator, args = distiller.accelerator, distiller.args
    root = Path(str(args.output_dir)) / CHECKPOINTS
    shards = root / ".shards"
    if distiller.sharded:  # every process writes its part of weights and optimizer; the rest is the same for all
        accelerator.save_state(str(shards))
    ranks = gather(accelerator, {"random": random_state(), "meter": distiller.meter.state()})
    info = {
        "position": dataclasses.asdict(distiller.position),
        "total_steps": distiller.total_steps,
        "history": distiller.history,
        "run": distiller.identity,
    }

    def write(folder: Path) -> None:
        (folder / "trainer_state.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
        state: dict[str, Any] = {"ranks": ranks}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        if distiller.sharded:
            shards.rename(folder / "shards")
        else:
            weights = distiller.student.state_dict()
            _check_finite(weights, distiller.position.step)
            save_tensors(folder / "model.safetensors", weights)
            state["optimizer"] = distiller.optimizer.state_dict()
        if distiller.average is not None:
            save_tensors(folder / "ema.safetensors", distiller.average.module.state_dict())
        if distiller.loss.state_dict():
            save_tensors(folder / "loss.safetensors", distiller.loss.state_dict())
        torch.save(state, folder / "state.pt")

    step = distiller.position.step
    return run_on_main(accelerator, lambda: write_checkpoint(root, step, write, args.keep_checkpoints))


def restore(distiller: Distiller) -> Path | None:
    """Puts a distiller into the state of the newest complete checkpoint, and returns that; None if there is none.

    Raises:
        ConfigError: The checkpoint belongs to another run: other settings, data, loss, teacher or processes.
        CheckpointError: Its weights do not fit the student, or this process does not see it.
    """
    accelerator, output_dir = distiller.accelerator, str(distiller.args.output_dir)
    folder = run_on_main(accelerator, lambda: find_checkpoint(output_dir))
    if folder is None:
        if accelerator.is_main_process:
            warn_from_start(output_dir)
        return None
    if not (folder / "trainer_state.json").is_file():
        raise CheckpointError(
            f"process {accelerator.process_index} does not see {folder}: resuming on several machines needs an"
            " output_dir that all of them share"
        )
    info = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    check_same_run(info["run"], distiller.identity, folder.name)
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"state.pt of {folder.name} holds more than tensors and plain values, and nothing in a checkpoint is run as"
            f" code: it was not written by this trainer ({' '.join(str(error).split())[:200]})"
        ) from error
    if distiller.sharded:
        accelerator.load_state(str(folder / "shards"))
    else:
        load_into(distiller.student, load_tensors(folder / "model.safetensors"), folder.name)
        distiller.optimizer.load_state_dict(state["optimizer"])
    if distiller.average is not None:
        load_into(distiller.average.module, load_tensors(folder / "ema.safetensors"), folder.name)
    if (folder / "loss.safetensors").is_file():
        load_into(distiller.loss, load_tensors(folder / "loss.safetensors"), folder.name)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    for name, value in info["position"].items():
        setattr(distiller.position, name, value)
    distiller.history[:] = info["history"]
    own = state["ranks"][accelerator.process_index]
    distiller.meter.restart(own["meter"])
    set_random_state(own["random"])
    logger.info("resumed %s at step %d of %d", folder.name, distiller.position.step, distiller.total_steps)
    return folder


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Returns the values of all processes, on all processes."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def _check_finite(weights: dict[str, Tensor], step: int) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteLossError(
                f"{name} is no longer finite after step {step}, although the loss was: no checkpoint is written. Try a"
                " lower lr, max_grad_norm, or mixed_precision 'no'"
            )
