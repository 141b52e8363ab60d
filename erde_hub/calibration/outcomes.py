"""What happens to every recorded sample at every exit: its score, what it loses there, what the exit costs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from erde_hub.policies import ExitPolicy
from erde_hub.policies.recorded import exit_indices, score_exits
from erde_hub.records import ExitRecords, row_chunks

from .objective import Objective


@dataclass(frozen=True)
class ExitOutcomes:
    """Scores, losses and costs of recorded samples, from which every threshold can be evaluated.

    Attributes:
        policy: Gave the scores.
        scores: Of each sample at each early exit.
        losses: Of each sample at each exit against the last one, in [-1, 1].
        costs: Of each exit.

    Shape:
        scores: (E - 1, N). losses: (E, N), the last row 0. costs: (E,) float64.
    """

    policy: ExitPolicy
    scores: Tensor
    losses: Tensor
    costs: Tensor

    @classmethod
    def of(cls, records: ExitRecords, policy: ExitPolicy, objective: Objective, costs: Tensor) -> ExitOutcomes:
        """Scores records with a policy and measures what an objective bounds."""
        losses = exit_losses(records.logits, records.labels, objective.target) / objective.scale
        if objective.target == "selective_risk":  # above 0 on average where the error of those that exit early is
            losses[:-1] -= objective.bound
        return cls(policy, score_exits(records.logits, policy), losses, costs)

    @property
    def early(self) -> int:
        """Number of early exits."""
        return self.scores.shape[0]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.scores.shape[1]

    @property
    def binary(self) -> bool:
        """Every loss is -1, 0 or 1."""
        return bool((self.losses == self.losses.round()).all())

    def select(self, rows: Tensor) -> ExitOutcomes:
        """Returns the outcomes of some samples."""
        return dataclasses.replace(self, scores=self.scores[:, rows], losses=self.losses[:, rows])

    def route(self, thresholds: list[float]) -> Tensor:
        """Returns the exit that each sample takes, (N,)."""
        return exit_indices(self.scores, self.policy, thresholds)

    def losses_at(self, thresholds: list[float]) -> Tensor:
        """Returns the loss of each sample at the exit that it takes, (N,)."""
        return self.losses.gather(0, self.route(thresholds)[None])[0]

    def ranks(self) -> Tensor:
        """Returns scores of which larger ones exit first, (E - 1, N) float64; minus infinity for those that never do.

        A threshold is then a *level*: samples with a rank of at least the level exit, at infinity none.
        """
        ranks = (self.scores if self.policy.leaves_above else -self.scores).double()
        stuck = ranks.isnan()
        if self.policy.leaves_above:
            stuck |= ranks < self.policy.threshold_range[0]
        return ranks.masked_fill(stuck, -math.inf)

    def level_of(self, exit_index: int, ranks: Tensor, threshold: float) -> float:
        """Returns the level of a threshold: the lowest rank (N,) that exits at it, infinity if none does."""
        if self.policy.never_leaves(threshold):
            return math.inf
        exiting = ranks[self.policy.compare(self.scores[exit_index], threshold)]
        return float(exiting.min()) if len(exiting) else math.inf

    def threshold_of(self, ranks: Tensor, level: float) -> float:
        """Returns a short threshold at which exactly the ranks (N,) of at least ``level`` exit."""
        policy = self.policy
        if math.isinf(level):
            return policy.never_threshold
        if policy.whole_thresholds:
            return float(level)
        below = ranks[ranks < level]
        following = float(below.max()) if len(below) else level - max(1e-4 * abs(level), 1e-6)
        low, high = policy.threshold_range
        if policy.leaves_above:  # exits at score >= threshold: anything in (following, level]
            return min(max(_shortest_between(following, level, level), low), high)
        # exits at score < threshold: anything in (-level, -following]
        return min(max(_shortest_between(-level, -following, -following), low), high)


def exit_losses(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """Returns what each sample loses at each exit against the last one, in the unit of the target.

    Args:
        logits: Of every exit.
        labels: Class indices.
        target: ``accuracy_drop`` and budgets: the last exit is correct and this one is not (1), or the other way round
            (-1). ``disagreement``: the prediction differs from the last exit's (1). ``brier_increase``: difference of
            the Brier scores, in [-2, 2]. ``selective_risk``: an early exit is wrong (1), whatever the last one says.

    Shape:
        logits: (E, N, K). labels: (N,). Returns (E, N) float64, the last row 0.
    """
    if target == "brier_increase":
        brier = torch.stack([_brier_scores(exit_logits, labels) for exit_logits in logits])
        return brier - brier[-1]
    predictions = logits.argmax(-1)
    wrong = (predictions != (predictions[-1] if target == "disagreement" else labels)).double()
    if target == "selective_risk":
        wrong[-1] = 0
    return wrong - wrong[-1]


def expected_losses(logits: Tensor) -> Tensor:
    """Returns the accuracy that each exit is expected to lose if the last exit's probabilities are correct.

    Shape:
        logits: (E, N, K). Returns (E, N) float64 in [0, 1], the last row 0.
    """
    parts = []
    for rows in row_chunks(logits.shape[1], logits.shape[2]):
        probs = logits[-1, rows].double().softmax(-1)
        parts.append(probs.gather(1, logits[:, rows].argmax(-1).T).T)
    expected = torch.cat(parts, 1)
    return expected[-1] - expected


def _brier_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Brier scores minus 1, (N,) float64."""
    parts = []
    for rows in row_chunks(*logits.shape):
        probs = logits[rows].double().softmax(-1)
        parts.append(probs.square().sum(-1) - 2 * probs.gather(1, labels[rows, None])[:, 0])
    return torch.cat(parts)


def _shortest_between(low: float, high: float, otherwise: float) -> float:
    """Returns the shortest decimal strictly between two numbers, in float32 too, or ``otherwise``."""
    middle = (low + high) / 2
    for digits in range(2, 9):
        value = float(f"{middle:.{digits}g}")
        if low < value < high and low < float(torch.tensor(value)) < high:
            return value
    return otherwise
