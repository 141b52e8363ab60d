"""What a loss is computed from and what comes of it: the stacked logits of a batch, named terms, the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from erde_hub.errors import ConfigError, InputTypeError, ShapeError

from . import functional


@dataclass
class LossResult:
    """A loss with its parts.

    The identities ``terms[name] == sum_e exit_weights[e] * exit_terms[name][e]`` and ``loss == sum of weight *
    terms[name]`` over the terms of the method hold, the weights being the method's own (``kl_weight``, ``ce_weight``,
    ``-entropy_weight``, ...). ``teacher_right`` and the mean weights of samples (``ea_kd_weight``, ...) are for the log
    only and no part of the loss.

    Attributes:
        loss: Scalar to call ``backward`` on, float32 (float64 for float64 logits).
        terms: Detached scalars by name, for the log.
        exit_terms: The same per exit, detached tensors (E,), before exit weights.
        correct: (E,), how many tokens each exit predicts; None where the loss is not one over tokens.
        tokens: Number of tokens that count, None likewise.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    exit_terms: dict[str, Tensor] = field(default_factory=dict)
    correct: Tensor | None = None
    tokens: int | None = None

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
    says; it contributes ``weight`` times the sum of that over exits.

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


def check_terms(loss: str, terms: Sequence[Term], batch: ExitBatch) -> None:
    """Checks what a loss, and what joined it, made of a batch, so that nothing of another shape is broadcast.

    Args:
        loss: Name of its class.
        terms: All of them.
        batch: What they were computed from.

    Raises:
        ConfigError: There is none, or two have one name.
        InputTypeError: One is no :class:`Term`, or its mask is not bool.
        ShapeError: Values, mask or weights that are not one number per exit and sample.
    """
    if not terms:
        raise ConfigError(f"{loss} has no term, and so nothing to train: terms() must return at least one Term")
    full = (batch.num_exits, batch.num_samples)
    for term in terms:
        if not isinstance(term, Term):
            raise InputTypeError(f"terms() of {loss} must return a list of Term, it holds {term!r:.80}")
        check_per_sample(f"values of term {term.name!r} of {loss}", term.values, (full,))
        if term.mask is not None:
            check_per_sample(f"mask of term {term.name!r} of {loss}", term.mask, (full,))
            if term.mask.dtype != torch.bool:
                raise InputTypeError(f"mask of term {term.name!r} of {loss} must be bool, got {term.mask.dtype}")
        if term.sample_weights is not None:
            check_per_sample(f"sample_weights of term {term.name!r} of {loss}", term.sample_weights, (full, full[1:]))
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two terms of {loss} are called {twice!r}: give each a name of its own, its key in the log")


def check_per_sample(what: str, values: object, shapes: Sequence[tuple[int, ...]]) -> None:
    """Checks that something is a tensor of one of these shapes, the first being (E, N).

    Raises:
        InputTypeError: Not a tensor.
        ShapeError: Another shape.
    """
    if not isinstance(values, Tensor):
        raise InputTypeError(f"{what} must be a tensor, got {type(values).__name__}")
    if values.shape not in shapes:
        exits, samples = shapes[0]
        raise ShapeError(
            f"{what} must have shape {' or '.join(map(str, shapes))}, for {exits} exits and {samples} samples, got"
            f" {tuple(values.shape)}"
        )


class ExitBatch:
    """The logits of one batch, stacked over the student's exits, and what several terms read, computed once.

    Attributes:
        student_logits: (E, N, K), float32 or float64.
        teacher_logits: The same; exit e holds what student exit e learns from.
        teacher_final_logits: (N, K), the teacher's last exit, whatever the map.
        labels: (N,).
        index: (N,), the stable number of each sample, where it was handed in.
        student_features: Per student exit (N, ..., D), or None at exits that have none.
        teacher_features: The same, detached; entry e is what student exit e learns from.
    """

    def __init__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_final_logits: Tensor | None = None,
        *,
        index: Tensor | None = None,
        student_features: Sequence[Tensor | None] | None = None,
        teacher_features: Sequence[Tensor | None] | None = None,
        processes: int = 1,
    ) -> None:
        self.student_logits = student_logits
        self.labels = labels
        self.index = index
        self.student_features = student_features
        self.teacher_features = teacher_features
        self._processes = processes
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

    def mean_over_samples(self, values: Tensor) -> Tensor:
        """Returns the mean over the last axis, over the samples of all processes where several train together.

        Shape:
            values: (..., N), detached. Returns (..., 1).
        """
        total = torch.cat([values.sum(-1, keepdim=True), torch.full_like(values[..., :1], values.shape[-1])], dim=-1)
        if self._processes > 1:
            dist.all_reduce(total)
        return total[..., :1] / total[..., 1:]

    @cached_property
    def teacher_right(self) -> Tensor:
        """Where the teacher exit paired with each student exit predicts the label, (E, N) bool."""
        return functional.correct(self.teacher_logits, self.labels)

    @cached_property
    def teacher_right_at_final_exit(self) -> Tensor:
        """Where the teacher's last exit predicts the label, (N,) bool."""
        return functional.correct(self.teacher_final_logits, self.labels)


def _given(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise InputTypeError("this loss was declared with needs_teacher = False, so its terms have no teacher logits")
    return logits
