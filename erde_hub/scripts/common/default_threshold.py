"""The threshold that a run stores where the user names none, chosen on validation samples and nothing else."""

from __future__ import annotations

from typing import Any

from erde_hub.calibration import ThresholdChoice, attainable_confidence, choose_threshold
from erde_hub.evaluation import ExitRecords
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.policies import ExitPolicy
from erde_hub.records import MIN_SAMPLES

#: The threshold stored by default loses at most this much accuracy, as a fraction, against the full model.
MAX_ACCURACY_DROP = 0.01
#: Confidence of that where the split is large enough, and below which no sample exits early.
CONFIDENCE, LOWEST_CONFIDENCE = 0.9, 0.5
THRESHOLD_RULE = (
    f"at most {100 * MAX_ACCURACY_DROP:g} point of accuracy lost against the full model, with {100 * CONFIDENCE:g} %"
    " confidence or, on a split too small for that, with the highest that its size allows"
)
#: What a report says of a threshold that was not chosen.
GIVEN_THRESHOLD = {"rule": "given by the user"}


def choose_default_threshold(
    records: ExitRecords, policy: ExitPolicy, max_drop: float = MAX_ACCURACY_DROP
) -> ThresholdChoice | None:
    """Chooses a threshold that keeps a bound on the loss of accuracy, with as much confidence as the split allows.

    The confidence is 0.9. A guarantee of one point with it takes 230 samples even if none of them loses anything; a
    smaller split gets the confidence that its size allows, 1 - 0.99^n, which is 0.76 for 144. It depends on the number
    of samples alone, so that it stays a guarantee. Below 69 samples it would be under one half; no sample exits early
    then.

    Args:
        records: Of the validation split; never of the data that are reported.
        policy: The policy that will route.
        max_drop: Accuracy that may be lost, as a fraction.

    Returns:
        None where there is nothing to choose: no early exit, a policy without threshold, or fewer than 20 samples.
    """
    if not policy.uses_threshold or records.num_exits == 1 or records.num_samples < MIN_SAMPLES:
        return None
    attainable = attainable_confidence(max_drop, records.num_samples)
    confidence = max(LOWEST_CONFIDENCE, min(CONFIDENCE, attainable))
    return choose_threshold(
        records, policy, max_accuracy_drop=max_drop, confidence=confidence, allow_missing_classes=True
    )


def store_default_threshold(model: EarlyExitWrapper, records: ExitRecords) -> dict[str, Any]:
    """Chooses and stores, and returns what ``results.json`` says about it as ``threshold_choice``."""
    choice = choose_default_threshold(records, model.policy)
    said: dict[str, Any] = {"rule": THRESHOLD_RULE, "split": "validation", "samples": records.num_samples}
    if choice is not None:
        choice.store(model)
        profile = choice.to_dict()
        kept = ("target", "bound", "confidence", "method", "upper_bound", "saving", "never_exits", "advice")
        return said | {key: profile[key] for key in kept}
    if model.policy.uses_threshold and records.num_exits > 1:
        model.threshold = model.policy.never_threshold
        said |= {
            "never_exits": True,
            "advice": f"Nobody leaves: choosing a threshold takes {MIN_SAMPLES} validation samples, and there are"
            f" {records.num_samples}.",
        }
    return said
