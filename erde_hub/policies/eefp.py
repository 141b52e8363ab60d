"""Exit when going on would not help: a small gate per exit, fitted on records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from erde_hub._arguments import check_number, check_whole
from erde_hub.errors import ConfigError, ShapeError
from erde_hub.losses import functional
from erde_hub.records import check_fit_data, row_chunks

from .base import LearnedPolicy

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords

#: Weight decays that :meth:`EEFPPolicy.fit` chooses from, strong ones first.
WEIGHT_DECAYS = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
#: What weight decay draws the gates to: the difference of the two largest log-probabilities.
_PRIOR = (0.0, 0.0, 0.0, 1.0, -1.0, 0.0)
_FEATURES = len(_PRIOR)
#: Least standard deviation that a feature is divided by; one that varies less says next to nothing.
_LEAST_DEVIATION = 0.01
#: Weight decay where all targets agree: the gate keeps its prior, and only its calibration is fitted.
_UNMOVED = 1e3
#: Least slope of the map from gates to probabilities, so that a larger gate never gives a smaller probability.
_SLOPE = 0.01


class EEFPPolicy(LearnedPolicy):
    """Exits when a logistic gate is confident enough that the exit is correct, or that no later one will be.

    The gate of each exit reads the largest probability, the margin, the normalised entropy and the logarithms of the
    three largest probabilities. Its target is 1 if the exit is correct, or wrong like all later exits: then going
    on costs and does not help. The score is a probability, calibrated per exit on what gates say of samples that
    they had not seen, so that one threshold means the same at every exit.

    Args:
        num_exits: Number of exits, the last one included; the last has no gate.

    Attributes:
        cross_fitted_scores: Of the records of the latest fit, each by gates that were fitted without its sample; empty
            for a policy that was built or loaded.
        fitted_weight_decay: The weight decay of the latest fit; None for a policy that was built or loaded.

    Shape:
        cross_fitted_scores: (E - 1, N).

    References:
        The target is that of Rethinking calibration for early exits, 2025, arXiv 2508.21495. The gate, its features and
        its fit are ours, since what the authors train was not published in a form we could read.
    """

    weight: Tensor
    bias: Tensor

    cross_fitted_scores: Tensor
    fitted_weight_decay: float | None

    def __init__(self, num_exits: int | None = None) -> None:
        super().__init__()
        self.num_exits = self.check_fitted(num_exits)
        self.register_buffer("weight", torch.zeros(self.num_exits - 1, _FEATURES))
        self.register_buffer("bias", torch.zeros(self.num_exits - 1))
        self.cross_fitted_scores = torch.empty(self.num_exits - 1, 0)
        self.fitted_weight_decay = None

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"num_exits": self.num_exits}

    @classmethod
    def fit(
        cls,
        records: ExitRecords,
        weight_decay: float | None = None,
        *,
        folds: int = 5,
        seed: int = 0,
        **checks: Any,
    ) -> EEFPPolicy:
        """Fits the gates on held-out records, by Newton's method, with cross-fitting.

        The samples are divided into folds, and gates that are fitted without a fold score it. These scores calibrate
        each exit, by a slope and a shift (Platt), and then choose the weight decay: the strongest one whose log-loss
        over all exits is within a standard error of the smallest. The gates that are kept are fitted on all samples.
        :attr:`cross_fitted_scores` show what a threshold would do on these records with gates that have not seen them.
        No guarantee rests on that, since slope, shift and weight decay have seen all samples: a guarantee needs other
        records.

        Args:
            records: Held-out: on training data later exits are nearly always correct, so there is nothing to learn.
            weight_decay: Of standardised features, away from a gate that is the difference of the two largest
                log-probabilities; None chooses from the powers of ten between 10 and 0.0001.
            folds: Number of folds.
            seed: Of the division.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.

        Raises:
            ConfigError: ``weight_decay`` is not positive, or ``folds`` is not between 2 and the number of samples.
            InputTypeError: An argument of another type.
            DataError: The records are of training data, too few, or lack a class.

        References:
            Platt, Probabilistic outputs for support vector machines, 1999, with the smoothed targets of section 2.2.
            Deviations: slope and shift have normal priors around 1 and 0 with a standard deviation of 1.
        """
        records = check_fit_data(cls.fit, records, checks)
        if weight_decay is not None:
            check_number("weight_decay", weight_decay, zero=False)
        if check_whole("folds", folds, 2) > records.num_samples:
            raise ConfigError(f"folds must be at most the number of samples, {records.num_samples}, got {folds}")
        check_whole("seed", seed, 0)
        decays = WEIGHT_DECAYS if weight_decay is None else (float(weight_decay),)
        generator = torch.Generator().manual_seed(seed)
        policy = cls(records.num_exits)
        targets = should_exit(records.logits.argmax(-1) == records.labels)
        features = [
            torch.cat([gate_features(logits[rows].log_softmax(-1)).double() for rows in row_chunks(*logits.shape)])
            for logits in records.logits[:-1]
        ]
        unseen, maps = [], []
        for x, target in zip(features, targets, strict=True):
            gates = _unseen_gates(x, target, _folds(target, folds, generator), decays)
            maps.append([platt(gate, target) for gate in gates])
            unseen.append(
                torch.stack([slope * gate + shift for gate, (slope, shift) in zip(gates, maps[-1], strict=True)])
            )
        best = _strongest(torch.stack(unseen), targets)
        for e, (x, target) in enumerate(zip(features, targets, strict=True)):
            slope, shift = maps[e][best]
            weight, bias = next(_gates(x, target, decays[best : best + 1]))
            policy.weight[e], policy.bias[e] = slope * weight, slope * bias + shift
        policy.fitted_weight_decay = decays[best]
        policy.cross_fitted_scores = torch.stack([own[best] for own in unseen]).sigmoid().float()
        return policy

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns the gate's probability, (N,)."""
        e = len(log_probs) - 1
        if e >= len(self.weight):
            raise ShapeError(f"this policy was fitted for {self.num_exits} exits, got {e + 1} early ones: fit it anew")
        x = gate_features(log_probs[-1])
        return (x @ self.weight[e].to(x) + self.bias[e].to(x)).sigmoid()


