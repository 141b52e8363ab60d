"""Names of data sets, folders and arrays to splits and batches."""

from __future__ import annotations

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install

from .base import LabelledData
from .images import image_data_from_arrays, load_image_data
from .loader import BatchLoader
from .texts import load_text_data
from .tokens import TokenData, load_token_data, train_tokenizer

__all__ = [
    "BatchLoader",
    "LabelledData",
    "TokenData",
    "image_data_from_arrays",
    "load_image_data",
    "load_text_data",
    "load_token_data",
    "train_tokenizer",
]
