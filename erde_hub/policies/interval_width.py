"""Exit when the interval of real numbers is narrow enough: the policy ``set_size`` of a regression."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from erde_hub.errors import ConfigError, ShapeError
from erde_hub.prediction_sets.base import check_alpha
from erde_hub.prediction_sets.intervals import (
    BayesianLinearRegression,
    avcs_terms,
    draw_weights,
    intersect_intervals,
    solve_intervals,
    with_constant,
)
from erde_hub.records import check_held_out, check_kind

from .base import LearnedPolicy
from .recorded import features_of

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords

#: Widest features that a posterior over their weights is kept of: its square is stored for every exit.
MAX_FEATURES = 8192
#: Rows of records that are computed at a time.
_ROWS = 4096


class IntervalWidthPolicy(LearnedPolicy):
    """Exits when the anytime-valid interval of this exit and all before is narrower than the threshold.

    Each exit has a Bayesian linear regression of the targets on what its last linear layer reads. The log-ratio of its
    predictive density to that of weights drawn once from its posterior is a parabola in the target; summed over the
    exits so far it stays below a level on an interval, and the intervals of all exits so far and of all draws are
    intersected. The threshold is a width in the unit of the targets; of several targets the widest interval counts.
    Where the exits contradict each other and nothing is left, the sample goes on.

    Later intervals lie inside earlier ones, so the one at the exit that a sample takes may be quoted. The published
    level log(1 / alpha) promises for one draw, and under the regressions' own assumptions, that the target is in all of
    them with probability 1 - alpha. The level that :meth:`fit` takes by default needs neither: it is the quantile, over
    held-back samples, of the largest log-ratio that any exit and draw gives the truth, so that each target lies in the
    intervals of all exits at once with probability 1 - alpha for samples drawn like these.

    Args:
        num_exits: Number of exits, the last one included.
        feature_sizes: Width of what each exit's last linear layer reads.
        num_targets: Number D of targets.
        alpha: Error rate, of each target.
        draws: Draws of the weights whose intervals are intersected. At the published level each fails at its own rate,
            so that many fail more often.

    Raises:
        ConfigError: Nothing was fitted, or a number is out of range.

    References:
        Jazbec et al., Early-exit neural networks with nested prediction sets, 2024, arXiv 2311.05931, and its released
        code, with one draw there for text similarity and ten for synthetic data. Deviations: fitted on held-out
        records; sums in float64; an empty interval is NaN. The level taken from held-back samples (split conformal
        prediction of a running maximum) and stopping on the width are ours.
    """

    uses_features: ClassVar[bool] = True
    leaves_above: ClassVar[bool] = False
    threshold_range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    default_threshold: ClassVar[float] = 0.0
    never_threshold: ClassVar[float] = 0.0

    noise: Tensor
    level: Tensor

    def __init__(
        self,
        num_exits: int | None = None,
        feature_sizes: Sequence[int] = (),
        num_targets: int = 1,
        alpha: float = 0.05,
        draws: int = 10,
    ) -> None:
        super().__init__()
        self.num_exits = self.check_fitted(num_exits)
        for name, value in (("num_targets", num_targets), ("draws", draws)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        sizes = list(feature_sizes) if isinstance(feature_sizes, (list, tuple)) else []
        if len(sizes) != self.num_exits or any(type(size) is not int or not 0 < size <= MAX_FEATURES for size in sizes):
            raise ConfigError(
                f"feature_sizes must be {self.num_exits} integers from 1 to {MAX_FEATURES}, one per exit, got"
                f" {feature_sizes!r}"
            )
        self.feature_sizes, self.num_targets, self.draws = sizes, num_targets, draws
        self.alpha = check_alpha(alpha)
        self.register_buffer("noise", torch.ones(self.num_exits, num_targets, dtype=torch.float32))
        self.register_buffer("level", torch.full((num_targets,), -math.log(self.alpha), dtype=torch.float32))
        for e, size in enumerate(sizes):
            # The posteriors of several targets differ in scale alone, so they have the same axes of their covariance.
            shapes = {
                "axes": (size + 1,),
                "variance": (num_targets,),
                "mean": (num_targets,),
                "drawn": (draws, num_targets),
            }
            for name, shape in shapes.items():
                self.register_buffer(f"{name}_{e}", torch.zeros(*shape, size + 1, dtype=torch.float32))

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "num_exits": self.num_exits,
            "feature_sizes": self.feature_sizes,
            "num_targets": self.num_targets,
            "alpha": self.alpha,
            "draws": self.draws,
        }

    @classmethod
    def fit(
        cls,
        records: ExitRecords,
        alpha: float = 0.05,
        draws: int = 10,
        seed: int = 0,
        level_share: float = 0.5,
        training_index: Any | None = None,
    ) -> Self:
        """Fits the regressions of all exits on held-out records, draws their weights once, and takes the level.

        Args:
            records: Of a regression, held-out, with features.
            alpha: Error rate, of each target.
            draws: Draws of the weights.
            seed: Of the draws, and of which samples are held back.
            level_share: Fraction of the samples that is held back for the level; 0 fits on all of them and takes the
                published level.
            training_index: Numbers of the samples that were trained on, where known.

        Raises:
            DataError: Too few records, or of samples that were trained on.
            RecordsError: Records without features, or with targets that no line can be fitted to.
            ConfigError: Records of classes, or a fraction outside [0, 1).
        """
        check_kind(records)
        features_of(records, cls.__name__)
        records = check_held_out(records, training_index)
        if isinstance(level_share, bool) or not isinstance(level_share, (int, float)) or not 0 <= level_share < 1:
            raise ConfigError(f"level_share must be at least 0 and below 1, got {level_share!r}")
        generator = torch.Generator().manual_seed(seed)
        held_back = round(level_share * records.num_samples)
        if held_back:
            order = torch.randperm(records.num_samples, generator=generator)
            records, kept = records.select(order[held_back:]), records.select(order[:held_back])
        features = features_of(records, cls.__name__)
        sizes = [int(feature.shape[1]) for feature in features]
        policy = cls(records.num_exits, sizes, records.num_outputs, alpha, draws)
        for e, feature in enumerate(features):
            fits = [BayesianLinearRegression.fit(feature, target) for target in records.labels.T]
            axes = torch.linalg.eigh(fits[0].covariance).eigenvectors
            policy.get_buffer(f"axes_{e}").copy_(axes)
            variance = torch.stack([(axes * (fit.covariance @ axes)).sum(0) for fit in fits])
            policy.get_buffer(f"variance_{e}").copy_(variance.clamp_min(0))
            policy.get_buffer(f"mean_{e}").copy_(torch.stack([fit.mean for fit in fits]))
            weights = torch.stack([torch.stack(draw_weights(fits, generator)) for _ in range(draws)])
            policy.get_buffer(f"drawn_{e}").copy_(weights)
            policy.noise[e] = torch.tensor([fit.noise for fit in fits])
        if held_back:
            policy.level.copy_(policy._level_of(kept))
        return policy

    def _level_of(self, records: ExitRecords) -> Tensor:
        """Quantile over samples of the largest log-ratio of the truth, (D,); infinite where there are too few."""
        rank = math.ceil((records.num_samples + 1) * (1 - self.alpha))
        if rank > records.num_samples:
            return torch.full((self.num_targets,), math.inf)
        features = features_of(records, type(self).__name__)
        terms = torch.stack([self.density_terms(e, feature) for e, feature in enumerate(features)])
        a, b, c = self._parabolas(terms).unbind(-1)  # (E, N, draws, D) each
        y = records.labels.to(a.dtype)[:, None]
        return (a * y.square() + b * y + c).amax((0, 2)).sort(0).values[rank - 1]

    def _parabolas(self, terms: Tensor) -> Tensor:
        return terms.unflatten(2, (self.draws, self.num_targets, 3)).cumsum(0)

    def density_terms(self, exit_index: int, feature: Tensor) -> Tensor:
        """Returns what an exit adds to the parabolas of its samples, flattened over draws, targets and coefficients.

        Shape:
            feature: (N, H). Returns (N, draws x D x 3), float64 where the device has it.
        """
        fitted = self.feature_sizes[exit_index : exit_index + 1]
        if feature.ndim != 2 or list(feature.shape[1:]) != fitted:
            raise ShapeError(
                f"this policy was fitted for {self.num_exits} exits with features {self.feature_sizes}, got"
                f" {tuple(feature.shape)} of exit {exit_index}: fit it anew"
            )
        dtype = torch.float32 if feature.device.type == "mps" else torch.float64
        axes, variance, mean, drawn = (
            self.get_buffer(f"{name}_{exit_index}").to(dtype) for name in ("axes", "variance", "mean", "drawn")
        )
        h = with_constant(feature, dtype)
        deviation = (h @ axes).square() @ variance.T
        lines = (h @ drawn.flatten(0, 1).T).unflatten(1, drawn.shape[:2])  # (N, draws, D)
        terms = avcs_terms((h @ mean.T)[:, None], deviation[:, None], lines, self.noise[exit_index].to(dtype))
        return terms.flatten(1)

    def _intervals(self, terms: Tensor) -> Tensor:
        """Nested intervals (exits so far, N, D, 2) from the exits' density terms; NaN where empty."""
        parabolas = self._parabolas(terms)
        level = torch.nn.functional.pad(self.level.to(parabolas.dtype)[:, None], (2, 0))  # (D, 3), the last column
        ends = solve_intervals(parabolas - level)  # (E, N, draws, D, 2)
        # NaN wins in both, as it has to: one empty interval empties the intersection.
        both = torch.stack([ends[..., 0].amax(2), ends[..., 1].amin(2)], -1)
        return intersect_intervals(both)

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns the width of the widest target's interval, NaN where one is empty.

        Args:
            log_probs: What :meth:`density_terms` gave for the exits so far; a regression has no log-probabilities.

        Shape:
            log_probs: (exits so far, N, draws x D x 3). Returns (N,) float32.
        """
        if log_probs.shape[-1] != 3 * self.draws * self.num_targets or len(log_probs) > self.num_exits:
            raise ShapeError(
                f"density terms must be (up to {self.num_exits} exits, N, {3 * self.draws * self.num_targets}), got"
                f" {tuple(log_probs.shape)}"
            )
        last = self._intervals(log_probs)[-1]
        return (last[..., 1] - last[..., 0]).amax(-1).float()

    @torch.no_grad()
    def intervals(self, records: ExitRecords) -> Tensor:
        """Returns the nested intervals of recorded samples at every exit, the last one included; NaN where empty.

        Shape:
            Returns (E, N, D, 2) float64.
        """
        features = features_of(records, type(self).__name__)
        if len(features) != self.num_exits:
            raise ShapeError(f"this policy was fitted for {self.num_exits} exits, got {len(features)}: fit it anew")
        parts = []
        for start in range(0, records.num_samples, _ROWS):
            rows = [self.density_terms(e, feature[start : start + _ROWS]) for e, feature in enumerate(features)]
            parts.append(self._intervals(torch.stack(rows)))
        return torch.cat(parts, 1)

    def never_leaves(self, threshold: float) -> bool:
        """No interval is narrower than nothing."""
        return threshold <= 0

    def grid(self, num_classes: int, num_early_exits: int) -> list[float]:
        """Has none: widths have the unit of the targets.

        Raises:
            ConfigError: Always; the message says where thresholds come from.
        """
        raise ConfigError("widths have no round thresholds: take fine_thresholds(records, policy), or state a width")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the policy with its model and keeps its numbers in float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            kept = before[name]
            if buffer is not None and kept is not None and buffer.dtype != kept.dtype:
                self._buffers[name] = kept if kept.is_meta else kept.to(buffer.device)
        return self
