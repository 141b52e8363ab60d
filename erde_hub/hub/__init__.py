"""The Hugging Face Hub: model cards, and uploading a checkpoint."""

from __future__ import annotations

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install

from .model_card import render_model_card
from .publish import publish_checkpoint

__all__ = ["publish_checkpoint", "render_model_card"]
