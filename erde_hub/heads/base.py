"""What an exit head is, and how the feature formats of backbones become vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import global_pool_nlc
from torch import Tensor, nn

from erde_hub.errors import ConfigError

FORMATS = ("NCHW", "NHWC", "NLC", "NC")
POOLS = ("token", "avg", "max", "avgmax")


@dataclass(frozen=True)
class FeatureSpec:
    """What an exit reads from its stage; comes from the backbone's adapter, never from guessing axes.

    Attributes:
        width: Number of channels.
        format: Order of the axes: ``NCHW``, ``NHWC``, ``NLC`` (tokens) or ``NC`` (already pooled).
        size: Spatial size: (H, W), (L,) or ().
        pool: Pooling of tokens that the backbone itself uses: ``token``, ``avg``, ``max`` or ``avgmax``.
        prefix_tokens: Number of class and register tokens in front of the patch tokens.
        leaf: Which tensor of a stage that returns several; None where it returns one.
        batched: Which of several tensors hold one row per sample and shrink with the batch.
    """

    width: int
    format: str
    size: tuple[int, ...] = ()
    pool: str = "avg"
    prefix_tokens: int = 0
    leaf: int | None = None
    batched: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"feature format {self.format!r} is unknown (available: {', '.join(FORMATS)})")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ConfigError(f"feature width must be a positive integer, got {self.width!r}")
        if self.pool not in POOLS:
            raise ConfigError(f"pooling {self.pool!r} is unknown (available: {', '.join(POOLS)})")
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "batched", tuple(self.batched))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeatureSpec:
        """Reads what a config stores; a key that does not exist raises :class:`ConfigError`."""
        if not isinstance(values, dict):
            raise ConfigError(f"exit_features must hold one dict per exit, got {values!r}")
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"exit_features has an unknown key {sorted(unknown)[0]!r} (keys: {', '.join(cls.__dataclass_fields__)})"
            )
        missing = [key for key in ("width", "format") if key not in values]
        if missing:
            raise ConfigError(f"exit_features lacks {' and '.join(missing)}, got {values}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns what a config stores."""
        return {
            "width": self.width,
            "format": self.format,
            "size": list(self.size),
            "pool": self.pool,
            "prefix_tokens": self.prefix_tokens,
            "leaf": self.leaf,
            "batched": list(self.batched),
        }


class ExitHead(nn.Module):
    """A small classifier on the feature of one stage.

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
    """Pools tokens the way the backbone itself does: class token, mean, maximum, or half of each."""

    def __init__(self, pool: str, prefix_tokens: int) -> None:
        super().__init__()
        self.pool = pool
        self.prefix_tokens = prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, C)."""
        return global_pool_nlc(x, pool_type=self.pool, num_prefix_tokens=self.prefix_tokens)


class GlobalPool(nn.Module):
    """Mean over the spatial axes."""

    def __init__(self, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (N, H, W, C) to (N, C)."""
        return x.mean(self.axes)


def vector_pool(spec: FeatureSpec) -> nn.Module:
    """Returns the module that pools a feature of that format to (N, C)."""
    if spec.format == "NLC":
        return TokenPool(spec.pool, spec.prefix_tokens)
    if spec.format == "NC":
        return nn.Identity()
    return GlobalPool((2, 3) if spec.format == "NCHW" else (1, 2))
