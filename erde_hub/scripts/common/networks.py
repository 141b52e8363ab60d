"""Networks by name: built with exits for the data at hand, or loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from erde_hub.backbones import find_adapter
from erde_hub.backbones.timm import nearest_argument
from erde_hub.data.base import LabelledData
from erde_hub.data.texts import TextData
from erde_hub.data.tokens import TokenData
from erde_hub.errors import CheckpointError, ConfigError, ErdeError, nearest
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.training.arguments import DistillationArguments

from .arguments import ExitArguments, StudentArguments, StudentNetworkArguments, TeacherArguments, exit_places
from .command_line import named_config
from .encoders import create_encoder, is_encoder
from .language_models import create_language_model, is_language_model


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
    teacher: EarlyExitWrapper | None,
    teacher_args: TeacherArguments,
    student_args: StudentNetworkArguments | None = None,
) -> dict[str, Any] | None:
    """Returns how inputs are made for the weights that training starts from; None where images start from scratch.

    For images it is what :func:`~erde_hub.preprocessing.check_preprocessing` describes, for texts ``{"tokenizer":
    folder or repository, "max_length": tokens or None}``, also where an encoder starts from scratch. For language
    models it is ``{"tokenizer": folder, repository or None, "block_size": tokens or None}``.
    """
    if teacher is not None:
        place = student_args.teacher if isinstance(student_args, StudentArguments) else None
        return preprocessing_of(teacher, place or "")
    networks = [(teacher_args.teacher_architecture, teacher_args.teacher_pretrained)]
    if student_args is not None:
        networks.append((student_args.student_architecture, student_args.student_pretrained))
    for architecture, pretrained in networks:
        if is_language_model(architecture):
            return {"tokenizer": architecture if is_encoder(architecture) else None, "block_size": None}
        if is_encoder(architecture):
            return {"tokenizer": architecture, "max_length": None}
        if pretrained:
            return pretrained_preprocessing(architecture)
    return None


def preprocessing_of(model: EarlyExitWrapper, name: str) -> dict[str, Any] | None:
    """Returns how a trained model's inputs are made, as :func:`existing_preprocessing` does.

    Args:
        model: The model.
        name: Where it was loaded from, and where its tokenizer is.
    """
    if model.main_input_name == "input_ids":
        size = model.config.input_size
        if model.config.task == "causal_lm":
            return {"tokenizer": name, "block_size": size[0] if size else None}
        return {"tokenizer": name, "max_length": size[0] if size else None}
    return model.config.preprocessing


def build_model(
    architecture: str,
    data: LabelledData,
    exits: ExitArguments,
    *,
    places: list[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    seed: int = 0,
) -> EarlyExitWrapper:
    """Builds a network for the classes of the data and gives it exits.

    Args:
        architecture: timm name, ``resnet10_cifar`` and its siblings among them; for texts a folder or repository, see
            :func:`~erde_hub.scripts.common.encoders.create_encoder`.
        data: For the number and names of the classes and the preprocessing.
        exits: Head, policy, threshold.
        places: Where the exits sit; those of ``exits`` if None.
        kwargs: Further creation arguments of the network.
        pretrained: Start from published weights.
        seed: Of new weights.

    Raises:
        ConfigError: No such network, an argument that it does not take, or weights that cannot be had.
        ExitPointError, ThresholdError: See :class:`~erde_hub.EarlyExitWrapper`.
    """
    kwargs = dict(kwargs or {})
    torch.manual_seed(seed)
    texts = isinstance(data, TextData)
    if isinstance(data, TokenData):
        backbone = create_language_model(architecture, data, kwargs, pretrained)
        return add_exits(backbone, data, exits, places=places)
    create = _create_encoder if texts else create_backbone
    backbone = create(architecture, data, kwargs, pretrained)
    return add_exits(backbone, data, exits, places=places, backbone_kwargs=None if texts else kwargs)


def add_exits(
    backbone: nn.Module,
    data: LabelledData,
    exits: ExitArguments,
    *,
    places: list[str] | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
) -> EarlyExitWrapper:
    """Gives a living network exits as the arguments say, and the names and preprocessing of the data.

    Args:
        backbone: A classifier of the data's classes.
        data: For the names of the classes and the preprocessing.
        exits: Head, policy, threshold.
        places: Where the exits sit; those of ``exits`` if None.
        backbone_kwargs: See :class:`~erde_hub.EarlyExitWrapper`.

    Raises:
        ExitPointError, ThresholdError: See :class:`~erde_hub.EarlyExitWrapper`.
    """
    tokens = isinstance(data, TokenData)
    model = EarlyExitWrapper(
        backbone,
        exits=exit_places(places or exits.exits),
        head=None if tokens and exits.head == ExitArguments.head else exits.head,
        head_kwargs=exits.head_kwargs,
        policy=exits.policy,
        policy_kwargs=exits.policy_kwargs,
        threshold=exits.stored_threshold(),
        input_size=data.input_size,
        backbone_kwargs=backbone_kwargs,
        id2label=None if tokens else data.class_names,
    )
    if data.kind == "image":  # texts: the tokenizer is saved next to the config
        model.set_preprocessing(**data.preprocessing)
    return model


def _create_encoder(architecture: str, data: Any, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    if not is_encoder(architecture):
        raise ConfigError(
            f"{architecture!r} is no network for texts, which {data.name!r} holds: give a folder, or a repository of"
            " the Hub, with a transformers encoder"
        )
    return create_encoder(architecture, data, kwargs, pretrained)


def create_backbone(
    architecture: str, data: LabelledData, kwargs: Mapping[str, Any], pretrained: bool = False
) -> nn.Module:
    """Creates a network of timm for the data's classes, without exits; see :func:`create_network`."""
    reserved = {"num_classes", "pretrained", "checkpoint_path"} & kwargs.keys()
    if reserved:
        raise ConfigError(f"{min(reserved)!r} cannot be a creation argument of {architecture!r}: the script sets it")
    return create_network(architecture, {**kwargs, "num_classes": data.num_classes}, pretrained)


