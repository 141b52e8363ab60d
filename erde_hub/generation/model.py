"""The class of causal language models with exits: ``generate`` that skips layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from erde_hub.config import EarlyExitConfig, read_field
from erde_hub.engine.routing import RoutingPlan, exit_mask
from erde_hub.errors import ConfigError, ErdeError, ExitPointError, InputTypeError, ShapeError, nearest
from erde_hub.modeling.wrapper import EarlyExitWrapper

from ._transformers import DraftGenerationMixin, check_version, merged_config, rotary_limit
from .cache import OwedCache, Span, check_cache, explain_cache, unchanged_on_error
from .drafting import ExitDrafter
from .layers import DecoderLayers

SKIPPED_STATES = ("owed", "copy")


@dataclass
class ExitGenerateOutput(GenerateDecoderOnlyOutput):
    """What ``generate`` returns with ``return_dict_in_generate``; the fields of transformers, and one more.

    Attributes:
        exit_index: (N, new tokens) int64, the exit whose logits each token was chosen from: 0 is the first exit,
            ``num_exits - 1`` the backbone's own read-out. Of drafts, the exit that drafted.
    """

    exit_index: Tensor | None = None


class EarlyExitForCausalLM(EarlyExitWrapper, DraftGenerationMixin, task="causal_lm"):
    """A causal language model with early exits; ``EarlyExitWrapper(model, exits)`` makes one of a causal model.

    Everything is as in :class:`~erde_hub.EarlyExitWrapper`; :meth:`generate` comes in addition.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=50)
        >>> model = EarlyExitWrapper(LlamaForCausalLM(config), exits=["model.layers.7", "model.layers.15"]).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model.generate(ids, threshold=4.0, max_new_tokens=5, eos_token_id=None).shape
        torch.Size([1, 8])
        >>> model.generate(ids, assistant_early_exit="model.layers.7", max_new_tokens=5, eos_token_id=None).shape
        torch.Size([1, 8])
    """

    _layers: DecoderLayers | None = None

    def __init__(self, model: nn.Module | EarlyExitConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, EarlyExitConfig) and model.task != "causal_lm":
            raise ConfigError(
                f"{type(self).__name__} is for causal language models, this checkpoint's task is {model.task!r}: load"
                " it with EarlyExitWrapper.from_pretrained"
            )
        super().__init__(model, *args, **kwargs)

    # The backbone's own generation is used where no token exits early, so both have one configuration.

    @property
    def generation_config(self) -> GenerationConfig:
        """The backbone's settings of generation; ``threshold`` and ``skipped_states`` may be set on it as well."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "backbone" in self._modules:
            self.backbone.generation_config = value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": None}

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        threshold: float | Sequence[float] | None = None,
        assistant_early_exit: int | str | None = None,
        skipped_states: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' ``generate``; tokens may exit early, or be drafted by an exit.

        Without ``threshold`` and ``assistant_early_exit``, and at a threshold where nobody exits, it is the backbone's
        own ``generate``, with all that this takes. Otherwise greedy search and sampling are possible.

        Args:
            inputs: (N, L) token ids, padded on the left; also as ``input_ids``.
            generation_config: Settings; those not given are the model's.
            *args: As for transformers.
            threshold: Of the model's policy: one number, or one per early exit. A new token exits where the policy is
                sure. The first layers of the next tokens run; when one goes deeper, it takes those before it along, so
                that keys and values are those of a full pass. The prompt runs through all layers. Several texts go on
                together until each of them has exited; each takes the logits of its own exit.
            assistant_early_exit: Name or index of the exit that drafts ``num_assistant_tokens`` tokens, which the rest
                of the model verifies in one pass. The text is that of the full model; sampled, its distribution. One
                text at a time.
            skipped_states: ``"owed"`` as described under ``threshold``. ``"copy"``: the layers that a token skips get
                keys and values made from its state at the exit (arXiv 2207.07061); cheaper, and an approximation.
            **kwargs: As for transformers.

        Returns:
            Token ids (N, L + new), or an :class:`ExitGenerateOutput` with ``return_dict_in_generate``.

        Raises:
            ThresholdError: A threshold that the policy does not take.
            ExitPointError: No such exit to draft with.
            ConfigError: Beam search and other ways of decoding with early exits; settings that exclude each other;
                layers to which tokens cannot be added later; a cache of another model.
            ShapeError: A prompt longer than the model's positions; several texts with ``assistant_early_exit``; early
                exits where the text grows past the length at which rotary positions change (Phi-3's longrope).
            InputTypeError: A model whose layers cannot be run by themselves.
            MissingDependencyError: Another version of transformers is needed.
        """
        given = generation_config if generation_config is not None else self.generation_config
        threshold = getattr(given, "threshold", None) if threshold is None else threshold
        skipped = skipped_states or getattr(given, "skipped_states", None) or "owed"
        if assistant_early_exit is None:
            assistant_early_exit = given.assistant_early_exit
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        plan = None if threshold is None else self._generation_plan(threshold)
        drafting = None if assistant_early_exit is None else self._exit_to_draft(assistant_early_exit)
        if skipped not in SKIPPED_STATES:
            raise ConfigError(f"skipped_states must be one of {', '.join(SKIPPED_STATES)}, got {skipped!r}")
        if plan is not None and plan.never_exits:
            plan = None
        if plan is not None and drafting is not None:
            raise ConfigError("threshold and assistant_early_exit exclude each other: give one of them")
        settings = merged_config(self, generation_config, dict(kwargs))
        self._check_length(kwargs.get("inputs_embeds") if ids is None else ids, settings)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            check_cache(cache, self._text_config)
        try:
            with unchanged_on_error(cache):
                if plan is None and drafting is None:
                    output = self.backbone.generate(inputs, generation_config, *args, **kwargs)  # type: ignore[operator]
                    return self._with_exits(output, ids, None)
                self._check_exits_can_be_taken(settings, ids, kwargs, drafting)
                return self._generate(inputs, generation_config, args, kwargs, plan, drafting, skipped)
        except (ErdeError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, IndexError) as error:
            typed = self._adapter.explain_failure(self.backbone, {"input_ids": ids})
            raise typed or explain_cache(cache) or error from error

    def _generate(
        self,
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        plan: RoutingPlan | None,
        drafting: int | None,
        skipped: str,
    ) -> Any:
        kwargs = dict(kwargs)
        given = kwargs.pop("cache", kwargs.pop("past_key_values", None))
        layers = self._decoder_layers()
        cache = OwedCache(layers.config, given)
        cache.plan, cache.copies = plan, skipped == "copy"
        ids: Tensor = inputs if inputs is not None else kwargs["input_ids"]
        if drafting is not None:
            cache.seen = cache.get_seq_length()
            if ids.shape[1] <= cache.seen:
                raise ShapeError(
                    f"with a cache, assistant_early_exit needs the whole text, of more than the {cache.seen} tokens in"
                    f" the cache, got {ids.shape[1]}"
                )
        output = super().generate(
            inputs, generation_config, *args, cache=cache, assistant_early_exit=drafting, **kwargs
        )
        if given is not None or isinstance(output, GenerateDecoderOnlyOutput):
            self._pay(cache)
        return self._with_exits(output, ids, cache.exit_index)

    def create_drafter(
        self, exit_index: int, config: GenerationConfig, processors: LogitsProcessorList, cache: OwedCache
    ) -> ExitDrafter:
        """Returns what drafts for ``generate(assistant_early_exit=...)``."""
        return ExitDrafter(self, exit_index, self.num_exits - 1, config, processors, cache)

    def _with_exits(self, output: Any, ids: Tensor | None, exits: list[Tensor] | None) -> Any:
        """Adds the exit of every token to what transformers returns as a dict."""
        if not isinstance(output, GenerateDecoderOnlyOutput):
            return output
        sequences = output.sequences
        new = sequences.shape[1] - (0 if ids is None else ids.shape[1])
        if exits is None:
            index = torch.full((sequences.shape[0], new), self.num_exits - 1)
        else:
            index = torch.stack([taken.cpu() for taken in exits[-new:]], 1)
        return ExitGenerateOutput(**output, exit_index=index.to(sequences.device))

    # Checks, before any work is lost

    def _generation_plan(self, threshold: float | Sequence[float]) -> RoutingPlan:
        thresholds = self.policy.check_threshold(threshold, self.num_exits - 1)
        if self.policy.uses_features:
            raise ConfigError(f"{type(self.policy).__name__} reads features of classifiers, which tokens have not")
        return RoutingPlan(self.runner, [*self.heads.active], self.policy, None, thresholds)

    def _exit_to_draft(self, exit_: int | str) -> int:
        names = self.exit_names[:-1]
        if isinstance(exit_, str) and exit_ in names:
            return names.index(exit_)
        if isinstance(exit_, int) and not isinstance(exit_, bool) and 0 <= exit_ < len(names):
            return exit_
        hint = nearest(exit_, names) if isinstance(exit_, str) else ""
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise ExitPointError(f"assistant_early_exit={exit_!r} is no early exit{hint} (exits: {listed})")

    def _check_length(self, prompt: Any, settings: GenerationConfig) -> None:
        if not isinstance(prompt, Tensor):
            return
        if prompt.is_floating_point() != (prompt.ndim == 3) or prompt.ndim < 2 or not prompt.shape[1]:
            raise ShapeError(
                f"a prompt must be token ids (N, L), int64, of at least one token, got {prompt.dtype}"
                f" {tuple(prompt.shape)}"
            )
        longest = getattr(self._text_config, "max_position_embeddings", None)
        tables = [m for m in self.backbone.modules() if isinstance(m, nn.Embedding)]
        learned = any(table is not self.backbone.get_input_embeddings() for table in tables)  # type: ignore[operator]
        length, new = prompt.shape[1], _new_tokens(settings, prompt.shape[1])
        if longest is not None and (length > longest or (learned and length + new - 1 > longest)):
            raise ShapeError(
                f"a prompt of {length} tokens and {new} new ones do not fit the {longest} positions of"
                f" {type(self.backbone).__name__}: shorten the prompt, or lower max_new_tokens"
            )

    def _check_exits_can_be_taken(
        self, settings: GenerationConfig, ids: Any, kwargs: dict[str, Any], drafting: int | None
    ) -> None:
        check_version()
        asked = "threshold" if drafting is None else "assistant_early_exit"
        settings.assistant_early_exit = drafting
        mode = settings.get_generation_mode(kwargs.get("assistant_model"))
        possible = (
            (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            if drafting is None
            else (GenerationMode.ASSISTED_GENERATION,)
        )
        if (
            mode not in possible
            or kwargs.get("custom_generate") is not None
            or kwargs.get("assistant_model") is not None
        ):
            raise ConfigError(
                f"{asked} goes with greedy search and sampling only, not with {mode.value.replace('_', ' ')} or another"
                " model's drafts: leave one of them out"
            )
        if settings.use_cache is False or settings.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"{asked} needs a cache that grows: use_cache=True without cache_implementation, got use_cache="
                f"{settings.use_cache} and {settings.cache_implementation!r}"
            )
        if settings.output_attentions or settings.output_hidden_states:
            raise ConfigError(f"{asked}: tokens that skip layers have no attentions and hidden states there")
        if not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None:
            raise InputTypeError(f"{asked} needs input_ids (N, L); inputs_embeds and empty prompts are not taken")
        if drafting is not None and (ids.shape[0] > 1 or (settings.num_return_sequences or 1) > 1):
            raise ShapeError(
                f"assistant_early_exit drafts for one text at a time, got {ids.shape[0]} with num_return_sequences="
                f"{settings.num_return_sequences}: call generate for each, or use threshold"
            )

        limit = rotary_limit(self._text_config)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        first = ids.shape[1] if cache is None else cache.get_seq_length()
        length, new = ids.shape[1], _new_tokens(settings, ids.shape[1])
        if limit is not None and first <= limit < length + new - 1:
            raise ShapeError(
                f"{type(self.backbone).__name__} turns all positions otherwise after {limit} tokens, so keys that were"
                f" kept before do not fit those that come later: with {asked}, {length} tokens and {new} new ones"
                f" must stay within {limit}, or the prompt be longer; generate without {asked}"
            )

    @property
    def _text_config(self) -> Any:
        return self.backbone.config.get_text_config()  # type: ignore[union-attr,operator]

    def _decoder_layers(self) -> DecoderLayers:
        backbone = getattr(self.backbone, "_orig_mod", self.backbone)
        if self._layers is None or self._layers.backbone is not backbone:
            self._layers = DecoderLayers(backbone, self.config.exits or [])
        return self._layers

    # One step

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        threshold: float | Sequence[float] | Tensor | None = None,
        output_all_exits: bool = False,
        return_dict: bool | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As :meth:`erde_hub.EarlyExitWrapper.forward`; :meth:`generate` also hands in its own cache.

        ``logits_to_keep`` returns the logits of the last so many tokens, or of tokens at these places, as in
        transformers; ``loss`` is of all of them.

        Raises:
            ConfigError: A cache that is another model's.
            InputTypeError: A cache that is none.
        """
        if isinstance(cache, OwedCache) and input_ids is not None:
            return self._step(input_ids, cache, attention_mask, position_ids, int(logits_to_keep))
        given = cache if cache is not None else kwargs.get("past_key_values")
        if given is not None:
            check_cache(given, self._text_config)
        if cache is not None:
            kwargs["cache"] = cache
        try:
            with unchanged_on_error(given):
                output: Any = super().forward(
                    pixel_values,
                    labels,
                    threshold,
                    output_all_exits,
                    True,
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **kwargs,
                )
        except (ErdeError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, IndexError) as error:
            raise explain_cache(given) or error from error
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            output.logits = output.logits[:, kept]
            if output.exit_logits is not None:
                output.exit_logits = tuple(logits[:, kept] for logits in output.exit_logits)
        if return_dict is None:
            return_dict = read_field(self.config, "return_dict")
        return output if return_dict else output.to_tuple()

    def _step(
        self, ids: Tensor, cache: OwedCache, padding: Tensor | None, position_ids: Tensor | None, keep: int
    ) -> CausalLMOutputWithPast:
        """Reads new tokens (N, Q), all layers of them or, of one that may exit, as many as it needs."""
        layers, cache.padding = self._decoder_layers(), padding
        asked = keep or ids.shape[1]
        seen, cache.seen = cache.seen, 0
        ids = ids[:, seen:]
        position_ids = None if position_ids is None else position_ids[:, seen:]
        span = layers.begin(ids, cache, padding, position_ids)
        token = _Token(cache.plan, ids.shape[0]) if cache.plan is not None and ids.shape[1] == 1 else None
        last = len(layers.edges) - 2
        for stage in range(last + 1):
            span = layers.run(stage, span, cache, padding)
            if stage == last:
                break
            if token is not None and token.exits(stage, span.hidden[:, -1:]):
                if cache.copies:
                    layers.store(stage + 1, span, cache, padding)
                else:
                    cache.owe(stage, span)
                cache.exit_index.append(token.index)
                return CausalLMOutputWithPast(logits=token.logits[:, None], cache=cache)
            span = cache.owed.pop(stage).then(span) if stage in cache.owed else span
        logits = layers.readout(span.hidden[:, -asked:])
        index = torch.full((ids.shape[0],), last, device=ids.device)
        if token is not None:
            logits, index = token.finish(logits[:, -1], last)
            logits = logits[:, None]
        if cache.plan is not None:
            cache.exit_index.append(index)
        return CausalLMOutputWithPast(logits=logits, cache=cache)

    def draft(
        self, ids: Tensor, cache: OwedCache, exit_index: int, padding: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Returns an exit's logits (1, V) for the token after ``ids`` (1, 1), whose deeper layers it owes."""
        layers = self._decoder_layers()
        span = layers.begin(ids, cache, padding, position_ids)
        for stage in range(exit_index + 1):
            span = layers.run(stage, span, cache, padding)
        cache.owe(exit_index, span)
        return self.heads.active[exit_index](span.hidden)[:, -1]

    def _pay(self, cache: OwedCache) -> None:
        """Takes all tokens that are owed through the layers that they have skipped."""
        layers = self._decoder_layers()
        span: Span | None = None
        for stage in range(1, len(layers.edges) - 1):
            owed = cache.owed.pop(stage - 1, None)
            span = owed if span is None else span if owed is None else owed.then(span)
            if span is not None:
                span = layers.run(stage, span, cache, cache.padding)


def _new_tokens(settings: GenerationConfig, length: int) -> int:
    new = settings.max_new_tokens
    return max(0, (settings.max_length or 0) - length) if new is None else new


class _Token:
    """One new token of each text on its way through the exits.

    Args:
        plan: Decides.
        batch: Number of texts.

    Attributes:
        logits: (N, V), of the exit that each text has taken, where it has taken one.
        index: (N,), that exit; -1 where none yet.
    """

    def __init__(self, plan: RoutingPlan, batch: int) -> None:
        self.plan = plan
        self.history: list[Tensor] = []
        self.logits: Tensor = torch.empty(0)
        self.index: Tensor = torch.full((batch,), -1)

    def exits(self, stage: int, hidden: Tensor) -> bool:
        """Runs an exit, (N, 1, C); returns whether every text has now exited."""
        plan = self.plan
        if not plan.runs_head[stage]:
            return False
        logits = plan.heads[stage](hidden)[:, -1]
        log_probs = logits.float().log_softmax(-1)
        if plan.policy.uses_history:
            self.history.append(log_probs)
            scores = plan.policy.score(torch.stack(self.history))
        else:
            scores = plan.policy.score_last(log_probs)
        self._take(exit_mask(plan.policy, scores, plan.thresholds[stage], logits), logits, stage)
        return bool((self.index >= 0).all())

    def finish(self, logits: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Gives the texts that have not exited the read-out of the last layer; returns logits and exits of all."""
        self._take(torch.ones_like(self.index, dtype=torch.bool), logits, last)
        return self.logits, self.index

    def _take(self, mask: Tensor, logits: Tensor, stage: int) -> None:
        index = self.index.to(logits.device)
        new = mask & (index < 0)
        self.logits = logits if self.logits.numel() == 0 else torch.where(new[:, None], logits, self.logits)
        self.index = torch.where(new, stage, index)
