"""Which rows train, which choose thresholds, which are reported: rules that know labels and nothing else.

All choices are hashes, of the row number or, for streams, of the image, so they are the same on every machine and do
not depend on a generator's version. The rules work for any data with class labels, images or not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde_hub._files import write_text
from erde_hub.errors import DataError

from .augment import LIMIT_STREAM, SPLIT_STREAM, counter_hash

_logger = logging.getLogger(__name__)

Labels = NDArray[np.int64]
Rows = NDArray[np.int64]
Buckets = tuple[int, int]

SPLIT_NAMES = ("train", "validation", "test")
VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2
EVERY_BUCKET = (0, 100)
_FORMAT_VERSION = 1
_RULE_KEYS = ("rule", "fraction", "seed", "from", "below")


def stratified_sample(
    labels: Labels, count: int, seed: int = 0, stream: int = SPLIT_STREAM, keep_one: bool = False
) -> Rows:
    """Returns ``count`` positions, in rising order, with the classes in the proportions of ``labels``.

    Each class gets its share rounded down; what is missing goes to the largest remainders, ties to the lower class.

    Args:
        labels: Class of every row.
        count: Rows to take.
        seed: Decides which rows of a class are taken.
        stream: Keeps samples for different purposes apart.
        keep_one: Leave at least one row of every class behind; then fewer than ``count`` may be returned.

    Shape:
        labels: (N,). Returns (count,) or fewer.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    quota = count * sizes / max(1, len(labels))
    limit = sizes - 1 if keep_one else sizes
    taken = np.minimum(np.floor(quota).astype(np.int64), limit)
    for position in np.argsort(-(quota - np.floor(quota)), kind="stable"):
        if taken.sum() < count and taken[position] < limit[position]:
            taken[position] += 1
    keys = counter_hash(seed, 0, np.arange(len(labels)), stream)
    chosen = []
    for label, number in zip(classes, taken, strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(keys[members], kind="stable")[:number]])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def hold_out(labels: Labels, fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Cuts a stratified part off: returns the rows that stay and the rows held out, at least one.

    Raises:
        DataError: There are so few rows that none can be held out without losing a class.
    """
    held = stratified_sample(labels, max(1, round(fraction * len(labels))), seed, keep_one=True)
    if len(held) == 0:
        raise DataError(
            f"{len(labels)} rows in {len(np.unique(labels))} classes are too few to hold out {fraction:.0%}: every"
            " class would need two rows; give a data set with its own validation and test splits"
        )
    return _without(len(labels), held), held


def halve_split(labels: Labels, seed: int = 0) -> tuple[Rows, Rows]:
    """Cuts a split in two stratified halves: the first for choosing thresholds, the second for the report.

    Meant for sets whose held-out rows must not be filled up from train, such as SST-2, whose training phrases are parts
    of one another.

    Raises:
        DataError: Fewer than two rows.
    """
    if len(labels) < 2:
        raise DataError(f"a split of {len(labels)} rows cannot be halved into validation and test: give two at least")
    second = stratified_sample(labels, len(labels) // 2, seed)
    return _without(len(labels), second), second


def _without(size: int, rows: Rows) -> Rows:
    return np.setdiff1d(np.arange(size), rows, assume_unique=True)


def bucket_of(content: bytes) -> int:
    """Returns 0 to 99 for the bytes of an image; equal images share a bucket, so no copy crosses splits."""
    return int(counter_hash(0, 0, np.array([zlib.crc32(content)]), SPLIT_STREAM)[0] % np.uint64(100))


def split_rules(sources: Collection[str]) -> dict[str, tuple[str, float]]:
    """Returns where each part comes from: a source split, and the share it takes of what earlier parts left of it.

    ==========================  ==============================================================================
    source splits               rule
    ==========================  ==============================================================================
    train, validation, test     as given
    train, test                 validation is 10 % of train
    train, validation           validation is halved into validation and test
    train                       test is 20 %, validation 10 % of the rest
    ==========================  ==============================================================================

    Raises:
        DataError: There is no train split.
    """
    if "train" not in sources:
        raise DataError(f"there is no split 'train' (found: {', '.join(map(repr, sources)) or 'none'})")
    validated = "validation" in sources
    held_out = ("validation", 0.5) if validated else ("train", TEST_FRACTION)
    return {
        "test": ("test", 1.0) if "test" in sources else held_out,
        "validation": ("validation", 1.0) if validated else ("train", VALIDATION_FRACTION),
        "train": ("train", 1.0),
    }


def split_buckets(sources: Collection[str]) -> dict[str, tuple[str, Buckets]]:
    """Returns source split and buckets of each part, for rows that are told apart by :func:`bucket_of` alone."""
    taken = dict.fromkeys(sources, 0)
    parts = {}
    for part, (source, share) in split_rules(sources).items():
        first = taken[source]
        taken[source] = first + round(share * (100 - first))
        parts[part] = (source, (first, taken[source]))
    return parts


def bucket_info(source: str, buckets: Buckets) -> dict[str, Any]:
    """Describes a part of a stream as :attr:`SplitPlan.info` does; :meth:`StoredSplit.buckets` reads it."""
    if buckets == EVERY_BUCKET:
        return {"source": source, "rule": "given"}
    return {"source": source, "rule": "hash of the image modulo 100", "from": buckets[0], "below": buckets[1]}


@dataclass
class SplitPlan:
    """The rows of train, validation and test, each with the source split it is taken from, and how that was decided.

    Streamed data have no row numbers: ``rows`` is empty then, and ``info`` alone says which rows belong where.
    """

    rows: dict[str, tuple[str, Rows]]
    info: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(
        self, path: str | os.PathLike[str], dataset: str, fingerprint: str, prefix_hash: str | None = None
    ) -> None:
        """Writes the held-out rows, or the rule that finds them, as JSON, beside first and then renamed.

        Args:
            path: The file.
            dataset: Name of the data set, for people.
            fingerprint: Of the data: the file is used with these only.
            prefix_hash: Hash of the first training rows, by which loaded data and a stream know each other.

        Raises:
            CheckpointWriteError: The file cannot be written.
        """
        content = {
            "format_version": _FORMAT_VERSION,
            "dataset": dataset,
            "fingerprint": fingerprint,
            "head": prefix_hash,
            "streamed": not self.rows,
            "splits": self.info,
            # train is what these leave of their sources
            "rows": {
                name: rows.tolist()
                for name, (_, rows) in self.rows.items()
                if name != "train" and self.info[name]["rule"] != "given"
            },
        }
        write_text(path, json.dumps(content) + "\n")


def plan_splits(
    labels: Mapping[str, Labels], seed: int = 0, keys: Mapping[str, Sequence[Hashable]] | None = None
) -> SplitPlan:
    """Decides the three splits from the source splits that there are, by :func:`split_rules`, stratified by class.

    Args:
        labels: Class of every row of each source split.
        seed: Decides which rows are held out.
        keys: Content of every row: where a source split is cut, rows of equal content stay together, and the first of
            them decides where.

    Raises:
        DataError: There is no train split, or too few rows to hold any out.
    """
    left = {name: np.arange(len(values)) for name, values in labels.items()}
    rows: dict[str, tuple[str, Rows]] = {}
    rules: dict[str, dict[str, Any]] = {}
    for part, (source, share) in split_rules(labels).items():
        rest, own = left[source], (keys or {}).get(source)
        if share == 1:
            kept, taken = rest[:0], rest
            rules[part] = {"rule": "given" if len(rest) == len(labels[source]) else f"rest of {source}"}
        elif source == "train":
            kept, taken = _cut(labels[source], rest, own, partial(hold_out, fraction=share, seed=seed))
            rules[part] = {"rule": "stratified part of train", "fraction": share, "seed": seed}
        else:
            kept, taken = _cut(labels[source], rest, own, partial(halve_split, seed=seed))
            rules[part] = {"rule": f"stratified half of {source}", "seed": seed}
        left[source], rows[part] = kept, (source, taken)
    return _with_info(rows, rules)


def _cut(
    labels: Labels, rows: Rows, keys: Sequence[Hashable] | None, cut: Callable[[Labels], tuple[Rows, Rows]]
) -> tuple[Rows, Rows]:
    """Cuts rows in two; those of equal content follow the first of them."""
    first = {keys[row] if keys is not None else row: row for row in rows[::-1].tolist()}
    leaders = np.sort(np.fromiter(first.values(), np.int64, len(first)))
    kept, taken = (leaders[part] for part in cut(labels[leaders]))
    if keys is None or len(leaders) == len(rows):
        return kept, taken
    held = {keys[row] for row in taken}
    side = np.array([keys[row] in held for row in rows])
    return rows[~side], rows[side]


def limit_plan(plan: SplitPlan, labels: Mapping[str, Labels], train: int | None, evaluation: int | None) -> SplitPlan:
    """Returns the plan with stratified parts of its splits; the plan itself, and so its held-out rows, stays.

    Args:
        plan: The whole splits.
        labels: Class of every row of each source split.
        train: Rows to train on at most; None for all.
        evaluation: Rows of validation, and of test, at most.

    Raises:
        DataError: A single class is left in train.
    """
    rows, info = dict(plan.rows), dict(plan.info)
    for name, limit in (("train", train), ("validation", evaluation), ("test", evaluation)):
        origin, every = plan.rows[name]
        if limit is None or limit >= len(every):
            continue
        part = every[stratified_sample(labels[origin][every], limit, stream=LIMIT_STREAM)]
        rows[name] = (origin, part)
        info[name] = {**info[name], "rows": limit, "limited_from": len(every), "digest": rows_digest(part)}
        if name == "train" and len(np.unique(labels[origin][part])) < 2:
            raise DataError(f"max_train_samples={limit} leaves a single class: give more rows")
    return SplitPlan(rows, info)


def leave_out_copies(plan: SplitPlan, keys: Mapping[str, Sequence[Hashable]]) -> SplitPlan:
    """Returns the plan without the training rows that occur in validation or test too; train says how many.

    Args:
        plan: The whole splits.
        keys: What is compared, for every row of each source split; one without them is not compared.

    Raises:
        DataError: No training row is left.
    """
    source, rows = plan.rows["train"]
    if source not in keys:
        return plan
    held_out = {
        keys[held][row] for held, own in (plan.rows["validation"], plan.rows["test"]) if held in keys for row in own
    }
    kept = np.array([row for row in rows if keys[source][row] not in held_out], np.int64)
    if len(kept) == len(rows):
        return plan
    if len(kept) == 0:
        raise DataError(f"every row of {source!r} occurs in validation or test too: nothing is left to train on")
    _logger.warning("%d rows of train are copies of held-out rows and are left out", len(rows) - len(kept))
    info = {**plan.info["train"], "rows": len(kept), "copies_left_out": len(rows) - len(kept)}
    info["digest"] = rows_digest(kept)
    return SplitPlan({**plan.rows, "train": (source, kept)}, {**plan.info, "train": info})


@dataclass(frozen=True)
class StoredSplit:
    """What :meth:`SplitPlan.save` wrote.

    Attributes:
        name: Of the file, for messages.
        streamed: The rows are found by a hash of the images; otherwise held-out ones are listed in ``rows``.
        info: Source and rule of each part.
        rows: Row numbers by part.
    """

    name: str
    fingerprint: str
    prefix_hash: str | None
    streamed: bool
    info: dict[str, dict[str, Any]]
    rows: dict[str, Rows]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> StoredSplit:
        """Reads a file.

        Raises:
            DataError: It is missing or damaged.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            info = {name: dict(content["splits"][name]) for name in SPLIT_NAMES}
            for entry in info.values():
                _ = entry["source"], entry["rule"], range(entry.get("from", 0), entry.get("below", 100))
            rows = {name: np.asarray(held, dtype=np.int64).reshape(-1) for name, held in content["rows"].items()}
            fingerprint, prefix_hash, streamed = (
                content["fingerprint"],
                content.get("head"),
                content.get("streamed", False),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"split file {path.name!r} cannot be used: {type(error).__name__}: {error}") from error
        return cls(path.name, fingerprint, prefix_hash, bool(streamed), info, rows)

    def belongs_to(self, fingerprint: str, prefix_hash: str | None, streamed: bool) -> bool:
        """Tells whether it was written for these data, be they loaded or streamed then and now."""
        if self.streamed == streamed:
            return self.fingerprint == fingerprint
        return self.prefix_hash is not None and self.prefix_hash == prefix_hash

    def check_data(self, fingerprint: str, prefix_hash: str | None, streamed: bool) -> None:
        """Raises :class:`DataError` unless it was written for these data."""
        if not self.belongs_to(fingerprint, prefix_hash, streamed):
            raise DataError(
                f"split file {self.name!r} was written for data with fingerprint {self.fingerprint}, these have"
                f" {fingerprint}: use the data the model was trained on"
            )

    def buckets(self) -> dict[str, tuple[str, Buckets]]:
        """Returns source split and buckets of each part, for a stream.

        Raises:
            DataError: A part is a list of row numbers, which a stream does not know.
        """
        if not self.streamed and any(self.info[part]["rule"] != "given" for part in SPLIT_NAMES):
            raise DataError(
                f"split file {self.name!r} holds out rows by their number, which streamed rows do not have: load the"
                " data without streaming (recipes: leave out --streaming)"
            )
        return {part: (how["source"], (how.get("from", 0), how.get("below", 100))) for part, how in self.info.items()}


def load_plan(
    path: str | os.PathLike[str],
    labels: Mapping[str, Labels],
    fingerprint: str,
    prefix_hash: str | None = None,
    buckets: Callable[[str], NDArray[np.int64]] | None = None,
) -> SplitPlan:
    """Reads a plan that :meth:`SplitPlan.save` wrote and checks that it belongs to these data.

    Args:
        path: The file; one that was written for the same data streamed will do.
        labels: Class of every row of each source split.
        fingerprint: Of these data.
        prefix_hash: Hash of their first training rows.
        buckets: Returns the bucket of every row of a source split; called for files of streamed data only.

    Raises:
        DataError: The file is missing or damaged, was written for other data, or names rows twice or out of range.
    """
    stored = StoredSplit.read(path)
    stored.check_data(fingerprint, prefix_hash, streamed=False)
    rows: dict[str, tuple[str, Rows]] = {}
    for name in ("test", "validation", "train"):
        source = stored.info[name]["source"]
        if source not in labels:
            raise DataError(f"split file {stored.name!r} takes {name} from {source!r}, which these data do not have")
        size = len(labels[source])
        used = np.concatenate([r for s, r in rows.values() if s == source] or [np.empty(0, np.int64)])
        if stored.streamed and buckets is not None:
            found, (low, high) = buckets(source), stored.buckets()[name][1]
            wanted = np.flatnonzero((found >= low) & (found < high))
        else:
            wanted = stored.rows.get(name, _without(size, used))
        if len(np.unique(wanted)) != len(wanted) or np.isin(wanted, used).any():
            raise DataError(f"split file {stored.name!r} is damaged: a row of {source!r} is named twice (in {name})")
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < size:
            raise DataError(f"split file {stored.name!r} is damaged: {name} names rows that {source!r} does not have")
        rows[name] = (source, wanted)
    rules = {name: {k: v for k, v in how.items() if k in _RULE_KEYS} for name, how in stored.info.items()}
    return _with_info(rows, rules)


def _with_info(rows: dict[str, tuple[str, Rows]], rules: Mapping[str, dict[str, Any]]) -> SplitPlan:
    rows = {name: rows[name] for name in SPLIT_NAMES}
    info = {}
    for name, (source, indices) in rows.items():
        if len(indices) == 0:
            raise DataError(f"split {name!r} is empty: {source!r} holds no rows for it")
        info[name] = {"rows": len(indices), "source": source, **rules[name], "digest": rows_digest(indices)}
    return SplitPlan(rows, info)


def rows_digest(rows: Rows) -> str:
    """Returns a short hash of row numbers, so that two reports can be told to speak of the same rows."""
    return hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()[:16]
