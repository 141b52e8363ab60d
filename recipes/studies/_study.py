"""What the studies share: images in memory, augmentation, a training loop that survives a kill, result files.

Everything random depends on the seed and the number of the step alone, so a run that was killed continues from its last
checkpoint with the batches, crops and dropout masks that it would have seen.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
import transformers
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

import erde_hub
from erde_hub import EarlyExitWrapper
from erde_hub._files import replacing, write_text
from erde_hub.losses import ExitLoss

log = logging.getLogger("study")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKPOINT_SECONDS = 180.0  # what a kill costs at most

# Asked for when the program starts: the checkout may have moved on when it ends.
_GIT = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
COMMIT = subprocess.run(_GIT, capture_output=True, text=True, check=False).stdout.strip() or None


def start_log(path: Path) -> None:
    """Logs to the terminal and to a file, with the time of day."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(path)]
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%d %H:%M:%S", handlers=handlers
    )
    log.setLevel(logging.INFO)


def share_cores() -> None:
    """Computes on the cores that other programs leave free, at least on one: threads that wait for each other are slow.

    Call it once a minute or so; the load average looks back as far.
    """
    cores = os.cpu_count() or 1
    others = os.getloadavg()[0] - torch.get_num_threads()
    torch.set_num_threads(max(1, min(cores, round(cores - others))))


# Files


def save(path: Path, state: Any) -> None:
    """Writes a file that is either complete or not there, also when the process is killed while it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:  # by name, torch refuses one without a stem
        torch.save(state, file)


def load(path: Path) -> Any:
    """Reads what :func:`save` wrote; None where there is no file yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def write_result(path: Path, arguments: dict[str, Any], measured: dict[str, Any]) -> None:
    """Writes the small JSON of a run: what was asked for, with which versions, what came out."""
    result = {
        "arguments": {
            key: Path(value).name if key in ("dataset", "output") else value for key, value in arguments.items()
        },
        "commit": COMMIT,
        "versions": {
            "erde_hub": erde_hub.__version__,
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, timm, transformers, datasets)},
        },
        "device": DEVICE,
        "cores": os.cpu_count(),
        **measured,
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 6))
    write_text(path, json.dumps(rounded, indent=1) + "\n")
    log.info("wrote %s", path.name)


# Images


