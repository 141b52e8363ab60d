"""Scores and fractions of exits learned together under a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erde_hub._arguments import check_flag, check_number, check_whole, plain_numbers
from erde_hub.errors import ConfigError, ShapeError
from erde_hub.losses.functional import entropy
from erde_hub.records import check_fit_data

from .base import LearnedPolicy

if TYPE_CHECKING:
    from erde_hub.records import ExitRecords

#: Passes over the records where none are asked for, and steps above which there are fewer.
_EPOCHS, _STEPS = 60, 1000
#: Widest hidden layer of a fraction head, so that a fit is linear in the number of classes.
_WIDEST = 512


class EENetPolicy(LearnedPolicy):
    """Exits by a score that is linear in an exit's probabilities and in the scores of the exits before.

    With x_k = [p_k, max p_k, 1 - H(p_k) / log K, clamped scores before] the score is q_k = u_k p_k + v_k rest. Fitting
    trains it to say whether the exit is correct, weighted by the fraction of each sample that a second head assigns to
    the exit, while these fractions are held to a budget. The thresholds let each exit take its mean fraction.

    Args:
        num_exits: Number of exits, the last one included.
        num_classes: Number of classes K.

    References:
        Ilhan et al., Adaptive deep neural network inference optimization with EENet, 2024, arXiv 2301.07099.
        Deviations: the released code mixes samples in its score layer and cannot train, the formulas are used instead;
        both heads are trained at once with a higher learning rate and fewer epochs; the last exit is taken where no
        threshold is met.
    """

    uses_budget: ClassVar[bool] = True

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
        costs: Sequence[float] | None = None,
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
        """Trains scores and fractions on held-out records.

        Args:
            records: Held-out.
            budget: Mean cost per sample; None is half of the full model's.
            costs: Of a sample that takes each exit, the last one included, in the unit of the budget, such as
                milliseconds; None takes multiply-accumulates.
            beta: Sharpens the scores that the fractions are drawn towards.
            kl_weight: Of that pull.
            cost_weight: Of the distance from the budget; published: 1e-2, with more steps.
            hidden_ratio: Width of the fraction head's hidden layer, relative to its input; at most 512 units.
            plain_logits: Fractions come from plain numbers; False bounds these by a sigmoid as published, which keeps
                any two fractions within a factor e of each other and so cannot meet small budgets.
            epochs: Passes over the records; None makes 60, or fewer where that is more than 1,000 steps.
            batch_size: Samples per step.
            lr: Of Adam.
            weight_decay: Of Adam.
            restarts: Starts; the most accurate one within 10 % of the budget is kept, or the nearest to it.
            seed: Of the starts.
            **checks: Arguments of :func:`~erde_hub.calibration.check_calibration_data`.

        Raises:
            ConfigError: A budget below the cheapest exit's cost or above the dearest one's, costs that are not one
                positive number per exit, or a number out of its range.
            InputTypeError: An argument of another type.
            DataError: The records are of training data, too few, or lack a class.
        """
        records = check_fit_data(cls.fit, records, checks)
        for name, value in (("beta", beta), ("kl_weight", kl_weight), ("cost_weight", cost_weight)):
            check_number(name, value, zero=True)
        check_number("weight_decay", weight_decay, zero=True)
        for name, value in (("hidden_ratio", hidden_ratio), ("lr", lr)):
            check_number(name, value, zero=False)
        for name, whole in (("batch_size", batch_size), ("restarts", restarts)):
            check_whole(name, whole, 1)
        check_whole("seed", seed, 0)
        check_flag("plain_logits", plain_logits)
        if epochs is not None:
            check_whole("epochs", epochs, 1)
        per_exit = _costs(records, costs)
        mean_cost = _budget(per_exit, budget)
        correct = records.logits.argmax(-1) == records.labels
        # Sample by sample in memory, which is how batches are taken.
        inputs, targets = head_inputs(records.logits.softmax(-1)).transpose(0, 1).contiguous(), correct.T.float()
        if epochs is None:
            epochs = max(1, min(_EPOCHS, _STEPS // math.ceil(records.num_samples / batch_size)))
        starts = [torch.Generator().manual_seed(seed + start) for start in range(restarts)]
        scheduler = _Scheduler(records.num_exits, records.num_classes, hidden_ratio, plain_logits, starts)
        optimizer = torch.optim.Adam(scheduler.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(records.num_samples, generator=starts[0]).split(batch_size):
                    batch = (inputs.index_select(0, rows).transpose(0, 1), targets.index_select(0, rows).T)
                    terms = scheduler.losses(*batch, per_exit.float(), mean_cost, beta, kl_weight, cost_weight)
                    optimizer.zero_grad()
                    terms["total"].sum().backward()
                    optimizer.step()
        with torch.no_grad():
            scores, fractions = scheduler(inputs.transpose(0, 1))
        ends = [_end(*own, correct, per_exit, mean_cost) for own in zip(scores, fractions, strict=True)]
        start = min(range(restarts), key=lambda i: ends[i][0])
        policy = cls(records.num_exits, records.num_classes)
        policy.fitted_thresholds = ends[start][1]
        for e in range(records.num_exits - 1):
            policy.q_prob[e] = scheduler.q_prob[e][start].detach()
            policy.q_extra[e, : 2 + e] = scheduler.q_extra[e][start].detach()
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
    """Score and fraction heads of all exits, for fitting; several starts are trained together on the same batches.

    Args:
        num_exits: E.
        num_classes: K.
        hidden_ratio: Width of the hidden layer, relative to its input.
        plain_logits: No sigmoid before the softmax over exits.
        generators: Of the initial weights, one per start.
    """

    def __init__(
        self,
        num_exits: int,
        num_classes: int,
        hidden_ratio: float,
        plain_logits: bool,
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.plain_logits = plain_logits
        widths = [num_classes + 2 + e for e in range(num_exits)]
        hidden = [max(1, min(_WIDEST, int(hidden_ratio * width))) for width in widths]

        def normal(shapes: Iterable[tuple[int, ...]]) -> nn.ParameterList:
            """One parameter per exit, (R, ...) for R starts."""
            draws = [[torch.randn(*shape, generator=g) * 0.1 for g in generators] for shape in shapes]
            return nn.ParameterList(nn.Parameter(torch.stack(own)) for own in draws)

        self.q_prob = normal((num_classes,) for _ in widths)
        self.q_extra = normal((2 + e,) for e in range(num_exits))
        for extra in self.q_extra:
            extra.data[:, 0] += 1.0  # begins as the largest probability
        self.h1_weight = normal(zip(hidden, widths, strict=True))
        self.h1_bias = normal((h,) for h in hidden)
        self.h2_weight = normal((h,) for h in hidden)
        self.h2_bias = normal((1,) for _ in hidden)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and assigns samples.

        Shape:
            inputs: (E, N, K + 2), from :func:`head_inputs`. Returns scores (R, E, N), unclamped, and fractions
                (R, N, E).
        """
        scores: list[Tensor] = []
        assigned = []
        for e, own in enumerate(inputs):
            before = [score.detach().clamp(0, 1)[..., None] for score in scores]
            x = torch.cat([own.expand(len(self.q_prob[e]), -1, -1), *before], -1)
            # The score is one more column of the product with the hidden layer: thin products are slow.
            weight = torch.cat([self.h1_weight[e], torch.cat([self.q_prob[e], self.q_extra[e]], -1)[:, None]], 1)
            columns = torch.baddbmm(F.pad(self.h1_bias[e], (0, 1))[:, None], x, weight.mT)
            scores.append(columns[..., -1])
            out = (columns[..., :-1].sigmoid() * self.h2_weight[e][:, None]).sum(-1) + self.h2_bias[e]
            assigned.append(out if self.plain_logits else out.sigmoid())
        return torch.stack(scores, 1), torch.stack(assigned, -1).softmax(-1)

    def losses(
        self,
        inputs: Tensor,
        correct: Tensor,
        costs: Tensor,
        budget: float,
        beta: float,
        kl_weight: float,
        cost_weight: float,
    ) -> dict[str, Tensor]:
        """Computes ``score``, ``kl``, ``cost`` and their weighted sum ``total``.

        Shape:
            inputs: (E, N, K + 2). correct: (E, N), 0 or 1. costs: (E,). Returns (R,) each.
        """
        scores, fractions = self(inputs)
        clamped = scores.transpose(1, 2).clamp(0, 1)
        weights = (fractions / fractions.sum(1, keepdim=True)).detach()
        missed = F.binary_cross_entropy(clamped, correct.T.expand_as(clamped), reduction="none")
        score = (weights * missed).sum((1, 2)) / len(correct)
        pull = clamped.detach().pow(beta)
        pull = pull / pull.sum(-1, keepdim=True).clamp_min(torch.finfo(pull.dtype).tiny)
        kl = (torch.special.xlogy(pull, pull) - pull * fractions.log()).mean((1, 2))
        cost = ((fractions @ costs.to(fractions.dtype)).mean(1) - budget).abs() / budget
        return {"score": score, "kl": kl, "cost": cost, "total": score + kl_weight * kl + cost_weight * cost}


