"""What is set up before the first update: models on their device, batches, the optimizer, the number of updates."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from erde_hub.data.base import LabelledData
from erde_hub.data.loader import BatchLoader
from erde_hub.errors import ConfigError
from erde_hub.modeling.pretrained import EarlyExitPreTrainedModel

from ._checks import class_names
from .arguments import DistillationArguments

logger = logging.getLogger(__name__)


def adopt_data(model: nn.Module, data: LabelledData) -> None:
    """Stores in a model's config how the images of the data become inputs, and the names of the classes.

    A checkpoint then answers in a pipeline as it did in training. :class:`~erde_hub.training.Distiller` calls it for
    the student; call it yourself before you train in another way, with transformers' Trainer for example. Modules
    without a config of this library stay as they are.

    Args:
        model: The model that will be trained on the data.
        data: Image or text data; a tokenizer is saved by whoever saves the model.
    """
    if not isinstance(model, EarlyExitPreTrainedModel):
        return
    if data.kind == "image":
        # its last layers may be new, and trained
        frozen = not any(parameter.requires_grad for parameter in islice(model.backbone.parameters(), 1))
        expected, given = _normalization(model.config.preprocessing), _normalization(data.preprocessing)
        if frozen and expected is not None and given is not None and expected != given:
            logger.warning(
                "the backbone is frozen and was made for images of mean %s and std %s, %r has mean %s and std %s: its"
                " features fit better if the data are loaded with the mean= and std= of the backbone",
                *(*expected, data.name, *given),
            )
        model.set_preprocessing(**data.preprocessing)
    if data.class_names and model.config.task == "classification":
        adopt_class_names(model.config, data.class_names)


def adopt_class_names(config: Any, names: Sequence[str]) -> None:
    """Stores the names of the classes in a model's config, in the place of transformers' placeholders.

    Raises:
        ConfigError: The model has other classes.
    """
    known = class_names(config)
    if config.num_labels != len(names) or known not in (None, list(names)):
        raise ConfigError(
            f"the model has {config.num_labels} classes {(known or [])[:3]}, the training data have {len(names)}"
            f" classes {list(names)[:3]}: build it for these classes, with id2label= their names"
        )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def teacher_normalization(
    teacher: nn.Module | None, preprocessing: dict[str, Any] | None
) -> Callable[[Tensor], Tensor] | None:
    """Returns what turns the student's images into those of a teacher that was trained with another mean and std.

    None where there is nothing to change.

    Args:
        teacher: The teacher.
        preprocessing: Of the student's images; None where it is not known.
    """
    if not isinstance(teacher, EarlyExitPreTrainedModel):
        return None
    own, given = _normalization(teacher.config.preprocessing), _normalization(preprocessing)
    if own is None or given is None or own == given:
        return None
    logger.warning(
        "the teacher was trained on images of mean %s and std %s and is given such images, while the student's have"
        " mean %s and std %s; if that is not so, correct it by teacher.set_preprocessing(**data.preprocessing)",
        *(*own, *given),
    )
    (own_mean, own_std), (mean, std) = (torch.tensor(pair).view(2, 1, -1, 1, 1).unbind(0) for pair in (own, given))
    scale, offset = std / own_std, (mean - own_mean) / own_std
    return lambda images: images * scale.to(images.device) + offset.to(images.device)


def _normalization(preprocessing: dict[str, Any] | None) -> tuple[list[float], list[float]] | None:
    images = preprocessing and "mean" in preprocessing  # and no tokenizer
    return (preprocessing["mean"], preprocessing["std"]) if images else None  # type: ignore[index]


def place_models(
    student: nn.Module, teacher: nn.Module | None, loss: nn.Module, args: DistillationArguments, device: torch.device
) -> None:
    """Moves the models to their device and puts them into the state that the arguments ask for.

    Raises:
        ConfigError: The student has no such state: no backbone to freeze, no recomputation.
    """
    for model in filter(None, (student, teacher)):
        model.to(device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
    loss.to(device)
    if teacher is not None:
        teacher.eval()
    if args.freeze_backbone:
        freeze = getattr(student, "freeze_backbone", None)
        if freeze is None:
            raise ConfigError(f"{type(student).__name__} has no freeze_backbone(): use an EarlyExitWrapper")
        freeze()
    if args.gradient_checkpointing:
        # transformers renames the method; releases that are supported have either
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        name = next((name for name in names if hasattr(student, name)), None)
        if name is None or not getattr(student, "supports_gradient_checkpointing", True):
            raise ConfigError(f"{type(student).__name__} does not support gradient_checkpointing: leave it out")
        getattr(student, name)()


def create_loader(
    split: Any, args: DistillationArguments, accelerator: Accelerator, *, train: bool, augment: str | None = None
) -> BatchLoader:
    """Builds the batches of this process.

    Their order is a pure function of seed and epoch. Accelerate would shard and skip a torch DataLoader instead, whose
    order depends on how often the global generator was used: a run resumed within an epoch would then see other batches
    than the one that was never interrupted.

    Args:
        split: What to read.
        args: Batch size, seed and layout.
        accelerator: For the part of this process.
        train: Shuffle, and leave out samples that fill no batch.
        augment: Augmentation, None for none.
    """
    return BatchLoader(
        split,
        args.batch_size,
        shuffle=train,
        augment=augment,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        drop_last=train,
        channels_last=args.channels_last,
        num_workers=args.num_workers,
    )


def create_optimizer(student: nn.Module, own: list[nn.Parameter], args: DistillationArguments) -> torch.optim.Optimizer:
    """Builds timm's optimizer for the student, and a group for the parameters of the loss.

    Raises:
        ConfigError: It cannot be built here; the message has the reason.
    """
    try:
        optimizer = create_optimizer_v2(
            student, args.optimizer, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # a package that is missing
        raise ConfigError(f"optimizer {args.optimizer!r} cannot be built here: {error}") from error
    if own:
        optimizer.add_param_group({"params": own, "lr": args.lr, "weight_decay": args.weight_decay})
    return optimizer


def count_steps(batches: int | None, dataset: str, args: DistillationArguments) -> tuple[int, int, int]:
    """Returns steps per epoch, steps in all, and epochs; a remainder that does not fill a step is left out.

    Args:
        batches: Of an epoch; None where a stream does not know.
        dataset: Its name, for messages.
        args: How many batches a step and how many epochs a run has.

    Raises:
        ConfigError: An epoch has no full step, or its length and ``max_steps`` are both unknown.
    """
    if batches is None:
        if not args.max_steps:
            raise ConfigError(f"the length of {dataset!r} is unknown, as it is streamed: set max_steps")
        return args.max_steps, args.max_steps, args.epochs
    per_epoch = batches // args.gradient_accumulation_steps
    if not per_epoch:
        raise ConfigError(
            f"an epoch has {batches} batches, fewer than gradient_accumulation_steps ="
            f" {args.gradient_accumulation_steps}: lower it or batch_size ({args.batch_size})"
        )
    total = min(per_epoch * args.epochs, args.max_steps or math.inf)
    return per_epoch, int(total), math.ceil(total / per_epoch)
