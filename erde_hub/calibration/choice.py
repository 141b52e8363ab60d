"""What a search for thresholds found, as a report that is stored with the model and can be read and reviewed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from erde_hub._arguments import check_number, check_whole
from erde_hub.errors import ConfigError, nearest
from erde_hub.fingerprint import check_fingerprint
from erde_hub.policies import ExitPolicy

#: What a target bounds, in words, by its name.
TARGETS = {
    "accuracy_drop": "loss of accuracy against the full model",
    "disagreement": "fraction of samples whose prediction differs from the full model's",
    "selective_risk": "error among the samples that exit early",
    "brier_increase": "rise of the Brier score against the full model",
    "mean_macs": "mean multiply-accumulates per sample",
    "mean_milliseconds": "mean measured time per sample",
}

#: How each method speaks of its guarantee.
METHODS = {
    "search": "the best on these samples; no guarantee for others",
    "ltt": "Hoeffding-Bentkus tests of the losses in a fixed order: Learn then Test, arXiv 2110.01052",
    "exact": "exact tests of losses minus gains in a fixed order: Learn then Test, arXiv 2110.01052",
    "ucb": "upper confidence bounds by betting, tested in a fixed order: arXiv 2010.09686",
    "crc": "conformal risk control, which holds on average over calibration sets: arXiv 2208.02814",
}


@dataclass(frozen=True)
class ThresholdChoice:
    """Thresholds, what was asked for, what the samples say, and what they cannot say.

    Attributes:
        threshold: One number, or one per early exit.
        policy: Key of the policies table.
        target: What is bounded: a key of ``TARGETS``.
        bound: Highest value allowed; a fraction, multiply-accumulates, or milliseconds.
        confidence: Probability, over the draw of the calibration samples, with which the bound holds for new samples of
            the same kind; None where nothing is promised.
        method: A key of ``METHODS``.
        per_exit: One threshold was searched for each exit.
        samples: Number of calibration samples.
        tested: Number of these that the guarantee rests on; the others found the candidates.
        value: Mean of the target over the samples, below 0 where exiting early is better; for ``selective_risk`` the
            error among those that exit early, with ``per_exit`` at the worst exit.
        upper_bound: Smallest bound that a test of this threshold alone accepts on the samples, at this confidence; for
            ``ltt`` without counting gains, for ``crc`` the estimate that it compares with the bound. What is promised
            is ``bound``: the same samples picked the threshold, so that this number says no more than how much of the
            bound is used up.
        accuracy: With this threshold, on the samples.
        full_accuracy: Of the last exit, on the samples.
        mean_macs: Multiply-accumulates per sample with this threshold.
        full_macs: Of the full model.
        saving: Fraction of the full model's cost that is expected to be saved: of the time where the target is one,
            otherwise of multiply-accumulates.
        possible_saving: The same for the boldest candidate that keeps the bound on these samples without any
            confidence: about what more data could show at most.
        exit_share: Fraction of samples per exit, shallow to deep.
        never_exits: No sample exits early.
        advice: What would need more data, or why no sample exits; empty where there is nothing to say.
        dataset: Name of the calibration data, where known.
        split: Their split, where known.
        fingerprint: Hash of the weights that gave the records; empty where unknown.
        unsupported_slices: Slices of the samples that do not support the bound by themselves, where slices were looked
            at: the guarantee is for all samples together.
    """

    threshold: float | list[float]
    policy: str
    target: str
    bound: float
    confidence: float | None
    method: str
    per_exit: bool
    samples: int
    tested: int
    value: float
    upper_bound: float | None
    accuracy: float
    full_accuracy: float
    mean_macs: float
    full_macs: int
    saving: float
    possible_saving: float
    exit_share: list[float]
    never_exits: bool
    advice: str = ""
    dataset: str = ""
    split: str = ""
    fingerprint: str = ""
    unsupported_slices: list[str] = dataclasses.field(default_factory=list)

    FORMAT: ClassVar[str] = "erde_hub.threshold_profile/1"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, for the config of a checkpoint or ``results.json``."""
        values = dataclasses.asdict(self)
        if not self.unsupported_slices:  # earlier versions do not know the name
            del values["unsupported_slices"]
        return {"format": self.FORMAT, **values}

    @classmethod
    def from_dict(cls, profile: Mapping[str, Any]) -> ThresholdChoice:
        """Reads what :meth:`to_dict` gave.

        Raises:
            ConfigError: Something else, a key that is missing or unknown, or a value of another kind.
        """
        if not isinstance(profile, Mapping) or profile.get("format") != cls.FORMAT:
            found = profile.get("format") if isinstance(profile, Mapping) else profile
            raise ConfigError(f"a threshold profile must have the format {cls.FORMAT!r}, got {found!r}")
        values = {key: value for key, value in profile.items() if key != "format"}
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in names]
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in values]
        if unknown or missing:
            what = f"unknown key {unknown[0]!r}{nearest(unknown[0], names)}" if unknown else f"no {missing[0]!r}"
            raise ConfigError(f"a threshold profile of {cls.FORMAT!r} is damaged: {what}")
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        wrong = [name for name, value in values.items() if not _is_of(kinds[name], value)]
        wrong += [key for key, table in (("target", TARGETS), ("method", METHODS)) if values[key] not in [*table]]
        if wrong:
            raise ConfigError(
                f"a threshold profile of {cls.FORMAT!r} is damaged: {wrong[0]} is {values[wrong[0]]!r:.80}"
            )
        if values["confidence"] is not None:
            check_confidence(values["confidence"])
        return cls(**values)

    @property
    def rule(self) -> str:
        """One sentence that says what the threshold was chosen for, for cards and logs."""
        amount = describe_bound(self.target, self.bound)
        confident = "" if self.confidence is None else f" with {describe_confidence(self.confidence)} confidence"
        return f"{TARGETS[self.target]} at most {amount}{confident} ({METHODS[self.method]})"

    def store(self, model: Any) -> None:
        """Sets a model's threshold and keeps this report in its config as ``threshold_profile``.

        Raises:
            RecordsError: The records that it was chosen on are of other weights.
            ConfigError: The model has another policy.
            ThresholdError: It has another number of exits.
        """
        if self.fingerprint:
            check_fingerprint(self.fingerprint, model, "the threshold was chosen on records")
        if model.config.policy != self.policy:
            raise ConfigError(
                f"the threshold was chosen for the policy {self.policy!r}, the model has {model.config.policy!r}:"
                " choose anew with the model's own policy"
            )
        model.threshold = self.threshold
        model.config.threshold_profile = self.to_dict()

    def __str__(self) -> str:
        where = f" of {self.split}" if self.split else ""
        rests = f" (guarantee from {self.tested:,})" if self.tested != self.samples else ""
        given = self.threshold if isinstance(self.threshold, list) else [self.threshold]
        shown = " / ".join("never" if abs(value) >= ExitPolicy.never_threshold else f"{value}" for value in given)
        lines = [
            f"threshold: {shown}{' (no sample exits early)' if self.never_exits else ''}",
            f"objective: {self.rule}",
            (
                f"on {self.samples:,} samples{where}{rests}: accuracy {100 * self.accuracy:.2f} % (full model"
                f" {100 * self.full_accuracy:.2f} %), {100 * self.mean_macs / max(self.full_macs, 1):.1f} % of the full"
                f" model's MACs, saving {100 * self.saving:.1f} %"
            ),
        ]
        if self.upper_bound is not None and not self.never_exits:
            used = describe_bound(self.target, self.upper_bound)
            alone = "" if self.method == "crc" else ", had it been the only one tried"
            lines.append(f"that bound is promised, no smaller one; on these samples the threshold meets {used}{alone}")
        if self.unsupported_slices:
            lines.append(f"slices that do not support the bound by themselves: {', '.join(self.unsupported_slices)}")
        if self.advice:
            lines.append(self.advice)
        return "\n".join(lines)


