"""Feature distillation: the features of an exit approach those of the teacher's exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erde_hub._arguments import check_choice, check_number, check_whole
from erde_hub.errors import ConfigError, InputTypeError, ShapeError

from . import functional
from .additions import ExtraTerm
from .batch import ExitBatch, Term
from .kd import KDLoss

PROJECTIONS = ("linear", "none")


def build_projections(pairs: Mapping[int, tuple[int, int]]) -> nn.ModuleDict:
    """Makes one linear map without bias per exit, from the student's width to the teacher's."""
    return nn.ModuleDict({str(exit_): nn.Linear(*widths, bias=False) for exit_, widths in pairs.items()})


def projection_of(projections: nn.ModuleDict, exit_: int, otherwise: str = "") -> Any:
    """Returns the projection of an exit; one that was not built raises :class:`ConfigError`.

    ``otherwise`` is what else the message may advise.
    """
    if str(exit_) not in projections:
        raise ConfigError(
            f"the feature term has no projection for exit {exit_}: call build(student_widths, teacher_widths) once"
            f" before training{otherwise}"
        )
    return projections[str(exit_)]


def paired_widths(
    student_widths: Sequence[int | None], teacher_widths: Sequence[int | None]
) -> dict[int, tuple[int, int]]:
    """Returns the widths of both sides at every exit where both have a feature.

    Raises:
        InputTypeError: Not a list of whole numbers and None.
        ConfigError: The lists differ in length, or a width is below 1.
    """
    for name, widths in (("student_widths", student_widths), ("teacher_widths", teacher_widths)):
        if not isinstance(widths, Sequence) or isinstance(widths, str):
            raise InputTypeError(
                f"{name} must be a list with the width of each exit's feature, or None at exits that have none, got"
                f" {widths!r}; a network with one exit has a list of one"
            )
        for exit_, width in enumerate(widths):
            if width is not None:
                check_whole(f"{name}[{exit_}]", width, 1)
    if len(student_widths) != len(teacher_widths):
        raise ConfigError(
            f"student_widths has {len(student_widths)} entries and teacher_widths {len(teacher_widths)}: give both one"
            " per student exit, the teacher's being that of the exit it learns from"
        )
    return {
        exit_: (student, teacher)
        for exit_, (student, teacher) in enumerate(zip(student_widths, teacher_widths, strict=True))
        if student is not None and teacher is not None
    }


class FeatureTerm(ExtraTerm):
    """The mean square between the student's features, projected to the teacher's width, and the teacher's.

    Per exit and sample: the mean over positions and channels of (P f_s - f_t)^2, with P a learned linear map without
    bias, one per exit, shared by all positions. P belongs to the loss: the optimizer trains it together with the
    student, its weights lie with the loss in a run's checkpoints, and the student that is saved knows nothing of it.

    A feature is what the head of an exit reads. The last exit, the classifier, has none and no such term. Maps are
    averaged down to ``feature_size`` positions a side, and to the smaller of the two where they differ; features of
    different layout are averaged over all their positions.

    The term applies to every sample. Beside ERDE, whose mask is for terms of its own, the features of the teacher are
    imitated also where its prediction is wrong.

    The Distiller builds the projections and hands the features over; in your own loop
    :class:`~erde_hub.training.ExitFeatures` reads both.

    Args:
        feature_weight: Factor of the term; above 0.
        projection: "linear", or "none" where both networks have the same widths.
        feature_size: Most positions a side of a map; the cost of the term grows with its square.

    Raises:
        ConfigError: A number out of range, or no such projection.
        InputTypeError: An argument of the wrong type.

    References:
        Romero et al., FitNets, 2014, arXiv 1412.6550. Deviations: in one stage with the other terms, maps averaged
        down, a linear map per position in place of a convolution, at every early exit.
    """

    name: ClassVar[str] = "feature"
    state: ClassVar[str] = "a projection per early exit, trained together with the student"
    needs_teacher: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    def __init__(self, feature_weight: float = 1.0, projection: str = "linear", feature_size: int = 4) -> None:
        super().__init__()
        self.feature_weight = check_number("feature_weight", feature_weight, zero=False)
        self.projection = check_choice("projection", projection, PROJECTIONS)
        self.feature_size = check_whole("feature_size", feature_size, 1)
        self.projections = nn.ModuleDict()

    def build(self, student_widths: Sequence[int | None], teacher_widths: Sequence[int | None]) -> None:
        """Makes the projections; call it before the optimizer is built.

        Args:
            student_widths: Channels of the feature of each student exit; None where it has none.
            teacher_widths: Channels of what each of these exits learns from, in the same order; None likewise.

        Raises:
            InputTypeError, ConfigError: Not widths, or not one per student exit; no exit has a feature on both sides;
                widths differ and there is to be no projection.
        """
        pairs = paired_widths(student_widths, teacher_widths)
        if not pairs:
            raise ConfigError(
                "'feature' compares what early exits of student and teacher read, and no pair of exits has features on"
                f" both sides (widths {list(student_widths)} and {list(teacher_widths)}): give both networks early"
                " exits, and map them by teacher_exits"
            )
        for exit_, (student, teacher) in pairs.items():
            if self.projection == "none" and student != teacher:
                raise ConfigError(
                    f"projection='none', but the feature of exit {exit_} has {student} channels and the teacher's"
                    f" {teacher}: use projection='linear'"
                )
        if self.projection == "linear":
            self.projections = build_projections(pairs)

    def distillation_terms(self) -> tuple[str, ...]:
        """Returns ``feature``."""
        return ("feature",)

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the term ``feature``, 0 at exits without a feature.

        Raises:
            ConfigError: The projections were not built.
            ShapeError: The widths are not those that they were built for.
        """
        zero = batch.student_logits.new_zeros(batch.num_samples)
        rows, applies = [], []
        pairs = zip(batch.student_features or (), batch.teacher_features or (), strict=True)
        for exit_, (student, teacher) in enumerate(pairs):
            applies.append(student is not None and teacher is not None)
            if student is None or teacher is None:
                rows.append(zero)
            else:
                rows.append(self._mean_square(exit_, student, teacher))
        values = torch.stack([row.to(zero.dtype) for row in rows])
        mask = torch.tensor(applies, device=values.device).unsqueeze(1).expand_as(values)
        return [Term("feature", values, self.feature_weight, mask)]

    def _mean_square(self, exit_: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = _same_positions(functional.upcast(student), functional.upcast(teacher), self.feature_size)
        if self.projection == "linear":
            layer = projection_of(self.projections, exit_)
            widths = (student.shape[-1], teacher.shape[-1])
            if widths != (layer.in_features, layer.out_features):
                raise ShapeError(
                    f"the features of exit {exit_} have {widths[0]} (student) and {widths[1]} (teacher) channels last,"
                    f" the projection was built for {layer.in_features} and {layer.out_features}"
                )
            student = layer(student.to(layer.weight.dtype))
        elif student.shape[-1] != teacher.shape[-1]:
            raise ShapeError(
                f"projection='none', but the features of exit {exit_} have {student.shape[-1]} and {teacher.shape[-1]}"
                " channels last: use projection='linear'"
            )
        return (student - teacher).square().flatten(1).mean(1)


class FeatureKDLoss(KDLoss):
    """Hinton's distillation plus the distance of features at every early exit.

    Summed over exits e, averaged over samples n::

        L = sum_e w_e mean_n { ce_weight CE(s, y) + kl_weight T^2 KL(p_t^T || p_s^T)
                               + feature_weight mean (P f_s - f_t)^2 }

    with the last term as in :class:`FeatureTerm`, which joins any other loss too. It costs a second look at every
    feature map. With ``kl_weight=0`` it is FitNets in one stage; with ``ce_weight=0`` too it trains nothing but what
    the heads read, and neither heads nor classifier.

    Args:
        temperature: Softens both sides of the divergence; positive. The divergence is multiplied by its square.
        kl_weight: Factor of the divergence.
        ce_weight: Factor of the cross-entropy.
        feature_weight: Factor of the distance of features; above 0.
        projection: "linear", or "none" where both networks have the same widths.
        feature_size: Most positions a side of a map; larger maps are averaged down.
        label_smoothing: Fraction of each target of the cross-entropy that is spread evenly over the classes, in [0, 1).
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).
        teacher_exits: For each student exit the teacher exit it learns from; None is the rule of
            :func:`~erde_hub.losses.map_teacher_exits`.

    Shape:
        student_logits: E tensors (N, K), shallow to deep. teacher_logits: any number of tensors (N, K). labels: (N,).
            student_features, teacher_features: per exit (N, ..., D), channels last, or None. The loss is a scalar.

    Raises:
        ConfigError: A number out of range, or no such projection.
        InputTypeError: An argument of the wrong type.

    References:
        Romero et al., FitNets, 2014, arXiv 1412.6550. Deviations: those of :class:`FeatureTerm`.

    Example:
        >>> import torch
        >>> logits, labels = [torch.zeros(1, 2), torch.zeros(1, 2)], torch.tensor([0])
        >>> loss = FeatureKDLoss(projection="none")
        >>> features = [torch.tensor([[1.0, 5.0]]), None]
        >>> result = loss(logits, logits, labels, student_features=features, teacher_features=[torch.ones(1, 2), None])
        >>> result.exit_terms["feature"].tolist()  # (0 + 16) / 2
        [8.0, 0.0]
    """

    state: ClassVar[str] = FeatureTerm.state
    trains_more: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float = 4.0,
        kl_weight: float = 0.9,
        ce_weight: float = 0.1,
        feature_weight: float = 1.0,
        projection: str = "linear",
        feature_size: int = 4,
        label_smoothing: float = 0.0,
        exit_weights: str | Sequence[float] = "uniform",
        teacher_exits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(temperature, kl_weight, ce_weight, label_smoothing, exit_weights, teacher_exits)
        self._contain(FeatureTerm(feature_weight, projection, feature_size))


def feature_kd_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
    student_features: Sequence[Tensor | None],
    teacher_features: Sequence[Tensor | None],
    **settings: Any,
) -> Tensor:
    """Returns the scalar of :class:`FeatureKDLoss` without projections, for a single call."""
    loss = FeatureKDLoss(**{"projection": "none", **settings})
    features = {"student_features": student_features, "teacher_features": teacher_features}
    return loss(student_logits, teacher_logits, labels, **features).loss


