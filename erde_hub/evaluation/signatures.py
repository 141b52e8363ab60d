"""Failure signatures: what in a result says that exits, thresholds or the teacher do not do what they are there for.

Each is one sentence with the numbers and what to try. A run prints them, ``results.json`` holds them as ``warnings``,
and the model card shows them among the limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from erde_hub.calibration.choice import describe_bound, describe_confidence
from erde_hub.records import ExitRecords

from .formatting import percent

#: Fraction of one class among an exit's answers from which on it has collapsed, if the labels hold half as many.
ONE_ANSWER = 0.9
#: Samples below which an exit that is no better than one class may be so by chance, as after one short epoch.
FEW = 50
#: Loss of accuracy between neighbouring thresholds that is a sharp fall.
SHARP_FALL = 0.05
#: How many times the fraction of the cost that the step saves the loss has to be.
STEEP = 2.0
#: How much better another network or exit must be before a report says so.
CLEARLY = 0.01
#: Fraction of samples on which a teacher is correct, beyond which the cases that a loss tells apart do not occur.
NEARLY_ALWAYS, NEARLY_NEVER = 0.995, 0.1


def failure_signatures(
    records: ExitRecords,
    sweep: Sequence[Mapping[str, Any]],
    *,
    never: bool = False,
    other_data: bool = False,
    teacher_records: ExitRecords | None = None,
    teacher_correct: float | None = None,
) -> list[str]:
    """Returns the failure signatures of a model, as sentences; none where all is well.

    Args:
        records: The exits on the samples that are reported.
        sweep: Rows of :func:`~erde_hub.evaluation.sweep_thresholds`, the finer the better.
        never: The policy lets no sample exit, on purpose.
        other_data: The samples are of other data than the model was trained on: nothing is said about its training.
        teacher_records: The teacher's exits on the same samples.
        teacher_correct: Fraction of the training samples on which the teacher was correct.
    """
    correct = records.logits.argmax(-1) == records.labels
    enough = records.num_samples >= FEW
    found = _at_chance(records, correct, other_data) if enough else []
    if not found:
        found = [
            *(_collapsed(records, correct, other_data) if enough else []),
            _overtaken(records, correct, other_data),
        ]
    if not never and records.num_exits > 1:
        found.append(_threshold_signature(records, sweep, other_data))
    if teacher_records is not None and teacher_records.labels.equal(records.labels):
        found.append(_weak_teacher(teacher_records, correct[-1], other_data))
    if teacher_correct is not None:
        found.append(teacher_signature(teacher_correct))
    return [signature for signature in found if signature]


def teacher_signature(correct: float) -> str | None:
    """Tells where a teacher is right, or wrong, on nearly every training sample.

    Args:
        correct: Fraction of the samples on which it is correct, mean over the exits that it teaches by.
    """
    if NEARLY_NEVER < correct < NEARLY_ALWAYS:
        return None
    which = f"the teacher is correct on {percent(correct)} % of the training samples"
    if correct <= NEARLY_NEVER:
        return (
            f"{which}, so it teaches errors: check that its classes are in the order of the data and that its images"
            " are normalised as in its training."
        )
    return (
        f"{which}: losses that treat its errors apart (erde) hardly differ from plain distillation here, and its soft"
        " labels say little more than the labels. Stronger augmentation, or a teacher trained for fewer epochs, changes"
        " that."
    )


def untrained_signature(accuracy: float, largest_class: float) -> str | None:
    """Tells where the classifier of a frozen backbone is no better than the most frequent class.

    Args:
        accuracy: Of the backbone's own classifier.
        largest_class: Fraction of the most frequent class among the labels.
    """
    if accuracy > largest_class or accuracy == 1.0:
        return None
    return (
        f"the backbone is frozen, and its own classifier is correct on {percent(accuracy)} % of the samples, where"
        f" always naming the most frequent class would be on {percent(largest_class)} %: it was not trained for these"
        " classes. Train it as well: after model.freeze_backbone(), requires_grad_(True) on it, and freeze_backbone"
        " left out of the arguments."
    )


def collapse_signature(exit_name: str, accuracy: float, largest_class: float, other_data: bool = False) -> str | None:
    """Tells where an exit is no better than the most frequent class.

    Args:
        exit_name: Of the exit.
        accuracy: Its accuracy.
        largest_class: Fraction of the most frequent class among the labels.
        other_data: See :func:`failure_signatures`.
    """
    if accuracy > largest_class or accuracy == 1.0:
        return None
    return (
        f"exit {exit_name} has collapsed: it is correct on {percent(accuracy)} % of the samples, and always naming the"
        f" most frequent class would be on {percent(largest_class)} %.{'' if other_data else _COLLAPSED}"
    )


def promise_signature(lost: Tensor, profile: Mapping[str, Any]) -> str | None:
    """Tells what it means that the samples of a report lose more accuracy than was promised for the threshold.

    Args:
        lost: Per sample 1 where the last exit is correct and the exit that it took is not, -1 where it is the other way
            round, 0 otherwise (N,).
        profile: What the threshold was chosen for, as ``config.threshold_profile``.
    """
    confidence, bound, loss = profile.get("confidence"), profile.get("bound"), float(lost.mean())
    if confidence is None or bound is None or profile.get("target") != "accuracy_drop" or loss <= bound:
        return None
    error = float(lost.std()) / math.sqrt(len(lost))
    return (
        f"the {len(lost):,} samples here lose {describe_bound('accuracy_drop', round(loss, 3))} of accuracy at the"
        f" stored threshold; {describe_bound('accuracy_drop', bound)} at most was promised. A promise is about the mean"
        f" over new samples, from which a set of this size differs by about ± {100 * error:.1f} points (standard"
        f" error), and one with {describe_confidence(confidence)} confidence fails in up to"
        f" {100 * (1 - confidence):.3g} % of the cases."
    )


_COLLAPSED = " Lower the learning rate, give the exit a larger weight (exit_weights), or place it deeper."


def _at_chance(records: ExitRecords, correct: Tensor, other_data: bool) -> list[str | None]:
    """One sentence where no exit is better than the most frequent class: then none of them is the cause."""
    largest = float(records.labels.bincount().max() / records.num_samples)
    best = float(correct.double().mean(1).max())
    if records.num_exits == 1 or collapse_signature("", best, largest) is None:
        return []
    advice = (
        "check that the classes are in the order of its training, and that the samples are prepared as there."
        if other_data
        else "nothing was learned yet. Train longer, with another learning rate, or begin with pretrained weights."
    )
    text = (
        "no exit, nor the network's last layer, is better than always naming the most frequent class (best"
        f" {percent(best)} %, that class {percent(largest)} %): {advice}"
    )
    return [text]


def _collapsed(records: ExitRecords, correct: Tensor, other_data: bool) -> Iterator[str | None]:
    classes = records.logits.shape[-1]
    labels = records.labels.bincount(minlength=classes) / records.num_samples
    for e, name in enumerate(records.exit_names[:-1]):
        answers = records.logits[e].argmax(-1).bincount(minlength=classes) / records.num_samples
        most = int(answers.argmax())
        if answers[most] >= ONE_ANSWER and labels[most] <= answers[most] / 2:
            answer = records.class_names[most] if records.class_names else most
            yield (
                f"exit {name} has collapsed: {percent(float(answers[most]))} % of its answers are {answer!r}, as are"
                f" {percent(float(labels[most]))} % of the samples.{'' if other_data else _COLLAPSED}"
            )
        else:
            yield collapse_signature(name, float(correct[e].double().mean()), float(labels.max()), other_data)


def _overtaken(records: ExitRecords, correct: Tensor, other_data: bool) -> str | None:
    """The last exit is clearly worse than an earlier one, so that it is no reference."""
    best = int(correct.sum(1).argmax())  # the first of equals
    if not _is_clearly_better(correct[best], correct[-1]):
        return None
    return (
        f"the last exit is correct on {_percent(correct[-1])} % of the samples, {records.exit_names[best]} on"
        f" {_percent(correct[best])} %{'' if other_data else ': most often the training was too short'}. What routing"
        " saves or costs against all layers says little here."
    )


_WEAK = " Train it longer, or take a larger one."


def _weak_teacher(records: ExitRecords, student: Tensor, other_data: bool) -> str | None:
    teacher = records.logits[-1].argmax(-1) == records.labels
    if not _is_clearly_better(student, teacher):
        return None
    return (
        f"the teacher is correct on {_percent(teacher)} % of the samples, its student on {_percent(student)} %: a"
        f" teacher that is weaker than its student has little to teach.{'' if other_data else _WEAK}"
    )


def _threshold_signature(records: ExitRecords, sweep: Sequence[Mapping[str, Any]], other_data: bool) -> str | None:
    if all(row["exit_share"][-1] == 1.0 for row in sweep):
        return (
            f"no sample exits early at any of {len(sweep)} thresholds, so nothing is saved: the early exits are never"
            f" confident. {'Sweep' if other_data else 'Train them longer, or sweep'} a wider range of thresholds."
        )
    full, rows = records.cumulative_macs[-1], sorted(sweep, key=lambda row: -row["mean_macs"])
    steps = []
    for before, after in pairwise(rows):
        fall, saved = before["accuracy"] - after["accuracy"], (before["mean_macs"] - after["mean_macs"]) / full
        if fall >= max(SHARP_FALL, STEEP * saved, 9 / records.num_samples):  # below 9 samples it may be chance
            steps.append((fall, saved, before, after))
    if not steps:
        return None
    _, saved, before, after = max(steps, key=lambda step: step[0])
    return (
        f"accuracy falls from {percent(before['accuracy'])} to {percent(after['accuracy'])} % between the neighbouring"
        f" thresholds {before['threshold']} and {after['threshold']}, which saves {percent(saved)} % of the full cost:"
        " an exit is confident and wrong there. Choose a threshold on the safe side, and calibrate the exits."
    )


def _is_clearly_better(one: Tensor, other: Tensor) -> bool:
    """By more than :data:`CLEARLY`, and by more than three standard deviations of what chance does to the difference.

    As in McNemar's test, which counts the samples on which one of the two is correct.
    """
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    ahead = gained - lost
    return ahead > CLEARLY * len(one) and ahead > 3 * math.sqrt(gained + lost)


def _percent(correct: Tensor) -> str:
    return percent(float(correct.double().mean()))