def _is_of(kind: str, value: Any) -> bool:
    """Tells whether a value is what an annotation such as ``float | list[float]`` says; NaN is nothing."""
    if " | " in kind:
        return any(_is_of(one, value) for one in kind.split(" | "))
    if kind.startswith("list["):
        return isinstance(value, (list, tuple)) and all(_is_of(kind[5:-1], item) for item in value)
    known: dict[str, Any] = {"None": type(None), "str": str, "bool": bool, "int": int, "float": (int, float)}
    return isinstance(value, known[kind]) and isinstance(value, bool) == (kind == "bool") and value == value


def describe_bound(target: str, bound: float) -> str:
    """Returns the bound of a target in its own unit: points of accuracy, % of the samples, MACs, ms, or as it is.

    Example:
        >>> describe_bound("accuracy_drop", 0.03), describe_bound("disagreement", 0.03)
        ('3 points', '3 %')
        >>> describe_bound("mean_macs", 2.5e6), describe_bound("mean_milliseconds", 1.5)
        ('2,500,000', '1.5 ms')
    """
    if target == "accuracy_drop":
        points = f"{100 * bound:.4g}"
        return f"{points} point{'' if points == '1' else 's'}"
    if target == "mean_macs":
        return f"{bound:,.0f}"
    if target == "mean_milliseconds":
        return f"{bound:g} ms"
    return f"{100 * bound:.4g} %" if target in ("disagreement", "selective_risk") else f"{bound:g}"


