"""Text data for training and evaluation: tokenised once, padded batch by batch to the longest text in it.

:func:`load_text_data` takes a folder or a Hub name and a tokenizer; :class:`~erde_hub.data.images.BatchLoader` gives
batches with ``input_ids`` and ``attention_mask`` of a split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from erde_hub._progress import passing_bar
from erde_hub.errors import ConfigError, DataError, InputTypeError

from .base import LabelledData, check_limits
from .columns import find_text_columns, read_labels
from .decoding import content_digest
from .loader import Batch, BatchSettings, Split
from .opening import open_tables
from .splits import SplitPlan, leave_out_copies, limit_plan, load_plan, plan_splits

__all__ = ["TextData", "load_text_data", "load_tokenizer"]

#: Longest text in tokens where nothing else is said; longer ones are cut.
MAX_LENGTH = 128

_AT_ONCE = 10_000
#: Batches among which texts of an epoch are sorted by length: enough to pad little, few enough to stay shuffled.
_WINDOW = 16


class TextSplit(Split):
    """A split of tokenised texts.

    Batches of training are drawn so that their texts are about equally long: within sixteen batches the shuffled rows
    are sorted by length, and these batches are then shuffled. Otherwise a batch is as long as its longest text.

    Args:
        name: "train", "validation" or "test".
        labels: Class of every row.
        indices: Row number in the source split.
        texts: Token ids of every row, int32.
        tokenizer: Pads the texts of a batch.
    """

    def __init__(
        self,
        name: str,
        labels: Tensor,
        indices: Tensor,
        texts: Sequence[NDArray[np.int32]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__(name, labels, indices)
        self._texts, self._collate = texts, DataCollatorWithPadding(tokenizer)
        self.lengths = np.fromiter(map(len, texts), np.int64, len(texts))

    def check_settings(self, settings: BatchSettings) -> None:
        """Refuses what is for images.

        Raises:
            ConfigError: An augmentation, or ``channels_last``.
        """
        if settings.augmentation.name != "none":
            raise ConfigError(f"augment={settings.augmentation.name!r} is for images: texts take 'none'")
        if settings.channels_last:
            raise ConfigError("channels_last is a memory format of images: leave it out for texts")

    def arrange(self, order: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
        """Puts texts of about the same length into one batch; a pure function of the order, as the order itself."""
        lengths, arranged = self.lengths, order.copy()
        for start in range(0, len(order) - batch + 1, _WINDOW * batch):
            batches = min(_WINDOW, (len(order) - start) // batch)  # the short last batch stays as it is
            rows = order[start : start + batches * batch]
            by_length = np.argsort(lengths[rows], kind="stable").reshape(batches, batch)
            mixed = by_length[np.argsort(by_length.min(axis=1), kind="stable")]  # in the order in which rows were drawn
            arranged[start : start + batches * batch] = rows[mixed.reshape(-1)]
        return arranged

    def inputs(self, positions: NDArray[np.int64], settings: BatchSettings, epoch: int) -> Batch:
        """Returns ``input_ids`` and ``attention_mask`` (N, L), L tokens in the longest of these texts."""
        if len(positions) == 0:  # a process may get none of the last batch
            return {name: torch.zeros(0, 1, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        texts = [self._texts[position].tolist() for position in positions]
        return dict(self._collate([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]))

    def contents(self) -> Iterator[bytes]:
        """Yields the tokens of each row."""
        return (text.tobytes() for text in self._texts)


@dataclass(kw_only=True)
class TextData(LabelledData):
    """Labelled texts; see :class:`~erde_hub.data.base.LabelledData`.

    Attributes:
        tokenizer: Turns a text into the network's input; saved beside a checkpoint.
        max_length: Longest text in tokens; longer ones are cut, and costs are counted at this length.
    """

    kind: ClassVar[str] = "text"

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    max_length: int

    @property
    def input_size(self) -> tuple[int]:
        """Tokens of the longest text."""
        return (self.max_length,)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Kind of tokenizer, size of its vocabulary and length of the longest text in tokens."""
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": len(self.tokenizer),
            "max_length": self.max_length,
        }


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the Hub; no remote code.

    Raises:
        ConfigError: There is none, or it has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(source))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"no tokenizer could be loaded from {os.fspath(source)!r}: {reason}; give a folder, or a repository of the"
            " Hub, that holds tokenizer.json"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer of {os.fspath(source)!r} has no padding token, so it makes no batch of several texts: set"
            " tokenizer.pad_token and save it"
        )
    return tokenizer


