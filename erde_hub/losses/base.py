"""What a loss over exits is: named per-sample terms with masks and weights, and one reduction.

A method is a list of :class:`Term`; everything else - checking and stacking the logits, precision, the map of teacher
exits, masks, weights per sample and per exit, means that agree between one process and many, what goes into the log -
happens once, here. So a new method is a ``terms`` of a few lines, and methods combine by concatenating terms or by
changing the weights of each other's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from erde_hub.errors import ConfigError, InputTypeError

from . import functional
from ._checks import check_choice, check_exit_logits, check_labels, check_same_classes
from .exit_weights import check_epoch, check_exit_weights, exit_weights_preset
from .teacher_exits import check_teacher_exits, map_teacher_exits

#: What the sum over samples is divided by: the batch, the samples under the term's mask, nothing.
REDUCTIONS = ("batch", "subset", "sum")


@dataclass
class LossResult:
    """A loss with its parts.

    The identities ``terms[name] == sum_e exit_weights[e] * exit_terms[name][e]`` and ``loss == sum of weight *
    terms[name]`` over the terms of the method hold, the weights being the method's own (``kl_weight``, ``ce_weight``,
    ``-entropy_weight``, ...). ``teacher_right`` and the like are for the log only and no part of the loss.

    Attributes:
        loss: Scalar to call ``backward`` on, float32 (float64 for float64 logits).
        terms: Detached scalars by name, for the log.
        exit_terms: The same per exit, detached tensors (E,), before exit weights.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    exit_terms: dict[str, Tensor] = field(default_factory=dict)

    def non_finite(self) -> list[tuple[str, int]]:
        """Returns term and exit of every part that is NaN or infinite.

        It waits for the device: call it once the loss is known not to be finite.
        """
        return [
            (name, exit_)
            for name, values in self.exit_terms.items()
            for exit_, fine in enumerate(torch.isfinite(values).tolist())
            if not fine
        ]


@dataclass
class Term:
    """One part of a loss, per exit and sample.

    Its value at an exit is the sum over samples of ``values * sample_weights * mask``, divided as the loss's reduction
    says; its share of the loss is ``weight`` times the sum of that over exits.

    Attributes:
        name: Key in the log.
        values: (E, N), one number per exit and sample.
        weight: Its factor in the loss; negative for what is maximised.
        mask: (E, N) bool, True where the term applies; None is everywhere. Values must be finite outside of it too.
        sample_weights: (E, N) or (N,), detached; None is 1. They do not enter the denominator.
    """

    name: str
    values: Tensor
    weight: float
    mask: Tensor | None = None
    sample_weights: Tensor | None = None


class ExitBatch:
    """The logits of one batch, stacked over the student's exits, with what several terms share computed once.

    Shape:
        student_logits: (E, N, K), float32 or float64. teacher_logits: the same, exit e holding what student exit e
            learns from.
        teacher_final_logits: (N, K), the teacher's last exit, whatever the map. labels: (N,).
    """

    def __init__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_final_logits: Tensor | None = None,
    ) -> None:
        self.student_logits = student_logits
        self.labels = labels
        self._teacher_logits = teacher_logits
        self._teacher_final_logits = teacher_final_logits
        self._student_log_probs: dict[float, Tensor] = {}
        self._teacher_log_probs: dict[float, Tensor] = {}
        self.num_exits, self.num_samples, self.num_classes = student_logits.shape

    @property
    def teacher_logits(self) -> Tensor:
        """Detached logits (E, N, K) of the teacher exits that the student's are paired with."""
        return _given(self._teacher_logits)

    @property
    def teacher_final_logits(self) -> Tensor:
        """Detached logits (N, K) of the teacher's last exit."""
        return _given(self._teacher_final_logits)

    def student_log_probs(self, temperature: float = 1.0) -> Tensor:
        """Returns log softmax(s / temperature), (E, N, K), computed once per temperature."""
        if temperature not in self._student_log_probs:
            self._student_log_probs[temperature] = functional.log_probs(self.student_logits, temperature)
        return self._student_log_probs[temperature]

    def teacher_log_probs(self, temperature: float = 1.0) -> Tensor:
        """Returns log softmax(t / temperature), (E, N, K), detached, computed once per temperature."""
        if temperature not in self._teacher_log_probs:
            self._teacher_log_probs[temperature] = functional.log_probs(self.teacher_logits, temperature)
        return self._teacher_log_probs[temperature]

    @cached_property
    def teacher_right(self) -> Tensor:
        """Where the teacher exit paired with each student exit names the label, (E, N) bool."""
        return functional.correct(self.teacher_logits, self.labels)

    @cached_property
    def teacher_right_at_final_exit(self) -> Tensor:
        """Where the teacher's last exit names the label, (N,) bool."""
        return functional.correct(self.teacher_final_logits, self.labels)


