"""Scores and shares of exits learned together under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erde_hub.errors import ConfigError, ShapeError
from erde_hub.held_out import check_calibration_data

from .base import LearnedPolicy

if TYPE_CHECKING:
    from erde_hub.evaluation import ExitRecords

#: Passes over the records where none are asked for, and steps above which there are fewer.
_EPOCHS, _STEPS = 60, 1500


class EENetPolicy(LearnedPolicy):
    """Leaves by a score that is linear in an exit's probabilities and in the scores of the exits before.

    With x_k = [p_k, max p_k, 1 - H(p_k) / log K, clamped scores before] the score is q_k = u_k p_k + v_k rest. Fitting
    trains it to say whether the exit is right, weighted by the share of each sample that a second head assigns to the
    exit, while these shares are held to a budget. The thresholds let each exit keep its mean share.

    Args:
        num_exits: Number of exits, the last one included.
        num_classes: Number of classes K.

    References:
        Ilhan et al., Adaptive deep neural network inference optimization with EENet, 2024, arXiv 2301.07099.
        Deviations: the released code mixes samples in its score layer and cannot train, the formulas are used instead;
        both heads are trained at once with a higher learning rate and fewer epochs; the last exit answers where no
        threshold is met.
    """

    q_prob: Tensor
    q_extra: Tensor

    #: Thresholds of the latest fit, one per early exit; empty for a policy that was built or loaded.
    fitted_thresholds: list[float]

    def __init__(self, num_exits: int | None = None, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_exits = self.check_fitted(num_exits)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ConfigError(f"num_classes must be an integer of at least 2, got {num_classes!r}")
        self.num_classes = num_classes
        early = self.num_exits - 1
        self.register_buffer("q_prob", torch.zeros(early, num_classes))
        self.register_buffer("q_extra", torch.zeros(early, early + 1))
        self.fitted_thresholds = []

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"num_exits": self.num_exits, "num_classes": self.num_classes}

    @classmethod
    def fit(
        cls,
        records: ExitRecords,
        budget: float | None = None,
        *,
        beta: float = 1.0,
        kl_weight: float = 1e-3,
        cost_weight: float = 1.0,
        hidden_ratio: float = 0.5,
        plain_logits: bool = True,
        epochs: int | None = None,
        batch_size: int = 512,
        lr: float = 1e-2,
        weight_decay: float = 1e-2,
        restarts: int = 3,
        seed: int = 0,
        **checks: Any,
    ) -> EENetPolicy:
        """Trains scores and shares on held-out records.

        Args:
            records: Held-out.
            budget: Mean multiply-accumulates per sample; None is half of the full model's.
            beta: Sharpens the scores that shares are drawn towards.
            kl_weight: Of that pull.
            cost_weight: Of the distance from the budget; published: 1e-2, with more steps.
            hidden_ratio: Width of the share head's hidden layer, relative to its input.
            plain_logits: Shares come from plain numbers; False bounds these by a sigmoid as published, which keeps any
                two shares within a factor e of each other and so cannot meet small budgets.
            epochs: Passes over the records; None makes 60, or fewer where that is more than 1,500 steps.
            batch_size: Samples per step.
            lr: Of Adam.
            weight_decay: Of Adam.
            restarts: Starts; the most accurate one within 10 % of the budget is kept, or the nearest to it.
            seed: Of the starts.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.

        Raises:
            ConfigError: A budget below the first exit's cost or above the last one's.
            DataError: The records are of training data, too few, or lack a class.
        """
        check_calibration_data(records, **checks)
        costs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
        wanted = float(costs[-1]) / 2 if budget is None else float(budget)
        wanted = max(wanted, float(costs[0])) if budget is None else wanted
        if not float(costs[0]) <= wanted <= float(costs[-1]):
            raise ConfigError(f"budget {wanted:g} is outside the costs of the exits, {costs[0]:g} to {costs[-1]:g}")
        probs, labels = records.logits.softmax(-1), records.labels
        correct = records.logits.argmax(-1) == labels
        if epochs is None:
            epochs = max(1, min(_EPOCHS, _STEPS // math.ceil(records.num_samples / batch_size)))
        best: tuple[tuple[float, float], _Scheduler, list[float]] | None = None
        for start in range(restarts):
            generator = torch.Generator().manual_seed(seed + start)
            scheduler = _Scheduler(records.num_exits, records.num_classes, hidden_ratio, plain_logits, generator)
            optimizer = torch.optim.Adam(scheduler.parameters(), lr=lr, weight_decay=weight_decay)
            with torch.enable_grad():
                for _ in range(epochs):
                    for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
                        terms = scheduler.losses(
                            probs[:, rows], labels[rows], costs.float(), wanted, beta, kl_weight, cost_weight
                        )
                        optimizer.zero_grad()
                        terms["total"].backward()
                        optimizer.step()
            with torch.no_grad():
                scores, shares = scheduler(probs)
            thresholds = share_thresholds(scores.T, shares.mean(0).tolist(), never=1.0)[:-1]
            taken = _taken(scores, thresholds)
            cost = float(costs[taken].mean())
            accuracy = float(correct.gather(0, taken[None]).double().mean())
            off = abs(cost - wanted) / wanted
            key = (max(off - 0.1, 0.0), -accuracy)
            if best is None or key < best[0]:
                best = (key, scheduler, thresholds)
        policy = cls(records.num_exits, records.num_classes)
        if best is not None:
            _, scheduler, policy.fitted_thresholds = best
            for e in range(records.num_exits - 1):
                policy.q_prob[e] = scheduler.q_prob[e].detach()
                policy.q_extra[e, : 2 + e] = scheduler.q_extra[e].detach()
        return policy

    def score(self, log_probs: Tensor) -> Tensor:
        """Returns the score of the deepest exit, (N,)."""
        last = len(log_probs) - 1
        if last >= len(self.q_prob) or log_probs.shape[-1] != self.num_classes:
            raise ShapeError(
                f"this policy was fitted for {self.num_exits} exits and {self.num_classes} classes, got"
                f" {last + 1} early exits and {log_probs.shape[-1]} classes: fit it anew"
            )
        before: list[Tensor] = []
        for e, own in enumerate(log_probs):
            probs = own.exp()
            rest = torch.stack([*_summary(probs), *before], -1)
            score = probs @ self.q_prob[e].to(probs) + rest @ self.q_extra[e, : 2 + e].to(probs)
            before.append(score.clamp(0, 1))
        return score


class _Scheduler(nn.Module):
    """Score and share heads of all exits, for fitting.

    Args:
        num_exits: E.
        num_classes: K.
        hidden_ratio: Width of the hidden layer, relative to its input.
        plain_logits: No sigmoid before the softmax over exits.
        generator: Of the initial weights.
    """

    def __init__(
        self,
        num_exits: int,
        num_classes: int,
        hidden_ratio: float,
        plain_logits: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.plain_logits = plain_logits

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.1)

        widths = [num_classes + 2 + e for e in range(num_exits)]
        hidden = [max(1, int(hidden_ratio * width)) for width in widths]
        self.q_prob = nn.ParameterList(normal(num_classes) for _ in widths)
        self.q_extra = nn.ParameterList(normal(2 + e) for e in range(num_exits))
        for extra in self.q_extra:
            extra.data[0] += 1.0  # begins as the largest probability
        self.h1_weight = nn.ParameterList(normal(h, w) for h, w in zip(hidden, widths, strict=True))
        self.h1_bias = nn.ParameterList(normal(h) for h in hidden)
        self.h2_weight = nn.ParameterList(normal(h) for h in hidden)
        self.h2_bias = nn.ParameterList(normal(1) for _ in hidden)

    def forward(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores (E, N), unclamped, and shares (N, E) of probabilities (E, N, K)."""
        scores: list[Tensor] = []
        assigned = []
        for e, own in enumerate(probs):
            rest = torch.stack([*_summary(own), *(score.detach().clamp(0, 1) for score in scores)], -1)
            x = torch.cat([own, rest], -1)
            scores.append(own @ self.q_prob[e] + rest @ self.q_extra[e])
            hidden = (x @ self.h1_weight[e].T + self.h1_bias[e]).sigmoid()
            out = hidden @ self.h2_weight[e] + self.h2_bias[e]
            assigned.append(out if self.plain_logits else out.sigmoid())
        return torch.stack(scores), torch.stack(assigned, -1).softmax(-1)

    def losses(
        self,
        probs: Tensor,
        labels: Tensor,
        costs: Tensor,
        budget: float,
        beta: float,
        kl_weight: float,
        cost_weight: float,
    ) -> dict[str, Tensor]:
        """Returns ``score``, ``kl``, ``cost`` and their weighted sum ``total``."""
        scores, shares = self(probs)
        clamped = scores.T.clamp(0, 1)
        right = (probs.argmax(-1) == labels).T.to(probs.dtype)
        weights = (shares / shares.sum(0)).detach()
        score = (weights * F.binary_cross_entropy(clamped, right, reduction="none")).sum() / len(probs)
        pull = clamped.detach().pow(beta)
        pull = pull / pull.sum(1, keepdim=True).clamp_min(torch.finfo(pull.dtype).tiny)
        kl = (torch.special.xlogy(pull, pull) - pull * shares.log()).mean()
        cost = ((shares @ costs.to(shares.dtype)).mean() - budget).abs() / budget
        return {"score": score, "kl": kl, "cost": cost, "total": score + kl_weight * kl + cost_weight * cost}