def create_network(
    architecture: str,
    kwargs: Mapping[str, Any],
    pretrained: bool = False,
    instead: str = "train without them (--student_pretrained false, --teacher_pretrained false)",
) -> nn.Module:
    """Creates a network of timm.

    Args:
        architecture: timm name, or ``local-dir:`` or ``hf-hub:`` and a place.
        kwargs: Creation arguments.
        pretrained: Start from published weights.
        instead: What the command takes where these cannot be had.

    Raises:
        ConfigError: No such network, an argument that it does not take, or weights that cannot be had.
    """
    if ":" not in architecture:
        check_architecture(architecture)
    try:
        network = timm.create_model(architecture, pretrained=pretrained, **kwargs)
        if pretrained and network.pretrained_cfg.get("num_classes", network.num_classes) != network.num_classes:
            network.new_layers = find_adapter(network).classifier_names(network)
        return network
    except TypeError as error:
        hint = nearest_argument(error, architecture)
        shown = {key: value for key, value in kwargs.items() if key != "num_classes"}
        raise ConfigError(
            f"{architecture!r} cannot be created with {shown}: {error}{hint}; they are what its --..._kwargs and"
            f" {named_config() or 'the configuration'} say, and `none` in the flag clears them"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"the weights of {architecture!r} cannot be had: {reason}; {instead}") from error


def build_student(
    student_args: StudentNetworkArguments, exits: ExitArguments, data: LabelledData, args: DistillationArguments
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
    there = folder.exists()
    places = [folder.parent, Path("runs")] if folder.name == name else [folder.parent]
    runs = [] if there else sorted(config.parent for place in places for config in place.glob("*/config.json"))
    if runs:  # next to other runs: a typing error, and not a repository, for which a look-up may take minutes
        close = nearest(folder.name, (run.name for run in runs))
        hint = next((f"; did you mean {str(run)!r}?" for run in runs if repr(run.name) in close), "")
        raise CheckpointError(f"there is no folder {name!r}{hint} (there are: {', '.join(map(str, runs[:8]))})")
    if not there and folder.name == name:  # no repository either: these have an owner
        raise CheckpointError(f"there is no folder {name!r}, and a repository of the Hub is named 'org/name'")
    try:
        return EarlyExitWrapper.from_pretrained(str(folder) if folder.is_dir() else name, **overrides)
    except (OSError, ValueError) as error:
        if isinstance(error, ErdeError):
            raise
        reason = " ".join(str(error).split())[:300]
        where = "" if there else f"there is no folder {name!r}, and on the Hub "
        raise CheckpointError(f"{where}{name!r} cannot be loaded as an early-exit model: {reason}") from error
