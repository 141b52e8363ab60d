"""Intervals of real numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from erde_hub.errors import RecordsError, ShapeError
from erde_hub.records import check_held_out, check_kind

from .base import SetMetrics, check_alpha

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords


class BayesianLinearRegression:
    """Linear regression with a Gaussian prior whose width, and the noise, are found by evidence maximisation.

    The precision of the weights is ``A = a I + b X^T X`` and their mean ``m = b A^-1 X^T y``. The updates
    ``a <- g / |m|^2`` and ``1/b <- |y - X m|^2 / (N - g)``, with g the effective number of weights, are repeated until
    both change by less than a tolerance. All of it in float64.

    Args:
        mean: Of the weights, the one of the constant last.
        covariance: Of the weights.
        noise: Standard deviation of the targets around the line.
        prior: Standard deviation of the weights in the prior, where known.

    References:
        MacKay, Bayesian interpolation, 1992; as in the released code of arXiv 2311.05931. Deviations: none; as there,
        mean and covariance belong to the values of a and b before the last update.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, noise: float, prior: float | None = None) -> None:
        self.mean, self.covariance, self.noise = mean.double(), covariance.double(), float(noise)
        self.prior = prior

    @classmethod
    def fit(
        cls,
        features: Tensor,
        targets: Tensor,
        start: float = 1e-5,
        tolerance: float = 1e-5,
        max_rounds: int = 1000,
    ) -> BayesianLinearRegression:
        """Fits one exit.

        Args:
            features: Without the 1 that is appended here.
            targets: Real numbers.
            start: First values of a and b.
            tolerance: Relative.
            max_rounds: Of updates.

        Shape:
            features: (N, H). targets: (N,).

        Raises:
            ShapeError: Other shapes, or fewer than two samples.
            RecordsError: The line meets every target, so that there is no noise.
        """
        x, y = with_constant(features), targets.double()
        if y.shape != (len(x),) or len(x) < 2:
            raise ShapeError(f"targets must be ({len(x)},), at least two, got {tuple(y.shape)}")
        gram, moment = x.T @ x, x.T @ y
        eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
        a = b = float(start)
        mean, precision = torch.zeros_like(moment), torch.eye(len(moment), dtype=torch.float64)
        for _ in range(max_rounds):
            precision = a * torch.eye(len(moment), dtype=torch.float64) + b * gram
            mean = b * torch.linalg.solve(precision, moment)
            gamma = float((b * eigenvalues / (b * eigenvalues + a)).sum())
            size, misfit = float(mean @ mean), float((y - x @ mean).square().sum())
            if not (misfit > 0 and math.isfinite(size + misfit)):
                raise RecordsError(
                    f"no line can be fitted to {len(y)} targets: it meets every one of them, or they are not finite:"
                    " fit on more samples, whose targets differ"
                )
            if gamma < 1e-9 or size == 0:  # the features say nothing about the targets: all weights are 0
                break
            new_a, new_b = gamma / size, (len(y) - gamma) / misfit
            close = abs(new_a - a) <= tolerance * abs(a) and abs(new_b - b) <= tolerance * abs(b)
            a, b = new_a, new_b
            if close:
                break
        return cls(mean, torch.linalg.inv(precision), b**-0.5, a**-0.5)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the variance of the line, without noise, each (N,)."""
        h = with_constant(features)
        return h @ self.mean, ((h @ self.covariance) * h).sum(1)


def with_constant(features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Appends a 1 to each row: (N, H) to (N, H + 1) of that dtype."""
    if features.ndim != 2:
        raise ShapeError(f"features must be (N, H), got {tuple(features.shape)}")
    return torch.nn.functional.pad(features.to(dtype), (0, 1), value=1.0)


def avcs_quadratics(
    regressions: Sequence[BayesianLinearRegression],
    features: Sequence[Tensor],
    weight_draws: Sequence[Tensor],
    alpha: float,
) -> Tensor:
    """Coefficients of a y^2 + b y + c <= 0, which defines the set of each exit so far.

    Shape:
        features: E tensors (N, H_e). weight_draws: E tensors (H_e + 1,). Returns (E, N, 3).
    """
    total = torch.zeros(len(features[0]), 3, dtype=torch.float64)
    total[:, 2] = math.log(check_alpha(alpha))
    found = []
    for regression, x, weights in zip(regressions, features, weight_draws, strict=True):
        noise = torch.tensor(regression.noise, dtype=torch.float64)
        total = total + avcs_terms(*regression.predict(x), with_constant(x) @ weights.double(), noise)
        found.append(total)
    return torch.stack(found)


def avcs_terms(mean: Tensor, variance: Tensor, drawn: Tensor, noise: Tensor) -> Tensor:
    """What one exit adds to the coefficients (a, b, c): the log-ratio of its predictive to its drawn density.

    Args:
        mean: Of the line.
        variance: Of the line, without noise.
        drawn: The line for weights that were drawn from their posterior.
        noise: Standard deviation of the targets around the line.

    Shape:
        all: (...), broadcast against each other. Returns (..., 3).
    """
    s2 = noise.square()
    wide = variance + s2
    a = variance / (2 * s2 * wide)  # (1 / s2 - 1 / wide) / 2, without the difference of two large numbers
    b = mean / wide - drawn / s2
    c = drawn.square() / (2 * s2) - mean.square() / (2 * wide) + noise.log() - wide.log() / 2
    return torch.stack(torch.broadcast_tensors(a, b, c), -1)