def share_thresholds(scores: Tensor, shares: Sequence[float], never: float = 1e8) -> list[float]:
    """Thresholds that let each exit keep a share of the samples: its best ones among those that are left.

    Args:
        scores: Of every exit, the last one included.
        shares: One per exit; an exit gets floor(share x N) samples.
        never: Threshold of an exit whose share is empty, or for which too few samples are left.

    Shape:
        scores: (N, E). Returns E numbers, the last one 0.
    """
    scores = scores.detach()
    samples, exits = scores.shape
    left = torch.ones(samples, dtype=torch.bool)
    thresholds = []
    for e in range(exits - 1):
        count = math.floor(shares[e] * samples + 1e-9)
        if count == 0 or count > int(left.sum()):
            thresholds.append(never)
            continue
        values = scores[left, e].sort(descending=True).values
        thresholds.append(float(values[count - 1]))
        left &= scores[:, e] < thresholds[-1]
    return [*thresholds, 0.0]


def _summary(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability, and one minus the normalised entropy."""
    entropy = -torch.special.xlogy(probs, probs).sum(-1)
    return probs.amax(-1), 1 - entropy / math.log(probs.shape[-1])


def _taken(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    taken = torch.full((scores.shape[1],), len(thresholds))
    for e in reversed(range(len(thresholds))):
        taken[scores[e] >= thresholds[e]] = e
    return taken
