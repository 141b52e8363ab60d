"""Drafts of an early exit, which the rest of the model verifies."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ._transformers import ExitCandidates
from .cache import OwedCache


class Drafts(Protocol):
    """What a drafter asks of a model."""

    def draft(
        self, ids: Tensor, cache: OwedCache, exit_index: int, padding: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Returns an exit's logits (1, V) for the token after ``ids`` (1, 1), whose deeper layers it owes."""


class ExitDrafter(ExitCandidates):
    """Drafts tokens with the head of an exit; the verifying pass goes on from the states of the drafts.

    Drafts are chosen as the model's own tokens are, from logits that went through the same processors, and these are
    the logits that rejection sampling compares (arXiv 2211.17192). So greedy text is that of the full model, and
    sampled text has its distribution.

    Args:
        model: Generates.
        exit_index: Of the exit that drafts.
        last: Index of the model's own read-out.
        config: Its ``num_assistant_tokens``, ``num_assistant_tokens_schedule`` and ``assistant_confidence_threshold``
            are transformers'.
        processors: Of logits.
        cache: Of the text that is generated.
    """

    def __init__(
        self,
        model: Drafts,
        exit_index: int,
        last: int,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        cache: OwedCache,
    ) -> None:
        self.model = model
        self.exit_index = exit_index
        self.last = last
        self.config = config
        self.processors = processors
        self.number = int(config.num_assistant_tokens)
        self.cache = cache

    def get_candidates(
        self, input_ids: Tensor, model_kwargs: dict[str, Any], is_first_iteration: bool, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the ids with the drafts behind them, (1, L + D), and the drafts' processed logits (1, D, V)."""
        if is_first_iteration:  # the prompt has to be read first
            return input_ids, None
        number = min(self.number, self.config.max_length - input_ids.shape[1] - 1)
        padding, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        ids = input_ids
        logits: list[Tensor] = []
        ends = getattr(self.config, "_eos_token_tensor", None)
        while len(logits) < number:
            given = len(logits)
            mask = None if padding is None else torch.nn.functional.pad(padding, (0, given), value=1)
            at = None if positions is None else positions[:, -1:] + given
            raw = self.model.draft(ids[:, -1:], self.cache, self.exit_index, mask, at)
            scores = self.processors(ids, raw.to(torch.float32))
            probabilities = scores.softmax(-1)
            if self.config.do_sample:
                token = torch.multinomial(probabilities, 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            ids, logits = torch.cat([ids, token], 1), [*logits, scores]
            if ends is not None and bool(torch.isin(token, ends.to(token.device))):
                break
            confidence = self.config.assistant_confidence_threshold
            if confidence and float(probabilities[0, token[0, 0]]) < confidence:
                break
        self.cache.seen = len(logits)
        return ids, torch.stack(logits, 1) if logits else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Notes which exit each accepted token comes from; adapts the number of drafts where the schedule says so."""
        taken = [self.exit_index] * int(num_matches) + [self.last]
        self.cache.exit_index += [torch.tensor([exit_index]) for exit_index in taken]
        if self.config.num_assistant_tokens_schedule in ("heuristic", "heuristic_transient"):
            every = int(num_matches) == scores.shape[1] - 1
            self.number = self.number + 2 if every else max(1, self.number - 1)
