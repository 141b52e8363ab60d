"""Causal language models of transformers by type, folder or Hub repository, and records of what they say of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from erde_hub.data.loader import BatchLoader
from erde_hub.data.texts import load_tokenizer
from erde_hub.data.tokens import TokenData
from erde_hub.errors import ConfigError
from erde_hub.losses import next_token_labels
from erde_hub.modeling._quiet import quiet_loading
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.outputs import EarlyExitOutput

#: Logits that records of tokens hold at most, over all exits: 256 MiB.
RECORDED_LOGITS = 2**26


def is_language_model(name: str) -> bool:
    """Tells whether a name is a type of causal language models, or a folder or repository that holds one."""
    if timm.is_model(name.split(".")[0]):
        return False
    folder = Path(name).expanduser()
    if "/" not in name and not folder.is_dir():
        return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    try:
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (config.architectures or [""])[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def create_language_model(source: str, data: TokenData, kwargs: Mapping[str, Any], pretrained: bool) -> PreTrainedModel:
    """Creates a causal language model, for the vocabulary of the data where it is one of a type.

    Args:
        source: Type (``llama``), folder or Hub repository.
        data: For tokenizer and length of a block.
        kwargs: Fields of its config.
        pretrained: Start from the weights of the folder or repository.

    Raises:
        ConfigError: No such model, a field that its config does not have, or weights that cannot be had.
    """
    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    stored = folder.is_dir() or "/" in source
    if pretrained and not stored:
        raise ConfigError(f"{source!r} is a type of models and has no weights: give a folder or a repository")
    end = getattr(data.tokenizer, "eos_token_id", None)
    ours = {"vocab_size": data.vocab_size, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    with quiet_loading():
        try:
            config = AutoConfig.from_pretrained(place) if stored else AutoConfig.for_model(source)
            unknown = [key for key in kwargs if not hasattr(config, key)]
            if unknown:
                raise ConfigError(f"the config of {source!r} ({type(config).__name__}) has no {unknown[0]!r}")
            if pretrained:
                _check_tokenizer(place, data)
                return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **kwargs)
            config = (
                AutoConfig.from_pretrained(place, **kwargs)
                if stored
                else AutoConfig.for_model(source, **{"max_position_embeddings": data.block_size, **ours, **kwargs})
            )
            model = AutoModelForCausalLM.from_config(config)
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"no causal language model could be made of {source!r}: {reason}") from error
    model.config._name_or_path = ""  # its weights come from nowhere
    return model


def _check_tokenizer(place: str, data: TokenData) -> None:
    """Raises :class:`ConfigError` where weights belong to another tokenizer than that of the data."""
    try:
        own = load_tokenizer(place)
    except ConfigError:  # there is none
        return
    if data.tokenizer is not None and own.get_vocab() != data.tokenizer.get_vocab():
        raise ConfigError(
            f"the tokenizer of {place!r} ({len(own)} tokens) is not that of {data.name!r} ({len(data.tokenizer)}):"
            " teacher, student and data need one vocabulary"
        )


class TokenExits(nn.Module):
    """A language model as :func:`~erde_hub.evaluation.collect_exit_records` takes it: every token is a sample.

    Args:
        model: The model.
    """

    def __init__(self, model: EarlyExitWrapper) -> None:
        super().__init__()
        self.model, self.exit_names, self.exit_table = model, model.exit_names, model.exit_table

    def forward(self, input_ids: Tensor, output_all_exits: bool = True) -> EarlyExitOutput:
        """Returns the logits of all tokens but the last of each text, (N (L - 1), V) per exit."""
        every = self.model(input_ids=input_ids, output_all_exits=output_all_exits).exit_logits
        logits = tuple(own[:, :-1].flatten(0, 1) for own in every)
        return EarlyExitOutput(logits=logits[-1], exit_logits=logits)


def token_batches(loader: BatchLoader, vocab_size: int, num_exits: int) -> Iterator[dict[str, Tensor]]:
    """Yields batches whose labels and index are those of tokens, up to a number that fits into memory."""
    room = RECORDED_LOGITS // (vocab_size * num_exits)
    for batch in loader:
        count, length = batch["input_ids"].shape
        if not count:
            continue
        labels = next_token_labels(batch["input_ids"])[:, :-1].flatten()
        index = (batch["index"][:, None] * length + torch.arange(length - 1)).flatten()
        yield {"input_ids": batch["input_ids"], "labels": labels, "index": index}
        room -= len(labels) * loader.world_size
        if room <= 0:
            return
