"""The Hugging Face Hub: model cards."""

from __future__ import annotations

from .model_card import render_model_card

__all__ = ["render_model_card"]