def describe_confidence(confidence: float) -> str:
    """Returns a confidence in percent, rounded down to one decimal at most, or more where that would read as certainty.

    Example:
        >>> describe_confidence(0.9), describe_confidence(0.764783), describe_confidence(0.99999)
        ('90 %', '76.4 %', '99.999 %')
    """
    decimals = max(1, math.ceil(-math.log10(1 - confidence) - 1e-6) - 2) if confidence < 1 else 0
    scale = 10**decimals
    return f"{math.floor(100 * confidence * scale + 1e-4) / scale:.12g} %"


def check_confidence(confidence: object) -> float:
    """Returns a confidence between 0 and 1, both excluded; raises :class:`ConfigError` otherwise."""
    number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not number or not 0 < confidence < 1:  # type: ignore[operator]
        raise ConfigError(
            f"confidence must be between 0 and 1, both excluded, got {confidence!r}: certainty needs infinitely many"
            " samples; 0.9 is usual"
        )
    return float(confidence)  # type: ignore[arg-type]


def samples_without_loss(bound: float, confidence: float) -> int:
    """Returns how many samples are needed to promise a bound if none of them loses anything: log(1 - c) / log(1 - a).

    Raises:
        ConfigError: Bound or confidence are not between 0 and 1, both excluded.
        InputTypeError: The bound is no number.

    Example:
        >>> samples_without_loss(0.01, 0.9)
        230
    """
    bound, confidence = check_number("bound", bound, zero=False, below=1), check_confidence(confidence)
    return math.ceil(math.log(1 - confidence) / math.log1p(-bound) - 1e-9)


def attainable_confidence(bound: float, samples: int) -> float:
    """Returns the highest confidence that a number of samples supports for a bound, where none of them loses anything.

    1 - (1 - a)^n. It depends on the number of samples alone, so that a guarantee at this confidence stays one.

    Raises:
        ConfigError: The bound is not between 0 and 1, both excluded, or the number of samples is negative.
        InputTypeError: Either is no number.

    Example:
        >>> round(attainable_confidence(0.01, 144), 3)
        0.765
    """
    bound, samples = check_number("bound", bound, zero=False, below=1), check_whole("samples", samples, 0)
    return max(0.0, -math.expm1(samples * math.log1p(-bound)) - 1e-9)  # rounded down, so that a test at it accepts
