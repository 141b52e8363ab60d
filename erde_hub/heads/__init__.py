"""Exit heads: small classifiers on the feature of one stage."""

from __future__ import annotations

from typing import Any

from erde_hub._registry import Entry, Registry

from .base import ExitHead, FeatureSpec
from .fc import FCHead
from .linear import LinearHead
from .mlp import MLPHead

__all__ = [
    "ExitHead",
    "FCHead",
    "FeatureSpec",
    "LinearHead",
    "MLPHead",
    "create_head",
    "get_head",
    "list_heads",
    "register_head",
]

_HEADS: Registry[ExitHead] = Registry("head")
register_head = _HEADS.register

register_head("fc", FCHead, "batch norm, ReLU, 2x2 average pooling, dropout, linear", "arXiv 2510.04856")
register_head("linear", LinearHead, "global pooling, linear")
register_head("mlp", MLPHead, "global pooling, layer norm, hidden layer, linear")


def create_head(name: str, spec: FeatureSpec, num_labels: int, **kwargs: Any) -> ExitHead:
    """Builds a head by name; an unknown name or argument raises :class:`erde_hub.errors.ConfigError`."""
    return _HEADS.create(name, spec, num_labels, **kwargs)


def get_head(name: str) -> Entry[ExitHead]:
    """Returns the table entry of that name: class, summary, reference."""
    return _HEADS.get(name)


def list_heads() -> list[str]:
    """Returns the names of all heads."""
    return _HEADS.names()
