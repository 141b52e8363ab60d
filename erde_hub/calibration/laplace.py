"""Uncertainty of each exit's last layer, from a Laplace approximation around its trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from erde_hub._arguments import check_flag, check_whole
from erde_hub.errors import ConfigError, InputTypeError, RecordsError
from erde_hub.records import check_fit_data, check_kind

from .base import Calibrator, log_of
from .mie import ensemble_step, ensemble_weights
from .temperature import TEMPERATURES, check_temperatures, nlpd

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords

#: Prior variances that the released code tries.
PRIOR_VARIANCES = (0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0)
#: Largest number of sampled probabilities that is held at a time.
_CELLS = 1 << 23


class LaplaceCalibrator(Calibrator):
    """Averages an exit's softmax over weights of its last layer that are drawn from a Gaussian around the trained ones.

    With features h = [features, 1], logits z and prior variance s2 the weights have covariance V'^-1 x U'^-1, V' = V +
    s2^-1/2 I, U' = U + s2^-1/2 I, so that logits are normal with mean z and covariance (h^T V'^-1 h) U'^-1. V is
    sqrt(N) times the mean of h h^T, U sqrt(N) times the mean of diag(p) - p p^T. Inputs that look unlike the training
    data get flatter probabilities.

    Args:
        num_exits: Number of exits, the last one included.
        num_classes: Number K of classes.
        feature_sizes: Width of the features of each exit.
        draws: Number of draws; the same ones serve every sample and exit, and are stored.
        ensemble: Also average the exits so far, as :class:`~erde_hub.calibration.MIECalibrator` does.

    Raises:
        ConfigError: A number that is not positive, or not one feature size per exit.

    References:
        Meronen et al., Fixing overconfidence in dynamic neural networks, 2024, arXiv 2302.06359, and its released code.
        Deviations: U is exact where the code draws one label per sample; factors are means over all samples, the code's
        running average over batches is an option.
    """

    uses_features: ClassVar[bool] = True

    temperature: Tensor
    weight: Tensor
    normal: Tensor

    def __init__(
        self,
        num_exits: int,
        num_classes: int,
        feature_sizes: Sequence[int],
        draws: int = 50,
        ensemble: bool = False,
    ) -> None:
        super().__init__(num_exits)
        for name, value in (("num_classes", num_classes), ("draws", draws)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        given = list(feature_sizes) if isinstance(feature_sizes, Sequence) else []
        if len(given) != num_exits or any(type(size) is not int or size < 1 for size in given):
            raise ConfigError(f"feature_sizes must be {num_exits} positive integers, got {feature_sizes!r:.80}")
        self.num_classes, self.feature_sizes = num_classes, [int(size) for size in feature_sizes]
        self.draws, self.ensemble = draws, check_flag("ensemble", ensemble)
        self.register_buffer("temperature", torch.ones(num_exits))
        self.register_buffer("weight", torch.ones(num_exits))
        self.register_buffer("normal", torch.zeros(draws, num_classes))
        for e, size in enumerate(feature_sizes):
            self.register_buffer(f"feature_factor_{e}", torch.zeros(size + 1, size + 1))
            self.register_buffer(f"logit_factor_{e}", torch.zeros(num_classes, num_classes))

    @property
    def uses_history(self) -> bool:  # type: ignore[override]
        """An ensemble reads earlier exits."""
        return self.ensemble

    def macs(self, exit_index: int) -> int:
        """Half of the operations 2 K n + 2 p^2 + 5 p + 2 of K classes, n draws and p features, arXiv 2302.06359."""
        size = self.feature_sizes[exit_index]
        return (2 * self.num_classes * self.draws + 2 * size**2 + 5 * size + 2) // 2

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "num_exits": self.num_exits,
            "num_classes": self.num_classes,
            "feature_sizes": self.feature_sizes,
            "draws": self.draws,
            "ensemble": self.ensemble,
        }

    @classmethod
    def fit(
        cls,
        records: ExitRecords,
        training_records: ExitRecords | None = None,
        *,
        draws: int = 50,
        ensemble: bool = False,
        temperatures: Sequence[float] = TEMPERATURES,
        prior_variances: Sequence[float] = PRIOR_VARIANCES,
        batch_size: int | None = None,
        tuning_samples: int = 1000,
        seed: int = 0,
        **checks: Any,
    ) -> LaplaceCalibrator:
        """Computes the factors, and chooses temperature and prior variance of each exit jointly by the NLPD.

        Args:
            records: Held-out, with features; they choose temperature and prior variance.
            training_records: Of training images, with features, for the factors; None takes the held-out ones.
            draws: Number of draws.
            ensemble: Average the exits so far; each is then tuned on the ensemble up to it, earlier ones fixed.
            temperatures: To choose from.
            prior_variances: To choose from.
            batch_size: Average the factors as the released code does, over batches of this size with the later ones
                weighing more; None takes the mean over all samples.
            tuning_samples: Held-out samples that are looked at for each combination.
            seed: Of the draws and of the choice of samples.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.

        Raises:
            RecordsError: Records without features, or training records of another model.
            ConfigError: A prior variance, temperature or number that is not positive.
            InputTypeError: An argument of another type.
        """
        records = check_fit_data(cls.fit, records, checks)
        source = records if training_records is None else training_records
        check_kind(source, "training_records")
        if records.features is None or source.features is None:
            raise RecordsError("Laplace needs features: collect_exit_records(model, data, features=True)")
        sizes, trained = ([feature.shape[1] for feature in part.features or []] for part in (records, source))
        if (trained, source.num_outputs) != (sizes, records.num_outputs):
            raise RecordsError(
                f"training_records are of another model: {source.num_outputs} classes and features {trained}, the"
                f" held-out records have {records.num_outputs} and {sizes}"
            )
        if source.fingerprint and records.fingerprint and source.fingerprint != records.fingerprint:
            raise RecordsError(
                f"training_records are of other weights ({source.fingerprint:.12}) than the held-out records"
                f" ({records.fingerprint:.12}): collect both with the same model"
            )
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        check_whole("tuning_samples", tuning_samples, 1)
        variances = check_temperatures(prior_variances, "prior_variances")
        grid = [(t, v) for v in variances for t in check_temperatures(temperatures)]
        generator = torch.Generator().manual_seed(check_whole("seed", seed, 0))
        found = cls(records.num_exits, records.num_classes, sizes, draws, ensemble)
        found.normal.copy_(torch.randn(draws, records.num_classes, generator=generator))
        found.weight.copy_(ensemble_weights(records.cumulative_macs))
        rows = torch.randperm(records.num_samples, generator=generator)[:tuning_samples]
        labels = records.labels[rows]
        state: list[Tensor] = []
        for e in range(records.num_exits):
            logit, feature = kronecker_factors(source.logits[e], source.features[e], batch_size)
            best: tuple[float, float, float, list[Tensor]] | None = None
            for temperature, variance in grid:
                found._set(e, logit, feature, variance, temperature)
                after = list(state)
                log_probs = found(e, records.logits[e, rows], records.features[e][rows], after)
                score = float(nlpd(log_probs.double(), labels))
                if best is None or score < best[0]:
                    best = (score, temperature, variance, after)
            if best is not None:
                found._set(e, logit, feature, best[2], best[1])
                state = best[3]
        return found

    def _set(self, exit_index: int, logit: Tensor, feature: Tensor, variance: float, temperature: float) -> None:
        getattr(self, f"logit_factor_{exit_index}").copy_(posterior_factor(logit, variance))
        getattr(self, f"feature_factor_{exit_index}").copy_(posterior_factor(feature, variance))
        self.temperature[exit_index] = temperature

    def forward(self, exit_index: int, logits: Tensor, feature: Tensor | None, state: list[Tensor]) -> Tensor:
        """Returns log-probabilities."""
        if feature is None or feature.ndim != 2:
            shape = None if feature is None else tuple(feature.shape)
            raise InputTypeError(f"Laplace reads the input (N, D) of exit {exit_index}'s last layer, got {shape}")
        probs = predictive(
            logits.float(),
            feature.float(),
            getattr(self, f"feature_factor_{exit_index}").float(),
            self.normal.float() @ getattr(self, f"logit_factor_{exit_index}").float().T,
            float(self.temperature[exit_index]),
        )
        return ensemble_step(exit_index, probs, self.weight, state) if self.ensemble else log_of(probs)


def kronecker_factors(logits: Tensor, features: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Factors U and V of the Gauss-Newton matrix of an exit's last layer, each times sqrt(N).

    Args:
        logits: At the trained weights.
        features: What the layer reads.
        batch_size: None for means over all samples; otherwise the released running average over batches i = 1, 2, ...:
            X <- r X + (1 - r) X_i with r = min(1 - 1/i, 0.95).

    Shape:
        logits: (N, K). features: (N, D). Returns (K, K) and (D + 1, D + 1), float64.
    """
    samples = len(logits)
    u = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.float64)
    v = torch.zeros(features.shape[1] + 1, features.shape[1] + 1, dtype=torch.float64)
    size = batch_size or samples
    for i, start in enumerate(range(0, samples, size), 1):
        probs = logits[start : start + size].double().softmax(-1)
        h = torch.nn.functional.pad(features[start : start + size].double(), (0, 1), value=1.0)
        rate = min(1 - 1 / i, 0.95)
        u = rate * u + (1 - rate) * (probs.mean(0).diag() - probs.T @ probs / len(probs))
        v = rate * v + (1 - rate) * (h.T @ h) / len(h)
    return u * samples**0.5, v * samples**0.5