def should_exit(correct: Tensor) -> Tensor:
    """Whether a sample should exit at an exit: it is correct there, or wrong there and at all later exits.

    Shape:
        correct: (E, N). Returns (E - 1, N) bool.
    """
    correct = correct.bool()
    later = correct.flip(0).cummax(0).values.flip(0)[1:]  # correct at some later exit
    return correct[:-1] | ~later


def gate_features(log_probs: Tensor) -> Tensor:
    """What a gate reads, (N, 6): largest probability, margin, normalised entropy, the three largest log-probabilities.

    Logarithms are cut at -20; with two classes the third is that.

    Shape:
        log_probs: (N, K).
    """
    best = log_probs.topk(min(3, log_probs.shape[-1]), dim=-1).values
    best = F.pad(best, (0, 3 - best.shape[-1]), value=-20.0)
    uncertainty = functional.entropy(log_probs) / math.log(log_probs.shape[-1])
    first, second = best[..., 0].exp(), best[..., 1].exp()
    return torch.cat([torch.stack([first, first - second, uncertainty], -1), best.clamp_min(-20.0)], -1)


def platt(gate: Tensor, target: Tensor) -> tuple[float, float]:
    """Slope and shift that turn gates into log-odds of the target; the slope is positive, 1 where all targets agree.

    Shape:
        gate: (N,) float64. target: (N,) bool.
    """
    soft, slope = _smoothed(target), 1.0
    prior = gate.new_tensor([1.0, 0.0])
    strength = torch.full_like(prior, 1 / len(gate))
    if _both(target):
        slope, shift = _newton(F.pad(gate[:, None], (0, 1), value=1.0), soft, strength, prior).tolist()
        if slope >= _SLOPE:
            return slope, shift
        slope = _SLOPE
    (shift,) = _newton(torch.ones_like(gate)[:, None], soft, strength[1:], prior[1:], slope * gate).tolist()
    return slope, shift


