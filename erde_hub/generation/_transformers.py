"""What generation needs of transformers that is not documented there; ``tests/generation`` says what has moved."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from erde_hub.errors import MissingDependencyError


class DraftGenerationMixin(GenerationMixin):
    """Generation whose drafts come from ``create_drafter`` of the class."""

    def _get_candidate_generator(self, generation_config: GenerationConfig, **kwargs: Any) -> CandidateGenerator:
        exit_index, cache = generation_config.assistant_early_exit, kwargs["model_kwargs"]["cache"]
        return self.create_drafter(exit_index, generation_config, kwargs["logits_processor"], cache)


class ExitCandidates(CandidateGenerator):
    """Drafts that need no outputs of the verifying pass but its end: the cache tells where to go on."""

    requires_model_outputs = True
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {}


def what_moved() -> list[str]:
    """Returns what this transformers has under other names than the ones used here."""
    verifying = getattr(getattr(GenerationMixin, "_assisted_decoding", None), "__code__", None)
    read = () if verifying is None else verifying.co_names
    found = {
        "the argument cache of GenerationMixin.prepare_inputs_for_generation": "cache"
        in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters,
        "GenerationMixin._get_candidate_generator": hasattr(GenerationMixin, "_get_candidate_generator"),
        "GenerationMixin._prepare_generation_config": hasattr(GenerationMixin, "_prepare_generation_config"),
        "CandidateGenerator.requires_model_outputs": "requires_model_outputs" in read,
        "CandidateGenerator.model_kwargs_overrides": "model_kwargs_overrides" in read,
        "the argument layer_idx of create_causal_mask": "layer_idx" in inspect.signature(create_causal_mask).parameters,
    }
    return [name for name, there in found.items() if not there]


def check_version() -> None:
    """Raises :class:`~erde_hub.errors.MissingDependencyError` where exits need another version of transformers."""
    if moved := what_moved():
        raise MissingDependencyError(
            f"generating with early exits needs another version of transformers, this one has no {moved[0]}: pip"
            " install 'transformers>=5.24'"
        )


def merged_config(model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> GenerationConfig:
    """Returns the settings that ``model.generate`` will use, arguments included."""
    return model._prepare_generation_config(generation_config, **kwargs)[0]


def kinds_that_cannot_owe(config: Any, cache: Cache) -> list[str]:
    """Returns the kinds of layers to which tokens cannot be added later: others than full and sliding attention."""
    named = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(config, "attention_chunk_size", None) is not None:  # stored as windows are, and masked otherwise
        named.add("chunked_attention")
    kept = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return sorted(named or {kind.__name__ for kind in kept})


def rotary_limit(config: Any) -> int | None:
    """Returns after how many tokens the rotary positions of all tokens change (longrope, dynamic); None where never."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # one for all layers, or by their type
    return min(
        (
            kind.get("original_max_position_embeddings") or config.max_position_embeddings
            for kind in kinds
            if kind.get("rope_type") in ("longrope", "dynamic")
        ),
        default=None,
    )


def window_mask(sliding: bool, config: Any, hidden: Tensor, padding: Tensor | None, cache: Cache, layer: int) -> Any:
    """Returns the mask for tokens that are added to one layer, in the form that the model's attention takes.

    Args:
        sliding: The layer sees a window.
        config: Of the backbone.
        hidden: (N, Q, C), of these tokens.
        padding: (N, L) of all tokens so far, 0 where a text is padded; None where none is.
        cache: Holds the tokens before them.
        layer: Number of the layer.
    """
    create = create_sliding_window_causal_mask if sliding else create_causal_mask
    return create(config=config, inputs_embeds=hidden, attention_mask=padding, cache=cache, layer_idx=layer)