def _same_positions(student: Tensor, teacher: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Brings two features, channels last, to the same positions: pooled maps, or the mean over all positions."""
    if student.ndim == teacher.ndim == 4:
        pairs = zip(student.shape[1:3], teacher.shape[1:3], strict=True)
        height, width = (min(*pair, most) for pair in pairs)
        return _pool(student, height, width), _pool(teacher, height, width)
    if student.shape[1:-1] == teacher.shape[1:-1]:
        return student, teacher
    return _mean_position(student), _mean_position(teacher)


#: Maps of at most this many positions, one channel after the other, are averaged by one product with a matrix.
SMALL_MAP = 64


def _pool(feature: Tensor, height: int, width: int) -> Tensor:
    """Averages a map, channels last, down to so many positions; of equal numbers, the way that takes least time."""
    if feature.shape[1:3] == (height, width):
        return feature
    maps = feature.permute(0, 3, 1, 2)  # the layout in which most networks have them in memory
    rows, columns = maps.shape[2] / height, maps.shape[3] / width
    if not rows.is_integer() or not columns.is_integer():
        pooled = F.adaptive_avg_pool2d(maps, (height, width))
    elif feature.is_contiguous():  # channels last in memory too
        pooled = F.avg_pool2d(maps, (int(rows), int(columns)))
    elif maps.shape[2] * maps.shape[3] <= SMALL_MAP:
        in_row = torch.eye(height, dtype=maps.dtype, device=maps.device).repeat_interleave(int(rows), 0)
        in_column = torch.eye(width, dtype=maps.dtype, device=maps.device).repeat_interleave(int(columns), 0)
        weights = torch.kron(in_row, in_column) / (rows * columns)  # of each position in each average
        pooled = (maps.flatten(2) @ weights).unflatten(2, (height, width))
    else:
        pooled = maps.unflatten(2, (height, -1)).sum(3).unflatten(3, (width, -1)).sum(4) / (rows * columns)
    return pooled.permute(0, 2, 3, 1)


def _mean_position(feature: Tensor) -> Tensor:
    return feature.flatten(1, -2).mean(1) if feature.ndim > 2 else feature