def solve_intervals(quadratics: Tensor) -> Tensor:
    """Ends of {y: a y^2 + b y + c <= 0}, NaN where it is empty: (..., 3) to (..., 2)."""
    a, b, c = quadratics.unbind(-1)
    discriminant = b.square() - 4 * a * c
    root = discriminant.clamp_min(0).sqrt()
    ends = torch.stack([(-b - root) / (2 * a), (-b + root) / (2 * a)], -1)
    return torch.where((discriminant < 0)[..., None], math.nan, ends)


def intersect_intervals(intervals: Tensor) -> Tensor:
    """Intervals cut with all before them; NaN from the first empty cut on.

    Shape:
        intervals: (E, ..., 2). Returns the same.
    """
    empty = intervals.isnan().any(-1)
    low = intervals[..., 0].nan_to_num(nan=math.inf).cummax(0).values
    high = intervals[..., 1].nan_to_num(nan=-math.inf).cummin(0).values
    empty = (empty | (low > high)).cummax(0).values
    return torch.where(empty[..., None], math.nan, torch.stack([low, high], -1))


def interval_metrics(intervals: Tensor, targets: Tensor) -> SetMetrics:
    """Lengths, coverage and nestedness of intervals; empty ones have length 0 and hold nothing.

    With several targets each counts by itself.

    Shape:
        intervals: (E, N, 2) or (E, N, D, 2), raw or nested. targets: (N,) or (N, D).
    """
    if intervals.shape[1:-1] != targets.shape or intervals.shape[-1] != 2:
        raise ShapeError(
            f"intervals must be (E, {', '.join(map(str, targets.shape))}, 2) for targets of shape"
            f" {tuple(targets.shape)}, got {tuple(intervals.shape)}"
        )
    nested = intersect_intervals(intervals)

    def length(values: Tensor) -> Tensor:
        return (values[..., 1] - values[..., 0]).nan_to_num(nan=0.0)

    held = (intervals[..., 0] <= targets) & (targets <= intervals[..., 1])
    size, kept = length(intervals), length(nested)
    both_empty = intervals.isnan().any(-1) & nested.isnan().any(-1)
    consistency = torch.where(size > 0, kept / size.clamp_min(1e-300), both_empty.double())
    so_far = held.long().cummin(0).values
    size, held, so_far, consistency = (
        values.double().flatten(1).mean(1) for values in (size, held, so_far, consistency)
    )
    return SetMetrics(size.tolist(), held.tolist(), so_far.tolist(), consistency.tolist())


def draw_weights(regressions: Sequence[BayesianLinearRegression], generator: torch.Generator) -> list[Tensor]:
    """One draw of each exit's weights from its posterior."""
    drawn = []
    for regression in regressions:
        factor = torch.linalg.cholesky((regression.covariance + regression.covariance.T) / 2)
        noise = torch.randn(len(regression.mean), generator=generator, dtype=torch.float64)
        drawn.append(regression.mean + factor @ noise)
    return drawn


class ConformalRegressor:
    """Split conformal intervals for each exit by itself: its output, plus and minus a quantile of its absolute errors.

    At an exit that is fixed beforehand the truth is in the interval with probability 1 - alpha, whatever the model, for
    samples drawn like those of the fit; intervals of one exit are all of one width. Those of different exits are not
    nested and do not hold the truth at once, unless ``all_exits`` divides alpha by the number of exits.

    Args:
        radii: Half the width, one per exit and target.
        alpha: Error rate.

    Shape:
        radii: (E, D).

    References:
        Lei et al., Distribution-free predictive inference for regression, 2018, arXiv 1604.04173. Deviations: none; the
        union bound over exits is ours.
    """

    def __init__(self, radii: Tensor, alpha: float = 0.05) -> None:
        self.radii, self.alpha = radii.double(), check_alpha(alpha)
        if self.radii.ndim != 2 or bool((self.radii < 0).any()):
            raise ShapeError(f"radii must be (E, D) and not negative, got {radii}")

    @classmethod
    def fit(cls, records: ExitRecords, alpha: float = 0.05, *, all_exits: bool = False) -> ConformalRegressor:
        """Takes the quantiles from held-out records of a regression.

        Args:
            records: Held-out.
            alpha: Error rate, of each target.
            all_exits: Give every exit the E-th part of it, so that the intervals of all exits hold the truth at once.
        """
        check_kind(records)
        records.require_regression("ConformalRegressor")
        records = check_held_out(records)
        rate = check_alpha(alpha) / (records.num_exits if all_exits else 1)
        rank = math.ceil((records.num_samples + 1) * (1 - rate))
        errors = (records.logits.double() - records.labels.double()).abs().sort(1).values
        short = rank > records.num_samples  # too few samples: everything is in
        return cls(torch.full_like(errors[:, 0], math.inf) if short else errors[:, rank - 1], alpha)

    def intervals(self, outputs: Tensor) -> Tensor:
        """Returns each exit's own intervals; :func:`intersect_intervals` makes them nested.

        Shape:
            outputs: (E, N, D). Returns (E, N, D, 2) float64.
        """
        if outputs.ndim != 3 or (len(outputs), outputs.shape[2]) != tuple(self.radii.shape):
            raise ShapeError(
                f"these intervals were fitted for {tuple(self.radii.shape)} exits and targets, got outputs of shape"
                f" {tuple(outputs.shape)}: fit them anew"
            )
        radii = self.radii[:, None]
        return torch.stack([outputs.double() - radii, outputs.double() + radii], -1)
