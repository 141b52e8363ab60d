"""What an exit head is, and how the feature formats of backbones become vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import global_pool_nlc
from torch import Tensor, nn

from erde_hub.errors import ConfigError

FORMATS = ("NCHW", "NHWC", "NLC", "NCL", "NC")
POOLS = ("token", "last", "avg", "max", "avgmax", "none")

#: Fields whose keys in a stored config have other names.
_STORED_KEYS = {"output_index": "leaf", "batch_outputs": "batched"}


@dataclass(frozen=True)
class FeatureSpec:
    """What an exit reads from its stage; comes from the backbone's adapter, never from guessing axes.

    Attributes:
        width: Number of channels.
        format: Order of the axes: ``NCHW``, ``NHWC``, ``NLC`` (tokens), ``NCL`` or ``NC`` (already pooled).
        size: Spatial size: (H, W), (L,) or ().
        pool: Pooling of tokens that the backbone itself uses: ``token`` (the first), ``last``, ``avg``, ``max`` or
            ``avgmax``; ``none`` for logits of every token.
        prefix_tokens: Number of class and register tokens in front of the patch tokens.
        output_index: Which tensor of a stage that returns several; None where it returns one.
        batch_outputs: Which of several tensors hold one row per sample and shrink with the batch.
        masked: Sequences may be padded: the head is called with the mask (N, L) of the tokens that count, or None where
            all do.
    """

    width: int
    format: str
    size: tuple[int, ...] = ()
    pool: str = "avg"
    prefix_tokens: int = 0
    output_index: int | None = None
    batch_outputs: tuple[int, ...] = ()
    masked: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"feature format {self.format!r} is unknown (available: {', '.join(FORMATS)})")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ConfigError(f"feature width must be a positive integer, got {self.width!r}")
        if self.pool not in POOLS:
            raise ConfigError(f"pooling {self.pool!r} is unknown (available: {', '.join(POOLS)})")
        if self.masked and (self.format != "NLC" or self.pool not in ("token", "last", "avg")):
            raise ConfigError(
                f"a masked feature is a sequence pooled by its first or last token or their mean, got format"
                f" {self.format!r}, pool {self.pool!r}"
            )
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "batch_outputs", tuple(self.batch_outputs))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeatureSpec:
        """Reads what a config stores; a key that does not exist raises :class:`ConfigError`."""
        if not isinstance(values, dict):
            raise ConfigError(f"exit_features must hold one dict per exit, got {values!r}")
        fields = {_STORED_KEYS.get(name, name): name for name in cls.__dataclass_fields__}
        unknown = set(values) - set(fields)
        if unknown:
            raise ConfigError(f"exit_features has an unknown key {sorted(unknown)[0]!r} (keys: {', '.join(fields)})")
        missing = [key for key in ("width", "format") if key not in values]
        if missing:
            raise ConfigError(f"exit_features lacks {' and '.join(missing)}, got {values}")
        return cls(**{fields[key]: value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Returns what a config stores."""
        return {
            "width": self.width,
            "format": self.format,
            "size": list(self.size),
            "pool": self.pool,
            "prefix_tokens": self.prefix_tokens,
            "leaf": self.output_index,
            "batched": list(self.batch_outputs),
            **({"masked": True} if self.masked else {}),
        }


class ExitHead(nn.Module):
    """A small classifier on the feature of one stage.

    Where ``spec.masked``, ``forward`` is called with the mask of the tokens as a second argument.

    Shape:
        Input: the feature in the format of ``spec``. Output: (N, num_labels).
    """

    def __init__(self, spec: FeatureSpec, num_labels: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_labels = num_labels


def check_dropout(dropout: float) -> float:
    """Returns the probability, or raises :class:`ConfigError` where it is not in [0, 1)."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout!r}")
    return dropout


class ToNCHW(nn.Module):
    """Brings NHWC features to the channel order that convolution-style layers read; a view, nothing is copied."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, C, H, W)."""
        return x.permute(0, 3, 1, 2)


class TokenPool(nn.Module):
    """Pools tokens the way the backbone itself does: first or last token, mean, maximum, half of each, or none."""

    def __init__(self, pool: str, prefix_tokens: int) -> None:
        super().__init__()
        self.pool = pool
        self.prefix_tokens = prefix_tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, C), unpooled to (N, L, C); tokens whose mask is 0 do not count."""
        if self.pool == "none":
            return x
        if self.pool == "last":
            if mask is None:
                return x[:, -1]
            positions = torch.arange(x.shape[1], device=x.device)
            last = (positions * mask.ne(0)).argmax(-1)
            return x[torch.arange(len(x), device=x.device), last]
        if self.pool == "avg" and mask is not None:
            weights = mask.to(x.dtype).unsqueeze(-1)
            return (x * weights).sum(1) / weights.sum(1)
        return global_pool_nlc(x, pool_type=self.pool, num_prefix_tokens=self.prefix_tokens)


class GlobalPool(nn.Module):
    """Mean over the spatial axes, followed by the maximum where asked."""

    def __init__(self, axes: Sequence[int], *, with_max: bool = False) -> None:
        super().__init__()
        self.axes = tuple(axes)
        self.with_max = with_max

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), (N, H, W, C) or (N, C, L) to (N, C), with the maximum (N, 2C)."""
        mean = x.mean(self.axes)
        return torch.cat([mean, x.amax(self.axes)], -1) if self.with_max else mean


def run_layers(layers: nn.Sequential, x: Tensor, mask: Tensor | None) -> Tensor:
    """Runs the layers in order; a pooling of tokens also gets the mask."""
    for layer in layers:
        x = layer(x, mask) if isinstance(layer, TokenPool) else layer(x)
    return x


def vector_pool(spec: FeatureSpec) -> nn.Module:
    """Returns the module that pools a feature of that format to (N, C)."""
    if spec.format == "NLC":
        return TokenPool(spec.pool, spec.prefix_tokens)
    if spec.format == "NC":
        return nn.Identity()
    return GlobalPool({"NCHW": (2, 3), "NHWC": (1, 2), "NCL": (2,)}[spec.format])