def head_inputs(probs: Tensor) -> Tensor:
    """What the heads read of an exit by itself, [p, max p, 1 - H(p) / log K]: (..., K) to (..., K + 2)."""
    return torch.cat([probs, torch.stack(_summary(probs), -1)], -1)


def fraction_thresholds(scores: Tensor, fractions: Sequence[float], never: float = 1e8) -> list[float]:
    """Thresholds that let each exit take a fraction of the samples: its best ones among those that are left.

    Args:
        scores: Of every exit, the last one included.
        fractions: One per exit; an exit gets floor(fraction x N) samples.
        never: Threshold of an exit whose fraction is empty, or for which too few samples are left.

    Shape:
        scores: (N, E). Returns E numbers, the last one 0.
    """
    scores = scores.detach()
    samples, exits = scores.shape
    left = torch.ones(samples, dtype=torch.bool)
    thresholds = []
    for e in range(exits - 1):
        count = math.floor(fractions[e] * samples + 1e-9)
        if count == 0 or count > int(left.sum()):
            thresholds.append(never)
            continue
        values = scores[left, e].sort(descending=True).values
        thresholds.append(float(values[count - 1]))
        left &= scores[:, e] < thresholds[-1]
    return [*thresholds, 0.0]


def _costs(records: ExitRecords, costs: Sequence[float] | None) -> Tensor:
    """Costs of the exits, (E,) float64."""
    if costs is None:
        return torch.tensor(records.cumulative_macs, dtype=torch.float64)
    values = plain_numbers(costs)
    if values is None or len(values) != records.num_exits or not all(0 < value < math.inf for value in values):
        raise ConfigError(
            f"costs must be {records.num_exits} positive numbers, one per exit, the last one included, got"
            f" {costs!r:.80}"
        )
    return torch.tensor(values, dtype=torch.float64)


