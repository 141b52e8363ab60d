"""Paths and arrays as people pass them, checked; without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde_hub.errors import InputTypeError


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
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: tensors on the meta device, for example
        reason = " ".join(str(error).split())[:200]
        raise InputTypeError(f"{name} cannot be made an array, got {type(value).__name__} ({reason})") from error
