"""Does a stored threshold still do on new data what it did on those that it was chosen on?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from erde_hub._arguments import check_choice, check_number
from erde_hub.calibration.choice import check_confidence, describe_bound, describe_confidence
from erde_hub.calibration.guarantees import supported_bound
from erde_hub.calibration.thresholds import exit_losses
from erde_hub.errors import RecordsError
from erde_hub.fingerprint import check_fingerprint
from erde_hub.policies import ExitPolicy, as_policy
from erde_hub.policies.recorded import exit_indices
from erde_hub.records import ExitRecords, check_kind

from .sweep import exit_scores


@dataclass(frozen=True)
class Drift:
    """A threshold on two sets of records.

    Attributes:
        threshold: The one in question.
        accuracy: Routed, on either set.
        accuracy_drop: Against the last exit, on either set.
        mean_cost: Share of the full model's MACs, on either set.
        exit_share: Shares of the exits, on either set.
        share_p_value: Of the hypothesis that samples leave at the same exits in both (chi-squared); small: they do not.
        drop_p_value: Of the hypothesis that no more of the target is lost on the second set than on the first.
        bound: What was promised, where given.
        supported_bound: Smallest bound that the second set supports at the confidence.
        confidence: Of that.
        verdict: ``holds``: the second set supports the bound; ``broken``: it speaks against it; ``open``: neither,
            which is what few samples give. Without a bound: ``changed`` or ``same``.
        target: What the bound is on: ``accuracy_drop``, ``disagreement`` or ``brier_increase``.
        loss: The target's mean, on either set.
        exit_names: One per exit.
    """

    threshold: float | list[float]
    accuracy: tuple[float, float]
    accuracy_drop: tuple[float, float]
    mean_cost: tuple[float, float]
    exit_share: tuple[list[float], list[float]]
    share_p_value: float
    drop_p_value: float
    bound: float | None
    supported_bound: float
    confidence: float
    verdict: str
    target: str
    loss: tuple[float, float]
    exit_names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = self.exit_names or [f"exit {e}" for e in range(len(self.exit_share[0]))]
        width = max(22, *(len(f"leave at {name}, % ") for name in names))
        lines = [f"threshold {self.threshold}", f"{'':{width}}{'before':>10}{'now':>10}"]
        for name, (before, now) in (
            ("accuracy %", self.accuracy),
            ("accuracy lost, points", self.accuracy_drop),
            ("cost, % of full", self.mean_cost),
        ):
            lines.append(f"{name:{width}}{100 * before:10.2f}{100 * now:10.2f}")
        for name, before, now in zip(names, *self.exit_share, strict=True):
            lines.append(f"{f'leave at {name}, %':{width}}{100 * before:10.1f}{100 * now:10.1f}")
        lines.append(f"same exits: p = {self.share_p_value:.3g}; no larger loss: p = {self.drop_p_value:.3g}")
        promised = "" if self.bound is None else f" (promised: {describe_bound(self.target, self.bound)})"
        if self.target != "accuracy_drop":
            then, later = (describe_bound(self.target, loss) for loss in self.loss)
            lines.append(f"{self.target.replace('_', ' ')}: {then} before, {later} now")
        lines.append(
            f"the new samples support a bound of {describe_bound(self.target, self.supported_bound)} with"
            f" {describe_confidence(self.confidence)} confidence{promised}: {_VERDICTS[self.verdict]}"
        )
        return "\n".join(lines)


_TARGETS = ("accuracy_drop", "disagreement", "brier_increase")
_VERDICTS = {
    "holds": "the threshold still holds",
    "broken": "the threshold no longer holds, choose it anew",
    "open": "too few new samples to tell",
    "changed": "the data have changed, choose the threshold anew",
    "same": "no sign of a change",
}


def compare_records(
    before: ExitRecords,
    now: ExitRecords,
    policy: str | ExitPolicy,
    threshold: float | list[float],
    bound: float | None = None,
    confidence: float = 0.9,
    target: str = "accuracy_drop",
) -> Drift:
    """Compares what a threshold does on two sets of records of the same model.

    Args:
        before: Those that the threshold was chosen on, or like these.
        now: New ones, with labels.
        policy: A key of the policies table, or a policy.
        threshold: The stored one.
        bound: On the loss that was promised.
        confidence: Of the statement about the new samples.
        target: What the loss is: ``accuracy_drop``, ``disagreement`` with the full model or ``brier_increase``.

    Raises:
        RecordsError: The records are of different models.
        ThresholdError: A threshold that the policy does not take.
        UnknownNameError: No such target.
        ConfigError: A bound below 0, or a confidence that is not between 0 and 1.
        InputTypeError: No records, or an argument of another type.
    """
    check_kind(before, "before")
    check_kind(now, "now")
    before.require_classes("compare_records")
    now.require_classes("compare_records")
    check_same_model(before, now)
    policy = as_policy(policy)
    thresholds = policy.check_threshold(threshold, before.num_exits - 1)
    check_choice("target", target, _TARGETS)
    confidence = check_confidence(confidence)
    bound = None if bound is None else check_number("bound", bound, zero=True)
    drops, shares, costs, accuracy, lost, counts = [], [], [], [], [], []
    for records in (before, now):
        index = exit_indices(exit_scores(records, policy), policy, thresholds)
        losses, scale = exit_losses(records.logits, records.labels, target)
        drops.append(losses.gather(0, index[None])[0])
        count = torch.bincount(index, minlength=records.num_exits).double()
        counts.append(count)
        shares.append((count / count.sum()).tolist())
        macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
        costs.append(float(macs[index].mean() / macs[-1]))
        right = records.logits.argmax(-1) == records.labels
        accuracy.append(float(right.gather(0, index[None]).double().mean()))
        lost.append(float(right[-1].double().mean()) - accuracy[-1])
    share_p, drop_p = _chi_squared(*counts), _larger(*drops)
    counted = target != "brier_increase"
    upper = scale * supported_bound(drops[1][None], confidence, "exact" if counted else "ucb", counted)
    if bound is None:
        verdict = "changed" if drop_p <= 1 - confidence or share_p <= (1 - confidence) / 10 else "same"
    elif upper <= bound + 1e-9:
        verdict = "holds"
    else:
        mean, error = scale * float(drops[1].mean()), scale * float(drops[1].std() / math.sqrt(len(drops[1])))
        verdict = "broken" if mean - _quantile(confidence) * error > bound else "open"
    return Drift(
        threshold, _two(accuracy), _two(lost), _two(costs), (shares[0], shares[1]), share_p, drop_p, bound, upper,
        confidence, verdict, target, _two([scale * float(d.mean()) for d in drops]), list(before.exit_names),
    )  # fmt: skip


def check_same_model(before: ExitRecords, now: ExitRecords) -> None:
    """Raises :class:`RecordsError` where two records cannot come from one model."""
    if before.exit_names != now.exit_names or before.num_classes != now.num_classes:
        raise RecordsError(
            f"the records are of different models: exits {before.exit_names} with {before.num_classes} classes, and"
            f" {now.exit_names} with {now.num_classes}"
        )
    if before.fingerprint and now.fingerprint and before.fingerprint != now.fingerprint:
        raise RecordsError(
            f"the records are of different weights ({before.fingerprint[:8]} and {now.fingerprint[:8]}): collect both"
            " with the model whose threshold is in question"
        )


def check_records_of(records: ExitRecords, model: nn.Module) -> None:
    """Raises :class:`RecordsError` where records were not collected with a model's weights; unknown ones pass."""
    if records.fingerprint:
        check_fingerprint(records.fingerprint, model, "these are records")


def _two(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]


def _chi_squared(first: Tensor, second: Tensor) -> float:
    """P-value of equal shares; exits that nobody takes are left out."""
    table = torch.stack([first, second])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2:
        return 1.0
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    statistic = ((table - expected).square() / expected).sum()
    freedom = torch.tensor((table.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def _larger(before: Tensor, now: Tensor) -> float:
    """P-value of a mean that is not larger now, normal approximation; add-one variances keep small sets honest."""
    error = sum(float((values.square().sum() + 1) / len(values) ** 2) for values in (before, now)) ** 0.5
    return 0.5 * math.erfc((float(now.mean()) - float(before.mean())) / error / 2**0.5)


def _quantile(confidence: float) -> float:
    return float(torch.special.ndtri(torch.tensor(confidence, dtype=torch.float64)))
