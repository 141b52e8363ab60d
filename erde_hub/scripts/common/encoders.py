"""Text encoders of transformers by folder or Hub repository, as classifiers for the data at hand."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from erde_hub.backbones import find_adapter
from erde_hub.data.texts import TextData
from erde_hub.errors import ConfigError
from erde_hub.modeling._quiet import quiet_loading
from erde_hub.modeling.wrapper import EarlyExitWrapper

logger = logging.getLogger(__name__)


def is_encoder(name: str) -> bool:
    """Tells whether a name is a folder or a Hub repository and not a network of timm."""
    return not timm.is_model(name.split(".")[0]) and ("/" in name or Path(name).expanduser().is_dir())


def create_encoder(source: str, data: TextData, kwargs: Mapping[str, Any], pretrained: bool) -> PreTrainedModel:
    """Creates a text classifier from the config, and optionally the weights, that a folder or repository holds.

    Fewer layers than the weights have (``num_hidden_layers=3``) take the first ones. The classifier is new.

    Args:
        source: Folder or Hub repository with config and safetensors.
        data: For the number of classes and the tokenizer, whose tokens the network must know.
        kwargs: Fields of the network's config to change.
        pretrained: Start from the weights.

    Raises:
        ConfigError: Nothing to be had there, no text classifier, a field that its config does not have, weights that
            are missing or do not fit, or a smaller vocabulary or shorter texts than the data have.
    """
    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    with quiet_loading():
        try:
            config = AutoConfig.from_pretrained(place)
            unknown = [key for key in kwargs if not hasattr(config, key)]
            if unknown:
                raise ConfigError(f"the config of {source!r} ({type(config).__name__}) has no {unknown[0]!r}")
            config = AutoConfig.from_pretrained(place, num_labels=data.num_classes, **kwargs)
            if not pretrained:
                model = AutoModelForSequenceClassification.from_config(config)
                model.config._name_or_path = ""  # its weights come from nowhere
            else:
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    place,
                    config=config,
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are found below
                    dtype=torch.float32,
                )
                check_loaded(source, model, info)
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"no text classifier could be made of {source!r}: {reason}") from error
    vocabulary, longest = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    if vocabulary < len(data.tokenizer):
        raise ConfigError(
            f"{source!r} knows {vocabulary} tokens, the tokenizer of the data has {len(data.tokenizer)}: teacher and"
            " student need one vocabulary"
        )
    if longest is not None and longest < data.max_length:
        raise ConfigError(f"max_length={data.max_length} is more than the {longest} tokens that {source!r} takes")
    return model


def published_base(model: EarlyExitWrapper) -> str | None:
    """Returns the repository of the Hub whose weights an encoder began with, None where there is none."""
    name = str(getattr(getattr(model.backbone, "config", None), "_name_or_path", "") or "")
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def check_loaded(source: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """The layers after the encoder are new; missing weights inside it would make it another network."""
    new = tuple(
        f"{name}." for name in (*find_adapter(model).classifier_names(model), f"{model.base_model_prefix}.pooler")
    )
    missing = sorted(str(name) for name in info["missing_keys"] if not str(name).startswith(new))
    mismatched = (str(name[0] if isinstance(name, tuple) else name) for name in info["mismatched_keys"])
    wrong = sorted(name for name in mismatched if not name.startswith(new))
    if missing or wrong:
        names = [*missing, *wrong]
        raise ConfigError(
            f"the weights of {source!r} do not fit: {len(names)} tensors are missing or of another shape, first"
            f" {names[0]!r}; change no widths of a pretrained network, or start without its weights"
        )
    logger.info("%s: new weights in %s", source, ", ".join(sorted(map(str, info["missing_keys"]))) or "nothing")