def load_images(dataset: str, cache: Path, limit: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (images, labels) of the splits train, validation and test; validation is the last tenth of train.

    Args:
        dataset: Folder or Hub name of a set like CIFAR: columns ``img`` and ``label`` or ``fine_label``.
        cache: Folder for the decoded images, so that they are decoded once.
        limit: Keep this many training images, and a fifth of it in the other splits; for a quick look.

    Shape:
        images: (N, 3, 32, 32) uint8. labels: (N,) int64.
    """
    file = cache / f"{Path(dataset).name}.pt"
    stored = load(file)
    if stored is None:
        stored = {}
        for split, rows in datasets.load_dataset(dataset).items():
            rows = rows.with_format("numpy")
            images = np.stack([row["img"] for row in rows])
            labels = rows["fine_label" if "fine_label" in rows.column_names else "label"][:]
            stored[split] = (torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels))
        save(file, stored)
    (images, labels), test = stored["train"], stored["test"]
    held_out = len(images) // 10
    splits = {
        "train": (images[:-held_out], labels[:-held_out]),
        "validation": (images[-held_out:], labels[-held_out:]),
        "test": test,
    }
    if limit is not None:
        sizes = {"train": limit, "validation": limit // 5, "test": limit // 5}
        splits = {split: (x[: sizes[split]], y[: sizes[split]]) for split, (x, y) in splits.items()}
    return splits


def class_names(dataset: str) -> list[str]:
    """Returns the names of the classes of a set like CIFAR."""
    features = datasets.load_dataset(dataset, split="train").features
    return list(features["fine_label" if "fine_label" in features else "label"].names)


def batch_indices(samples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Returns the rows of the batch of a step: a new order in every epoch, incomplete batches are dropped."""
    epoch, batch = divmod(step, samples // batch_size)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[batch * batch_size : (batch + 1) * batch_size]


def crop_and_flip(images: Tensor, seed: int, step: int, padding: int = 4) -> Tensor:
    """Crops out of the zero-padded images at random and flips half of them; (N, 3, H, W) to the same."""
    samples, _, height, width = images.shape
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    top, left = torch.randint(0, 2 * padding + 1, (2, samples, 1), generator=generator)
    columns = left + torch.arange(width)
    flipped = torch.rand(samples, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    rows = top + torch.arange(height)
    padded = F.pad(images, [padding] * 4)
    cropped = padded[torch.arange(samples)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)  # indexing put the channels last, which is how convolutions like them


# Training


@dataclass
class Learner:
    """A model with what it takes to train it. What is measured in the end is ``average``."""

    model: nn.Module
    loss: ExitLoss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: ModelEmaV3

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "average": self.average.module,
        }


def exit_logits(model: nn.Module, x: Tensor, bf16: bool = True) -> tuple[Tensor, ...]:
    """Logits of every exit, of a model without exits just its own; gradients only in train mode."""
    options = {"output_all_exits": True} if isinstance(model, EarlyExitWrapper) else {}
    with torch.set_grad_enabled(model.training), torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        out = model(x, **options)
    logits = out.exit_logits if options else [getattr(out, "logits", out)]
    return tuple(one.float() for one in logits)


def train(
    learners: Mapping[str, Learner],
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    folder: Path,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    bf16: bool = True,
    look: tuple[int, Callable[[nn.Module], str]],
) -> None:
    """Trains models side by side on the same batches.

    Every few minutes everything is written to ``folder``; what is there already is not trained again.

    Args:
        learners: Each trains by itself; a teacher's forward is paid once for all.
        batch: From the number of a step to (inputs, labels).
        steps: Number of steps.
        folder: Of the checkpoint.
        seed: Of dropout.
        teacher: Its logits go to the losses that read them.
        bf16: Compute in bfloat16 where autocast does.
        look: Every so many steps, what this says about each averaged model is logged.
    """
    checkpoint, first = folder / "checkpoint.pt", 0
    if (state := load(checkpoint)) is not None:
        first = state["step"]
        for name, learner in learners.items():
            for part, value in learner.parts().items():
                value.load_state_dict(state[name][part])
        log.info("%s continues at step %d of %d", folder.name, first, steps)
    for learner in learners.values():
        learner.model.train()
    saved = shown = time.perf_counter()
    shown_step, sums = first, dict.fromkeys(learners, 0.0)
    for step in range(first, steps):
        x, y = batch(step)
        teacher_logits = None if teacher is None else exit_logits(teacher.eval(), x, bf16)
        for name, learner in learners.items():
            torch.manual_seed(1_000_003 * seed + step)  # for dropout
            given = teacher_logits if learner.loss.reads_teacher else None
            loss = learner.loss(exit_logits(learner.model, x, bf16), given, y).loss
            loss.backward()
            learner.optimizer.step()
            learner.optimizer.zero_grad()
            learner.schedule.step()
            learner.average.update(learner.model, step)
            sums[name] += loss.item()
        done, looks = step + 1 == steps, (step + 1) % look[0] == 0
        if done or looks or time.perf_counter() - shown > 120:
            count, seconds = step + 1 - shown_step, time.perf_counter() - shown
            means = ", ".join(f"{name} {total / count:.3f}" for name, total in sums.items())
            log.info("step %d of %d, %.2f s each, mean loss: %s", step + 1, steps, seconds / count, means)
            if done or looks:
                texts = (f"{name} {look[1](learner.average.module.eval())}" for name, learner in learners.items())
                log.info("validation: %s", ", ".join(texts))
            share_cores()
            shown, shown_step, sums = time.perf_counter(), step + 1, dict.fromkeys(learners, 0.0)
        if done or time.perf_counter() - saved > CHECKPOINT_SECONDS:
            states = {
                name: {part: value.state_dict() for part, value in learner.parts().items()}
                for name, learner in learners.items()
            }
            save(checkpoint, {"step": step + 1, **states})
            saved = time.perf_counter()
