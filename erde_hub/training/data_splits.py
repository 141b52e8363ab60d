"""Which rows train, which choose thresholds, which are reported: rules that know labels and nothing else.

All choices are hashes of the row number, so they are the same on every machine and do not depend on a generator's
version. The rules work for any data with class labels, images or not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde_hub.errors import DataError
from erde_hub.evaluation._files import write_text

from .augment import SPLIT_STREAM, counter_hash

Labels = NDArray[np.int64]
Rows = NDArray[np.int64]

SPLIT_NAMES = ("train", "validation", "test")
VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2
_FORMAT_VERSION = 1


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


@dataclass
class SplitPlan:
    """The rows of train, validation and test, each with the source split it is taken from, and how that was decided."""

    rows: dict[str, tuple[str, Rows]]
    info: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], dataset: str, fingerprint: str) -> None:
        """Writes the held-out rows as JSON, beside first and then renamed.

        Raises:
            CheckpointWriteError: The file cannot be written.
        """
        content = {
            "format_version": _FORMAT_VERSION,
            "dataset": dataset,
            "fingerprint": fingerprint,
            "splits": self.info,
            # train is what these leave of their sources
            "rows": {
                name: rows.tolist()
                for name, (_, rows) in self.rows.items()
                if name != "train" and self.info[name]["rule"] != "given"
            },
        }
        write_text(path, json.dumps(content) + "\n")


def plan_splits(labels: Mapping[str, Labels], seed: int = 0) -> SplitPlan:
    """Decides the three splits from the source splits that there are.

    ==========================  ==============================================================================
    source splits               rule
    ==========================  ==============================================================================
    train, validation, test     as given
    train, test                 validation is a stratified 10 % of train
    train, validation           validation is halved, stratified, into validation and test
    train                       test is a stratified 20 %, validation a stratified 10 % of the rest
    ==========================  ==============================================================================

    Args:
        labels: Class of every row of each source split.
        seed: Decides which rows are held out.

    Raises:
        DataError: There is no train split, or too few rows to hold any out.
    """
    if "train" not in labels:
        raise DataError(f"there is no split 'train' (found: {', '.join(map(repr, labels)) or 'none'})")
    everything = {name: np.arange(len(values)) for name, values in labels.items()}
    train = everything["train"]
    rows: dict[str, tuple[str, Rows]] = {}
    rules: dict[str, dict[str, Any]] = {}
    if "test" in labels:
        rows["test"], rules["test"] = ("test", everything["test"]), {"rule": "given"}
    elif "validation" in labels:
        first, second = halve_split(labels["validation"], seed)
        rows["validation"], rows["test"] = ("validation", first), ("validation", second)
        rules["validation"] = rules["test"] = {"rule": "stratified half of validation", "seed": seed}
    else:
        kept, held = hold_out(labels["train"], TEST_FRACTION, seed)
        train, rows["test"] = kept, ("train", held)
        rules["test"] = {"rule": "stratified part of train", "fraction": TEST_FRACTION, "seed": seed}
    if "validation" not in rows:
        if "validation" in labels:
            rows["validation"], rules["validation"] = ("validation", everything["validation"]), {"rule": "given"}
        else:
            kept, held = hold_out(labels["train"][train], VALIDATION_FRACTION, seed)
            rows["validation"], train = ("train", train[held]), train[kept]
            rules["validation"] = {
                "rule": "stratified part of train",
                "fraction": VALIDATION_FRACTION,
                "seed": seed,
            }
    rows["train"] = ("train", train)
    rules["train"] = {"rule": "given" if len(train) == len(labels["train"]) else "rest of train"}
    return _with_info(rows, rules)


def load_plan(path: str | os.PathLike[str], labels: Mapping[str, Labels], fingerprint: str) -> SplitPlan:
    """Reads a plan that :meth:`SplitPlan.save` wrote and checks that it belongs to these data.

    Raises:
        DataError: The file is missing or damaged, was written for other data, or names rows twice or out of range.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored, held, splits = content["fingerprint"], content["rows"], content["splits"]
        sources = {name: splits[name]["source"] for name in SPLIT_NAMES}
        rules = {name: {k: v for k, v in splits[name].items() if k in ("rule", "fraction", "seed")} for name in splits}
        named = {name: np.asarray(held[name], dtype=np.int64).reshape(-1) for name in held}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"split file {path.name!r} cannot be used: {type(error).__name__}: {error}") from error
    if stored != fingerprint:
        raise DataError(
            f"split file {path.name!r} was written for data with fingerprint {stored}, these have {fingerprint}: use"
            " the data the model was trained on"
        )
    rows: dict[str, tuple[str, Rows]] = {}
    for name in ("test", "validation", "train"):
        source = sources[name]
        if source not in labels:
            raise DataError(f"split file {path.name!r} takes {name} from {source!r}, which these data do not have")
        size = len(labels[source])
        used = np.concatenate([r for s, r in rows.values() if s == source] or [np.empty(0, np.int64)])
        wanted = named.get(name, _without(size, used))
        if len(np.unique(wanted)) != len(wanted) or np.isin(wanted, used).any():
            raise DataError(f"split file {path.name!r} is damaged: a row of {source!r} is named twice (in {name})")
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < size:
            raise DataError(f"split file {path.name!r} is damaged: {name} names rows that {source!r} does not have")
        rows[name] = (source, wanted)
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