def _folds(target: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """Divides samples into folds at random, those of each target evenly: (N,) to (N,) of numbers below ``folds``."""
    order = torch.randperm(len(target), generator=generator)
    order = order[target[order].int().argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % folds
    return fold


def _unseen_gates(x: Tensor, target: Tensor, fold: Tensor, decays: tuple[float, ...]) -> Tensor:
    """Gates of all samples, each fitted without the sample's fold.

    Shape:
        x: (N, 6) float64. target, fold: (N,). Returns (decays, N).
    """
    found = x.new_empty(len(decays), len(x))
    for k in fold.unique():
        inside = fold == k
        for row, (weight, bias) in zip(found, _gates(x[~inside], target[~inside], decays), strict=True):
            row[inside] = x[inside] @ weight + bias
    return found


def _gates(x: Tensor, target: Tensor, decays: tuple[float, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields weights and bias of one exit's gate for each weight decay; each fit starts where the last one ended."""
    mean, deviation = x.mean(0), x.std(0).clamp_min(_LEAST_DEVIATION)
    design = F.pad((x - mean) / deviation, (0, 1), value=1.0)
    prior = F.pad(x.new_tensor(_PRIOR) * deviation, (0, 1))
    soft, found = _smoothed(target), None
    for decay in decays:
        ridge = F.pad(torch.full_like(deviation, decay if _both(target) else _UNMOVED), (0, 1), value=1e-9)
        found = _newton(design, soft, ridge, prior, start=found)
        weight = found[:-1] / deviation
        yield weight, found[-1] - weight @ mean


def _strongest(unseen: Tensor, targets: Tensor) -> int:
    """Returns the number of the first weight decay whose log-loss is within a standard error of the smallest one.

    Shape:
        unseen: (E - 1, decays, N), strong decays first. targets: (E - 1, N).
    """
    expected = targets[:, None].double().expand_as(unseen)
    losses = F.binary_cross_entropy_with_logits(unseen, expected, reduction="none").mean(0)
    excess = losses - losses[losses.mean(1).argmin()]
    error = excess.std(1) / unseen.shape[-1] ** 0.5
    return int((excess.mean(1) <= error + 1e-9).int().argmax())  # 1e-9 is rounding


def _both(target: Tensor) -> bool:
    """Whether there is a sample of either target, without which nothing is known about their order."""
    return 0 < int(target.sum()) < len(target)


def _smoothed(target: Tensor) -> Tensor:
    """Targets short of 0 and 1 by one sample's worth, so that those that are all alike have a finite fit too."""
    positive = int(target.sum())
    return torch.where(target, (positive + 1) / (positive + 2), 1 / (len(target) - positive + 2)).double()


def _newton(
    design: Tensor,
    target: Tensor,
    ridge: Tensor,
    prior: Tensor,
    offset: Tensor | float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """Weights of a logistic regression with a ridge around a prior, by damped Newton steps.

    Minimises mean BCE(X w + offset, target) + sum ridge (w - prior)^2 / 2.

    Shape:
        design: (N, D). target: (N,). ridge, prior, start: (D,). offset: (N,). Returns (D,).
    """
    w = prior if start is None else start
    z = design @ w + offset

    def loss(z: Tensor, w: Tensor) -> float:
        return float(F.softplus(z).mean() - target @ z / len(z) + (ridge * (w - prior).square()).sum() / 2)

    now = loss(z, w)
    for _ in range(50):
        p = z.sigmoid()
        gradient = design.T @ (p - target) / len(target) + ridge * (w - prior)
        hessian = (design * (p * (1 - p))[:, None]).T @ design / len(target) + ridge.diag()
        step = torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
        size = 1.0
        while True:
            new = w - size * step
            z = design @ new + offset
            then = loss(z, new)
            if then <= now + 1e-12 or size < 1e-6:  # the rest is rounding
                break
            size /= 2
        w, now = new, then
        if float(step.abs().max()) * size < 1e-8:
            break
    return w
