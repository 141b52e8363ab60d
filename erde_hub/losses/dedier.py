"""DEDIER: samples that an early read-out of the student gets wrong with confidence weigh more in distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from erde_hub._arguments import check_choice, check_flag, check_number, check_whole
from erde_hub.errors import ConfigError, InputTypeError, ShapeError

from . import functional
from ._checks import check_index, check_labels
from .additions import Extensible, SampleWeight
from .batch import ExitBatch
from .kd import KDLoss

#: The early read-out: an exit of the student, or a head that is trained for the purpose on the same feature.
READOUT_SOURCES = ("exit", "head")
#: Where the confidence of the read-out is taken from.
ReadoutConfidence = Literal["softmax", "laplace", "prediction_set"]


def readout_weights(
    logits: Tensor, labels: Tensor, alpha: float, beta: float, confidence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight of each sample from the logits of an early read-out, and where that is wrong.

    With p = softmax(logits) and cm = p_(1) - p_(2), the largest minus the second: exp(beta cm^alpha) where argmax p is
    not the label, else 1. The power is the reading of the released code; with a small alpha most wrong samples get
    about exp(beta).

    Args:
        logits: Of the read-out.
        labels: Class indices.
        alpha: Power of the confidence.
        beta: Factor of the exponent.
        confidence: cm, where it is not the margin of the softmax.

    Shape:
        logits: (N, K). labels, confidence: (N,), confidence in [0, 1]. Returns (N,) weights in [1, exp(beta)] and (N,)
        bool.
    """
    log_probs = functional.log_probs(logits.detach())
    wrong = ~functional.correct(log_probs, labels)
    cm = probability_margin(log_probs) if confidence is None else confidence.to(log_probs)
    weights = torch.exp(beta * cm**alpha)
    return torch.where(wrong, weights, torch.ones_like(weights)), wrong


def probability_margin(log_probs: Tensor) -> Tensor:
    """Largest probability minus the second, (..., K) to (...)."""
    best = log_probs.topk(2, dim=-1).values.exp()
    return (best[..., 0] - best[..., 1]).clamp_min(0.0)


