"""What is asked is checked, what is found is reported and stored, and what cannot be promised is not."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch

import erde_hub.records as records_module
from erde_hub.calibration import (
    TemperatureCalibrator,
    ThresholdChoice,
    attainable_confidence,
    check_calibration_data,
    choose_threshold,
    samples_without_loss,
    thresholds,
)
from erde_hub.calibration.choice import describe_confidence
from erde_hub.errors import (
    ConfigError,
    DataError,
    InputTypeError,
    RecordsError,
    RepeatedSamplesWarning,
    ThresholdError,
    UnknownNameError,
)
from erde_hub.evaluation import collect_exit_records, curve_area, route_records
from erde_hub.policies import EEFPPolicy, EENetPolicy, SetSizePolicy
from erde_hub.prediction_sets import AVCSClassifier, ConformalClassifier
from tests.fakes.networks import resnet8
from tests.fakes.records import make_records, records_of

RECORDS = make_records(400)


def test_without_enough_samples_nobody_leaves_and_the_report_says_so():
    for policy, never in (("entropy", 0.0), ("confidence", 2.0), ("margin", 2.0), ("patience", 1e8)):
        choice = choose_threshold(make_records(144), policy, max_accuracy_drop=0.01, confidence=0.9)
        assert choice.never_exits
        assert choice.threshold == never
        assert choice.saving == 0
        assert "No sample exits early" in choice.advice
        assert "230 are needed" in choice.advice
        assert "there are 144" in choice.advice
        index, _ = route_records(make_records(50, seed=3), policy, choice.threshold)
        assert (index == 2).all()
        assert "(no sample exits early)" in str(choice)
    zero = choose_threshold(RECORDS, max_accuracy_drop=0, confidence=0.9)
    assert zero.never_exits
    assert "no number of samples can guarantee a bound of 0" in zero.advice
    assert choose_threshold(RECORDS, max_accuracy_drop=0).accuracy >= zero.full_accuracy


def test_advice_contradicts_neither_itself_nor_the_choice():
    logits = torch.zeros(2, 200, 2)
    logits[0, :, 0], logits[1, :, 0] = 5.0, 3.0
    logits[1, :4] = torch.tensor([0.0, 3.0])  # the last exit is wrong where the first one is right
    logits[:, 100:] = logits[:, 100:].flip(-1)
    records = records_of(logits, torch.arange(200) // 100)
    args = {"max_accuracy_drop": 0.01, "confidence": 0.9}
    better = choose_threshold(records, candidates=[0.5], method="exact", **args)
    assert better.saving == 0.5, "gains make up for what 200 samples without a loss could not show"
    assert better.advice == ""
    never = choose_threshold(records, **args)
    assert "230 are needed for this bound" in never.advice
    assert "On these 200 samples a bolder threshold, which saves 50.0 %, keeps the bound, but" in never.advice
    logits[0] = logits[0].flip(-1)
    wrong = choose_threshold(dataclasses.replace(records, logits=logits), **args)
    assert wrong.never_exits
    assert "bolder" not in wrong.advice, "there is none that would save anything"


def test_hopeless_exits_stay_shut():
    records = make_records(600)
    hopeless = records.logits.clone()
    hopeless[:-1] = hopeless[:-1].roll(1, 0).roll(1, 1)  # sure of another sample's answer
    records = dataclasses.replace(records, logits=hopeless)
    choice = choose_threshold(records, max_accuracy_drop=0.01, confidence=0.9)
    assert choice.never_exits or choice.saving < 0.05
    if choice.never_exits:
        assert "loses too much" in choice.advice


def test_a_wider_bound_or_a_lower_confidence_saves_more():
    savings = [choose_threshold(RECORDS, max_accuracy_drop=b, confidence=0.9).saving for b in (0.02, 0.04, 0.08)]
    assert savings == sorted(savings)
    assert savings[0] < savings[-1]
    sure = choose_threshold(RECORDS, max_accuracy_drop=0.04, confidence=0.99)
    unsure = choose_threshold(RECORDS, max_accuracy_drop=0.04, confidence=0.6)
    assert sure.saving < unsure.saving <= unsure.possible_saving
    assert "a bolder threshold, which saves" in sure.advice


def test_candidates_per_exit_are_found_on_samples_that_are_not_tested(monkeypatch):
    records, seen = make_records(600), []
    find = thresholds.fit_exit_speeds
    monkeypatch.setattr(
        thresholds,
        "fit_exit_speeds",
        lambda *args, **kw: seen.append((args[0].scores, args[0].losses)) or find(*args, **kw),
    )
    tested = torch.randperm(600, generator=torch.Generator().manual_seed(thresholds._SPLIT_SEED))[120:]
    labels = records.labels.clone()
    labels[tested] = labels[tested].roll(1)
    for given in (records, dataclasses.replace(records, labels=labels)):
        choice = choose_threshold(given, max_accuracy_drop=0.05, confidence=0.8, per_exit=True)
        assert choice.tested == len(tested)
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def repeated(records, times, index=None):
    found = records.select(torch.arange(len(records)).repeat(times))
    return found if index is None else dataclasses.replace(found, index=index)


@pytest.mark.parametrize("per_exit", [False, True])
def test_a_repeated_sample_counts_once(per_exit):
    records = make_records(300)
    args = {"max_accuracy_drop": 0.05, "confidence": 0.9, "per_exit": per_exit}
    with pytest.warns(
        RepeatedSamplesWarning, match=r"14700 of 15000 rows repeat a sample index \(such as 0, 1, 2, 3, 4"
    ):
        many = choose_threshold(repeated(records, 50), **args)
    assert many == choose_threshold(records, **args)
    assert many.samples == 300


def test_equal_logits_under_other_indices_are_a_warning_and_never_refused():
    records = make_records(300)
    with pytest.warns(RepeatedSamplesWarning, match="600 of 900 samples have exactly the logits of another"):
        choice = choose_threshold(repeated(records, 3, torch.arange(900)), max_accuracy_drop=0.05, confidence=0.9)
    assert choice.samples == 900
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_threshold(records, max_accuracy_drop=0.05, confidence=0.9)


def test_logits_are_searched_for_copies_once(monkeypatch):
    records, calls = make_records(300), []
    chunks = records_module.row_chunks
    monkeypatch.setattr(records_module, "row_chunks", lambda *shape: calls.append(shape) or chunks(*shape))
    for _ in range(2):
        TemperatureCalibrator.fit(records)
        choose_threshold(records, max_accuracy_drop=0.05)
    assert len(calls) == 1


@pytest.mark.parametrize("fit", [EEFPPolicy.fit, SetSizePolicy.fit, TemperatureCalibrator.fit, ConformalClassifier.fit,
                                 AVCSClassifier.fit, check_calibration_data])  # fmt: skip
def test_fits_of_every_kind_count_a_repeated_sample_once(fit):
    records = make_records(60, classes=3)
    with pytest.warns(RepeatedSamplesWarning, match="60 of 120 rows"):
        twice = fit(repeated(records, 2))
    once = fit(records)
    for name, value in vars(once).items():
        if isinstance(value, (list, float, str)):
            assert getattr(twice, name) == value, name
    if isinstance(once, torch.nn.Module):
        assert all(torch.equal(a, b) for a, b in zip(once.buffers(), twice.buffers(), strict=True))
    with pytest.raises(DataError, match="15 samples are too few"), pytest.warns(RepeatedSamplesWarning):
        fit(repeated(records.select(range(15)), 40))


@pytest.mark.parametrize("candidates", [None, [0.1 * i for i in range(1, 16)]])
@pytest.mark.parametrize("objective", [{"max_mean_macs": 17_000.0}, {"max_accuracy_drop": 0.02}])
def test_thirty_two_early_exits_are_searched_in_linear_work(objective, candidates):
    """Tables of all combinations would have 2 to 16 to the power of 32 cells."""
    records = make_records(300, exits=33)
    choice = choose_threshold(records, per_exit=True, candidates=candidates, **objective)
    shared = choose_threshold(records, candidates=candidates, **objective)
    assert choice.value <= choice.bound
    if "max_mean_macs" in objective:
        assert choice.accuracy >= shared.accuracy
    else:
        assert choice.mean_macs <= shared.mean_macs
    assert candidates is None or set(choice.threshold) <= {0.0, *candidates}


def test_the_same_records_give_the_same_choice():
    args = {"max_accuracy_drop": 0.04, "confidence": 0.8, "per_exit": True}
    first = choose_threshold(RECORDS, **args)
    torch.manual_seed(99)
    assert choose_threshold(RECORDS, **args) == first
    assert first.tested == 320


def test_reports_go_into_json_and_come_back():
    for args in ({"max_accuracy_drop": 0.03, "confidence": 0.9}, {"max_mean_macs": 2600.0, "per_exit": True},
                 {"max_disagreement": 0.1, "method": "crc"}):  # fmt: skip
        choice = choose_threshold(RECORDS, **args)
        text = json.dumps(choice.to_dict(), allow_nan=False)
        assert ThresholdChoice.from_dict(json.loads(text)) == choice
    profile = choice.to_dict()
    for damaged, message in (
        ({**profile, "format": "x/2"}, "format 'erde_hub.threshold_profile/1', got 'x/2'"),
        ({**profile, "savin": 1}, "unknown key 'savin'; did you mean 'saving'"),
        ({k: v for k, v in profile.items() if k != "bound"}, "no 'bound'"),
        ({**profile, "saving": "much"}, "damaged: saving is 'much'"),
        ({**profile, "saving": math.nan}, "damaged: saving is nan"),
        ({**profile, "samples": True}, "damaged: samples is True"),
        ({**profile, "exit_share": [0.5, None]}, "damaged: exit_share is"),
        ({**profile, "target": "fame"}, "damaged: target is 'fame'"),
        ({**profile, "method": [1]}, "damaged: method is [1]"),
        ({**profile, "confidence": 1.0}, "confidence must be between 0 and 1"),
        (3, "got 3"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            ThresholdChoice.from_dict(damaged)


def test_a_choice_is_stored_in_the_model_whose_records_it_was_made_on_and_in_no_other():
    model = resnet8(10, head="linear").eval()
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 10
    records = collect_exit_records(model, [(images, labels)], progress=False)
    choice = choose_threshold(records, max_accuracy_drop=0.5, confidence=0.9)
    choice.store(model)
    assert model.threshold == choice.threshold
    assert model.config.threshold_profile["fingerprint"] == records.fingerprint
    with torch.no_grad():
        model.backbone.fc.bias.add_(1)
    with pytest.raises(RecordsError, match="chosen on records that were not collected with this model"):
        choice.store(model)
    choose_threshold(dataclasses.replace(records, fingerprint=""), max_accuracy_drop=0.5).store(model)
    with pytest.raises(ConfigError, match="chosen for the policy 'margin', the model has 'entropy'"):
        choose_threshold(dataclasses.replace(records, fingerprint=""), "margin", max_accuracy_drop=0.5).store(model)


def test_names_and_facts_of_the_records_are_in_the_report():
    records = make_records(300, dataset="uoft-cs/cifar10")
    choice = choose_threshold(records, max_accuracy_drop=0.03, confidence=0.9)
    assert (choice.dataset, choice.split, choice.fingerprint) == ("uoft-cs/cifar10", "validation", "f" * 32)
    assert "loss of accuracy against the full model at most 3 points with 90 % confidence" in choice.rule
    assert "on 300 samples of validation" in str(choice)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({}, ConfigError, "exactly one of max_accuracy_drop"),
        ({"max_accuracy_drop": 0.1, "max_mean_macs": 1.0}, ConfigError, "got 2"),
        ({"max_accuracy_drop": -0.01}, ConfigError, r"at least 0, got -0\.01"),
        ({"max_accuracy_drop": math.nan}, ConfigError, "got nan"),
        ({"max_accuracy_drop": 1.0}, ConfigError, r"below 1, got 1\.0: it is a fraction, 0\.01 is one point"),
        ({"max_accuracy_drop": True}, ConfigError, "got True"),
        ({"max_accuracy_drop": 0.1, "confidence": 1}, ConfigError, "got 1: certainty needs infinitely many samples"),
        ({"max_accuracy_drop": 0.1, "confidence": 0.0}, ConfigError, r"got 0\.0"),
        ({"max_accuracy_drop": 0.1, "confidence": 90}, ConfigError, "got 90"),
        ({"max_accuracy_drop": 0.1, "method": "ltt"}, ConfigError, "'ltt' needs a confidence"),
        ({"max_accuracy_drop": 0.1, "method": "crc", "confidence": 0.9}, ConfigError, "takes no confidence"),
        ({"max_accuracy_drop": 0.1, "method": "lt", "confidence": 0.9}, UnknownNameError, "'lt'; did you mean 'ltt'"),
        ({"max_brier_increase": 0.1, "method": "exact", "confidence": 0.9}, ConfigError, "use 'ltt' or 'ucb'"),
        ({"max_mean_macs": 2500.0, "confidence": 0.9}, ConfigError, "max_mean_macs is a budget"),
        ({"max_mean_macs": 100.0}, ConfigError, "budget of 100 is below the cheapest exit's cost, 2,000"),
        ({"max_mean_milliseconds": 3.0}, ConfigError, "needs exit_milliseconds"),
        ({"max_mean_milliseconds": 3.0, "exit_milliseconds": [1.0, 2.0]}, ConfigError, "must be 3 positive times"),
        ({"max_mean_macs": 3e3, "exit_milliseconds": [1.0, 2.0, 3.0]}, ConfigError, "use max_mean_milliseconds"),
        ({"max_accuracy_drop": 0.1, "candidates": []}, ConfigError, "candidates is empty"),
        ({"max_accuracy_drop": 0.1, "candidates": [-1.0]}, ThresholdError, r"threshold -1\.0 is not allowed"),
        ({"max_accuracy_drop": 0.1, "policy": "never"}, ThresholdError, "NeverPolicy has no threshold to choose"),
        ({"max_accuracy_drop": 0.1, "policy": "entrop"}, UnknownNameError, "did you mean 'entropy'"),
        ({"max_accuracy_drop": 0.1, "training_index": [7, 3, 10_000]}, DataError, "2 of 400 samples were trained on"),
        ({"max_accuracy_drop": 0.1, "training_index": "abc"}, InputTypeError, r"such as \[0, 5, 17\], got 'abc'"),
        ({"max_accuracy_drop": 0.1, "training_index": [0.5]}, InputTypeError, r"numbers of samples, .* got \[0\.5\]"),
        ({"max_accuracy_drop": 0.1, "training_index": torch.ones(9) > 0}, InputTypeError, r"take mask\.nonzero\(\)"),
        ({"max_accuracy_drop": 0.1, "policy": 3}, InputTypeError, "policy must be a name, .* got 3"),
        ({"max_accuracy_drop": 0.1, "policy": EEFPPolicy}, InputTypeError, r"write EEFPPolicy\(\)"),
        ({"max_accuracy_drop": 0.1, "exit_milliseconds": "abc"}, ConfigError, "must be positive times, .* got 'abc'"),
        ({"max_accuracy_drop": 0.1, "exit_milliseconds": 2.0}, ConfigError, r"must be positive times, .* got 2\.0"),
        ({"max_accuracy_drop": 0.1, "exit_milliseconds": [1, None, 3]}, ConfigError, "must be positive times"),
        ({"max_accuracy_drop": 0.1, "candidates": ["a"]}, ThresholdError, r"must be thresholds, .* got \['a'\]"),
        ({"max_accuracy_drop": 0.1, "candidates": 0.5}, ThresholdError, r"must be thresholds, .* got 0\.5"),
        ({"max_accuracy_drop": 0.1, "method": ["ltt"]}, UnknownNameError, r"unknown method \['ltt'\]"),
        ({"max_accuracy_drop": 0.1, "per_exit": "no"}, InputTypeError, "per_exit must be True or False, got 'no'"),
        ({"max_accuracy_drop": 0.1, "allow_missing_classes": "no"}, InputTypeError, "must be True or False, got 'no'"),
        ({"max_mean_macs": 2500.0, "method": "crc"}, ConfigError, "leave method 'crc' out"),
        ({"max_mean_macs": 2500.0, "confidence": 0.95}, ConfigError, r"leave confidence 0\.95 out"),
    ],
)
def test_what_makes_no_sense_is_refused(args, error, message):
    with pytest.raises(error, match=message):
        choose_threshold(RECORDS, **args)


@pytest.mark.parametrize("function", [choose_threshold, TemperatureCalibrator.fit, check_calibration_data, curve_area])
@pytest.mark.parametrize("given", [None, "records.safetensors", [RECORDS]])
def test_what_are_no_records_is_refused(function, given):
    with pytest.raises(InputTypeError, match=r"records must be ExitRecords, .* got (None|'records|\[)"):
        function(given)


@pytest.mark.parametrize(("function", "args", "error", "message"), [
    (samples_without_loss, (0.0, 0.9), ConfigError, "bound must be finite and above 0 and below 1, got 0"),
    (samples_without_loss, (0.01, 1.0), ConfigError, "confidence must be between 0 and 1"),
    (attainable_confidence, ("0.01", 144), InputTypeError, "bound must be a number"),
    (attainable_confidence, (0.01, 1.5), InputTypeError, r"samples must be a whole number, got 1\.5"),
])  # fmt: skip
def test_what_no_number_of_samples_answers_is_refused(function, args, error, message):
    with pytest.raises(error, match=message):
        function(*args)


def test_numbers_of_numpy_and_tensors_are_numbers():
    args = {"max_accuracy_drop": 0.1, "per_exit": True}
    plain = choose_threshold(RECORDS, candidates=[0.1, 0.5], exit_milliseconds=[1.0, 2.0, 4.0], **args)
    assert plain == choose_threshold(
        RECORDS, candidates=torch.tensor([0.1, 0.5]).double(), exit_milliseconds=np.array([1, 2, 4]),
        training_index=np.array([900, 901]), **args,
    )  # fmt: skip
    assert plain == choose_threshold(
        RECORDS, candidates=list(torch.tensor([0.1, 0.5]).double()), exit_milliseconds=list(np.array([1, 2, 4])), **args
    )


def test_a_confidence_is_never_written_larger_than_it_is():
    choice = choose_threshold(RECORDS, max_accuracy_drop=0.05, confidence=attainable_confidence(0.01, 144))
    assert "at most 5 points with 76.4 % confidence" in choice.rule
    written = {0.9: "90 %", 0.95: "95 %", 0.7999: "79.9 %", 0.9 - 1e-9: "90 %", 0.9996: "99.96 %", 0.6: "60 %"}
    assert {confidence: describe_confidence(confidence) for confidence in written} == written


def test_the_bound_is_the_promise_and_the_number_beside_it_none():
    choice = choose_threshold(RECORDS, max_accuracy_drop=0.05, confidence=0.9)
    args = {"confidence": 0.9, "method": choice.method}
    assert 0 < choice.upper_bound < 0.05
    alone = choose_threshold(
        RECORDS, candidates=[choice.threshold], max_accuracy_drop=choice.upper_bound + 1e-6, **args
    )
    assert alone.threshold == choice.threshold, "a test of this threshold alone passes"
    walked = choose_threshold(RECORDS, max_accuracy_drop=choice.upper_bound - 1e-5, **args)
    assert walked.saving < choice.saving, "the walk would have ended earlier"
    assert re.search("promised, no smaller one; .* meets .* points, had it been the only one tried", str(choice))


def test_data_that_cannot_calibrate_are_refused():
    with pytest.raises(DataError, match="of the training split"):
        choose_threshold(make_records(100, split="train"), max_accuracy_drop=0.1)
    with pytest.raises(DataError, match="12 samples are too few to calibrate on: at least 20"):
        choose_threshold(make_records(12), max_accuracy_drop=0.1)
    lacking = RECORDS.select(RECORDS.labels != 4)
    with pytest.raises(DataError, match="class 'c4' has no sample"):
        choose_threshold(lacking, max_accuracy_drop=0.1)
    assert choose_threshold(lacking, max_accuracy_drop=0.1, allow_missing_classes=True).samples == len(lacking)
    for fit in (EEFPPolicy.fit, EENetPolicy.fit, SetSizePolicy.fit, TemperatureCalibrator.fit):
        with pytest.raises(DataError, match="of the training split"):
            fit(make_records(100, split="train"))
        with pytest.raises(DataError, match="12 samples are too few"):
            fit(make_records(12))
        with pytest.raises(DataError, match="1 of 400 samples were trained on"):
            fit(RECORDS, training_index=[3])
    one = dataclasses.replace(RECORDS, logits=RECORDS.logits[-1:], exit_names=["c"], cumulative_macs=[1])
    with pytest.raises(RecordsError, match="no early exit"):
        choose_threshold(one, max_accuracy_drop=0.1)
