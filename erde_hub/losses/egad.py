"""EGAD: distillation of causal language models, token by token, led by the teacher's entropy. Experimental."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from erde_hub._arguments import check_choice, check_flag, check_number, check_whole
from erde_hub.errors import ConfigError, InputTypeError, ShapeError

from . import functional
from ._checks import check_features, check_weights
from ._token_inputs import (
    IGNORE,
    check_tokens,
    check_vocabulary,
    counted_tokens,
    flat_features,
    flat_logits,
    valid_labels,
)
from ._tokens import TokenLogits, token_entropy, token_losses
from .additions import Addition
from .base import ExitLoss
from .batch import LossResult
from .feature import build_projections, paired_widths, projection_of

DIRECTIONS = ("increasing", "decreasing")
NORMALIZERS = ("log_v", "batch_max")
HARD = ("threshold", "soft")
DIVERGENCES = ("forward", "reverse")


def next_token_labels(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Returns for each position the token that follows it, and -100 where none does or where it is padding.

    Shifting labels instead of slicing logits leaves the logits, which are large, where they are.

    Args:
        input_ids: Tokens.
        attention_mask: 1 for tokens, 0 for padding; mask prompts out likewise.

    Shape:
        both: (B, L). Returns (B, L).

    Raises:
        InputTypeError, ShapeError: Not tokens (B, L), or a mask of another shape.

    Example:
        >>> next_token_labels(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])).tolist()
        [[6, 7, -100, -100]]
    """
    check_tokens("input_ids", input_ids)
    if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        masked = "" if attention_mask is None else f" and an attention_mask {tuple(attention_mask.shape)}"
        raise ShapeError(f"input_ids must be (B, L), the mask likewise, got {tuple(input_ids.shape)}{masked}")
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        labels[:, :-1].masked_fill_((attention_mask[:, 1:] == 0) | (attention_mask[:, :-1] == 0), IGNORE)
    return labels


