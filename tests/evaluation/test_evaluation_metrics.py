"""Metrics: golden numbers, torchmetrics and sklearn-like loops as independent references, edges, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from erde_hub.errors import ConfigError, InputTypeError, LabelError, RecordsError, ShapeError
from erde_hub.evaluation import calibration_error, exit_metrics
from erde_hub.evaluation.metrics import sample_metrics


def test_golden_numbers_in_float64(golden):
    data = golden("metrics")
    tolerance = data["tolerance"]
    assert {case["name"] for case in data["cases"]} >= {"ordinary", "with_saturated"}
    for case in data["cases"]:
        logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
        labels = torch.tensor(case["inputs"]["labels"])
        found = exit_metrics(logits, labels)
        expected = case["expected"]
        for key, name in (
            ("accuracy", "accuracy"),
            ("nll", "nlpd"),
            ("brier", "brier"),
            ("ece", "ece15_right_closed"),
        ):
            assert found[key] == pytest.approx(
                expected[name], rel=tolerance["float64_rtol"], abs=tolerance["float64_atol"]
            ), (case["name"], key)
        assert exit_metrics(logits, labels, bins=10)["ece"] == pytest.approx(expected["ece10_right_closed"], rel=1e-9)
        confidence = sample_metrics(logits, labels).confidence.mean().item()
        assert confidence == pytest.approx(expected["mean_confidence"], rel=1e-9)


def test_float32_logits_are_good_to_float32(golden):
    data = golden("metrics")
    case = next(case for case in data["cases"] if case["name"] == "with_saturated")
    found = exit_metrics(torch.tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"]))
    assert found["nll"] == pytest.approx(case["expected"]["nlpd"], rel=1e-4)
    assert found["ece"] == pytest.approx(case["expected"]["ece15_right_closed"], rel=1e-4)


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 60))
def test_agrees_with_torchmetrics_and_a_loop(seed, classes, samples):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=generator)
    found = exit_metrics(logits, labels)
    probs = logits.softmax(1)
    nll = brier = 0.0
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        nll -= math.log(row[label])
        brier += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    assert found["nll"] == pytest.approx(nll / samples, rel=1e-9)
    assert found["brier"] == pytest.approx(brier / samples, rel=1e-9, abs=1e-12)
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(probs, labels, classes, average="micro").item())
    if classes > 5:
        top5 = multiclass_accuracy(probs, labels, classes, average="micro", top_k=5).item()
        assert found["top5"] == pytest.approx(top5)
    else:
        assert "top5" not in found
    # Random confidences do not lie on a bin's edge, so that left- and right-closed bins agree.
    reference = multiclass_calibration_error(probs, labels, classes, n_bins=15).item()
    assert found["ece"] == pytest.approx(reference, abs=1e-6)


def test_bins_are_right_closed_and_hold_both_ends():
    confidence = torch.tensor([0.6, 0.8, 1.0, 0.0], dtype=torch.float64)
    correct = torch.tensor([True, False, True, False])
    # Bins of 0.2: (0.4, 0.6] off by 0.4, (0.6, 0.8] off by 0.8, (0.8, 1.0] and [0, 0.2] right.
    assert calibration_error(confidence, correct, bins=5) == pytest.approx((0.4 + 0.8) / 4)
    assert calibration_error(confidence, correct, bins=1) == pytest.approx(abs(2 - 2.4) / 4)


def test_worked_by_hand():
    found = exit_metrics(torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]), torch.tensor([0, 0]))
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert found["brier"] == pytest.approx((2 * 0.25**2 + 2 * 0.75**2) / 2)
    assert found["ece"] == pytest.approx(0.25)


def test_log_probabilities_serve_as_logits():
    logits, labels = torch.randn(40, 7, dtype=torch.float64), torch.randint(7, (40,))
    assert exit_metrics(logits, labels) == pytest.approx(exit_metrics(logits.log_softmax(1), labels))


def test_equal_logits_go_to_the_first_class_as_in_argmax():
    logits = torch.zeros(3, 8)
    labels = torch.tensor([0, 4, 5])
    samples = sample_metrics(logits, labels)
    assert samples.correct.tolist() == [True, False, False]
    assert samples.top5.tolist() == [True, True, False]


def test_saturated_logits_are_finite_and_never_minus_zero():
    found = exit_metrics(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1]))
    assert found["nll"] == 5e3
    perfect = exit_metrics(torch.tensor([[1e4, 0.0]]), torch.tensor([0]))
    assert perfect == {"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0, "aurc": 0.0}
    assert math.copysign(1, perfect["nll"]) == 1


def test_rows_are_independent_of_the_chunks_they_are_computed_in(monkeypatch):
    logits, labels = torch.randn(50, 6), torch.randint(6, (50,))
    whole = exit_metrics(logits, labels)
    monkeypatch.setattr("erde_hub.records._ROWS", 7)
    assert exit_metrics(logits, labels) == whole


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        (torch.zeros(3), torch.zeros(3).long(), ShapeError, "(3,)"),
        (torch.zeros(3, 2), torch.zeros(4).long(), ShapeError, "(4,)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), ShapeError, "at least one"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), InputTypeError, "int64"),
        (torch.zeros(3, 2), torch.zeros(3), InputTypeError, "soft labels"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), LabelError, "label 2 of row 2"),
        (torch.zeros(3, 2), torch.tensor([0, -100, 1]), LabelError, "label -100 of row 1"),
        (torch.tensor([[0.0, 1], [math.nan, 0]]), torch.tensor([0, 1]), RecordsError, "row 1"),
    ],
)
def test_bad_input(logits, labels, error, words):
    with pytest.raises(error) as caught:
        exit_metrics(logits, labels)
    assert words in str(caught.value)


@pytest.mark.parametrize("bins", [0, -1, 2.5, True])
def test_bad_number_of_bins(bins):
    with pytest.raises(ConfigError, match="bins"):
        exit_metrics(torch.zeros(1, 2), torch.zeros(1).long(), bins=bins)
