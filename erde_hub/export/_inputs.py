"""Paths, pictures and arrays as people pass them, checked; without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde_hub.errors import DataError, InputTypeError, ShapeError

from ._requirements import require


def file_path(path: object) -> Path:
    """Returns the path of a file.

    Raises:
        InputTypeError: Neither text nor a path.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if isinstance(text, str) and "\0" not in text:
            return Path(text)
    raise InputTypeError(f"path must be text or a pathlib.Path, such as 'model.onnx', got {path!r}")


def as_array(value: Any, name: str) -> NDArray[Any]:
    """Returns an array; tensors may need gradients, lie on an accelerator or be in bfloat16, which NumPy has not.

    Raises:
        InputTypeError: It holds nothing that an array can hold, or no values at all; the message begins with ``name``.
    """
    try:
        if hasattr(value, "is_floating_point"):  # a tensor; torch need not be here
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: tensors on the meta device, for example
        reason = " ".join(str(error).split())[:200]
        raise InputTypeError(f"{name} cannot be made an array, got {type(value).__name__} ({reason})") from error


def is_picture(value: Any) -> bool:
    """Tells whether a value is the path of an image, or an image of Pillow."""
    if isinstance(value, (str, os.PathLike)):
        return True
    pillow: Any = sys.modules.get("PIL.Image")  # whoever has an image of Pillow has imported it
    return pillow is not None and isinstance(value, pillow.Image)


def read_picture(picture: Any, channels: int, number: int) -> NDArray[np.uint8]:
    """Reads an image as training does: any mode, upright.

    Args:
        picture: What :func:`is_picture` accepts.
        channels: Of the model.
        number: Its place in the batch, for errors.

    Shape:
        Returns (H, W, channels).

    Raises:
        DataError: No such file, or no image that can be read.
        ShapeError: The model takes neither grey nor colour images.
        MissingDependencyError: Pillow is not installed.
    """
    require("PIL.Image", "reading an image", "pillow; or pass arrays")
    from erde_hub._image_files import decode, upright_rgb  # noqa: PLC0415 - needs Pillow

    if channels not in (1, 3):
        raise ShapeError(f"the model takes images of {channels} channels, which files do not have: pass arrays")
    if isinstance(picture, (str, os.PathLike)):
        path = file_path(picture)
        try:
            content = path.read_bytes()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(f"image {number}, {str(path)!r}, cannot be read: {reason}") from error
        image = decode(content, repr(str(path)))
    else:
        image = upright_rgb(picture, f"the batch, number {number},")
    return np.array(image) if channels == 3 else np.array(image.convert("L"))[..., None]
