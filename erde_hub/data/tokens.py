"""Texts for causal language models: tokenised once, joined, and cut into blocks of equal length.

:func:`load_token_data` takes a folder of text files, a data set of texts or of token ids, or arrays of token ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from erde_hub._arguments import check_whole
from erde_hub.errors import ConfigError, DataError, InputTypeError

from .base import LabelledData, check_limits
from .decoding import content_digest
from .folders import SPLIT_ALIASES
from .loader import Batch, BatchSettings, Split
from .opening import open_tables
from .splits import SPLIT_NAMES, rows_digest, split_rules
from .texts import load_tokenizer

__all__ = ["TokenData", "load_token_data", "train_tokenizer"]

#: Tokens of a block where nothing else is said.
BLOCK_SIZE = 256
#: Tokens of a byte-level tokenizer without merges: the bytes, and the end of a text.
BYTES = 257
_END = "<|endoftext|>"

Ids = NDArray[np.int64]


class TokenSplit(Split):
    """A split of blocks of tokens; the labels of a block are its tokens, as ``DataCollatorForLanguageModeling`` has it.

    Args:
        name: "train", "validation" or "test".
        blocks: (M, L) token ids.
        indices: Number of each block in the source split.
    """

    def __init__(self, name: str, blocks: Ids, indices: Ids) -> None:
        super().__init__(name, torch.from_numpy(blocks), torch.from_numpy(indices))

    def check_settings(self, settings: BatchSettings) -> None:
        """Refuses what is for images.

        Raises:
            ConfigError: An augmentation, or ``channels_last``.
        """
        if settings.augmentation.name != "none" or settings.channels_last:
            raise ConfigError("augment and channels_last are for images: leave them out for texts")

    def inputs(self, positions: NDArray[np.int64], settings: BatchSettings, epoch: int) -> Batch:
        """Returns ``input_ids`` (N, L)."""
        return {"input_ids": self.labels[positions]}

    def contents(self) -> Iterator[bytes]:
        """Yields the tokens of each block."""
        return (block.numpy().tobytes() for block in self.labels)


@dataclass(kw_only=True)
class TokenData(LabelledData):
    """Blocks of tokens; see :class:`~erde_hub.data.base.LabelledData`. There are no classes.

    Attributes:
        tokenizer: Saved next to a checkpoint; None where token ids were given.
        vocab_size: Token ids are below it.
        block_size: Tokens of a block.
    """

    kind: ClassVar[str] = "token"

    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    vocab_size: int
    block_size: int

    @property
    def num_classes(self) -> int:
        """Size of the vocabulary."""
        return self.vocab_size

    @property
    def input_size(self) -> tuple[int]:
        """Tokens of a block."""
        return (self.block_size,)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Kind of tokenizer, size of its vocabulary and tokens of a block."""
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": self.vocab_size,
            "block_size": self.block_size,
        }


