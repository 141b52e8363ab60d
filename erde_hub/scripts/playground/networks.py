"""Networks as the page sees them: every exit answers once, and a threshold then says which of the answers is taken.

Without torch: an ONNX file can be shown where there is none. See checkpoint.py for checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde_hub.errors import NotSupportedError
from erde_hub.export.session import EarlyExitSession

#: Calls whose median is the time of an exit of an ONNX file.
CALLS = 20
#: Figures of a run that the page shows, and what it says of them.
PICTURES = {
    "contact_sheet.png": "Test images that take each exit at the stored threshold, with their predictions",
    "shares.png": "Samples that take each exit, against a shared threshold and against the cost that it saves",
    "reliability.png": "Accuracy against confidence at each exit, with its expected calibration error",
}


@dataclass(frozen=True)
class Answers:
    """What every exit says to samples.

    Attributes:
        probs: (E, N, K), probabilities of the classes, shallow to deep.
        scores: (E - 1, N), by which the policy decides at each early exit.
    """

    probs: NDArray[np.float64]
    scores: NDArray[np.float64]

    def __add__(self, other: Answers) -> Answers:
        """Answers to the samples of both."""
        return Answers(np.concatenate([self.probs, other.probs], 1), np.concatenate([self.scores, other.scores], 1))


@dataclass(frozen=True)
class Network:
    """A classifier with exits.

    Attributes:
        name: What the page calls it.
        kind: ``image`` or ``text``.
        exit_names: E names, the last is the network's own classifier.
        macs: Of a sample that takes each exit, E integers.
        milliseconds: The same in time, one sample per call on this machine; None where it could not be measured.
        class_names: K names.
        policy: Its name, for words.
        exits_above: Scores at or above the threshold exit; False: those strictly below it.
        threshold: The stored one: one number, or one per early exit.
        slider: Lowest and highest threshold of the slider, and its step; None for a policy without threshold.
        promise: What is known of how the stored threshold was chosen, one sentence.
        results: The report that lies next to the network, None where there is none.
        answer: Runs every exit on a list of PIL images, or of texts.
        pictures: PNG files of the report's figures, by what they show.
    """

    name: str
    kind: str
    exit_names: Sequence[str]
    macs: Sequence[int]
    milliseconds: Sequence[float] | None
    class_names: Sequence[str]
    policy: str
    exits_above: bool
    threshold: float | Sequence[float]
    slider: tuple[float, float, float] | None
    promise: str
    results: Mapping[str, Any] | None
    answer: Callable[[Sequence[Any]], Answers]
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    def route(self, answers: Answers, threshold: float | Sequence[float]) -> NDArray[np.int64]:
        """Returns the exit that each sample takes: the first whose score passes, otherwise the last.

        Args:
            answers: Of this network.
            threshold: One number, or one per early exit.

        Shape:
            Returns (N,), 0 is the first exit.
        """
        limits = np.broadcast_to(np.asarray(threshold, np.float64), len(self.exit_names) - 1)[:, None]
        exits = answers.scores >= limits if self.exits_above else answers.scores < limits
        return np.concatenate([exits, np.ones_like(exits[:1])]).argmax(0)

    def measured(self, threshold: float | Sequence[float]) -> Mapping[str, Any] | None:
        """Returns the row of the report's sweep over the test set whose threshold is nearest; None without a report."""
        rows = [] if self.results is None else [*self.results["sweep"], *self.results.get("fine_sweep", [])]
        point = None if self.results is None else self.results.get("operating_point")
        if not isinstance(threshold, (int, float)):
            return point if point is not None and list(threshold) == point["threshold"] else None
        rows += [point] if point is not None else []
        single = [row for row in rows if not isinstance(row["threshold"], list)]
        return min(single, key=lambda row: _distance(float(row["threshold"]), threshold), default=None)


def _distance(one: float, other: float) -> float:
    return 0.0 if one == other else abs(one - other)  # inf - inf is NaN


