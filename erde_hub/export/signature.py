"""What a model's file takes: names of its inputs, and its tokens."""

from __future__ import annotations

import inspect
from typing import Any

from erde_hub.modeling.wrapper import EarlyExitWrapper


def reads_texts(model: EarlyExitWrapper) -> bool:
    """Tells whether the model takes token ids."""
    return model.main_input_name == "input_ids"


def input_names(model: EarlyExitWrapper) -> list[str]:
    """Returns the inputs in the order of the file, thresholds aside; token types where the model has several."""
    if not reads_texts(model):
        return ["pixel_values"]
    config: Any = model.backbone.config
    types = getattr(config, "type_vocab_size", None) or 0
    takes_types = "token_type_ids" in inspect.signature(type(model.backbone).forward).parameters
    return ["input_ids", "attention_mask", *(["token_type_ids"] if takes_types and types > 1 else [])]


def vocabulary(model: EarlyExitWrapper) -> int:
    """Returns the number of tokens that the model knows."""
    return int(model.backbone.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def padding_token(model: EarlyExitWrapper) -> int:
    """Returns the token that the model takes for padding; 0 where it names none, and masks alone tell."""
    token = model.backbone.config.get_text_config().pad_token_id  # type: ignore[union-attr,operator]
    return int(token or 0)
