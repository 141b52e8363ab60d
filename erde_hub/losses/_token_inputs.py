"""Checks of what a loss over tokens is called with, and its flattening to one row per position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erde_hub.errors import InputTypeError, LabelError, ShapeError

#: Label of a position that is not learnt, as in transformers.
IGNORE = -100


def check_tokens(name: str, tokens: object) -> None:
    """Raises :class:`InputTypeError` unless it is a tensor of whole numbers."""
    if not isinstance(tokens, Tensor):
        raise InputTypeError(f"{name} must be a tensor of tokens, got {type(tokens).__name__}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputTypeError(f"{name} must be tokens (int64), got {tokens.dtype}")


def flat_logits(name: str, logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Returns the logits of every exit as (N, V), views where that is possible.

    Raises:
        InputTypeError: Not floating-point tensors.
        ShapeError: No exit, or one that is not (B, L, V) or (N, V), or that differs from the first.
    """
    every = [logits] if isinstance(logits, Tensor) else list(logits) if isinstance(logits, Sequence) else [logits]
    if not every:
        raise ShapeError(f"{name} is empty: give the logits of at least one exit")
    flat = []
    for index, one in enumerate(every):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            kind = one.dtype if isinstance(one, Tensor) else type(one).__name__
            raise InputTypeError(f"{name}[{index}] must be a floating-point tensor of logits, got {kind}")
        if one.ndim not in (2, 3) or one.shape[-1] < 2 or not one.numel():
            raise ShapeError(f"{name}[{index}] must be (B, L, V) or (N, V), got {tuple(one.shape)}")
        if one.shape != every[0].shape:
            raise ShapeError(f"{name}[{index}] has shape {tuple(one.shape)}, but exit 0 has {tuple(every[0].shape)}")
        flat.append(one.reshape(-1, one.shape[-1]))
    return flat


def flat_features(features: Any) -> Any:
    """Hidden states (B, L, D) as (N, D), one entry per exit."""
    if isinstance(features, Tensor):
        features = [features]
    if not isinstance(features, Sequence):
        return features
    return [f.reshape(-1, f.shape[-1]) if isinstance(f, Tensor) and f.ndim == 3 else f for f in features]


def counted_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the numbers of the tokens that count, and their labels.

    Raises:
        LabelError: None counts.
    """
    rows = (labels != IGNORE).nonzero()[:, 0]
    if not len(rows):
        raise LabelError(f"all {len(labels)} labels are {IGNORE}: no token of this batch counts")
    return rows, labels[rows]


def check_vocabulary(student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
    """Returns how many columns of both logits (N, V) are words: ``vocab_size``, or all where it is None.

    Raises:
        ShapeError: The two do not fit each other, or have fewer columns than that.
        InputTypeError: They are on two devices.
    """
    if student.device != teacher.device:
        raise InputTypeError(f"student_logits are on {student.device} and teacher_logits on {teacher.device}")
    if len(student) != len(teacher):
        raise ShapeError(
            f"student_logits hold {len(student)} positions and teacher_logits {len(teacher)}: both must see"
            " the same tokens"
        )
    own, target = student.shape[-1], teacher.shape[-1]
    if vocab_size is None:
        if own != target:
            raise ShapeError(
                f"the student has {own} words and the teacher {target}: EGAD compares them word by word, so both"
                " need one tokenizer; where only the padding of the embeddings differs, set vocab_size to the"
                " tokenizer's length"
            )
        return own
    if vocab_size > min(own, target):
        raise ShapeError(f"vocab_size is {vocab_size}, but the logits have {own} and {target} columns")
    return vocab_size


def valid_labels(labels: Any, mask: Any, logits: Tensor, vocab_size: int) -> Tensor:
    """Returns labels (N,) of the positions of some logits (B, L, V) or (N, V), -100 where nothing is learnt.

    Raises:
        InputTypeError: Not tensors of tokens and of flags, or on another device than the logits.
        ShapeError: Another number of positions.
        LabelError: A label that is no word; checked on a CPU only, since elsewhere it would wait for the device.
    """
    check_tokens("labels", labels)
    positions = logits.shape[:-1]
    if labels.numel() != positions.numel() or (labels.ndim == len(positions) and labels.shape != positions):
        raise ShapeError(
            f"labels {tuple(labels.shape)} do not belong to the {positions.numel()} positions {tuple(positions)} of the"
            " logits"
        )
    if labels.device != logits.device:
        raise InputTypeError(f"labels are on {labels.device} and the logits on {logits.device}")
    flat = labels.reshape(-1).long()
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise InputTypeError(f"mask must be a tensor, True where something is learnt, got {type(mask).__name__}")
        if mask.shape != labels.shape:
            raise ShapeError(f"mask has shape {tuple(mask.shape)} and labels {tuple(labels.shape)}")
        flat = flat.masked_fill(~mask.reshape(-1).bool(), IGNORE)
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (flat >= vocab_size) | ((flat < 0) & (flat != IGNORE))
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise LabelError(
                f"label {int(flat[place])} at position {place} is outside the {vocab_size} words; positions that"
                f" are not learnt have {IGNORE}"
            )
    return flat
