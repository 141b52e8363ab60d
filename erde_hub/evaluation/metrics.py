"""Accuracy, NLL, Brier score and calibration error, from per-sample numbers that are computed once.

Everything is float64. Calibration error is written here because torchmetrics 1.9 has left-closed bins, with another one
for confidences of exactly 1, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from erde_hub.errors import ConfigError, InputTypeError, RecordsError, ShapeError
from erde_hub.records import row_chunks
from erde_hub.tasks import check_class_labels

from .ranking import aurc

#: Number of equal, right-closed bins of the calibration error.
ECE_BINS = 15


@dataclass(frozen=True, eq=False)
class SampleMetrics:
    """What every metric is computed from, one value per sample (or per exit and sample).

    Attributes:
        correct: The label is the best class; among equal logits the first class wins, as in argmax.
        top5: The label is among the five best classes; None where there are no more than five.
        nll: Negative log-probability of the label, in nats.
        brier: Squared distance of the probabilities to the label's one-hot vector, summed over classes.
        confidence: Largest probability.
        covered: The label is in the prediction set; None without sets.
        set_size: Number of classes in the prediction set; None without sets.

    Shape:
        All (N,), or (E, N) after :meth:`stack`.
    """

    correct: Tensor
    top5: Tensor | None
    nll: Tensor
    brier: Tensor
    confidence: Tensor
    covered: Tensor | None = None
    set_size: Tensor | None = None

    @classmethod
    def stack(cls, parts: Sequence[SampleMetrics]) -> SampleMetrics:
        """Stacks the exits: E objects of (N,) give one of (E, N)."""
        return cls._join(parts, torch.stack)

    @classmethod
    def concatenate(cls, parts: Sequence[SampleMetrics]) -> SampleMetrics:
        """Puts samples one after the other."""
        return cls._join(parts, torch.cat)

    def at(self, exit_index: Tensor) -> SampleMetrics:
        """Takes each sample's own exit: (E, N) and indices (N,) give (N,)."""
        rows = exit_index.unsqueeze(0)
        return self._join([self], lambda values: values[0].gather(0, rows).squeeze(0))

    @classmethod
    def _join(cls, parts: Sequence[SampleMetrics], join: Callable[[list[Tensor]], Tensor]) -> SampleMetrics:
        """Joins each field of the parts; one that a part lacks stays None."""
        joined: dict[str, Any] = {}
        for name in (f.name for f in fields(cls)):
            values = [getattr(part, name) for part in parts]
            joined[name] = None if any(value is None for value in values) else join(values)
        return cls(**joined)

    def summary(self, bins: int = ECE_BINS) -> dict[str, float]:
        """Summarises samples (N,): accuracy, top5 (above five classes), nll, brier, ece, aurc; fractions or nats.

        With prediction sets also coverage, a fraction, and set_size, the mean number of classes.
        """
        values = {"accuracy": self.correct.double().mean().item()}
        if self.top5 is not None:
            values["top5"] = self.top5.double().mean().item()
        values["nll"] = self.nll.mean().item()
        values["brier"] = self.brier.mean().item()
        values["ece"] = calibration_error(self.confidence, self.correct, bins)
        values["aurc"] = aurc(self.confidence, self.correct)
        if self.covered is not None and self.set_size is not None:
            values["coverage"] = self.covered.double().mean().item()
            values["set_size"] = self.set_size.double().mean().item()
        return values

    def with_sets(self, sets: Tensor, labels: Tensor) -> SampleMetrics:
        """Adds whether prediction sets hold the label, and how large they are.

        Shape:
            sets: (E, N, K) bool, for metrics that are (E, N). labels: (N,).

        Raises:
            ShapeError: The sets are not one per exit and sample.
            InputTypeError: They are not booleans.
        """
        if sets.ndim != 3 or sets.shape[:2] != self.correct.shape or 0 in sets.shape:
            raise ShapeError(
                f"sets must be (exits, samples, classes) with {tuple(self.correct.shape)} exits and samples, got"
                f" {tuple(sets.shape)}"
            )
        if sets.dtype != torch.bool:
            raise InputTypeError(f"sets must be bool, True for each class that is in, got {sets.dtype}")
        held = sets.gather(2, labels.long()[None, :, None].expand(len(sets), -1, 1))[..., 0]
        return replace(self, covered=held, set_size=sets.sum(-1))


