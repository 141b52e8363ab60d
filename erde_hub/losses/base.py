"""What a loss over exits is: named per-sample terms with masks and weights, and one reduction.

A method is a list of :class:`Term`; everything else - checking and stacking the logits, precision, the map of teacher
exits, masks, weights per sample and per exit, means that agree between one process and many, what goes into the log -
happens once, here. So a new method is a ``terms`` of a few lines, and methods combine by concatenating terms or by
changing the weights of each other's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from erde_hub._arguments import check_choice
from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.tasks import REGRESSION

from ._checks import (
    check_exit_logits,
    check_features,
    check_index,
    check_labels,
    check_same_classes,
    without_teacher,
)
from ._token_inputs import counted_tokens
from ._tokens import HEAD_CHUNK_ELEMENTS, TokenLogits, in_chunks
from .additions import Addition, SampleWeight, check_addition
from .batch import ExitBatch, LossResult, Term, check_per_sample, check_terms
from .exit_weights import check_epoch, check_exit_weights, weights_per_exit
from .teacher_exits import check_teacher_exits, map_teacher_exits

#: What the sum over samples is divided by: the batch, the samples under the term's mask, nothing.
REDUCTIONS = ("batch", "subset", "sum")


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

    #: What it trains: "classification", "regression", or "causal_lm"; recipes for images take the first only.
    task: ClassVar[str] = "classification"
    #: Calls need teacher logits (False: they are ignored, and may be None).
    needs_teacher: ClassVar[bool] = True
    #: Calls need the stable number of each sample.
    needs_index: ClassVar[bool] = False
    #: What it carries from batch to batch, in words for the table.
    state: ClassVar[str] = ""
    #: The loss is differentiable in the student's logits, once and ...
    differentiable: ClassVar[bool] = True
    #: ... twice.
    twice_differentiable: ClassVar[bool] = True

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
        self.extra_terms = nn.ModuleList()
        self.sample_weights = nn.ModuleList()
        self._epoch: tuple[int, int] | None = None
        self._enabled: list[bool] | None = None
        self._checked_labels: set[int] = set()
        self._added: list[Addition] = []

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the parts of this loss for one batch; names are unique."""
        raise NotImplementedError

    def distillation_terms(self) -> tuple[str, ...]:
        """Returns the names of the terms that imitate the teacher: those that weights per sample apply to."""
        return tuple(name for part in self.extra_terms for name in part.distillation_terms())  # type: ignore[operator]

    def add(self, *additions: Addition) -> Self:
        """Lets weights of samples or further terms join this loss, and returns it.

        Weights multiply what :meth:`distillation_terms` names; several multiply each other. The order in which
        additions are given does not matter, and where one is refused none has joined.

        Raises:
            InputTypeError: Neither a :class:`~erde_hub.losses.SampleWeight` nor an
                :class:`~erde_hub.losses.ExtraTerm`.
            ConfigError: One has no name, or cannot join this loss; the message says why.

        Example:
            >>> from erde_hub.losses import create_addition, create_loss
            >>> loss = create_loss("erde").add(create_addition("ea_kd", entropy_temperature=2.0))
            >>> [addition.name for addition in loss.additions()]
            ['ea_kd']
        """
        for addition in additions:
            check_addition(addition)
        self._attach(*additions)
        self._added.extend(additions)
        return self

    def additions(self) -> list[Addition]:
        """Returns the further terms and the weights of samples, those that the loss itself consists of included."""
        return [*self.extra_terms, *self.sample_weights]

    @property
    def reads_teacher(self) -> bool:
        """Whether this loss, with what has joined it, needs teacher logits."""
        return self.needs_teacher or any(addition.needs_teacher for addition in self.additions())

    @property
    def reads_index(self) -> bool:
        """Whether this loss looks samples up by their stable number."""
        return self.needs_index or any(addition.needs_index for addition in self.additions())

    @property
    def reads_features(self) -> bool:
        """Whether this loss needs the features of exits."""
        return any(addition.needs_features for addition in self.additions())

    def forward(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor] | None,
        labels: Tensor,
        *,
        index: Tensor | None = None,
        student_features: Sequence[Tensor | None] | None = None,
        teacher_features: Sequence[Tensor | None] | None = None,
    ) -> LossResult:
        """Computes the loss of one batch.

        Args:
            student_logits: Unnormalised scores of each exit.
            teacher_logits: Those of the teacher; None for a loss without one.
            labels: Class indices.
            index: Stable number of each sample, for weights that are looked up; any integer dtype.
            student_features: Per student exit the feature that it reads, channels last (N, ..., D), or None where there
                is none; for losses with a feature term.
            teacher_features: The same per teacher exit.

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
            batch = self._make_batch(student_logits, teacher_logits, labels, index, student_features, teacher_features)
            terms = self.terms(batch)
            for part in self.extra_terms:
                terms = [*terms, *part.terms(batch)]  # type: ignore[operator]
            check_terms(type(self).__name__, terms, batch)
            shown = self._weigh(terms, batch)
            return self._reduce(terms, batch, shown)

    def over_tokens(
        self,
        student: Sequence[TokenLogits],
        teacher: Sequence[TokenLogits] | None,
        labels: Tensor,
        *,
        chunk_size: int | None = None,
    ) -> LossResult:
        """Computes the loss of the tokens of a batch of texts, in which a token is what a sample is elsewhere.

        Logits of a few tokens exist at a time; they are computed again in the backward pass. The means run over tokens
        whose label is not -100.

        Args:
            student: Per exit the logits of N tokens.
            teacher: Those of the teacher; None for a loss without one.
            labels: (N,), the token that follows each.
            chunk_size: Tokens at a time; None is about eight million logits.

        Raises:
            ConfigError: A loss that :meth:`check_tokens` refuses.
            LabelError: No label counts, or one is no token.
        """
        self.check_tokens()
        rows, labels = counted_tokens(labels)
        count, exits = len(rows), len(student)
        every = [one.at(rows) for one in (*student, *(teacher or ()))]
        names: list[str] = []

        def of_chunk(labels: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            logits = [one.of(own) for one, own in zip(every[:exits], states[:exits], strict=True)]
            with torch.no_grad():
                targets = [one.of(own) for one, own in zip(every[exits:], states[exits:], strict=True)]
                correct = torch.stack([(own.argmax(-1) == labels).sum() for own in logits])
            result = self(logits, targets or None, labels)
            names[:] = result.terms
            share = 1.0 if self.reduction == "sum" else len(labels) / count
            terms, exit_terms = (torch.stack([*of.values()]) * share for of in (result.terms, result.exit_terms))
            return result.loss * share, terms, exit_terms, correct

        with torch.no_grad():
            vocabulary = every[0][:1].shape[-1]
        size = chunk_size or max(1, HEAD_CHUNK_ELEMENTS // (vocabulary * len(every)))
        found = in_chunks(of_chunk, (labels, *(one.states for one in every)), size)
        loss, terms, exit_terms, correct = (torch.stack(values).sum(0) for values in zip(*found, strict=True))
        return LossResult(
            loss,
            dict(zip(names, terms.detach().unbind(0), strict=True)),
            dict(zip(names, exit_terms.detach().unbind(0), strict=True)),
            correct,
            count,
        )

    def check_tokens(self) -> None:
        """Checks that the loss of a batch of tokens is the sum of those of its parts.

        Raises:
            ConfigError: It is not, or the loss reads features or keeps something per sample.
        """
        name = type(self).__name__
        if self.task == REGRESSION:
            raise ConfigError(f"{name} is for regression, tokens are classes: choose 'ce' or 'kd', say")
        if self.reads_index or self.reads_features:
            what = "keeps something per sample" if self.reads_index else "compares features"
            raise ConfigError(f"{name} {what}, which tokens have not: choose 'ce', 'kd', 'self', 'ea_kd' or 'egad'")
        for part in (self, *self.additions()):
            if self.reduction == "subset" or getattr(part, "normalize_weights", False):
                raise ConfigError(
                    f"{name} of tokens is computed a few tokens at a time, so that nothing can be divided by a mean or"
                    " count of the whole batch: set reduction 'batch' and normalize_weights false"
                )

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
        weights = weights_per_exit(self.exit_weights, num_exits, *(self._epoch or ()))
        if self._enabled is None:
            return weights
        return [weight * enabled for weight, enabled in zip(weights, self._enabled, strict=True)]

    def enable_exits(self, enabled: Sequence[bool] | None) -> None:
        """Gives the other exits weight 0 until the next call; None enables all."""
        self._enabled = None if enabled is None else list(enabled)

    def teacher_exit_map(self, num_student: int, num_teacher: int) -> list[int]:
        """Returns which teacher exit each student exit learns from (:func:`~erde_hub.losses.map_teacher_exits`)."""
        return map_teacher_exits(num_student, num_teacher, self.teacher_exits)

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments by name, as plain data, for the log and for the results of a run."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def added(self) -> dict[str, dict[str, Any]]:
        """Returns the settings of what joined this loss by :meth:`add`, by name, as plain data."""
        return {addition.name: addition.settings() for addition in self._added}

    def extra_repr(self) -> str:
        """Shows the arguments, and what joined."""
        values = [f"{name}={value!r}" for name, value in self.settings().items()]
        return ", ".join([*values, *(f"+{name}({settings!r})" for name, settings in self.added().items())])

    def _contain(self, addition: Addition) -> None:
        """Makes an addition a part of this loss, whose constructor takes the addition's arguments as its own."""
        for name, value in addition.settings().items():
            setattr(self, name, value)
        self._attach(addition)

    def _attach(self, *additions: Addition) -> None:
        before = len(self.extra_terms), len(self.sample_weights)
        try:  # terms first: what a weight applies to may be one of them
            for addition in sorted(additions, key=lambda addition: isinstance(addition, SampleWeight)):
                addition.check(self)
                (self.sample_weights if isinstance(addition, SampleWeight) else self.extra_terms).append(addition)
        except Exception:
            del self.extra_terms[before[0] :], self.sample_weights[before[1] :]
            raise

    def _weigh(self, terms: list[Term], batch: ExitBatch) -> dict[str, Tensor]:
        """Multiplies the weights of samples into the terms that they apply to; returns their means per exit."""
        shown = {}
        for weight in self.sample_weights:
            values = weight.weights(batch)  # type: ignore[operator]
            full = (batch.num_exits, batch.num_samples)
            check_per_sample(f"weights of {weight.name!r}", values, (full, full[1:]))
            values = values.detach()
            names = weight.targets(self)  # type: ignore[operator]
            for term in terms:
                if term.name in names:
                    term.sample_weights = values if term.sample_weights is None else values * term.sample_weights
            shown[f"{weight.name}_weight"] = values.mean(-1).expand(batch.num_exits)
        return shown

    def _make_batch(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor] | None,
        labels: Tensor,
        index: Tensor | None,
        student_features: Sequence[Tensor | None] | None,
        teacher_features: Sequence[Tensor | None] | None,
    ) -> ExitBatch:
        student = check_exit_logits("student_logits", student_logits, least=1 if self.task == REGRESSION else 2)
        labels = self._check_labels(labels, student[0])
        double = any(logits.dtype == torch.float64 for logits in student)
        dtype = torch.float64 if double else torch.float32
        given: dict[str, Any] = {"index": check_index(index, student[0]), "processes": self._processes()}
        if self.reads_features:
            given["student_features"] = check_features("student_features", student_features, student)
        if not self.reads_teacher:
            return ExitBatch(_stack(student, dtype), labels, **given)
        if teacher_logits is None:
            raise InputTypeError(
                f"{type(self).__name__} learns from a teacher, got teacher_logits=None; pass the logits of its exits,"
                f" or {without_teacher(self)}"
            )
        teacher = check_exit_logits("teacher_logits", teacher_logits)
        check_same_classes(student[0], teacher[0])
        with torch.no_grad():
            pairs = self.teacher_exit_map(len(student), len(teacher))
            paired = _stack([teacher[exit_] for exit_ in pairs], dtype)
        if self.reads_features:
            features = check_features("teacher_features", teacher_features, teacher)
            chosen = [features[exit_] for exit_ in pairs]
            given["teacher_features"] = [None if feature is None else feature.detach() for feature in chosen]
        return ExitBatch(_stack(student, dtype), labels, paired, teacher[-1].detach(), **given)

    def _check_labels(self, labels: Tensor, logits: Tensor) -> Tensor:
        num_classes = logits.shape[-1]
        on_device = logits.device.type != "cpu"
        seen = on_device and num_classes in self._checked_labels
        checked = check_labels(labels, logits, values=not seen and not torch.compiler.is_compiling())
        if on_device and not seen:
            self._checked_labels.add(num_classes)
        return checked

    def _reduce(self, terms: list[Term], batch: ExitBatch, shown: dict[str, Tensor]) -> LossResult:
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
        # Worth seeing in the log next to the terms.
        if self.reads_teacher:
            shown["teacher_right"] = batch.teacher_right.to(result.loss.dtype).mean(-1)
        for name, value in shown.items():
            result.exit_terms[name] = value
            result.terms[name] = value.mean()
        return result

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
