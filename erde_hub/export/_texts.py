"""Texts as people pass them: sentences for the tokenizer of a file, or what a tokenizer gave; without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde_hub.errors import CheckpointError, ConfigError, InputTypeError, ShapeError

from ._inputs import as_array
from ._requirements import require
from .metadata import FileInfo


def tokenizer_json(tokenizer: Any, info: FileInfo) -> str:
    """Returns the text of a tokenizer that cuts and pads as a file needs it.

    Args:
        tokenizer: A fast tokenizer of transformers, a ``tokenizers.Tokenizer``, a ``tokenizer.json``, or the folder of
            one.
        info: Of the file.

    Raises:
        InputTypeError: Neither of these, or one that is written in Python.
        ConfigError: A file that holds no tokenizer, or one with more tokens than the model knows.
    """
    tokenizers: Any = require("tokenizers", "a tokenizer in the file", "tokenizers")
    longest, side = info.max_length, "right"
    if isinstance(tokenizer, (str, os.PathLike)):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            fast = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises the base class
            raise ConfigError(f"{str(tokenizer)!r} holds no tokenizer.json that can be read ({error})") from error
    else:
        side = getattr(tokenizer, "padding_side", side)
        limit = getattr(tokenizer, "model_max_length", None)
        if isinstance(limit, int) and limit < 2**31:  # transformers' word for no limit is 10^30
            longest = min(limit, longest or limit)
        text = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "to_str", None)
        if text is None:
            raise InputTypeError(
                f"tokenizer must be a fast tokenizer of transformers, a tokenizers.Tokenizer, or a tokenizer.json, got"
                f" {type(tokenizer).__name__}"
            )
        fast = tokenizers.Tokenizer.from_str(text())
    if info.vocab_size is not None and fast.get_vocab_size() > info.vocab_size:
        raise ConfigError(
            f"the tokenizer has {fast.get_vocab_size()} tokens, the model knows {info.vocab_size}: take the model's own"
        )
    fixed = info.input_size[0] if info.batch_size else None
    limits = [limit for limit in (fixed, longest) if limit]
    if limits:
        fast.enable_truncation(min(limits))
    else:
        fast.no_truncation()
    pad = info.pad_token_id or 0
    fast.enable_padding(direction=side, length=fixed, pad_id=pad, pad_token=fast.id_to_token(pad) or "[PAD]")
    return str(fast.to_str())


def read_tokenizer(info: FileInfo, source: str) -> Any:
    """Returns the tokenizer of a file.

    Raises:
        ConfigError: The file has none.
        MissingDependencyError: The package is not installed.
        CheckpointError: The file's is damaged.
    """
    if info.tokenizer is None:
        raise ConfigError(
            f"{source} holds no tokenizer, so texts cannot be cut into tokens: pass {{'input_ids': ...,"
            " 'attention_mask': ...}, or export with tokenizer=..."
        )
    tokenizers: Any = require("tokenizers", "reading texts", "tokenizers; or pass input_ids and attention_mask")
    try:
        return tokenizers.Tokenizer.from_str(info.tokenizer)
    except Exception as error:  # the library raises the base class
        raise CheckpointError(f"the tokenizer in {source} is damaged ({error}): export the model again") from error


def tokenize(texts: Sequence[Any], tokenizer: Any, info: FileInfo) -> dict[str, NDArray[np.int64]]:
    """Returns the inputs (N, L) of texts, or of pairs of texts.

    Raises:
        InputTypeError: Not a list of texts.
    """
    for number, text in enumerate(texts):
        pair = isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not isinstance(text, str) and not pair:
            raise InputTypeError(f"texts must be strings, or pairs of strings, got {type(text).__name__} at {number}")
    encoded = tokenizer.encode_batch([text if isinstance(text, str) else tuple(text) for text in texts])
    read = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(e, read[name]) for e in encoded], np.int64) for name in info.input_names}


def text_arrays(given: Mapping[str, Any], info: FileInfo) -> dict[str, NDArray[np.int64]]:
    """Returns the inputs (N, L) that a tokenizer gave, by name; all tokens count and are of type 0 where not said.

    For a file of fixed shapes they are padded to its length.

    Raises:
        InputTypeError: No ``input_ids``, a name that the file does not take, floats, or tokens that the model does not
            know.
        ShapeError: Arrays that do not agree, or texts that are too long.
    """
    unknown = [name for name in given if name not in info.input_names]
    if unknown or "input_ids" not in given:
        raise InputTypeError(
            f"the file takes {', '.join(info.input_names)}, got {', '.join(map(repr, given)) or 'none of them'}"
        )
    arrays: dict[str, NDArray[Any]] = {name: as_array(value, name) for name, value in given.items()}
    ids = arrays["input_ids"]
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer) and not (name == "attention_mask" and array.dtype == bool):
            raise InputTypeError(f"{name} must hold integers, got {array.dtype}")
        if array.ndim != 2 or array.shape != ids.shape:
            raise ShapeError(f"{name} must be (N, L) as input_ids, got {array.shape} next to {ids.shape}")
    length, fixed = ids.shape[1], info.input_size[0] if info.batch_size else None
    longest = min((limit for limit in (fixed, info.max_length) if limit is not None), default=None)
    if length == 0 or (longest is not None and length > longest):
        most = "at least 1" if longest is None else f"1 to {longest}"
        raise ShapeError(f"texts must have {most} tokens, got {length}: tokenizer(texts, truncation=True) cuts them")
    if ids.size and not (ids.min() >= 0 and ids.max() < (info.vocab_size or np.inf)):
        raise InputTypeError(
            f"input_ids must be 0 to {(info.vocab_size or 0) - 1}, got {ids.min()} to {ids.max()}: use the model's own"
            " tokenizer"
        )
    arrays.setdefault("attention_mask", np.ones_like(ids))
    arrays.setdefault("token_type_ids", np.zeros_like(ids))
    if fixed is not None:
        padding = {"input_ids": info.pad_token_id or 0}
        arrays = {
            name: np.pad(array, ((0, 0), (0, fixed - length)), constant_values=padding.get(name, 0))
            for name, array in arrays.items()
        }
    return {name: np.ascontiguousarray(arrays[name], np.int64) for name in info.input_names}
