"""Randomness that is a function of (seed, epoch, sample), and the augmentations built on it.

A resumed run has to see the samples and the crops that the uninterrupted run would have seen, whatever the number of
processes or workers. So nothing here draws from a generator whose state would have to be saved: every random number is
a hash of counters, computed for a whole batch at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from erde_hub.errors import unknown_name

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

#: Streams keep uses of the same (seed, epoch, index) apart.
ORDER_STREAM, AUGMENT_STREAM, SPLIT_STREAM, LIMIT_STREAM = 1, 2, 3, 4


def _mix(value: int) -> int:
    """The finaliser of splitmix64 for one Python integer."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def counter_hash(seed: int, epoch: int, index: NDArray[np.integer[Any]], stream: int) -> NDArray[np.uint64]:
    """Returns 64 random bits for every index: splitmix64 started at a hash of (seed, epoch, stream).

    Equal arguments give equal bits on every platform, in any batch, in any order.

    Args:
        seed: Any integer; taken modulo 2**64.
        epoch: Any integer.
        index: Sample indices.
        stream: Keeps independent uses of the same counters apart.

    Shape:
        index: (N,). Returns (N,).

    References:
        Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014. Deviation: the start is a hash
        of three counters.
    """
    start = _mix(_mix(_mix(seed & _MASK) ^ (epoch & _MASK)) ^ stream)
    value = np.atleast_1d(index).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(start)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def epoch_order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the order of an epoch: a permutation of ``range(size)`` that depends on (seed, epoch) alone."""
    return np.argsort(counter_hash(seed, epoch, np.arange(size), ORDER_STREAM), kind="stable")


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch (CPU) for a block and puts their states back after it.

    timm's and torchvision's transforms draw from all three. Generators of accelerators are not touched.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002 (see above)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed & (_MASK >> 1))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


@dataclass(frozen=True)
class Augmentation:
    """One way to vary training images.

    Without ``transform`` it is applied to a batch of uint8 images at once: zero-pad, crop at random, mirror. With
    ``transform`` every image goes through :func:`timm.data.create_transform` with these arguments, in workers.

    Args:
        name: Key in the table.
        summary: One line for people.
        pad: Border added before the random crop, as a fraction of the image's side (1/8 is 4 of 32 pixels).
        flip: Mirror left and right with probability one half.
        transform: Arguments of timm's training transform.
    """

    name: str
    summary: str
    pad: float = 0.0
    flip: bool = False
    transform: Mapping[str, Any] | None = None

    @property
    def per_image(self) -> bool:
        """Tells whether images have to be transformed one by one."""
        return self.transform is not None

    def apply(self, pixels: NDArray[np.uint8], bits: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Augments a batch; the result of a sample depends on its own pixels and bits only.

        Shape:
            pixels: (N, H, W, 3). bits: (N,). Returns (N, H, W, 3).
        """
        if self.pad:
            pixels = _random_crop(pixels, bits, self.pad)
        if self.flip:
            mirrored = (bits & np.uint64(1)).astype(bool)
            pixels = pixels.copy()
            pixels[mirrored] = pixels[mirrored][:, :, ::-1]
        return pixels


def _random_crop(pixels: NDArray[np.uint8], bits: NDArray[np.uint64], pad: float) -> NDArray[np.uint8]:
    count, height, width, channels = pixels.shape
    border_y, border_x = max(1, round(pad * height)), max(1, round(pad * width))
    # two numbers of 31 bits out of the upper 62: the lowest bits decide about mirroring
    top = ((bits >> np.uint64(33)) * np.uint64(2 * border_y + 1)) >> np.uint64(31)
    left = ((bits >> np.uint64(2) & np.uint64(0x7FFFFFFF)) * np.uint64(2 * border_x + 1)) >> np.uint64(31)
    padded = np.zeros((count, height + 2 * border_y, width + 2 * border_x, channels), dtype=np.uint8)
    padded[:, border_y : border_y + height, border_x : border_x + width] = pixels
    windows = np.moveaxis(sliding_window_view(padded, (height, width), axis=(1, 2)), 3, -1)
    return windows[np.arange(count), top.astype(np.int64), left.astype(np.int64)]


_TIMM = {"hflip": 0.5, "color_jitter": None}

#: By name; add your own.
AUGMENTATIONS = {
    own.name: own
    for own in (
        Augmentation("none", "images as they are"),
        Augmentation("shift", "zero-pad by a sixteenth and crop at random", pad=1 / 16),
        Augmentation("crop_flip", "zero-pad by an eighth, crop at random, mirror", pad=1 / 8, flip=True),
        Augmentation("rrc_flip", "crop of random size and shape, resized, mirrored (timm)", transform=_TIMM),
        Augmentation(
            "rand_augment",
            "as rrc_flip, then RandAugment of magnitude 9 (timm)",
            transform={**_TIMM, "auto_augment": "rand-m9-mstd0.5-inc1"},
        ),
    )
}


def get_augmentation(name: str | None) -> Augmentation:
    """Returns the augmentation of that name (None is "none"); a miss lists what exists."""
    name = "none" if name is None else name
    if not isinstance(name, str) or name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]
