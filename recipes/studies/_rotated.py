"""Images turned by a known angle, which is what a network has to tell: a regression made from any set of images.

Every image is turned about its centre and cut to the circle that fits into it, so that no corner tells the angle. The
angles are a function of seed and sample: the same in every epoch, process and run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from erde_hub.data.augment import counter_hash
from erde_hub.data.images import ImageData
from erde_hub.data.loader import BatchSettings, ImageSplit
from erde_hub.errors import ConfigError, InputTypeError

#: Name of the target, with its unit.
TARGET = "angle in radians"
#: Keeps the choice of angles apart from other uses of the same hash.
_ANGLE_STREAM = 72


class RotatedSplit(ImageSplit):
    """A split whose images are turned; labels are the angles (N, 1) in radians, anticlockwise.

    Args:
        split: The images as they are.
        degrees: Largest angle, either way.
        copies: How often each image occurs, at an angle of its own each time.
        seed: Of the angles.
    """

    def __init__(self, split: ImageSplit, degrees: float, copies: int, seed: int) -> None:
        indices = (split.indices[:, None] * copies + torch.arange(copies)).flatten()
        share = counter_hash(seed, 0, indices.numpy(), _ANGLE_STREAM) / 2.0**64
        angles = torch.from_numpy((2 * share - 1) * math.radians(degrees)).float()
        super().__init__(split.name, angles[:, None], indices, split.preprocessing)
        self._split, self._copies = split, copies

    def check_settings(self, settings: BatchSettings) -> None:
        """Refuses augmentations that turn or mirror an image, whose angle would be another one then."""
        augmentation = settings.augmentation
        if augmentation.flip or augmentation.per_image:
            raise ConfigError(
                f"augmentation {augmentation.name!r} mirrors or warps images, which changes the angle that is learnt:"
                " use 'none' or 'shift'"
            )

    def images(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Image.Image]:
        """Returns turned RGB images, of the network's input size."""
        return [Image.fromarray(pixels) for pixels in self.pixels(np.asarray(positions, dtype=np.int64))]

    def pixels(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns uint8 (N, H, W, 3) for these positions in the split."""
        fill = [round(255 * mean) for mean in self.preprocessing.mean]
        return rotate(self._split.pixels(np.asarray(positions) // self._copies), self.labels[positions, 0], fill)

    def contents(self) -> Iterator[bytes]:
        """Yields the images as they are: turned another way, an image is known all the same."""
        return (content for content in self._split.contents() for _ in range(self._copies))


def rotated_images(data: ImageData, degrees: float = 45.0, copies: int = 1, seed: int = 0) -> ImageData:
    """Makes a regression of images: which angle was each turned by?

    Args:
        data: Of any classes, which are forgotten; not streamed.
        degrees: Largest angle, either way.
        copies: How often each training image occurs, at an angle of its own each time; validation and test images occur
            once, so that their samples are independent.
        seed: Of the angles.

    Returns:
        Data with one target, :data:`TARGET`.

    Raises:
        ConfigError: Angles outside 0 to 180 degrees, or no copy.
        InputTypeError: Texts, or streamed images.

    Example:
        >>> data = rotated_images(load_image_data("digits"), degrees=45, copies=4)  # doctest: +SKIP
        >>> data.train.labels.shape  # doctest: +SKIP
        torch.Size([5172, 1])
    """
    if isinstance(degrees, bool) or not isinstance(degrees, (int, float)) or not 0 < degrees <= 180:
        raise ConfigError(f"degrees must be above 0 and at most 180, got {degrees!r}")
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise ConfigError(f"copies must be an integer of at least 1, got {copies!r}")
    splits = {}
    for name, times in (("train", copies), ("validation", 1), ("test", 1)):
        split = getattr(data, name)
        if not isinstance(split, ImageSplit):
            raise InputTypeError(f"images that can be turned are needed, {data.name!r} gives {type(split).__name__}")
        splits[name] = RotatedSplit(split, float(degrees), times, seed)
    info = {name: {**how, "rows": len(splits[name])} for name, how in data.split_info.items()}
    return replace(
        data,
        name=f"{data.name}, turned by up to {degrees:g} degrees",
        fingerprint=f"{data.fingerprint}-{degrees:g}-{copies}-{seed}",
        class_names=[TARGET],
        split_info=info,
        augment="none",
        plan=None,
        prefix_hash=None,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
    )


def rotate(pixels: NDArray[np.uint8], angles: Tensor, fill: Sequence[int]) -> NDArray[np.uint8]:
    """Turns images anticlockwise about their centres, between pixels bilinearly, and cuts out the inscribed circle.

    Args:
        pixels: The images.
        angles: In radians.
        fill: Colour outside the circle, per channel.

    Shape:
        pixels: uint8 (N, H, W, C). angles: (N,). Returns uint8 (N, H, W, C).
    """
    height, width = pixels.shape[1:3]
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    grid = torch.stack([(cos * x - sin * y) * 2 / width, (sin * x + cos * y) * 2 / height], -1)
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    turned = F.grid_sample(images, grid.float(), mode="bilinear", padding_mode="border", align_corners=False)
    outside = x.square() + y.square() > (min(height, width) / 2) ** 2
    colour = torch.tensor(fill, dtype=torch.float32)[:, None, None]
    turned = torch.where(outside, colour, turned)
    return turned.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