def posterior_factor(factor: Tensor, prior_variance: float) -> Tensor:
    """Lower Cholesky factor of (X + I / sqrt(prior variance))^-1."""
    size = len(factor)
    damped = factor.double() + torch.eye(size, dtype=torch.float64) / prior_variance**0.5
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky((inverse + inverse.T) / 2)


def predictive(logits: Tensor, features: Tensor, feature_factor: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Mean over draws of softmax((z + sqrt(h^T V'^-1 h) L g) / T).

    Args:
        logits: z.
        features: Without the 1 that is appended here.
        feature_factor: Lower Cholesky factor of V'^-1.
        noise: The draws L g, one row each.
        temperature: T.

    Shape:
        logits: (N, K). features: (N, D). feature_factor: (D + 1, D + 1). noise: (M, K). Returns (N, K).
    """
    h = torch.nn.functional.pad(features, (0, 1), value=1.0)
    deviation = (h @ feature_factor).norm(dim=1)
    rows = max(1, _CELLS // noise.numel())
    parts = []
    for z, s in zip(logits.split(rows), deviation.split(rows), strict=True):
        parts.append(((z + s[:, None] * noise[:, None]) / temperature).softmax(-1).mean(0))
    return torch.cat(parts) if parts else logits.new_zeros(logits.shape)