class EGADLoss(ExitLoss):
    """Token-level distillation with a curriculum, a temperature and a feature branch that follow the teacher's entropy.

    For every token, with t and s the logits of teacher and student over V words, H the teacher's entropy at temperature
    1, h = H / log V and r the fraction of the training that is done::

        L = sum_e w_e { ce_weight mean CE(s, y) + kl_weight mean [ c T^2 KL(p_t^T || p_s^T) ] + feature_weight F }

        c = (1 - r) (1 - h) + r h, divided by its mean     easy tokens first, hard ones later
        T = min_temperature + (max_temperature - min_temperature) h
        F = mean over hard tokens and dimensions of (P f_s - f_t)^2, hard being h >= its hard_quantile

    Means run over valid tokens: those whose label is not -100 and, if given, whose mask is True. All that is derived
    from the teacher is detached. A model without early exits hands in one tensor of logits; labels belong to the same
    positions as the logits (:func:`next_token_labels` shifts them).

    A loop calls :meth:`build` once, before the optimizer takes the loss's parameters in, and :meth:`set_progress` at
    every step. Without progress the curriculum rests: c is 1.

    Logits are read in chunks and their gradient is computed in closed form, so that in addition to both logits and the
    gradient a call needs a few chunks of memory and some numbers per token. It can be differentiated once.

    **Experimental.** The paper gives no equations that could be had; this is a reading of its abstract, every open
    choice is an argument, and there are no figures to compare with.

    Args:
        min_temperature: Temperature where the teacher is confident (or uncertain, see ``temperature_direction``);
            positive.
        max_temperature: At the other end; equal to ``min_temperature`` switches the dependence off.
        temperature_direction: "increasing" softens uncertain tokens, "decreasing" certain ones, by 1 - h for h.
        curriculum: Weigh tokens by c; otherwise, and as long as no progress was set, all weigh alike.
        entropy_normalizer: What H is divided by: "log_v", or "batch_max", the largest entropy of a valid token.
        hard_tokens: "threshold" as above; "soft" weighs every token's feature term by h, divided by the sum of h.
        hard_quantile: Share of tokens that are not hard, in [0, 1); linear interpolation over the valid tokens.
        feature_weight: Factor of the feature term; 0 switches it off. It needs :meth:`build` and features.
        kl_weight: Factor of the divergence.
        ce_weight: Factor of the cross-entropy.
        divergence: "forward" is KL(p_t || p_s); "reverse" is KL(p_s || p_t), which drops what the student cannot cover.
        vocab_size: Read so many columns of both logits; None is all. For embeddings that are padded, or two paddings.
        chunk_size: Tokens that are computed at a time; None is about two million logits.
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; None is the rule of
            :func:`~erde_hub.losses.map_teacher_exits`.

    Shape:
        student_logits, teacher_logits: (B, L, V) or (N, V), or a sequence of these, one per exit. labels, mask: (B, L)
            or (N,). student_features, teacher_features: (B, L, D) or (N, D), one per exit, or None. The loss is a
            scalar.

    Raises:
        ConfigError: A number out of range, all weights 0, a reading that does not exist.
        InputTypeError: An argument of the wrong type.

    References:
        EGAD: Entropy-Guided Adaptive Token Distillation, 2026, arXiv 2605.01732 (abstract only). Deviations: unknown;
        formulas and defaults are our reading.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]])
        >>> result = EGADLoss(feature_weight=0.0)(logits, logits, labels)
        >>> round(result.terms["ce"].item(), 4), result.terms["kl"].item()  # log 4
        (1.3863, 0.0)
    """

    task: ClassVar[str] = "causal language models"
    state: ClassVar[str] = "the fraction of the training that is done; a projection per exit with features"
    twice_differentiable: ClassVar[bool] = False

    def __init__(
        self,
        min_temperature: float = 1.0,
        max_temperature: float = 4.0,
        temperature_direction: str = "increasing",
        curriculum: bool = True,
        entropy_normalizer: str = "log_v",
        hard_tokens: str = "threshold",
        hard_quantile: float = 0.8,
        feature_weight: float = 0.5,
        kl_weight: float = 1.0,
        ce_weight: float = 1.0,
        divergence: str = "forward",
        vocab_size: int | None = None,
        chunk_size: int | None = None,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(exit_weights=exit_weights, teacher_exits=teacher_exits)
        self.min_temperature = check_number("min_temperature", min_temperature, zero=False)
        self.max_temperature = check_number("max_temperature", max_temperature, zero=False)
        if self.max_temperature < self.min_temperature:
            raise ConfigError(
                f"max_temperature {max_temperature!r} is below min_temperature {min_temperature!r}: to soften certain"
                " tokens more, use temperature_direction='decreasing'"
            )
        self.temperature_direction = check_choice("temperature_direction", temperature_direction, DIRECTIONS)
        self.curriculum = check_flag("curriculum", curriculum)
        self.entropy_normalizer = check_choice("entropy_normalizer", entropy_normalizer, NORMALIZERS)
        self.hard_tokens = check_choice("hard_tokens", hard_tokens, HARD)
        self.hard_quantile = check_number("hard_quantile", hard_quantile, zero=True, below=1.0)
        self.feature_weight, self.kl_weight, self.ce_weight = check_weights(
            type(self).__name__, feature_weight=feature_weight, kl_weight=kl_weight, ce_weight=ce_weight
        )
        self.divergence = check_choice("divergence", divergence, DIVERGENCES)
        self.vocab_size = None if vocab_size is None else check_whole("vocab_size", vocab_size, 2)
        self.chunk_size = None if chunk_size is None else check_whole("chunk_size", chunk_size, 1)
        self.projections = nn.ModuleDict()
        self._progress: float | None = None

    @property
    def reads_features(self) -> bool:
        """Whether features are compared."""
        return self.feature_weight > 0

    def build(self, student_widths: Sequence[int | None], teacher_widths: Sequence[int | None]) -> None:
        """Makes the projections of the feature term; call it before the optimizer is built.

        Args:
            student_widths: Width of the hidden states of each student exit; None where none are handed in. A model
                without early exits has one.
            teacher_widths: Width of those that each of them learns from.

        Raises:
            InputTypeError, ConfigError: Not widths, or not one per student exit; no exit has features on both sides.
        """
        pairs = paired_widths(student_widths, teacher_widths)
        if not pairs:
            raise ConfigError(
                f"no exit has features on both sides (widths {list(student_widths)} and {list(teacher_widths)}): give"
                " the widths of both networks' hidden states, or set feature_weight=0"
            )
        self.projections = build_projections(pairs)

    def set_progress(self, progress: float) -> None:
        """Tells the loss which fraction of the training is done, for the curriculum; 0 at the start, 1 at the end.

        Raises:
            ConfigError: Outside of 0 to 1.
        """
        if isinstance(progress, bool) or not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
            raise ConfigError(f"progress must be a fraction from 0 to 1, got {progress!r}")
        self._progress = float(progress)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tells the loss the epoch, counted from 1; the curriculum moves on with it (finer by :meth:`set_progress`)."""
        super().set_epoch(epoch, epochs)
        self._progress = (epoch - 1) / max(epochs - 1, 1)

    def forward(
        self,
        student_logits: Tensor | Sequence[Tensor],
        teacher_logits: Tensor | Sequence[Tensor] | None,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        student_features: Tensor | Sequence[Tensor | None] | None = None,
        teacher_features: Tensor | Sequence[Tensor | None] | None = None,
    ) -> LossResult:
        """Computes the loss of one batch.

        Args:
            student_logits: Of every position, not shifted.
            teacher_logits: Likewise, over the same words.
            labels: The word that follows each position; -100 where nothing is learnt.
            mask: True where something is learnt, in addition to the labels; False for prompts, for example.
            index: Not used.
            student_features: Hidden states of the student's last layer, or of whichever is to be compared (per exit).
            teacher_features: Those of the teacher.

        Raises:
            InputTypeError, ShapeError, LabelError: Tensors of the wrong type or that do not fit each other.
            ConfigError: The features have no projection.
        """
        if teacher_logits is None:
            raise InputTypeError("EGADLoss learns from a teacher, got teacher_logits=None; pass its logits")
        if self.reads_features and (student_features is None or teacher_features is None):
            raise InputTypeError(
                "EGADLoss compares hidden states of hard tokens: pass student_features= and teacher_features=, the last"
                " hidden states of both networks, or build it with feature_weight=0"
            )
        student = flat_logits("student_logits", student_logits)
        teacher = flat_logits("teacher_logits", teacher_logits)
        vocab_size = check_vocabulary(student[0], teacher[0], self.vocab_size)
        first = student_logits if isinstance(student_logits, Tensor) else student_logits[0]
        labels = valid_labels(labels, mask, first, vocab_size)
        with torch.no_grad():
            pairs = self.teacher_exit_map(len(student), len(teacher))
        dtype = torch.float64 if any(logits.dtype == torch.float64 for logits in student) else torch.float32
        features = self._pair_features(student_features, teacher_features, student, teacher, pairs)
        with torch.autocast(student[0].device.type, enabled=False):
            rows = [
                self._exit_terms(
                    exit_,
                    TokenLogits(own),
                    TokenLogits(teacher[pair].detach()),
                    labels,
                    features[exit_],
                    vocab_size,
                    dtype,
                )
                for exit_, (own, pair) in enumerate(zip(student, pairs, strict=True))
            ]
            return self._assemble(rows, len(labels))

    def over_tokens(
        self,
        student: Sequence[TokenLogits],
        teacher: Sequence[TokenLogits] | None,
        labels: Tensor,
        *,
        chunk_size: int | None = None,
    ) -> LossResult:
        """As :meth:`ExitLoss.over_tokens`; the features are the states that the exits read."""
        if teacher is None:
            raise InputTypeError("EGADLoss learns from a teacher, got teacher=None; pass its exits")
        rows, labels = counted_tokens(labels)
        pairs = self.teacher_exit_map(len(student), len(teacher))
        with torch.no_grad():
            vocab_size = check_vocabulary(student[-1][rows[:1]], teacher[-1][rows[:1]], self.vocab_size)
        labels = valid_labels(labels, None, labels[:, None], vocab_size)
        terms = []
        for exit_, pair in enumerate(pairs):
            own, target = student[exit_].at(rows), teacher[pair].at(rows)
            features = (own.states, target.states) if self.feature_weight else None
            dtype = torch.promote_types(own.states.dtype, torch.float32)
            terms.append(self._exit_terms(exit_, own, target, labels, features, vocab_size, dtype))
        return self._assemble(terms, len(rows))

    def check_tokens(self) -> None:
        """It is one over tokens."""

    def _exit_terms(
        self,
        exit_: int,
        student: TokenLogits,
        teacher: TokenLogits,
        labels: Tensor,
        features: tuple[Tensor, Tensor] | None,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Returns the means of one exit by name."""
        valid = labels >= 0
        entropy, prediction = token_entropy(teacher, vocab_size, self.chunk_size)
        entropy = entropy.to(dtype)
        hardness = self._hardness(entropy, valid, vocab_size)
        softness = hardness if self.temperature_direction == "increasing" else 1 - hardness
        temperature = self.min_temperature + (self.max_temperature - self.min_temperature) * softness
        kl, ce, predicts = token_losses(
            student, teacher, labels, temperature, vocab_size, self.chunk_size, self.divergence == "reverse"
        )
        count = self._total(valid.sum().to(kl.dtype)).clamp_min(1.0)
        factor = self._processes() / count
        weight = self._curriculum_weight(hardness, valid, count) * valid
        terms = {"ce": ce.sum() * factor, "kl": (weight * temperature.square() * kl).sum() * factor}
        if self.feature_weight:
            terms["feature"] = kl.new_zeros(())
            if features is not None:
                terms["feature"] = self._feature_distance(exit_, *features, hardness, valid).to(kl.dtype)
        terms["teacher_right"] = (prediction == labels).sum() * factor  # -100 is never predicted
        terms["correct"] = predicts.sum()
        return terms

    def _hardness(self, entropy: Tensor, valid: Tensor, vocab_size: int) -> Tensor:
        """H over its largest value, in [0, 1]."""
        if self.entropy_normalizer == "log_v":
            return (entropy / math.log(vocab_size)).clamp(0.0, 1.0)
        largest = entropy.masked_fill(~valid, 0.0).max()
        if self._processes() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return (entropy / largest.clamp_min(1e-12)).clamp(0.0, 1.0)

    def _curriculum_weight(self, hardness: Tensor, valid: Tensor, count: Tensor) -> Tensor:
        if not self.curriculum or self._progress is None:
            return torch.ones_like(hardness)
        weight = (1 - self._progress) * (1 - hardness) + self._progress * hardness
        mean = self._total((weight * valid).sum()) / count
        return weight / mean.clamp_min(1e-12)

    def _feature_distance(
        self, exit_: int, student: Tensor, teacher: Tensor, hardness: Tensor, valid: Tensor
    ) -> Tensor:
        """Mean square over hard tokens and dimensions; only hard tokens are projected."""
        layer = projection_of(self.projections, exit_, ", or set feature_weight=0")
        widths = (student.shape[-1], teacher.shape[-1])
        if widths != (layer.in_features, layer.out_features):
            raise ShapeError(
                f"the features of exit {exit_} are {widths[0]} (student) and {widths[1]} (teacher) wide, the projection"
                f" was built for {layer.in_features} and {layer.out_features}"
            )
        weight = hardness * valid
        if self.hard_tokens == "threshold":
            weight = (valid & (hardness >= self._hard_threshold(hardness, valid))).to(hardness.dtype)
        chosen = weight > 0
        own, target = functional.upcast(student[chosen]), functional.upcast(teacher[chosen].detach())
        distance = (layer(own.to(layer.weight.dtype)) - target.to(layer.weight.dtype)).square().mean(-1)
        total = self._total(weight.sum()).clamp_min(1e-12)
        return (distance * weight[chosen]).sum() * (self._processes() / total)

    def _hard_threshold(self, hardness: Tensor, valid: Tensor) -> Tensor:
        """The quantile over the valid tokens of all processes; infinity where there are none."""
        values = hardness[valid]
        if self._processes() > 1:
            parts: list[Any] = [None] * self._processes()
            dist.all_gather_object(parts, values.cpu())
            values = torch.cat(parts).to(hardness.device)
        if not len(values):
            return hardness.new_full((), math.inf)
        ordered = values.sort().values  # torch.quantile takes at most 16 million values
        place = self.hard_quantile * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return torch.lerp(ordered[low], ordered[high], place - low)

    def _total(self, value: Tensor) -> Tensor:
        if self._processes() > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def _assemble(self, rows: list[dict[str, Tensor]], tokens: int) -> LossResult:
        correct = torch.stack([row.pop("correct") for row in rows])
        weights = {"ce": self.ce_weight, "kl": self.kl_weight, "feature": self.feature_weight}
        exit_weights = self.weights_for(len(rows))
        exit_terms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        terms, loss = {}, exit_terms["ce"].new_zeros(())
        for name, weight in weights.items():
            if name in exit_terms:
                weighted = [value * w for value, w in zip(exit_terms[name], exit_weights, strict=True)]
                terms[name] = torch.stack(weighted).sum()
                loss = loss + weight * terms[name]
        terms["teacher_right"] = exit_terms["teacher_right"].mean()
        return LossResult(
            loss=loss,
            terms={name: value.detach() for name, value in terms.items()},
            exit_terms={name: value.detach() for name, value in exit_terms.items()},
            correct=correct,
            tokens=tokens,
        )

    def _pair_features(
        self,
        student_features: Any,
        teacher_features: Any,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        pairs: Sequence[int],
    ) -> list[tuple[Tensor, Tensor] | None]:
        if not self.feature_weight:
            return [None] * len(student)
        own = check_features("student_features", flat_features(student_features), student)
        target = check_features("teacher_features", flat_features(teacher_features), teacher)
        found: list[tuple[Tensor, Tensor] | None] = []
        for exit_, pair in enumerate(pairs):
            ours, theirs = own[exit_], target[pair]
            found.append(None if ours is None or theirs is None else (ours, theirs))
        return found

    def _attach(self, *additions: Addition) -> None:
        if additions:
            raise ConfigError(
                f"{additions[0].name!r} cannot join EGADLoss: it works on exits over classes, and EGAD weighs and"
                " compares tokens itself"
            )


def egad_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    **settings: Any,
) -> Tensor:
    """Returns the scalar of :class:`EGADLoss` without its feature term, for a single call."""
    return EGADLoss(**{"feature_weight": 0.0, **settings})(student_logits, teacher_logits, labels).loss