class ExitLoss(nn.Module):
    """A loss over all exits of a student, with or without a teacher.

    Subclasses implement :meth:`terms`, store each constructor argument under its own name, and call
    ``super().__init__`` with those that are common to all losses.

    Precision: logits of any floating dtype are stacked and computed on in float32 (float64 stays float64), also under
    ``torch.autocast``. Logits must be finite, a NaN or an infinity comes out as one; how large they are does not
    matter.

    Processes: under ``torch.distributed`` the average of the losses of all processes, and so the average of gradients
    that DDP takes, equals the loss of one process that sees all their samples, given batches of equal size. For the
    reduction ``"batch"`` nothing is needed for that. ``"sum"`` multiplies by the number of processes. ``"subset"`` adds
    up the counts of all processes (one small ``all_reduce``), so every process has to call the loss equally often.
    Where only some do, as in an evaluation on the first process, call ``loss.eval()``: all sums are local then.

    Args:
        exit_weights: One number per exit, or a preset: "uniform", "msdnet", "sdn", "linear", "branchynet"
            (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; None is the rule of
            :func:`~erde_hub.losses.map_teacher_exits`.
        reduction: "batch" divides each sum over samples by the batch, "subset" by the number of samples to which the
            term applies at that exit (0 where there are none), "sum" by nothing.

    Shape:
        student_logits: E tensors (N, K), shallow to deep. teacher_logits: any number of tensors (N, K). labels: (N,).
    """

    #: Calls need teacher logits (False: they are ignored, and may be None).
    needs_teacher: ClassVar[bool] = True
    #: The loss is differentiable in the student's logits, once and twice.
    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
        reduction: str = "batch",
    ) -> None:
        super().__init__()
        self.exit_weights = check_exit_weights(exit_weights)
        self.teacher_exits = check_teacher_exits(teacher_exits)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self._epoch: tuple[int, int] | None = None
        self._checked_labels: set[int] = set()

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the parts of this loss for one batch; names are unique."""
        raise NotImplementedError

    def forward(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor] | None,
        labels: Tensor,
    ) -> LossResult:
        """Computes the loss of one batch.

        The range of the labels is checked on every call on a CPU. On other devices that would wait for the device, so
        there the first call checks (once per number of classes) and later ones leave it to torch's own assertion in the
        kernel.

        Raises:
            InputTypeError: Not sequences of floating-point tensors, labels that are not class indices, a teacher that
                is missing, tensors on several devices.
            ShapeError: An exit disagrees in N or K (the message names it), teacher and student have different classes.
            LabelError: A label outside the classes.
            ConfigError: ``exit_weights`` or ``teacher_exits`` do not fit the number of exits.
        """
        device_type = student_logits[0].device.type if _is_tensors(student_logits) else "cpu"
        with torch.autocast(device_type, enabled=False):
            batch = self._make_batch(student_logits, teacher_logits, labels)
            return self._reduce(self.terms(batch), batch)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tells the loss which epoch is about to be trained, counted from 1.

        Exit weights that follow a schedule ("sdn") read it; without a call they are those of the schedule's end. The
        loss does not count by itself, so a resumed run continues the schedule by calling this.

        Raises:
            ConfigError: An epoch outside 1 to ``epochs``.
        """
        check_epoch(epoch, epochs)
        self._epoch = (epoch, epochs)

    def weights_for(self, num_exits: int) -> list[float]:
        """Returns the weight of each exit at the current epoch; for checks before training and for the log.

        Raises:
            ConfigError: The weights given are not one per exit.
        """
        if isinstance(self.exit_weights, str):
            return exit_weights_preset(self.exit_weights, num_exits, *(self._epoch or ()))
        if len(self.exit_weights) != num_exits:
            raise ConfigError(
                f"exit_weights has {len(self.exit_weights)} entries, {list(self.exit_weights)}, but the student has"
                f" {num_exits} exits: give one weight per exit, the final one included"
            )
        return list(self.exit_weights)

    def teacher_exit_map(self, num_student: int, num_teacher: int) -> list[int]:
        """Returns which teacher exit each student exit learns from (:func:`~erde_hub.losses.map_teacher_exits`)."""
        return map_teacher_exits(num_student, num_teacher, self.teacher_exits)

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments by name, as plain data, for the log and for the results of a run."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def _make_batch(
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor] | None, labels: Tensor
    ) -> ExitBatch:
        student = check_exit_logits("student_logits", student_logits)
        labels = self._check_labels(labels, student[0])
        double = any(logits.dtype == torch.float64 for logits in student)
        dtype = torch.float64 if double else torch.float32
        if not self.needs_teacher:
            return ExitBatch(_stack(student, dtype), labels)
        if teacher_logits is None:
            raise InputTypeError(
                f"{type(self).__name__} learns from a teacher, got teacher_logits=None; pass the logits of its exits,"
                ' or train without one by the loss "ce"'
            )
        teacher = check_exit_logits("teacher_logits", teacher_logits)
        check_same_classes(student[0], teacher[0])
        with torch.no_grad():
            pairs = self.teacher_exit_map(len(student), len(teacher))
            paired = _stack([teacher[index] for index in pairs], dtype)
        return ExitBatch(_stack(student, dtype), labels, paired, teacher[-1].detach())

    def _check_labels(self, labels: Tensor, logits: Tensor) -> Tensor:
        num_classes = logits.shape[-1]
        on_device = logits.device.type != "cpu"
        seen = on_device and num_classes in self._checked_labels
        checked = check_labels(labels, logits, values=not seen and not torch.compiler.is_compiling())
        if on_device and not seen:
            self._checked_labels.add(num_classes)
        return checked

    def _reduce(self, terms: list[Term], batch: ExitBatch) -> LossResult:
        weights = self.weights_for(batch.num_exits)
        per_exit = torch.stack([_sum_over_samples(term) for term in terms])  # (terms, E)
        if self.reduction == "batch":
            per_exit = per_exit / batch.num_samples
        elif self.reduction == "subset":
            per_exit = per_exit * self._subset_factors(terms, batch, per_exit)
        elif self._processes() > 1:
            per_exit = per_exit * self._processes()
        if all(weight == 1.0 for weight in weights):
            per_term = per_exit.sum(1)
        else:
            per_term = _weighted_sum(per_exit.unbind(1), weights)
        values = per_term.unbind(0)
        loss = _weighted_sum(values, [term.weight for term in terms])
        names = [term.name for term in terms]
        result = LossResult(
            loss=loss,
            terms=dict(zip(names, (value.detach() for value in values), strict=True)),
            exit_terms=dict(zip(names, per_exit.detach().unbind(0), strict=True)),
        )
        self._monitor(batch, result)
        return result

    def _monitor(self, batch: ExitBatch, result: LossResult) -> None:
        """Adds what is worth seeing in the log beside the terms."""
        if self.needs_teacher:
            right = batch.teacher_right.to(result.loss.dtype).mean(-1)
            result.exit_terms["teacher_right"] = right
            result.terms["teacher_right"] = right.mean()

    def _subset_factors(self, terms: list[Term], batch: ExitBatch, like: Tensor) -> Tensor:
        """Returns processes / count per term and exit, with the counts of all processes; 0 samples give 0 anyway."""
        counts = like.new_full(like.shape, batch.num_samples)
        for row, term in zip(counts, terms, strict=True):
            if term.mask is not None:
                row.copy_(term.mask.sum(-1))
        processes = self._processes()
        if processes > 1:
            dist.all_reduce(counts)
        return processes / counts.clamp_min(1.0)

    def _processes(self) -> int:
        if self.training and dist.is_available() and dist.is_initialized():
            return dist.get_world_size()
        return 1


def _is_tensors(logits: object) -> bool:
    return isinstance(logits, Sequence) and len(logits) > 0 and isinstance(logits[0], Tensor)


def _stack(exit_logits: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    # Exits of one dtype, the usual case, are stacked first and cast once.
    if any(logits.dtype != exit_logits[0].dtype for logits in exit_logits):
        exit_logits = [logits.to(dtype) for logits in exit_logits]
    return torch.stack(list(exit_logits)).to(dtype)


def _sum_over_samples(term: Term) -> Tensor:
    values = term.values
    if term.sample_weights is not None:
        values = values * term.sample_weights.detach()
    if term.mask is not None:
        values = values * term.mask
    return values.sum(-1)


def _weighted_sum(values: Sequence[Tensor], weights: Iterable[float]) -> Tensor:
    # Python numbers instead of a tensor of weights: that would have to be copied to the device, which waits for it.
    pairs = zip(values, weights, strict=True)
    value, weight = next(pairs)
    total = value * weight
    for value, weight in pairs:
        total = torch.add(total, value, alpha=weight)
    return total


def _given(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise InputTypeError("this loss was declared with needs_teacher = False, so its terms have no teacher logits")
    return logits
