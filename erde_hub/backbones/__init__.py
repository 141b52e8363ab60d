"""Backbones: one adapter per kind, asked in the order of the table."""

from __future__ import annotations

from torch import nn

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install
from erde_hub.errors import unknown_name

from .base import BackboneAdapter, ExitPoint, ExitPoints
from .plain import PlainAdapter
from .timm import TimmAdapter
from .transformers import TransformersAdapter

__all__ = ["BackboneAdapter", "ExitPoint", "ExitPoints", "find_adapter", "get_adapter", "list_libraries"]

_ADAPTERS: tuple[BackboneAdapter, ...] = (TimmAdapter(), TransformersAdapter(), PlainAdapter())


def find_adapter(module: nn.Module) -> BackboneAdapter:
    """Returns the first adapter that knows the module; the plain one knows every module."""
    return next(adapter for adapter in _ADAPTERS if adapter.matches(module))


def get_adapter(library: str) -> BackboneAdapter:
    """Returns the adapter of that ``config.library``; a miss raises :class:`~erde_hub.errors.UnknownNameError`."""
    for adapter in _ADAPTERS:
        if adapter.library == library:
            return adapter
    raise unknown_name("library", library, list_libraries())


def list_libraries() -> list[str]:
    """Returns the values that ``config.library`` can have."""
    return [adapter.library for adapter in _ADAPTERS]
