"""Leave when going on would not help: a small gate per exit, fitted on records."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from erde_hub.errors import ConfigError, ShapeError
from erde_hub.held_out import check_calibration_data

from .base import LearnedPolicy

if TYPE_CHECKING:
    from erde_hub.evaluation import ExitRecords

_FEATURES = 6


class EEFPPolicy(LearnedPolicy):
    """Leaves when a logistic gate is sure enough that the exit is right, or that no later one will be.

    The gate of each exit reads the largest probability, the margin, the normalised entropy and the logarithms of the
    three largest probabilities. Its target is 1 if the exit is right, or wrong like all exits behind it: then going on
    costs and changes nothing. The score is a probability, the same scale at every exit.

    Args:
        num_exits: Number of exits, the last one included; the last has no gate.

    References:
        The target is that of Rethinking calibration for early exits, 2025, arXiv 2508.21495. The gate, its features and
        its fit are ours, since what the authors train was not published in a form we could read.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_exits: int | None = None) -> None:
        super().__init__()
        self.num_exits = self.check_fitted(num_exits)
        self.register_buffer("weight", torch.zeros(self.num_exits - 1, _FEATURES))
        self.register_buffer("bias", torch.zeros(self.num_exits - 1))

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"num_exits": self.num_exits}

    @classmethod
    def fit(cls, records: ExitRecords, weight_decay: float = 1e-3, **checks: Any) -> EEFPPolicy:
        """Fits the gates on held-out records, by Newton's method.

        Args:
            records: Held-out: on training data later exits are nearly always right, which says nothing.
            weight_decay: Of standardised features, against gates that separate a small set perfectly.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.

        Raises:
            ConfigError: ``weight_decay`` is not positive.
            DataError: The records are of training data, too few, or lack a class.
        """
        check_calibration_data(records, **checks)
        if not 0 < weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be positive, got {weight_decay!r}")
        policy = cls(records.num_exits)
        targets = should_exit(records.logits.argmax(-1) == records.labels)
        for e, target in enumerate(targets):
            x = gate_features(records.logits[e].log_softmax(-1)).double()
            mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
            weight, bias = _logistic((x - mean) / spread, target.double(), weight_decay)
            policy.weight[e] = weight / spread
            policy.bias[e] = bias - (weight / spread) @ mean
        return policy

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns the gate's probability, (N,)."""
        e = len(log_probs) - 1
        if e >= len(self.weight):
            raise ShapeError(f"this policy was fitted for {self.num_exits} exits, got {e + 1} early ones: fit it anew")
        x = gate_features(log_probs[-1])
        return (x @ self.weight[e].to(x) + self.bias[e].to(x)).sigmoid()


def should_exit(correct: Tensor) -> Tensor:
    """Whether a sample should leave at an exit: it is right there, or wrong there and at all exits behind.

    Shape:
        correct: (E, N). Returns (E - 1, N) bool.
    """
    correct = correct.bool()
    later = correct.flip(0).cummax(0).values.flip(0)[1:]  # right at some exit behind
    return correct[:-1] | ~later


def gate_features(log_probs: Tensor) -> Tensor:
    """What a gate reads, (N, 6): largest probability, margin, normalised entropy, the three largest log-probabilities.

    Logarithms are cut at -20; with two classes the third is that.

    Shape:
        log_probs: (N, K).
    """
    best = log_probs.topk(min(3, log_probs.shape[-1]), dim=-1).values
    best = F.pad(best, (0, 3 - best.shape[-1]), value=-20.0)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.clamp_min(-1e4)).sum(-1) / math.log(log_probs.shape[-1])
    first, second = best[..., 0].exp(), best[..., 1].exp()
    return torch.cat([torch.stack([first, first - second, entropy], -1), best.clamp_min(-20.0)], -1)


def _logistic(x: Tensor, target: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Weights and bias of a logistic regression with a ridge, by damped Newton steps."""
    design = F.pad(x, (0, 1), value=1.0)
    ridge = torch.full((design.shape[1],), weight_decay, dtype=x.dtype)
    ridge[-1] = 1e-9
    w = torch.zeros(design.shape[1], dtype=x.dtype)

    def loss(w: Tensor) -> float:
        return float(F.binary_cross_entropy_with_logits(design @ w, target) + (ridge * w * w).sum() / 2)

    for _ in range(50):
        p = (design @ w).sigmoid()
        gradient = design.T @ (p - target) / len(target) + ridge * w
        hessian = (design * (p * (1 - p))[:, None]).T @ design / len(target) + ridge.diag()
        step = torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
        size = 1.0
        while size > 1e-6 and loss(w - size * step) > loss(w):
            size /= 2
        w = w - size * step
        if float(step.abs().max()) * size < 1e-8:
            break
    return w[:-1], w[-1]