class ReadoutWeight(SampleWeight):
    """Weight per training sample from the predictions of an early read-out of the student.

    At the end of an epoch the read-out predicts the whole training set, and every sample gets a new weight::

        cm = p_(1) - p_(2) of the read-out's softmax, its confidence margin
        w = exp(beta cm^alpha)  if the read-out is wrong, else 1

    A student that is about to rely on what is easy and misleading shows it in its early layers: they are confident and
    wrong on the samples where the easy cue does not hold. These count up to exp(beta) times as much from then on.

    An exit of the student that is read, and those before it, are not weighed themselves: up to exp(beta) times the
    weight on what it got wrong turns it round, so that it gets everything else wrong in the next round, and so on. An
    auxiliary head needs no such exception, since it is trained anew and without weights.

    Weights lie in a table, addressed by the stable index of each sample. The table is a buffer: it is saved with a
    run's checkpoints and resumed; :meth:`update` gathers it from all processes. Until the first round all weights are
    1. The Distiller runs the rounds; in your own loop call :meth:`allocate` once and :meth:`update` per round.

    Args:
        readout_alpha: alpha; 0.05 for Waterbirds, 0.1 for CelebA, 0.2 for MultiNLI.
        readout_beta: beta; 4, 3.5 and 3 there. Weights reach exp(beta), so the effective learning rate jumps with it.
        readout_source: "exit" reads the predictions of one of the student's own exits and weighs the exits after it;
            "head" weighs all exits and trains a head of two convolutions (tokens: one hidden layer) from scratch on the
            detached feature of that exit in every round, as the authors do for students without exits. Such a student
            is refused here: give it one exit, which says where the head reads, and the loss ``exit_weights=[0, 1]``, so
            that it is trained as if it had none.
        readout_exit: Which early exit, from 0.
        readout_every: Epochs from round to round, L; the first is after the first epoch.
        readout_epochs: Epochs that the head is trained for in each round, R.
        readout_lr: Learning rate of the head (AdamW).
        readout_sticky: A sample that has become correct keeps its last weight, as in the released code; otherwise it
            returns to 1.
        readout_normalize: Divide by the mean over the training set, which leaves the size of the term as it is.
        readout_weighs_ce: Weigh the cross-entropy too, as the released code does; the same where its weight is 0.
        readout_confidence: cm. "softmax" is the margin above; "laplace" the margin of the probabilities of a
            :class:`~erde_hub.calibration.LaplaceCalibrator`; "prediction_set" is 1 - (size - 1) / (K - 1) of the set of
            an :class:`~erde_hub.prediction_sets.AVCSClassifier`, 0 where it is empty. The last two are fitted in every
            round on the validation split: where the misleading cue does not hold there, the read-out is less sure.

    Raises:
        ConfigError: A number out of range, or no such source.
        InputTypeError: An argument of the wrong type.

    References:
        Tiwari et al., Using Early Readouts to Mediate Featural Bias in Distillation, 2023, arXiv 2310.18590; the power
        in the exponent, the defaults of both schedules and both switches as in the released code. Deviations: the
        margin is top-1 minus top-2 for any number of classes; the student's own exits as a source, ``readout_lr``,
        ``readout_normalize`` and ``readout_confidence`` are ours; the feature is detached, where the released code
        freezes the student's stem.

    Example:
        >>> import torch
        >>> weight = ReadoutWeight(readout_alpha=1.0, readout_beta=2.0)
        >>> weight.allocate(4)
        >>> logits = torch.tensor([[9.0, -9.0], [9.0, -9.0], [0.0, 0.0]])
        >>> weight.update(torch.tensor([0, 1, 3]), logits, torch.tensor([0, 1, 1]))["wrong"]
        0.6666666666666666
        >>> [round(value, 2) for value in weight.table.tolist()]  # correct, confident and wrong, not seen, no margin
        [1.0, 7.39, 1.0, 1.0]
    """

    name: ClassVar[str] = "dedier"
    state: ClassVar[str] = "a weight per training sample, renewed between epochs"
    needs_index: ClassVar[bool] = True
    table: Tensor
    scale: Tensor

    def __init__(
        self,
        readout_alpha: float = 0.05,
        readout_beta: float = 4.0,
        readout_source: str = "exit",
        readout_exit: int = 0,
        readout_every: int = 1,
        readout_epochs: int = 1,
        readout_lr: float = 1e-3,
        readout_sticky: bool = False,
        readout_normalize: bool = False,
        readout_weighs_ce: bool = False,
        readout_confidence: ReadoutConfidence = "softmax",
    ) -> None:
        super().__init__()
        self.readout_alpha = check_number("readout_alpha", readout_alpha, zero=False)
        self.readout_beta = check_number("readout_beta", readout_beta, zero=True)
        self.readout_source = check_choice("readout_source", readout_source, READOUT_SOURCES)
        self.readout_exit = check_whole("readout_exit", readout_exit, 0)
        self.readout_every = check_whole("readout_every", readout_every, 1)
        self.readout_epochs = check_whole("readout_epochs", readout_epochs, 1)
        self.readout_lr = check_number("readout_lr", readout_lr, zero=False)
        self.readout_sticky = check_flag("readout_sticky", readout_sticky)
        self.readout_normalize = check_flag("readout_normalize", readout_normalize)
        self.readout_weighs_ce = check_flag("readout_weighs_ce", readout_weighs_ce)
        self.readout_confidence = check_choice("readout_confidence", readout_confidence, get_args(ReadoutConfidence))
        self.register_buffer("table", torch.ones(0))
        self.register_buffer("scale", torch.ones(()))

    def targets(self, loss: Extensible) -> tuple[str, ...]:
        """Returns the distillation terms, and ``ce`` if that is weighed too."""
        return (*super().targets(loss), "ce") if self.readout_weighs_ce else super().targets(loss)

    def check_exits(self, num_exits: int) -> None:
        """Refuses a student without the early exit that is read."""
        if self.readout_exit >= num_exits - 1:
            raise ConfigError(
                f"'dedier' reads early exit {self.readout_exit} and the student has {num_exits - 1} early exits: "
                + (f"give readout_exit 0 to {num_exits - 2}" if num_exits > 1 else self._one_exit())
            )

    def _one_exit(self) -> str:
        where = ", where the head reads, and exit_weights=[0, 1] to leave it untrained"
        return "give it one" + (where if self.readout_source == "head" else "")

    def allocate(self, num_samples: int) -> None:
        """Makes the table, all weights 1.

        Args:
            num_samples: Largest index plus one.
        """
        check_whole("num_samples", num_samples, 1)
        self.table, self.scale = self.table.new_ones(num_samples), torch.ones_like(self.scale)

    def weights(self, batch: ExitBatch) -> Tensor:
        """Returns the weights (E, N) of the batch; 1 before the first round, and at the exit that is read.

        Raises:
            ConfigError: The student has no early exit that is read and none after it that could be weighed.
            InputTypeError: The batch has no index.
            ShapeError: An index outside the table.
        """
        if self.readout_source == "exit":
            self.check_exits(batch.num_exits)
        if not len(self.table):
            return batch.student_logits.new_ones(batch.num_samples)
        index = _required(batch.index)
        if index.device.type == "cpu":
            self._check_range(index)
        weights = (self.table[index] * self.scale).to(batch.student_logits.dtype).repeat(batch.num_exits, 1)
        if self.readout_source == "exit":
            weights[: self.readout_exit + 1] = 1.0
        return weights

    def update(
        self, index: Tensor, logits: Tensor, labels: Tensor, confidence: Tensor | None = None
    ) -> dict[str, float]:
        """Ends a round: gives every sample its new weight. All processes call it, each with its own samples.

        Args:
            index: Stable numbers. A sample that several processes hold, as padding, counts once.
            logits: Those of the read-out.
            labels: Class indices.
            confidence: How sure the read-out is, where ``readout_confidence`` is not "softmax".

        Shape:
            index, labels: (N,), N may be 0 and differ between processes. logits: (N, K). confidence: (N,) in [0, 1].

        Returns:
            ``wrong``, the fraction of samples that the read-out gets wrong, and ``mean_weight``, ``max_weight`` of all.

        Raises:
            ConfigError: :meth:`allocate` was not called.
            InputTypeError, ShapeError, LabelError: Tensors that do not fit each other, the table or
                ``readout_confidence``; no sample at all.
        """
        if not len(self.table):
            raise ConfigError("the table of weights has no rows: call allocate(largest index + 1) once before training")
        if (confidence is None) != (self.readout_confidence == "softmax"):
            needed = "takes none" if confidence is not None else "needs the confidence= (N,) of every sample"
            raise InputTypeError(f"a round with readout_confidence={self.readout_confidence!r} {needed}")
        if confidence is not None and confidence.shape != labels.shape:
            raise ShapeError(f"confidence must be {tuple(labels.shape)} as the labels, got {tuple(confidence.shape)}")
        gathered = self.table.new_zeros(3, len(self.table))  # weight where wrong, wrong, seen
        if len(logits):
            rows = _required(check_index(index, logits)).to(self.table.device)
            self._check_range(rows)
            labels = check_labels(labels, logits, values=True)
            weights, wrong = readout_weights(logits, labels, self.readout_alpha, self.readout_beta, confidence)
            values = torch.stack([weights * wrong, wrong.to(weights.dtype), torch.ones_like(weights)])
            gathered[:, rows] = values.to(self.table)
        if self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(gathered)
        is_wrong, seen = gathered[1] > 0, gathered[2] > 0
        if not seen.any():
            raise ShapeError("a round needs the logits of at least one sample, and no process has any")
        before = self.table if self.readout_sticky else torch.ones_like(self.table)
        self.table = torch.where(is_wrong, gathered[0] / gathered[1].clamp_min(1.0), before)
        mean = self.table[seen].mean()
        if self.readout_normalize:
            self.scale = 1 / mean
        return {
            "wrong": float(is_wrong[seen].double().mean()),
            "mean_weight": float(mean),
            "max_weight": float(self.table[seen].max()),
        }

    def _check_range(self, index: Tensor) -> None:
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= len(self.table):
            raise ShapeError(
                f"index {low if low < 0 else high} is outside the table of {len(self.table)} weights: the index of a"
                " sample is its row number in the training set that allocate() was called for"
            )