def train_tokenizer(texts: Sequence[str], vocab_size: int = BYTES) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; with the smallest vocabulary a token is a byte.

    Args:
        texts: Of the training split.
        vocab_size: The 256 bytes, the end of a text, and merges.

    Raises:
        ConfigError: Fewer than 257.
    """
    check_whole("vocab_size", vocab_size, BYTES)
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=_END, bos_token=_END, pad_token=_END)


def load_token_data(
    dataset: str | os.PathLike[str] | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    *,
    block_size: int = BLOCK_SIZE,
    vocab_size: int | None = None,
    text_column: str | None = None,
    config_name: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> TokenData:
    """Loads texts, tokenises and joins them, and cuts them into blocks; what fills no block at the end is left out.

    Rows of a data set are texts of their own, each ended by the tokenizer's end of text where it has one; a text file
    is one text. Splits that are missing are cut off the end of the others, in the shares of
    :func:`~erde_hub.data.splits.split_rules`.

    Args:
        dataset: A folder with ``train.txt`` (and ``validation.txt``, ``test.txt``); a folder or a Hub name that
            ``datasets.load_dataset`` reads, with a column of texts or a column ``input_ids``; or token ids (M,) per
            split, ``{"train": ids, ...}``.
        tokenizer: Or where to load it from; None trains one on the training split, see :func:`train_tokenizer`.
        block_size: Tokens of a block.
        vocab_size: Of the tokenizer that is trained, or of given token ids.
        text_column: Needed where several columns hold texts.
        config_name: Configuration of a Hub data set that has several.
        cache_dir: Where ``datasets`` keeps its files.
        max_train_samples: Train on the first blocks only.
        max_eval_samples: Use the first blocks of validation and test only.

    Raises:
        DataError: No such data, no or several columns of texts, a split without a whole block, ids outside of the
            vocabulary.
        ConfigError: A number that is not allowed, or no tokenizer.
        InputTypeError: ``tokenizer`` is none, or ids that are no whole numbers.
    """
    check_limits({"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples})
    check_whole("block_size", block_size, 2)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputTypeError(
            f"tokenizer must be one of transformers, or a place to load it from, got {tokenizer!r:.80}"
        )
    if tokenizer is not None and vocab_size not in (None, len(tokenizer)):
        raise ConfigError(f"vocab_size={vocab_size} is not that of the tokenizer, {len(tokenizer)}: leave it out")
    name, rows = _read(dataset, text_column, config_name, cache_dir)
    if isinstance(rows["train"], list):
        tokenizer = tokenizer or train_tokenizer(rows["train"], vocab_size or BYTES)
        ids = {split: _tokenize(texts, tokenizer) for split, texts in rows.items()}
    else:
        ids = rows
    words = len(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else vocab_size
    words = 1 + max(int(values.max(initial=0)) for values in ids.values()) if words is None else words
    for split, values in ids.items():
        wrong = (values < 0) | (values >= words)
        if wrong.any():
            first = int(wrong.argmax())
            raise DataError(f"token {int(values[first])} at position {first} of {split!r} is outside 0 to {words - 1}")
    splits, info = _cut(name, ids, block_size, {"train": max_train_samples}, max_eval_samples)
    contents = [(values.tobytes(), 0) for _, values in sorted(ids.items())]
    return TokenData(
        name=name,
        fingerprint=content_digest([str(block_size)], contents),
        class_names=[],
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        split_info=info,
        tokenizer=tokenizer,
        vocab_size=words,
        block_size=block_size,
    )


def _read(
    dataset: str | os.PathLike[str] | Mapping[str, Any],
    text_column: str | None,
    config_name: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[str, dict[str, Any]]:
    """Returns a name and, per source split, a list of texts or an array of ids."""
    if isinstance(dataset, Mapping):
        if "train" not in dataset:
            raise DataError(f"token ids are given as {{'train': ids, ...}}, got the keys {sorted(map(str, dataset))}")
        return "tokens", {split: _whole_numbers(split, dataset[split]) for split in SPLIT_NAMES if split in dataset}
    source = os.fspath(dataset)
    folder = Path(source).expanduser()
    files = {SPLIT_ALIASES[path.stem]: path for path in sorted(folder.glob("*.txt")) if path.stem in SPLIT_ALIASES}
    if folder.is_dir() and "train" in files:
        return folder.resolve().name, {split: [_read_text(path)] for split, path in files.items()}
    opened = open_tables(source, config_name, None if cache_dir is None else os.fspath(cache_dir), prefer_tables=True)
    features = opened.splits["train"].features
    if "input_ids" in features and text_column is None:
        joined = {s: np.concatenate([np.asarray(v) for v in t["input_ids"]]) for s, t in opened.splits.items()}
        return opened.name, {split: _whole_numbers(split, values) for split, values in joined.items()}
    texts = (datasets.Value("string"), datasets.Value("large_string"))
    found = [name for name, kind in features.items() if kind in texts]
    column = text_column or (found[0] if len(found) == 1 else None)
    if column not in found:
        raise DataError(
            f"{opened.name!r} has {len(found)} columns of texts ({', '.join(found)}), text_column is {text_column!r}:"
            " name one of them"
        )
    return opened.name, {split: [text or "" for text in table[column]] for split, table in opened.splits.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name!r} cannot be read as UTF-8: {error}") from error


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Ids:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.asarray([*ids, *end], np.int64))
    return np.concatenate(parts)


def _whole_numbers(split: str, values: Any) -> Ids:
    ids = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputTypeError(f"{split!r} must hold token ids, whole numbers (M,), got {ids.dtype} {ids.shape}")
    return ids.astype(np.int64)


def _cut(
    name: str, ids: dict[str, Ids], block_size: int, limits: dict[str, int | None], evaluation: int | None
) -> tuple[dict[str, TokenSplit], dict[str, dict[str, Any]]]:
    """Cuts source splits into blocks, and splits that are missing off the end of others."""
    left = {}
    for source, values in ids.items():
        count = len(values) // block_size
        left[source] = np.arange(count), values[: count * block_size].reshape(count, block_size)
    splits, info = {}, {}
    for split, (source, share) in split_rules(ids).items():
        numbers, blocks = left[source]
        first = 0 if share == 1.0 else len(blocks) - max(1, round(share * len(blocks)))
        left[source] = numbers[:first], blocks[:first]
        limit = limits.get(split, evaluation)
        own, numbers = blocks[first:][:limit], numbers[first:][:limit]
        if not len(own):
            raise DataError(
                f"split {split!r} of {name!r} has no block of {block_size} tokens: lower block_size, or give more text"
            )
        splits[split] = TokenSplit(split, own, numbers)
        rule = {"rule": "given"} if share == 1.0 else {"rule": "end", "fraction": share}
        info[split] = {"rows": len(own), "source": source, **rule, "digest": rows_digest(numbers)}
    return splits, info