def sample_metrics(logits: Tensor, labels: Tensor) -> SampleMetrics:
    """Computes the per-sample numbers of one exit, or of routed logits.

    Log-probabilities may be given in place of logits: a log-softmax leaves them as they are.

    Shape:
        logits: (N, K). labels: (N,) class indices.

    Raises:
        ShapeError: The shapes are not (N, K) and (N,), or N is 0.
        InputTypeError: Logits are not floating point or labels are not integers.
        LabelError: A label lies outside the classes.
        RecordsError: A logit is NaN; the message names the row.
    """
    _check(logits, labels)
    return SampleMetrics.concatenate([_rows(logits[rows], labels[rows]) for rows in row_chunks(*logits.shape)])


def exit_metrics(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> dict[str, float]:
    """Returns accuracy, top5 (where there are more than five classes), nll, brier, ece and aurc of one exit.

    Args:
        logits: Logits or log-probabilities.
        labels: Class indices.
        bins: Number of right-closed bins of the calibration error.

    Shape:
        logits: (N, K). labels: (N,).

    Raises:
        ShapeError, InputTypeError, LabelError, RecordsError: As :func:`sample_metrics`.
        ConfigError: ``bins`` is not a positive integer.

    Example:
        >>> exit_metrics(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))["accuracy"]
        0.5
    """
    return sample_metrics(logits, labels).summary(bins)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error: the mean over samples of ``|accuracy - confidence|`` of their bin.

    Bin b of B holds confidences in (b/B, (b+1)/B], so that a saturated confidence of 1 counts in the last bin; 0 counts
    in the first.

    Shape:
        confidence, correct: (N,).

    Raises:
        ConfigError: ``bins`` is not a positive integer.

    References:
        Guo et al., On calibration of modern neural networks, 2017, arXiv 1706.04599, equation 3.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ConfigError(f"bins must be a positive integer, got {bins!r}")
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    position = torch.bucketize(confidence.double(), edges)
    gap = torch.bincount(position, weights=correct.double() - confidence.double(), minlength=bins)
    return gap.abs().sum().item() / len(confidence)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or 0 in logits.shape:
        raise ShapeError(
            "logits must be (N, K) and labels (N,), with at least one sample, got shapes"
            f" {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.is_floating_point():
        raise InputTypeError(f"logits must be floating point, got {logits.dtype}")
    check_class_labels(labels, len(labels), logits.shape[1])
    bad = logits.isnan().any(1).nonzero()
    if len(bad):
        raise RecordsError(f"logits of row {bad[0].item()} hold NaN ({len(bad)} of {len(logits)} rows do)")


def _rows(logits: Tensor, labels: Tensor) -> SampleMetrics:
    labels = labels.long().unsqueeze(1)
    z = logits.double()
    own = z.gather(1, labels)
    # Rank of the label, ties going to the lower class: no sorting, and rank 0 is exactly argmax.
    first = torch.arange(z.shape[1], device=z.device) < labels
    rank = ((z > own) | ((z == own) & first)).sum(1)
    log_probs = z.log_softmax(1)
    nll = 0 - log_probs.gather(1, labels).squeeze(1)  # not a negation, which gives -0.0
    probs = log_probs.exp_()
    confidence = probs.amax(1)
    brier = probs.scatter_add_(1, labels, -torch.ones_like(own)).square_().sum(1)
    top5 = rank < 5 if z.shape[1] > 5 else None
    return SampleMetrics(rank == 0, top5, nll, brier, confidence)