def open_onnx(path: str | os.PathLike[str]) -> Network:
    """Opens a file that ``erde-hub export`` wrote, with the report next to it if that is of the same network.

    Raises:
        CheckpointError: No such file, a damaged one, or not one of erde_hub's.
        NotSupportedError: It holds no preprocessing for images, or no tokenizer for texts.
        MissingDependencyError: onnxruntime is not installed.
    """
    session = EarlyExitSession(path)
    info = session.info
    kind, needed = ("text", "tokenizer") if info.reads_texts else ("image", "preprocessing")
    if getattr(info, needed) is None:
        raise NotSupportedError(f"{Path(path).name} holds no {needed}, so it cannot be shown {kind}s: export it again")
    early, read = info.num_early_exits, session.tokenize if info.reads_texts else session.preprocess
    blank: Any = np.zeros((1, *info.input_size), np.float32)
    if info.reads_texts:
        blank = {"input_ids": np.zeros((1, min(info.input_size[0], info.max_length or info.input_size[0])), np.int64)}
    low, high = info.threshold_range
    above = bool(session(blank, low).exit_index[0] == 0)  # at its lowest threshold all samples exit at once
    now, never = (low, high) if above else (high, low)
    plans = [[never] * e + [now] * (early - e) for e in range(early + 1)]

    def answer(samples: Sequence[Any]) -> Answers:
        inputs = read(samples)
        probs = np.stack([_softmax(session(inputs, plan).logits) for plan in plans])
        return Answers(probs, SCORES[info.policy](probs[:-1]))

    def milliseconds(plan: Sequence[float]) -> float:
        times = []
        for _ in range(CALLS):
            started = time.perf_counter()
            session(blank, plan)
            times.append(1e3 * (time.perf_counter() - started))
        return float(np.median(times))

    results = _report_of(Path(path).parent, info.exit_names, info.cumulative_macs)
    stored = info.threshold[0] if len({*info.threshold}) == 1 else info.threshold
    top = math.log(len(info.id2label)) if math.isinf(high) else high
    return Network(
        name=Path(path).name,
        kind=kind,
        exit_names=info.exit_names,
        macs=info.cumulative_macs,
        milliseconds=[milliseconds(plan) for plan in plans],
        class_names=list(info.id2label.values()),
        policy=info.policy,
        exits_above=above,
        threshold=stored,
        slider=slider(low, top),
        promise=promise_of(results),
        results=results,
        answer=answer,
        pictures=pictures_of(results, lambda name: Path(path).parent / name),
    )


#: Scores of the policies that can be exported, of probabilities (..., K).
SCORES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "entropy": lambda probs: -(probs * np.log(np.where(probs > 0, probs, 1))).sum(-1),
    "confidence": lambda probs: probs.max(-1),
    "margin": lambda probs: np.diff(np.sort(probs, -1)[..., -2:], axis=-1)[..., 0],
}


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def slider(low: float, high: float, whole: bool = False) -> tuple[float, float, float]:
    """Returns the lowest and the highest threshold of a slider, and its step, a number that reads well."""
    step = 1.0 if whole else 10 ** math.floor(math.log10((high - low) / 100))
    return round(math.floor(low / step) * step, 10), round(math.ceil(high / step) * step, 10), step


def promise_of(results: Mapping[str, Any] | None) -> str:
    """Says in words how the stored threshold was chosen, as far as a report knows."""
    choice = (results or {}).get("threshold_choice")
    if choice is None:
        return "Nothing is stored on how the threshold was chosen: it promises nothing."
    samples = f", on {choice['samples']:,} {choice['split']} samples" if "samples" in choice else ""
    limits = " It holds for data like these." if samples else ""
    return f"The stored threshold: {choice['rule']}{samples}.{limits}"


def pictures_of(
    results: Mapping[str, Any] | None, find: Callable[[str], str | os.PathLike[str] | None]
) -> dict[str, bytes]:
    """Reads the figures that a report lists, by what they show; those that cannot be found are left out."""
    listed = (results or {}).get("figures", [])
    files = {caption: find(name) for name, caption in PICTURES.items() if name in listed}
    return {caption: Path(file).read_bytes() for caption, file in files.items() if file and Path(file).is_file()}


def _report_of(folder: Path, exit_names: Sequence[str], macs: Sequence[int]) -> dict[str, Any] | None:
    """Reads results.json of a folder; None where there is none, or one of another network."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows = [(row["exit"], row["macs"]) for row in results["per_exit"]]
        return results if rows == list(zip(exit_names, macs, strict=True)) and results["sweep"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