def _required(index: Tensor | None) -> Tensor:
    if index is None:
        raise InputTypeError(
            "'dedier' looks the weight of each sample up: pass index=, the stable number of every sample of the batch"
        )
    return index


class DEDIERLoss(KDLoss):
    """Hinton's distillation whose divergence counts more on samples that an early read-out gets wrong with confidence.

    Summed over exits e, averaged over samples n::

        L = sum_e w_e mean_n { ce_weight CE(s, y) + v kl_weight T^2 KL(p_t^T || p_s^T) }

    with v looked up in the table of :class:`ReadoutWeight`: exp(beta cm^alpha) where the read-out was wrong with margin
    cm, else 1. The same weight joins any other loss: ``create_loss("erde").add(ReadoutWeight())``. It is meant for data
    with a misleading cue and a teacher that does not rely on it; on clean data it weighs up what is hard or has a wrong
    label.

    Args:
        temperature: Softens both sides of the divergence; positive. The divergence is multiplied by its square.
        kl_weight: Factor of the weighed divergence; above 0.
        ce_weight: Factor of the cross-entropy; 0 in the released code's default.
        readout_alpha: Power of the margin in the exponent.
        readout_beta: Factor of the exponent; weights reach exp(beta).
        readout_source: "exit" reads one of the student's own exits and weighs those after it, "head" trains a head on
            the detached feature of that exit and weighs all.
        readout_exit: Which early exit, from 0.
        readout_every: Epochs from one renewal of the weights to the next; the first is after the first epoch.
        readout_epochs: Epochs that the head is trained for each time.
        readout_lr: Learning rate of the head.
        readout_sticky: A sample that has become correct keeps its last weight.
        readout_normalize: Divide the weights by their mean over the training set.
        readout_weighs_ce: Weigh the cross-entropy too.
        label_smoothing: Fraction of each target of the cross-entropy that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; None is the rule of
            :func:`~erde_hub.losses.map_teacher_exits`.
        readout_confidence: cm: "softmax", "laplace" or "prediction_set"; the last two read the validation split.

    Shape:
        student_logits: E tensors (N, K), shallow to deep. teacher_logits: any number of tensors (N, K). labels, index:
            (N,). The loss is a scalar.

    Raises:
        ConfigError: A number out of range, no divergence to weigh.
        InputTypeError: An argument of the wrong type.

    References:
        Tiwari et al., Using Early Readouts to Mediate Featural Bias in Distillation, 2023, arXiv 2310.18590.
        Deviations: those of :class:`ReadoutWeight`; several exits with the same weight of the sample.

    Example:
        >>> import torch
        >>> teacher, student, labels = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), torch.tensor([1])
        >>> loss = DEDIERLoss(temperature=2.0, readout_alpha=1.0, readout_beta=1.0, readout_source="head")
        >>> loss.readout.allocate(1)
        >>> before = loss([student], [teacher], labels, index=torch.tensor([0])).loss
        >>> summary = loss.readout.update(torch.tensor([0]), torch.tensor([[50.0, 0.0]]), labels)  # wrong, margin 1
        >>> after = loss([student], [teacher], labels, index=torch.tensor([0])).loss
        >>> round((after / before).item(), 4)  # e
        2.7183
    """

    state: ClassVar[str] = ReadoutWeight.state

    def __init__(
        self,
        temperature: float = 3.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        readout_alpha: float = 0.05,
        readout_beta: float = 4.0,
        readout_source: str = "exit",
        readout_exit: int = 0,
        readout_every: int = 1,
        readout_epochs: int = 1,
        readout_lr: float = 1e-3,
        readout_sticky: bool = False,
        readout_normalize: bool = False,
        readout_weighs_ce: bool = False,
        label_smoothing: float = 0.0,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
        readout_confidence: ReadoutConfidence = "softmax",
    ) -> None:
        super().__init__(temperature, kl_weight, ce_weight, label_smoothing, exit_weights, teacher_exits)
        self._contain(
            ReadoutWeight(
                readout_alpha, readout_beta, readout_source, readout_exit, readout_every, readout_epochs, readout_lr,
                readout_sticky, readout_normalize, readout_weighs_ce, readout_confidence,
            )
        )  # fmt: skip

    @property
    def readout(self) -> ReadoutWeight:
        """The weights and their table."""
        return self.sample_weights[0]  # type: ignore[return-value]


def dedier_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
    readout_logits: Tensor,
    **settings: Any,
) -> Tensor:
    """Returns the scalar of :class:`DEDIERLoss` with the weights that a read-out of the same batch gives to all exits.

    Args:
        student_logits: Of every exit.
        teacher_logits: Of every exit of the teacher.
        labels: Class indices.
        readout_logits: Logits of the read-out, (N, K).
        **settings: Arguments of :class:`DEDIERLoss`.
    """
    loss = DEDIERLoss(**{"readout_source": "head", **settings})
    index = torch.arange(len(labels), device=labels.device)
    loss.to(student_logits[0].device, functional.upcast(student_logits[0]).dtype)
    loss.readout.allocate(len(labels))
    loss.readout.update(index, readout_logits, labels)
    return loss(student_logits, teacher_logits, labels, index=index).loss
