"""Networks by name: built with exits for the data at hand, or loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from erde_hub.errors import CheckpointError, ConfigError, ErdeError, nearest
from erde_hub.modeling import EarlyExitWrapper
from erde_hub.training.arguments import DistillationArguments
from erde_hub.training.data import ImageData
from erde_hub.training.recipe_arguments import ExitArguments, StudentArguments, TeacherArguments, exit_places


def check_architecture(name: str) -> None:
    """Raises :class:`ConfigError` with the nearest name if timm knows no such network."""
    if not timm.is_model(name.split(".")[0]):
        hint = nearest(name, timm.list_models())
        raise ConfigError(f"timm has no model {name!r}{hint}; timm.list_models('*resnet*') lists names")


def pretrained_preprocessing(architecture: str) -> dict[str, Any]:
    """Returns how images have to be prepared for the weights that timm has for a network.

    Raises:
        ConfigError: timm has no such network.
    """
    check_architecture(architecture)
    cfg = timm.get_pretrained_cfg(architecture)
    if cfg is None:
        raise ConfigError(f"timm has no weights for {architecture!r}: train it from scratch, without pretrained")
    return {
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "size": list(cfg.input_size[1:]),
        "interpolation": cfg.interpolation,
        "crop_pct": cfg.crop_pct,
        "crop_mode": cfg.crop_mode,
    }


def existing_preprocessing(
    teacher: EarlyExitWrapper | None, teacher_args: TeacherArguments, student_args: StudentArguments | None = None
) -> dict[str, Any] | None:
    """Returns the preprocessing of the weights that training starts from; None where everything starts from scratch."""
    if teacher is not None:
        return teacher.config.preprocessing
    if teacher_args.teacher_pretrained:
        return pretrained_preprocessing(teacher_args.teacher_architecture)
    if student_args is not None and student_args.student_pretrained:
        return pretrained_preprocessing(student_args.student_architecture)
    return None


def build_model(
    architecture: str,
    data: ImageData,
    exits: ExitArguments,
    *,
    places: list[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    seed: int = 0,
) -> EarlyExitWrapper:
    """Builds a timm network for the classes of the data and gives it exits.

    Args:
        architecture: timm name; ``resnet10_cifar`` and its siblings among them.
        data: For the number and names of the classes and the preprocessing.
        exits: Head, policy, threshold.
        places: Where the exits sit; those of ``exits`` if None.
        kwargs: Further creation arguments of the network.
        pretrained: Start from timm's weights.
        seed: Of new weights.

    Raises:
        ConfigError: No such network, an argument that it does not take, or weights that cannot be had.
        ExitPointError, ThresholdError: See :class:`~erde_hub.EarlyExitWrapper`.
    """
    check_architecture(architecture)
    kwargs = dict(kwargs or {})
    reserved = {"num_classes", "pretrained", "checkpoint_path"} & kwargs.keys()
    if reserved:
        raise ConfigError(f"{min(reserved)!r} cannot be a creation argument of {architecture!r}: the recipe sets it")
    torch.manual_seed(seed)
    try:
        backbone = timm.create_model(architecture, pretrained=pretrained, num_classes=data.num_classes, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{architecture!r} cannot be created with {kwargs}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the weights of {architecture!r} cannot be had: {reason}; without them: pretrained false"
        ) from error
    model = EarlyExitWrapper(
        backbone,
        exits=exit_places(places or exits.exits),
        head=exits.head,
        head_kwargs=exits.head_kwargs,
        policy=exits.policy,
        policy_kwargs=exits.policy_kwargs,
        threshold=exits.stored_threshold(),
        input_size=data.input_size,
        backbone_kwargs=kwargs,
        id2label=data.class_names,
    )
    model.set_preprocessing(
        mean=data.mean,
        std=data.std,
        size=data.input_size[1:],
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        crop_mode=data.preprocessing.crop_mode,
    )
    return model


def build_student(
    student_args: StudentArguments, exits: ExitArguments, data: ImageData, args: DistillationArguments
) -> EarlyExitWrapper:
    """Builds the student; see :func:`build_model`."""
    return build_model(
        student_args.student_architecture,
        data,
        exits,
        kwargs=student_args.student_kwargs,
        pretrained=student_args.student_pretrained,
        seed=args.seed,
    )


def load_model(name: str, **overrides: Any) -> EarlyExitWrapper:
    """Loads a checkpoint from a folder or the Hub.

    Args:
        name: Folder or Hub repository.
        **overrides: Fields of the config to change, ``threshold`` for example.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    folder = Path(name).expanduser()
    try:
        return EarlyExitWrapper.from_pretrained(str(folder) if folder.is_dir() else name, **overrides)
    except (OSError, ValueError) as error:
        if isinstance(error, ErdeError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name!r} cannot be loaded as an early-exit model: {reason}") from error
