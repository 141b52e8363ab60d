"""Exit heads: small classifiers on the feature of one stage."""

from __future__ import annotations

from typing import Any, Literal

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install
from erde_hub._registry import Registry

from .avg_max import AvgMaxHead
from .base import ExitHead, FeatureSpec
from .container import ExitHeads
from .fc import FCHead
from .linear import LinearHead
from .lm import LMHead
from .mlp import MLPHead

__all__ = [
    "AvgMaxHead",
    "ExitHead",
    "ExitHeads",
    "FCHead",
    "FeatureSpec",
    "HeadKey",
    "LMHead",
    "LinearHead",
    "MLPHead",
    "create_head",
    "get_head",
    "list_heads",
    "register_head",
]

#: Keys of the table, so that editors complete ``head=``; any other text is the key of a head that you registered.
HeadKey = Literal["fc", "linear", "mlp", "avg_max", "lm"] | str

_HEADS: Registry[ExitHead] = Registry("head")
register_head = _HEADS.register
get_head = _HEADS.get
list_heads = _HEADS.names

register_head("fc", FCHead, "batch norm, ReLU, 2x2 average pooling, dropout, linear", "arXiv 2510.04856")
register_head("linear", LinearHead, "global pooling, linear")
register_head("mlp", MLPHead, "global pooling, layer norm, hidden layer, linear")
register_head("avg_max", AvgMaxHead, "mean and maximum, batch norm, hidden layer, linear")
register_head("lm", LMHead, "the language model's own final norm and output embedding, shared", "arXiv 2404.16710")


def create_head(name: HeadKey, spec: FeatureSpec, num_labels: int, **kwargs: Any) -> ExitHead:
    """Builds a head by name; an unknown name or argument raises :class:`erde_hub.errors.ConfigError`."""
    return _HEADS.create(name, spec, num_labels, **kwargs)
