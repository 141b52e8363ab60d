"""Do threshold, model and input still behave on new data as they did before?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from erde_hub._arguments import check_choice, check_number
from erde_hub.calibration.choice import check_confidence, describe_bound, describe_confidence
from erde_hub.calibration.guarantees import LossTest
from erde_hub.calibration.outcomes import exit_losses
from erde_hub.errors import RecordsError
from erde_hub.fingerprint import check_fingerprint
from erde_hub.policies import ExitPolicy, PolicyKey, as_policy
from erde_hub.policies.recorded import exit_indices
from erde_hub.records import ExitRecords, check_kind, distinct_samples

from .sweep import exit_scores

TARGETS = ("accuracy_drop", "disagreement", "brier_increase", "selective_risk")
#: What each verdict means, and the next command; DIR and DATA stand for the checkpoint and the new data.
_VERDICTS = {
    "threshold": {
        "holds": "routing loses no more against the full model than promised; keep it",
        "broken": "routing loses more against the full model than promised; choose it anew:"
        " python recipes/calibrate.py --model DIR --dataset DATA",
        "open": "too few new samples to tell; collect more:"
        " python recipes/evaluate.py --model DIR --dataset DATA --save_records",
        "changed": "samples exit elsewhere, or lose more, than before; choose it anew:"
        " python recipes/calibrate.py --model DIR --dataset DATA",
        "same": "no sign of a change; keep it",
        "unknown": "the new samples have no labels; label some:"
        " python recipes/evaluate.py --model DIR --dataset DATA --save_records",
    },
    "model": {
        "same": "the full model is as accurate as before, as far as the samples tell; keep it",
        "worse": "the full model is less accurate than before, which no threshold mends; train on samples like these:"
        " python recipes/distill.py --dataset DATA",
        "unknown": "the samples have no labels; label some:"
        " python recipes/evaluate.py --model DIR --dataset DATA --save_records",
    },
    "input": {
        "same": "exits and scores look as before; nothing to do",
        "changed": "exits or scores differ from before; look at the new samples and their preprocessing, then measure:"
        " python recipes/evaluate.py --model DIR --dataset DATA --save_records",
    },
}


@dataclass(frozen=True)
class Drift:
    """A threshold on two sets of records, with a verdict on the threshold, the model and the input.

    Attributes:
        threshold: The one in question.
        accuracy: Routed, on either set; None without labels.
        full_accuracy: Of the last exit, on either set; None without labels.
        accuracy_drop: Of routing against the last exit, on either set; None without labels.
        mean_cost: Fraction of the full model's MACs, on either set.
        exit_share: Fractions of the samples at the exits, on either set.
        share_p_value: Of the hypothesis that samples take the same exits in both (chi-squared); small: they do not.
        score_p_value: Of the hypothesis that the scores of every early exit and the last exit's largest probability
            are distributed alike in both (Kolmogorov-Smirnov, the smallest times their number); small: they are not.
        drop_p_value: Of the hypothesis that no more of the target is lost on the second set than on the first; None
            where the target needs labels that are missing.
        accuracy_p_value: Of the hypothesis that the full model is as accurate on the second set; None without labels.
        bound: What was promised, where given.
        supported_bound: Smallest bound that the second set supports at the confidence; None without the labels for it.
        confidence: Of that.
        verdict: On the threshold. ``holds``: the second set supports the bound; ``broken``: it speaks against it;
            ``open``: neither, which is what few samples give. Without a bound: ``changed`` or ``same``. ``unknown``:
            the target needs labels that are missing.
        model_verdict: ``same``, ``worse`` or, without labels, ``unknown``.
        input_verdict: ``same`` or ``changed``, which needs no labels.
        target: What the bound is on: ``accuracy_drop``, ``disagreement``, ``brier_increase`` or ``selective_risk``.
        loss: The target's mean, on either set; None where it needs labels that are missing.
        exit_names: One per exit.
    """

    threshold: float | list[float]
    accuracy: tuple[float | None, float | None]
    full_accuracy: tuple[float | None, float | None]
    accuracy_drop: tuple[float | None, float | None]
    mean_cost: tuple[float, float]
    exit_share: tuple[list[float], list[float]]
    share_p_value: float
    score_p_value: float
    drop_p_value: float | None
    accuracy_p_value: float | None
    bound: float | None
    supported_bound: float | None
    confidence: float
    verdict: str
    model_verdict: str
    input_verdict: str
    target: str
    loss: tuple[float | None, float | None]
    exit_names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = self.exit_names or [f"exit {e}" for e in range(len(self.exit_share[0]))]
        width = max(24, *(len(f"exit at {name}, % ") for name in names))
        lines = [f"threshold {self.threshold}", f"{'':{width}}{'before':>10}{'now':>10}"]
        for name, pair in (
            ("accuracy %", self.accuracy),
            ("full model's accuracy %", self.full_accuracy),
            ("accuracy lost, points", self.accuracy_drop),
            ("cost, % of full", self.mean_cost),
        ):
            lines.append(f"{name:{width}}" + "".join(f"{'-' if v is None else f'{100 * v:.2f}':>10}" for v in pair))
        for name, before, now in zip(names, *self.exit_share, strict=True):
            lines.append(f"{f'exit at {name}, %':{width}}{100 * before:10.1f}{100 * now:10.1f}")
        p_values = {
            "same exits": self.share_p_value,
            "same scores": self.score_p_value,
            "no larger loss": self.drop_p_value,
            "full model as accurate": self.accuracy_p_value,
        }
        lines.append("; ".join(f"{name}: p = {p:.3g}" for name, p in p_values.items() if p is not None))
        if self.target != "accuracy_drop" and self.loss[0] is not None and self.loss[1] is not None:
            then, later = (describe_bound(self.target, loss) for loss in self.loss if loss is not None)
            lines.append(f"{self.target.replace('_', ' ')}: {then} before, {later} now")
        if self.supported_bound is not None:
            promised = "" if self.bound is None else f" (promised: {describe_bound(self.target, self.bound)})"
            lines.append(
                f"the new samples support a bound of {describe_bound(self.target, self.supported_bound)} with"
                f" {describe_confidence(self.confidence)} confidence{promised}"
            )
        verdicts = {"threshold": self.verdict, "model": self.model_verdict, "input": self.input_verdict}
        lines += [f"{part}: {verdict}: {_VERDICTS[part][verdict]}" for part, verdict in verdicts.items()]
        return "\n".join(lines)


def compare_records(
    before: ExitRecords,
    now: ExitRecords,
    policy: PolicyKey | ExitPolicy,
    threshold: float | list[float],
    bound: float | None = None,
    confidence: float = 0.9,
    target: str = "accuracy_drop",
) -> Drift:
    """Compares what a threshold does on two sets of records of the same model.

    Three things may change, and each has its own verdict. The threshold: routing loses more against the full model. The
    model: the full model is less accurate, which no threshold mends. The input: samples take other exits, or scores are
    distributed differently. Exits and scores need no labels, so that ``now`` (and ``before``) may have none. A sample
    index that occurs more than once counts once, with a warning.

    Args:
        before: Those that the threshold was chosen on, or like these.
        now: New ones.
        policy: A key of the policies table, or a policy.
        threshold: The stored one.
        bound: On the loss that was promised.
        confidence: Of the statements about the new samples.
        target: What the loss is: ``accuracy_drop``, ``disagreement`` with the full model (which needs no labels) or
            ``brier_increase``, or ``selective_risk``: the error among those that exit early.

    Raises:
        RecordsError: The records are of different models.
        ThresholdError: A threshold that the policy does not take.
        UnknownNameError: No such target.
        ConfigError: A bound below 0, or a confidence that is not between 0 and 1.
        InputTypeError: No records, or an argument of another type.
    """
    check_kind(before, "before")
    check_kind(now, "now")
    before.require_classes("compare_records", labels=False)
    now.require_classes("compare_records", labels=False)
    check_same_model(before, now)
    policy = as_policy(policy)
    thresholds = policy.check_threshold(threshold, before.num_exits - 1)
    check_choice("target", target, TARGETS)
    confidence = check_confidence(confidence)
    bound = None if bound is None else check_number("bound", bound, zero=True)
    first, second = (_measure(records, policy, thresholds, target) for records in (before, now))
    share_p, score_p = _same_exits(first.counts, second.counts), _same_scores(first.scores, second.scores)
    drop_p, upper, verdict = None, None, "unknown"
    if first.losses is not None and second.losses is not None:
        drop_p = _no_larger(first.losses, second.losses)
        upper, verdict = check_bound(second.losses, target, bound, confidence)
        if bound is None:
            verdict = "changed" if drop_p <= 1 - confidence or share_p <= (1 - confidence) / 10 else "same"
    accuracy_p, model_verdict = None, "unknown"
    if first.wrong is not None and second.wrong is not None:
        accuracy_p = _no_larger(first.wrong, second.wrong)
        model_verdict = "worse" if accuracy_p <= (1 - confidence) / 10 else "same"
    return Drift(
        threshold=threshold,
        accuracy=(first.accuracy, second.accuracy),
        full_accuracy=(first.full_accuracy, second.full_accuracy),
        accuracy_drop=(first.drop, second.drop),
        mean_cost=(first.cost, second.cost),
        exit_share=((first.counts / first.counts.sum()).tolist(), (second.counts / second.counts.sum()).tolist()),
        share_p_value=share_p,
        score_p_value=score_p,
        drop_p_value=drop_p,
        accuracy_p_value=accuracy_p,
        bound=bound,
        supported_bound=upper,
        confidence=confidence,
        verdict=verdict,
        model_verdict=model_verdict,
        input_verdict="changed" if min(share_p, score_p) <= (1 - confidence) / 10 else "same",
        target=target,
        loss=(_mean(first.losses), _mean(second.losses)),
        exit_names=list(before.exit_names),
    )


@dataclass(frozen=True)
class _Measured:
    """What a threshold does on one set of records.

    Attributes:
        counts: Number of samples at each exit.
        cost: Mean cost, a fraction of the full model's.
        scores: The policy's scores of the early exits and the last exit's largest probability.
        losses: Of each sample against the last exit; None where the target needs labels that are missing.
        wrong: Whether the last exit is wrong on each sample; None without labels.
        accuracy: Routed; None without labels.

    Shape:
        counts: (E,). scores: (E, N). losses, wrong: (N,).
    """

    counts: Tensor
    cost: float
    scores: Tensor
    losses: Tensor | None
    wrong: Tensor | None
    accuracy: float | None

    @property
    def full_accuracy(self) -> float | None:
        return None if self.wrong is None else 1 - float(self.wrong.mean())

    @property
    def drop(self) -> float | None:
        return None if self.accuracy is None or self.full_accuracy is None else self.full_accuracy - self.accuracy


def _measure(records: ExitRecords, policy: ExitPolicy, thresholds: list[float], target: str) -> _Measured:
    records = distinct_samples(records)
    scores = exit_scores(records, policy)
    index = exit_indices(scores, policy, thresholds)
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    last = (records.logits[-1].amax(-1) - records.logits[-1].logsumexp(-1)).exp()
    losses = None
    if records.labelled or target == "disagreement":
        losses = losses_taken(records, index, target)
    correct = records.logits.argmax(-1) == records.labels if records.labelled else None
    return _Measured(
        counts=torch.bincount(index, minlength=records.num_exits).double(),
        cost=float(macs[index].mean() / macs[-1]),
        scores=torch.cat([scores, last[None].to(scores)]),
        losses=losses,
        wrong=None if correct is None else 1 - correct[-1].double(),
        accuracy=None if correct is None else float(correct.gather(0, index[None]).double().mean()),
    )


def losses_taken(records: ExitRecords, index: Tensor, target: str) -> Tensor:
    """Returns what each sample loses at the exit that it takes; of ``selective_risk`` those that exit early alone.

    Shape:
        index: (N,). Returns (N,), or (M,) for M samples that exit early.
    """
    losses = exit_losses(records.logits, records.labels, target).gather(0, index[None])[0]
    if target == "selective_risk":
        losses = losses[index < records.num_exits - 1]
        return losses if len(losses) else losses.new_zeros(2)  # nobody exits early: as if hardly any sample did
    return losses


def check_bound(losses: Tensor, target: str, bound: float | None, confidence: float) -> tuple[float, str]:
    """Returns the smallest bound that losses support, and whether they keep a bound: holds, broken or open.

    Shape:
        losses: (N,), of :func:`losses_taken`.
    """
    from scipy.stats import norm  # noqa: PLC0415 - takes a second to import

    counted = target != "brier_increase"
    scale = 1.0 if counted else 2.0
    test = LossTest("exact" if counted else "ucb", confidence, counted)
    supported = scale * test.supported_bound(losses[None] / scale)
    if bound is None or supported <= bound + 1e-9:
        return supported, "holds"
    error = float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
    below = max(float(norm.ppf(confidence)), 0.0)  # a mean within the bound never breaks it
    return supported, "broken" if float(losses.mean()) - below * error > bound else "open"


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


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _same_exits(before: Tensor, now: Tensor) -> float:
    """P-value of equal fractions, from the number of samples at each exit; exits without samples are left out."""
    from scipy.stats import chi2_contingency  # noqa: PLC0415

    table = torch.stack([before, now])
    table = table[:, table.sum(0) > 0]
    return 1.0 if table.shape[1] < 2 else float(chi2_contingency(table.numpy(), correction=False).pvalue)


def _same_scores(before: Tensor, now: Tensor) -> float:
    """P-value of equal distributions in every row, (E, N) and (E, M); NaN and infinite scores are left out."""
    from scipy.stats import ks_2samp  # noqa: PLC0415

    found = []
    for first, second in zip(before, now, strict=True):
        first, second = first[first.isfinite()], second[second.isfinite()]
        if len(first) and len(second):
            found.append(float(ks_2samp(first.numpy(), second.numpy(), method="asymp").pvalue))
    return min(1.0, min(found, default=1.0) * max(len(found), 1))


def _no_larger(before: Tensor, now: Tensor) -> float:
    """P-value of a mean that is not larger now, normal approximation; add-one variances keep small sets honest."""
    from scipy.stats import norm  # noqa: PLC0415

    error = sum(float((values.square().sum() + 1) / len(values) ** 2) for values in (before, now)) ** 0.5
    return float(norm.sf((float(now.mean()) - float(before.mean())) / error))
