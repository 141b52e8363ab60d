"""Images where there are none: random, and yet as different to a network as photographs are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def coarse_patterns(count: int, size: Sequence[int]) -> Tensor:
    """The same images on every call: coarse patterns of differing strength.

    White noise would be the same to a network from image to image, and so would be the scores of its exits.

    Args:
        count: N, which is the seed too.
        size: (C, H, W).

    Shape:
        Returns (N, C, H, W).
    """
    generator = torch.Generator().manual_seed(count)
    channels, *sides = size
    coarse = torch.randn((count, channels, 6, 6), generator=generator)
    strength = 0.3 + 1.4 * torch.rand((count, 1, 1, 1), generator=generator)
    noise = 0.2 * torch.randn((count, channels, *sides), generator=generator)
    return strength * functional.interpolate(coarse, tuple(sides), mode="bilinear") + noise
