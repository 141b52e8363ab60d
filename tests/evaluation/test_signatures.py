"""What a result says about exits, thresholds and a teacher that fail."""

from __future__ import annotations

import re

import pytest
import torch

from erde_hub.evaluation import sweep_thresholds
from erde_hub.evaluation.signatures import collapse_signature, failure_signatures, promise_signature, teacher_signature
from erde_hub.evaluation.sweep import fine_thresholds
from tests.fakes.records import make_records


def found(records, **options):
    sweep = sweep_thresholds(records, options.pop("thresholds", fine_thresholds(records)), "entropy")
    return failure_signatures(records, sweep, **options)


def sure(records, exit_, correct, confidence=12.0):
    """Sets an exit's answers: right on the first ``correct`` samples, confident everywhere."""
    wrong = torch.arange(records.num_samples) >= correct
    answers = (records.labels + wrong) % 10
    records.logits[exit_] = confidence * torch.nn.functional.one_hot(answers, 10)
    return records


def test_good_exits_and_a_good_teacher_leave_no_signature():
    assert found(make_records(samples=400), teacher_records=make_records(samples=400), teacher_correct=0.9) == []


def test_an_exit_that_gives_one_answer_has_collapsed():
    records = make_records()
    records.logits[0, :, 3] += 100.0
    (text,) = found(records)
    assert text.startswith("exit stage0 has collapsed: 100.0 % of its answers are 'c3', as are 1")
    records.labels[:] = 3  # then it is right
    assert not [text for text in found(records) if "stage0 has" in text]


def test_an_exit_below_the_most_frequent_class_has_collapsed():
    records = sure(make_records(), 1, correct=20, confidence=0.01)
    text = next(text for text in found(records) if "collapsed" in text)
    assert "exit stage1 has collapsed: it is correct on 5.0 % of the samples" in text
    assert collapse_signature("a", 0.51, 0.5) is None
    assert "always naming the most frequent class would be on 50.0 %" in collapse_signature("a", 0.5, 0.5)


def test_a_few_samples_do_not_say_that_an_exit_has_collapsed():
    records = sure(make_records(), 1, correct=0, confidence=0.01)
    assert not [text for text in found(records.select(torch.arange(40))) if "collapsed" in text]
    assert [text for text in found(records.select(torch.arange(60))) if "collapsed" in text]


def test_a_loss_above_the_promised_one_says_what_a_promise_is():
    lost = torch.cat([torch.ones(6), -torch.ones(1), torch.zeros(353)])
    profile = {"target": "accuracy_drop", "bound": 0.01, "confidence": 0.76}
    text = promise_signature(lost, profile)
    assert text.startswith("the 360 samples here lose 1.4 points of accuracy at the stored threshold; 1 point at most")
    assert "differs by about ± 0.7 points" in text
    assert "with 76 % confidence fails in up to 24 % of the cases" in text
    for other in ({"bound": 0.02}, {"confidence": None}, {"target": "disagreement"}):
        assert promise_signature(lost, profile | other) is None


def test_a_network_at_chance_gets_one_sentence_and_no_advice_for_single_exits():
    records = make_records()
    for exit_ in range(3):
        sure(records, exit_, correct=30)
    first, *others = found(records)
    assert (
        "no exit, nor the network's last layer, is better than always naming the most frequent class (best 7.5 %"
        in first
    )
    assert not [text for text in others if "collapsed" in text]
    sure(records, 0, correct=300)
    assert "nothing was learned" not in " ".join(found(records)), "an early exit did learn"


def test_other_data_than_those_of_the_training_say_nothing_about_it():
    chance, overtaken, collapsed = (make_records() for _ in range(3))
    for exit_ in range(3):
        sure(chance, exit_, correct=30)
    sure(overtaken, 0, correct=400)
    sure(overtaken, 2, correct=200)
    collapsed.logits[0, :, 3] += 100.0
    for records in (chance, overtaken, collapsed):
        here, elsewhere = (" ".join(found(records, other_data=other, thresholds=[0.0])) for other in (False, True))
        assert re.search("[Tt]rain .*longer|training was|learning rate", here)
        assert elsewhere.startswith(here[:40])
        assert not re.search("longer|too short|learn", elsewhere)


def test_a_sweep_at_which_nobody_exits_is_told_unless_the_policy_never_lets_one():
    records = make_records()
    (text,) = found(records, thresholds=[0.0, 1e-30])
    assert "no sample exits early at any of 2 thresholds" in text
    assert found(records, thresholds=[0.0, 1e-30], never=True) == []
    assert found(make_records(exits=1)) == []


def test_a_sharp_fall_between_neighbouring_thresholds_is_told_with_both():
    """60 confident errors that an exit makes at one entropy all leave at the same threshold."""
    records = make_records()
    for exit_ in range(3):
        sure(records, exit_, correct=400)
    sure(records, 1, correct=340)
    records.logits[0] = 0.0
    records.logits[0, torch.arange(400), records.labels] = 0.1
    records.logits[1, 340:] *= 0.5
    assert not found(records, thresholds=[0.0, 1e-3])
    (text,) = found(records, thresholds=[1e-3, 0.3])
    assert "accuracy falls from 100.0 to 85.0 % between the neighbouring thresholds 0.001 and 0.3" in text


@pytest.mark.parametrize(("correct", "weak"), [(300, True), (395, False)])
def test_a_teacher_weaker_than_its_student_is_told(correct, weak):
    student, teacher = sure(make_records(), 2, correct=400), sure(make_records(), 2, correct=correct)
    texts = [text for text in found(student, teacher_records=teacher) if "weaker than its student" in text]
    assert len(texts) == weak
    if weak:
        assert "the teacher is correct on 75.0 % of the samples, its student on 100.0 %" in texts[0]


@pytest.mark.parametrize(
    ("correct", "says"), [(1.0, "hardly differ"), (0.995, "hardly differ"), (0.99, None), (0.11, None), (0.1, "errors")]
)
def test_a_teacher_that_is_right_or_wrong_on_nearly_every_sample_is_told(correct, says):
    text = teacher_signature(correct)
    assert text is None if says is None else says in text
    assert found(make_records(), teacher_correct=correct) == ([] if text is None else [text])
