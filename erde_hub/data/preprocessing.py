"""What turns an RGB image into the network's input, and how the data and the caller decide it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

from erde_hub.errors import ConfigError, DataError, unknown_name
from erde_hub.preprocessing import CROP_MODES, INTERPOLATIONS

from .augment import Augmentation

#: Images of at most this many pixels are decoded once and kept as uint8.
SMALL_IMAGE_PIXELS = 96 * 96

Triple = tuple[float, float, float]

#: Of large images where nothing else is said.
LARGE_IMAGE_DEFAULTS = {
    "input_size": (3, 224, 224),
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


@dataclass(frozen=True)
class Preprocessing:
    """What turns an RGB image into the network's input; travels with the checkpoint.

    Args:
        input_size: (3, H, W) of the network's input.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        interpolation: "bilinear", "bicubic", ... as timm names them.
        crop_pct: The shorter side is resized to the input size divided by this, then the centre is cut out.
        crop_mode: "squash" resizes both sides instead, without keeping their ratio. An input that is not square is
            always made like this, as the checkpoint's image processor does.
    """

    input_size: tuple[int, int, int]
    mean: Triple
    std: Triple
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @functools.cached_property
    def resize(self) -> Callable[[Image.Image], Tensor]:
        """The transform of evaluation up to uint8 pixels (3, H, W)."""
        return create_transform(
            self.input_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode if self.input_size[1] == self.input_size[2] else "squash",
            normalize=False,
        )

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """Resizes and crops images of any size to uint8 (N, H, W, 3)."""
        if not images:
            return np.empty((0, *self.input_size[1:], 3), np.uint8)
        return np.stack([self.resize(image).permute(1, 2, 0).numpy() for image in images])

    def normalize(self, pixels: NDArray[np.uint8], channels_last: bool = False) -> Tensor:
        """Turns uint8 (N, H, W, 3) into normalised float32 (N, 3, H, W)."""
        # NumPy runs this in the calling thread: a batch is too small to be worth waking torch's threads for, and
        # waiting for them costs tens of milliseconds on a busy machine.
        count, height, width, channels = pixels.shape
        scale, offset = self._affine
        if channels_last:
            values = pixels.reshape(count, height * width * channels).astype(np.float32)
            values *= np.tile(scale, height * width)
            values += np.tile(offset, height * width)
            return torch.from_numpy(values.reshape(pixels.shape)).permute(0, 3, 1, 2)
        values = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C").reshape(count, channels * height * width)
        values *= np.repeat(scale, height * width)
        values += np.repeat(offset, height * width)
        return torch.from_numpy(values.reshape(count, channels, height, width))

    @functools.cached_property
    def _affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean, std = np.array(self.mean), np.array(self.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def training_transform(self, augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
        """Returns timm's random transform for one image, up to normalised float32 (3, H, W)."""
        return create_transform(
            self.input_size,
            is_training=True,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            **dict(augmentation.transform or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments of ``EarlyExitWrapper.set_preprocessing``, as JSON types."""
        return {
            "size": list(self.input_size[1:]),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }


def complete(overrides: Mapping[str, Any], **defaults: Any) -> Preprocessing:
    """Returns the preprocessing that the data decide, but for what the caller fixed."""
    return Preprocessing(**{**defaults, **overrides})


def check_overrides(
    input_size: int | Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
    crop_pct: float | None,
    crop_mode: str | None = None,
) -> dict[str, Any]:
    """Checks what a person asked for and returns it; what is None is left to the data.

    Raises:
        ConfigError: A size, a number or a name that no preprocessing can have.
    """
    size = (3, input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None:
        size = tuple(size)
        if len(size) != 3 or size[0] != 3 or not all(type(n) is int and n > 0 for n in size):
            raise ConfigError(
                f"input_size={input_size!r} is not allowed: give (3, height, width), or one positive integer for a"
                " square"
            )
        size = (size[0], size[1], size[2])
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise unknown_name("interpolation", interpolation, INTERPOLATIONS)
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ConfigError(f"crop_pct={crop_pct!r} is not allowed: give a number above 0 and at most 1")
    if crop_mode is not None and crop_mode not in CROP_MODES:
        raise unknown_name("crop_mode", crop_mode, CROP_MODES)
    given = {
        "input_size": size,
        "mean": _triple("mean", mean, 0),
        "std": _triple("std", std, 1e-6),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    return {name: value for name, value in given.items() if value is not None}


def _triple(name: str, values: Sequence[float] | None, low: float) -> Triple | None:
    if values is None:
        return None
    if len(values) != 3 or not all(math.isfinite(value) and value >= low for value in values):
        raise ConfigError(
            f"{name}={tuple(values)!r} is not allowed: give three {'positive ' if low else ''}numbers, one per colour"
            " channel, on the scale [0, 1]"
        )
    return float(values[0]), float(values[1]), float(values[2])


def channel_statistics(pixels: NDArray[np.uint8], positions: NDArray[np.int64] | None = None) -> tuple[Triple, Triple]:
    """Returns mean and standard deviation per channel of uint8 pixels (N, H, W, 3), on the scale [0, 1].

    Args:
        pixels: uint8 (N, H, W, 3).
        positions: Images to measure; None for all.

    Raises:
        DataError: A channel is constant, so that it cannot be normalised.
    """
    counts = np.zeros((3, 256), np.int64)
    positions = np.arange(len(pixels)) if positions is None else positions
    for start in range(0, len(positions), 1024):
        part = pixels[positions[start : start + 1024]].reshape(-1, 3)
        counts += np.stack([np.bincount(part[:, channel], minlength=256) for channel in range(3)])
    levels = np.arange(256) / 255
    number = counts[0].sum()
    mean = counts @ levels / number
    std = np.sqrt(np.maximum(counts @ levels**2 / number - mean**2, 0))
    if not (std > 1e-6).all():
        raise DataError(
            f"colour channel {int(np.argmin(std))} has the same value in all training pixels, so the images cannot be"
            " normalised: check the image column, or give mean and std"
        )
    return _rounded(mean), _rounded(std)


def _rounded(values: NDArray[np.float64]) -> Triple:
    # six digits survive a round trip through JSON and mean the same to everybody
    return round(float(values[0]), 6), round(float(values[1]), 6), round(float(values[2]), 6)
