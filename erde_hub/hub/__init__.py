"""The Hugging Face Hub: model cards, and uploading a checkpoint."""

from __future__ import annotations

from .model_card import render_model_card
from .publish import publish_checkpoint

__all__ = ["publish_checkpoint", "render_model_card"]
