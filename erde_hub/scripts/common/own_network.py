"""A network that somebody has already: by name, folder or repository, with published weights or those of a file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import cached_file

from erde_hub.backbones.transformers_preprocessing import known_preprocessing
from erde_hub.data.base import LabelledData
from erde_hub.errors import CheckpointError, ConfigError, ErdeError
from erde_hub.modeling._quiet import quiet_loading
from erde_hub.modeling.attach import new_layers

from .encoders import check_loaded
from .networks import create_network

#: How many missing or unknown tensors an error lists.
_LISTED = 5


def open_network(source: str, weights: str | None, kwargs: Mapping[str, Any]) -> Any:
    """Opens a classifier of images or texts as it is, with its own classes.

    Args:
        source: timm name; folder or Hub repository of timm (also as ``local-dir:FOLDER``) or of transformers.
        weights: File with the weights of a timm network, safetensors or what ``torch.save`` wrote of a state dict; if
            None, those that timm, the folder or the repository has.
        kwargs: Creation arguments of a timm network.

    Raises:
        ConfigError: No such network, or an argument that it does not take.
        CheckpointError: The weights cannot be read, or are not those of this network: missing and unknown ones are
            listed.
    """
    name = _timm_name(source)
    if name is None:
        if weights or kwargs:
            raise ConfigError(f"{source!r} is a network of transformers: its folder holds weights and settings")
        return load_transformers(source)
    if weights is None:
        return create_network(name, kwargs, True, "give a file of them with --weights, or a folder with --model")
    state = read_weights(weights)
    network = create_network(name, {**kwargs, "num_classes": _classes_in(state, create_network(name, kwargs))})
    own = network.state_dict()
    wrong = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    if any(wrong.values()):
        listed = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''}"
            for what, keys in wrong.items()
            if keys
        )
        raise CheckpointError(
            f"{Path(weights).name} does not hold the weights of {source!r} ({listed}): name the network that it was"
            " saved from, with its creation arguments in --model_kwargs"
        )
    network.load_state_dict(state)
    return network


def read_weights(path: str) -> dict[str, Tensor]:
    """Reads a state dict from safetensors, or from what ``torch.save`` wrote, without running anything that it holds.

    Raises:
        CheckpointError: No such file, or none that holds tensors alone.
    """
    try:
        state = load_state_dict(str(Path(path).expanduser()), use_ema=False, weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as weights: {' '.join(str(error).split())[:200]}; save model.state_dict(), best"
            " with safetensors.torch.save_file"
        ) from error
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: save model.state_dict()")
    return tensors


def inputs_of(network: Any, source: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns how the inputs of a network are made, see :func:`~erde_hub.scripts.common.existing_preprocessing`.

    Args:
        network: From :func:`open_network`.
        source: Where its tokenizer is.
        changes: Entries that are different: ``mean``, ``std``, ``size``, ``interpolation``, ``crop_pct``,
            ``crop_mode``.
    """
    if isinstance(network, PreTrainedModel):
        if network.main_input_name == "input_ids":
            return {"tokenizer": source, "max_length": None}
        known = known_preprocessing(network.config)
        return None if known is None and not changes else {**(known or {}), **changes}
    config = resolve_model_data_config(network)
    config["size"] = list(config.pop("input_size")[1:])
    names = ("mean", "std", "size", "interpolation", "crop_pct", "crop_mode")
    return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items() if key in names} | dict(changes)


def fit_classifier(network: Any, source: str, data: LabelledData, anew: bool = False) -> tuple[Any, bool]:
    """Gives a network as many classes as the data have.

    Returns:
        The network, and whether its last layer is new and has to be trained, with what
        :func:`~erde_hub.modeling.attach.new_layers` returns.
    """
    known = isinstance(network, PreTrainedModel)
    new = (network.config.num_labels if known else network.num_classes) != data.num_classes
    if new and known:
        network = load_transformers(source, data.num_classes)
    elif new:
        network.reset_classifier(data.num_classes)
    new = new or bool(new_layers(network))
    return network, new or anew


def load_transformers(source: str, num_labels: int | None = None) -> PreTrainedModel:
    """Loads a classifier of images or texts, whose last layers may be new.

    Raises:
        ConfigError: There is none, or weights are missing inside of it.
    """
    place = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    with quiet_loading():
        try:
            images = type(AutoConfig.from_pretrained(place)) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
            auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
            model, info = auto.from_pretrained(
                place,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                **({} if num_labels is None else {"num_labels": num_labels}),
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            if isinstance(error, ErdeError):
                raise
            raise ConfigError(
                f"no classifier could be loaded from {source!r}: {' '.join(str(error).split())[:300]}"
            ) from error
        check_loaded(source, model, info)
    return model


def _timm_name(source: str) -> str | None:
    """Returns the name by which timm creates a network; None where it is one of transformers."""
    if source.startswith(("local-dir:", "hf-hub:")) or timm.is_model(source.split(".")[0]):
        return source
    folder = Path(source).expanduser()
    try:
        path = cached_file(str(folder) if folder.is_dir() else source, "config.json")
        stored = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if "/" not in source and not folder.exists():
            create_network(source, {})  # raises, with the nearest name
        reason = " ".join(str(error).split())[:200]
        where = (
            "is no folder, and" if source.startswith((".", "/", "~")) and not folder.exists() else "is a place where"
        )
        raise ConfigError(f"{source!r} {where} no config.json says which network it is: {reason}") from error
    if stored.get("model_type") == "early_exit":
        raise ConfigError(f"{source!r} has exits already: choose their threshold with calibrate, measure with evaluate")
    if "architecture" not in stored:
        return None
    return f"local-dir:{folder}" if folder.is_dir() else f"hf-hub:{source}"


def _classes_in(state: Mapping[str, Tensor], network: Any) -> int:
    """Returns the number of classes that the last linear layer of a state dict has."""
    names = {id(module): name for name, module in network.named_modules()}
    name = names.get(id(network.get_classifier()))
    weight = state.get(f"{name}.weight")
    return int(network.num_classes) if weight is None else len(weight)