def _budget(costs: Tensor, budget: float | None) -> float:
    """The budget, or half of the last exit's cost where there is none, at least the cheapest exit's."""
    low, high = float(costs.min()), float(costs.max())
    chosen = max(float(costs[-1]) / 2, low) if budget is None else check_number("budget", budget, zero=True)
    if not low <= chosen <= high:
        raise ConfigError(f"budget {chosen:g} is outside the costs of the exits, {low:g} to {high:g}")
    return chosen


def _summary(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability, and one minus the normalised entropy."""
    return probs.amax(-1), 1 - entropy(probs.log()) / math.log(probs.shape[-1])


def _end(
    scores: Tensor, fractions: Tensor, correct: Tensor, costs: Tensor, budget: float
) -> tuple[tuple[float, float], list[float]]:
    """The result of a start: a key, smaller for better ones, and thresholds.

    Shape:
        scores, correct: (E, N). fractions: (N, E). costs: (E,).
    """
    thresholds = fraction_thresholds(scores.T, fractions.mean(0).tolist(), never=1.0)[:-1]
    taken = torch.full((scores.shape[1],), len(thresholds))
    for e in reversed(range(len(thresholds))):
        taken[scores[e] >= thresholds[e]] = e
    off = abs(float(costs[taken].mean()) - budget) / budget
    accuracy = float(correct.gather(0, taken[None]).double().mean())
    return (max(off - 0.1, 0.0), -accuracy), thresholds
