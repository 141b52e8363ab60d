"""Sums of what the steps of a training produced, kept on the device until somebody asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from erde_hub.losses import LossResult


@dataclass
class Totals:
    """Sums over batches and samples; ``average`` turns them into what a log shows."""

    batches: int = 0
    samples: int = 0
    loss: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    correct: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, other: Totals) -> None:
        """Adds the sums of other batches."""
        self.batches += other.batches
        self.samples += other.samples
        self.loss += other.loss
        for name, value in other.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value
        self.correct = [a + b for a, b in zip(self.correct or [0] * len(other.correct), other.correct, strict=True)]
        self.errors = [a + b for a, b in zip(self.errors or [0.0] * len(other.errors), other.errors, strict=True)]

    def average(self) -> dict[str, Any]:
        """Returns the mean loss and terms per batch, and per exit the accuracy, of a regression the absolute error."""
        batches, samples = max(self.batches, 1), max(self.samples, 1)
        averages: dict[str, Any] = {
            "loss": self.loss / batches,
            "terms": {name: value / batches for name, value in self.terms.items()},
        }
        if self.errors:
            return averages | {"mae": [error / samples for error in self.errors]}
        return averages | {"accuracy": [count / samples for count in self.correct]}


@dataclass
class _Batch:
    step: int
    result: LossResult
    correct: Tensor | None
    errors: Tensor | None
    samples: int


class StepMeter:
    """Loss, terms and accuracy, or absolute error, per exit of the training batches.

    Reading a number off a GPU waits for it, so batches are kept as they are (a few scalars each) until ``collect``.
    """

    def __init__(self) -> None:
        self.epoch = Totals()
        self._pending: list[_Batch] = []
        self._checked = 0

    def add(self, step: int, result: LossResult, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Adds one batch; ``step`` counts optimizer steps from 1 and is named if the loss is not finite.

        A loss over tokens has counted what is correct itself.
        """
        correct, errors, samples = result.correct, None, len(labels) if result.tokens is None else result.tokens
        with torch.no_grad():
            if correct is not None:
                pass
            elif labels.is_floating_point():
                errors = torch.stack([(exit_ - labels.view_as(exit_)).abs().mean(-1).sum() for exit_ in logits])
            else:
                correct = torch.stack([(exit_.argmax(-1) == labels).sum() for exit_ in logits])
            detached = LossResult(result.loss.detach(), result.terms, result.exit_terms)  # releases the graph
        self._pending.append(_Batch(step, detached, correct, errors, samples))

    def first_bad_batch(self) -> tuple[int, LossResult] | None:
        """Returns step and result of the first batch since the last call whose loss is NaN or infinite."""
        new = self._pending[self._checked :]
        self._checked = len(self._pending)
        if len(new) == 1:  # the usual case on a CPU, where looking costs nothing
            return None if math.isfinite(new[0].result.loss.item()) else (new[0].step, new[0].result)
        fine = torch.stack([batch.result.loss for batch in new]).isfinite().tolist() if new else []
        return next(((b.step, b.result) for b, ok in zip(new, fine, strict=True) if not ok), None)

    def collect(self) -> Totals:
        """Moves what is pending into the sums of the epoch and returns it."""
        window = Totals()
        if self._pending:
            results = [batch.result for batch in self._pending]
            window.batches = len(results)
            window.samples = sum(batch.samples for batch in self._pending)
            window.loss = _sum([result.loss for result in results])
            window.terms = {
                name: _sum([r.terms[name] for r in results if name in r.terms]) for name in results[0].terms
            }
            window.correct = _sum_per_exit([batch.correct for batch in self._pending])
            window.errors = _sum_per_exit([batch.errors for batch in self._pending])
            self._pending.clear()
            self._checked = 0
            self.epoch.add(window)
        return window

    def state(self) -> dict[str, Any]:
        """Returns the sums of the epoch so far, as plain data."""
        return vars(self.epoch).copy()

    def restart(self, state: Mapping[str, Any] | None = None) -> None:
        """Starts an epoch, at the sums of an earlier process if it was interrupted."""
        self.epoch = Totals(**state) if state else Totals()
        self._pending.clear()
        self._checked = 0


def _sum_per_exit(values: list[Tensor | None]) -> list[Any]:
    known = [value for value in values if value is not None]
    return torch.stack(known).sum(0).tolist() if known else []


def _sum(values: list[Tensor]) -> float:
    return float(torch.stack(values).cpu().double().sum())


def describe_non_finite(step: int, result: LossResult, exit_names: Sequence[str]) -> str:
    """Says which term of which exit made a loss NaN or infinite."""
    loss = float(result.loss)
    parts = [
        f"term {name!r} of exit {exit_names[index]!r} is {float(result.exit_terms[name][index])}"
        for name, index in result.non_finite()
    ]
    return f"the loss became {loss} at step {step}: {'; '.join(parts[:4]) or 'the sum over its terms overflows'}"
