"""The transformers model: build, save, load, truncate."""

from __future__ import annotations

from .wrapper import EarlyExitWrapper

__all__ = ["EarlyExitWrapper"]
