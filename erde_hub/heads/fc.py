"""The exit branch of the ERDE paper."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from erde_hub.errors import ConfigError, ShapeError

from .base import ExitHead, FeatureSpec, ToNCHW, check_dropout, run_layers, vector_pool


class FCHead(ExitHead):
    """Batch norm, ReLU, 2x2 average pooling, dropout, one linear layer: the branch of the ERDE paper.

    With ``pool="adaptive"`` the map is pooled to 2x2, so that the linear layer has 4C inputs at every resolution;
    ``pool="kernel"`` is the literal reading, kernel 2 and stride 2, and ties the head to one input size. Tokens go
    through the backbone's own pooling first, then layer norm, ReLU, dropout and the linear layer.

    Args:
        spec: What the exit reads.
        num_labels: Number of classes.
        pool: ``"adaptive"`` or ``"kernel"``; for tokens ``"mean"`` averages all of them (those that are no padding)
            where the backbone itself may read a class token, which says little in early layers of encoders that were
            trained without it.
        dropout: Probability of zeroing an input of the linear layer in training.

    Raises:
        ConfigError: An unknown ``pool``, a dropout outside [0, 1), ``pool="kernel"`` without a known spatial size, or
            ``pool="mean"`` for features that are no tokens.

    References:
        ERDE, arXiv 2510.04856. Deviation: adaptive pooling by default.
    """

    POOLS: ClassVar[tuple[str, ...]] = ("adaptive", "kernel", "mean")

    def __init__(self, spec: FeatureSpec, num_labels: int, *, pool: str = "adaptive", dropout: float = 0.5) -> None:
        super().__init__(spec, num_labels)
        if pool not in self.POOLS:
            raise ConfigError(f"pool must be one of {', '.join(self.POOLS)}, got {pool!r}")
        self.pool = pool
        if pool == "mean" and (spec.format not in ("NLC", "NCL") or spec.pool == "none"):
            raise ConfigError(
                f"pool='mean' averages the tokens of a sample, and this exit ({spec.format}, pool"
                f" {spec.pool!r}) has none to average: leave it out"
            )
        layers: list[nn.Module]
        if spec.format in ("NCHW", "NHWC"):
            inputs = 4 * spec.width
            pooling: nn.Module = nn.AdaptiveAvgPool2d(2)
            if pool == "kernel":
                if len(spec.size) != 2 or min(spec.size) < 2:
                    raise ConfigError(
                        f"pool='kernel' needs a known feature size of at least 2x2, got {spec.size}: wrap the living"
                        " model, or use pool='adaptive'"
                    )
                inputs = spec.width * (spec.size[0] // 2) * (spec.size[1] // 2)
                pooling = nn.AvgPool2d(2, 2)
            layers = [nn.BatchNorm2d(spec.width), nn.ReLU(), pooling, nn.Flatten()]
            if spec.format == "NHWC":
                layers.insert(0, ToNCHW())
        else:
            inputs = spec.width
            norm = nn.BatchNorm1d(inputs) if spec.format == "NC" else nn.LayerNorm(inputs)
            layers = [vector_pool(replace(spec, pool="avg") if pool == "mean" else spec), norm, nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Dropout(check_dropout(dropout)))
        self.fc = nn.Linear(inputs, num_labels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feature in the format of ``spec`` to (N, num_labels)."""
        if self.pool == "kernel" and x.ndim == 4:
            size = tuple(x.shape[2:] if self.spec.format == "NCHW" else x.shape[1:3])
            if size != self.spec.size:
                raise ShapeError(f"a head with pool='kernel' was built for features of {self.spec.size}, got {size}")
        return self.fc(run_layers(self.layers, x, mask))
