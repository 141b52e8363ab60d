"""Random images and logits in place of data, as different from sample to sample as real ones."""

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


def make_logits(
    samples: int, exits: int = 3, classes: int = 10, seed: int = 0, spread: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Exits that share evidence, get better with depth and differ from sample to sample in how hard they find it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    hard = torch.rand(samples, generator=generator)
    common = torch.randn(samples, classes, generator=generator)
    logits = []
    for e in range(exits):
        depth = (e + 1) / exits
        own = common * 0.7 + (1.9 - 0.9 * depth) * torch.randn(samples, classes, generator=generator)
        own[torch.arange(samples), labels] += (1.2 + 4.2 * depth) * (1.6 - hard)
        logits.append(spread * own)
    return torch.stack(logits), labels
