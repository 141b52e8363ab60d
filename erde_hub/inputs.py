"""Checks of what a model, a loss or a metric is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputTypeError, LabelError, ShapeError


def check_pixel_values(pixel_values: Any, input_size: Sequence[int]) -> Tensor:
    """Returns a batch of inputs of that size; height and width may differ from it.

    Args:
        pixel_values: (N, C, H, W) float for images.
        input_size: Shape of one input, () where it is not known.

    Raises:
        InputTypeError: Not a tensor, or images that are not floats.
        ShapeError: Another number of axes or channels.
    """
    if not isinstance(pixel_values, Tensor):
        raise InputTypeError(f"pixel_values must be a tensor (N, C, H, W), got {type(pixel_values).__name__}")
    if input_size and pixel_values.ndim != len(input_size) + 1:
        raise ShapeError(
            f"pixel_values must have {len(input_size) + 1} axes, (N, {', '.join(map(str, input_size))}), got shape"
            f" {tuple(pixel_values.shape)}"
        )
    if len(input_size) == 3 and pixel_values.shape[1] != input_size[0]:
        raise ShapeError(f"pixel_values must have {input_size[0]} channels, got shape {tuple(pixel_values.shape)}")
    if len(input_size) == 3 and not pixel_values.is_floating_point():
        raise InputTypeError(
            f"pixel_values must be floats, got {pixel_values.dtype}: preprocess images with model.image_processor()"
        )
    return pixel_values


def check_class_labels(labels: object, count: int, num_classes: int, *, values: bool = True) -> Tensor:
    """Returns class indices (N,) as int64.

    Args:
        labels: Class indices of any integer type.
        count: N.
        num_classes: K.
        values: Check the range too, which on an accelerator waits for the device.

    Raises:
        InputTypeError: Not an integer tensor.
        ShapeError: Not (N,).
        LabelError: A label outside 0 to K - 1; the message names its position.
    """
    if not isinstance(labels, Tensor):
        raise InputTypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputTypeError(f"labels must be class indices (int64), got {labels.dtype}")
    if labels.shape != (count,):
        raise ShapeError(f"labels must have shape ({count},), one per sample, got {tuple(labels.shape)}")
    if values and count:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            position = int((labels == wrong).nonzero()[0])
            raise LabelError(
                f"labels[{position}] is {wrong}, but there are {num_classes} classes: labels must lie in"
                f" 0 to {num_classes - 1}"
            )
    return labels.long()