def load_text_data(
    dataset: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    max_length: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    split_file: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TextData:
    """Loads a data set of texts, tokenises it once and cuts it into train, validation and test.

    Splits are made as for images (:func:`~erde_hub.data.splits.split_rules`). Training rows whose text occurs
    in validation or test too are left out; ``split_info`` says how many.

    Args:
        dataset: A local folder that ``datasets.load_dataset`` reads (parquet, ...), or a name on the Hub.
        tokenizer: Or where to load it from.
        text_column: Needed where several columns hold texts.
        label_column: Needed where the features show no class column, or several.
        config_name: Configuration of a Hub data set that has several.
        max_length: Longest text in tokens, special ones included; longer ones are cut. None takes 128, or less where
            the tokenizer says so.
        cache_dir: Where ``datasets`` keeps its files; by default its own cache.
        max_train_samples: Train on a stratified part.
        max_eval_samples: Use stratified parts of validation and test.
        split_file: Written by :meth:`LabelledData.save_split`: use exactly these held-out rows.
        seed: Of the held-out rows; 0 gives the splits that other people get.
        progress: Show progress bars.

    Raises:
        DataError: No such data, no or several columns, an empty split, a single class, a row without text or label, a
            text without tokens, a split file of other data.
        LabelError: A label outside the classes.
        ConfigError: A number that is not allowed, or no tokenizer.
        InputTypeError: ``tokenizer`` is none.
    """
    check_limits({"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples})
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputTypeError(
            f"tokenizer must be one of transformers, or a place to load it from, got {tokenizer!r:.80}"
        )
    longest = _check_length(max_length, tokenizer)
    dataset, cache = os.fspath(dataset), None if cache_dir is None else os.fspath(cache_dir)
    opened = open_tables(dataset, config_name, cache, prefer_tables=True, label_column=label_column)
    name, tables = opened.name, opened.splits
    text, label = find_text_columns(tables["train"].features, name, text_column, label_column)
    class_names, labels = read_labels(tables, name, label)
    texts = {split: _read_texts(tables[split], text, name, split) for split in labels}
    fingerprint = _fingerprint(class_names, texts, labels)
    plan = plan_splits(labels, seed) if split_file is None else load_plan(split_file, labels, fingerprint)
    plan = leave_out_copies(plan, {split: [" ".join(entry.split()) for entry in own] for split, own in texts.items()})
    used = limit_plan(plan, labels, max_train_samples, max_eval_samples)
    splits = _tokenized_splits(texts, labels, used, tokenizer, longest, name, progress)
    return TextData(
        name=name,
        fingerprint=fingerprint,
        class_names=class_names,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        split_info=used.info,
        plan=plan,
        tokenizer=tokenizer,
        max_length=longest,
    )


def _check_length(wanted: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    limit = int(tokenizer.model_max_length)  # about 1e30 where the tokenizer does not know
    least = tokenizer.num_special_tokens_to_add() + 1
    if wanted is None:
        return min(MAX_LENGTH, limit)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not least <= wanted <= limit:
        most = f" to {limit}, what the tokenizer was made for" if limit < 1_000_000 else " or more"
        raise ConfigError(f"max_length={wanted!r} is not allowed: give a number of tokens, {least}{most}")
    return wanted


def _fingerprint(
    class_names: Sequence[str], texts: Mapping[str, list[str]], labels: Mapping[str, NDArray[np.int64]]
) -> str:
    sizes = [f"{split}:{len(texts[split])}" for split in sorted(texts)]
    rows = [
        (text.encode(), int(label))
        for split in sorted(texts)
        for text, label in zip(texts[split], labels[split], strict=True)
    ]
    return content_digest([*class_names, *sizes], rows)


def _read_texts(table: Any, column: str, dataset: str, split: str) -> list[str]:
    texts = table.data.column(column).to_pylist()
    missing = next((row for row, text in enumerate(texts) if text is None), None)
    if missing is not None:
        raise DataError(f"row {missing} of split {split!r} of {dataset!r} has no text in {column!r}: remove it")
    return texts


def _tokenized_splits(
    texts: Mapping[str, list[str]],
    labels: Mapping[str, NDArray[np.int64]],
    used: SplitPlan,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    dataset: str,
    progress: bool,
) -> dict[str, TextSplit]:
    """Tokenises the rows that are used, split by split."""
    splits = {}
    for name, (origin, rows) in used.rows.items():
        tokens: list[list[int]] = []
        parts = range(0, len(rows), _AT_ONCE)
        for start in passing_bar(parts, f"tokenising {name}", shown=progress and len(parts) > 1):
            part = [texts[origin][row] for row in rows[start : start + _AT_ONCE]]
            tokens += tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        empty = next((row for row, own in zip(rows, tokens, strict=True) if not own), None)
        if empty is not None:
            raise DataError(f"the text in row {empty} of split {origin!r} of {dataset!r} has no tokens: remove it")
        splits[name] = TextSplit(
            name,
            torch.from_numpy(labels[origin][rows]),
            torch.from_numpy(rows.copy()),
            [np.asarray(ids, np.int32) for ids in tokens],
            tokenizer,
        )
    return splits
