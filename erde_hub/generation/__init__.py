"""Generating text with early exits: per token by a threshold, or by drafts that the rest of the model verifies."""

from __future__ import annotations

from .model import EarlyExitForCausalLM, ExitGenerateOutput

__all__ = ["EarlyExitForCausalLM", "ExitGenerateOutput"]
