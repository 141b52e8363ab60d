"""Accuracy per group, worst group and mean of groups."""

import pytest
import torch

from erde_hub.calibration import choose_threshold
from erde_hub.errors import ConfigError, InputTypeError, ShapeError, UnknownNameError
from erde_hub.evaluation import group_accuracies, group_metrics, slice_metrics, sweep_thresholds
from tests.fakes.records import make_records, records_of


def test_by_hand():
    right = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    groups = torch.tensor([0, 0, 2, 2, 2])
    table = group_accuracies(right, groups, 4)
    assert table[0].tolist()[0] == 0.5
    assert table[:, 2].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert torch.isnan(table[:, [1, 3]]).all()


def test_metrics_of_records():
    labels = torch.tensor([0, 1, 0, 1])
    right = torch.nn.functional.one_hot(labels, 2).float()
    logits = torch.stack([right, right.flip(-1)])
    logits[1, 0] = right[0]
    records = records_of(logits, labels, exit_names=["early", "classifier"])
    early, last = group_metrics(records, torch.tensor([0, 0, 1, 1]), ["a", "b", "empty"])
    assert early == {
        "exit": "early", "accuracy": 1.0, "groups": {"a": 1.0, "b": 1.0}, "worst_group": 1.0, "mean_of_groups": 1.0,
    }  # fmt: skip
    assert last["groups"] == {"a": 0.5, "b": 0.0}
    assert (last["worst_group"], last["mean_of_groups"], last["accuracy"]) == (0.0, 0.25, 0.25)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), InputTypeError, "groups must be whole numbers .*torch.float32"),
        (torch.tensor([0, 1, 1]), ShapeError, "one entry per sample, got"),
        (torch.tensor([0, 2]), ShapeError, "groups run from 0 to 2, allowed is 0 to 1"),
        (torch.tensor([-1, 1]), ShapeError, "groups run from -1"),
    ],
)
def test_groups_that_do_not_fit(groups, error, message):
    with pytest.raises(error, match=message):
        group_accuracies(torch.tensor([True, False]), groups, 2)


def test_slices_are_what_a_sweep_of_each_says_the_worst_first():
    records = make_records(900, exits=3)
    groups = torch.arange(900) % 3
    records.logits[:, groups == 1] = records.logits[:, groups == 1].roll(1, -1)  # a slice on which every exit is wrong
    choice = choose_threshold(records.select(groups != 1), max_accuracy_drop=0.1, confidence=0.9)
    rows = slice_metrics(records, groups, ["a", "b", "c", "none"], "entropy", choice.threshold, choice.to_dict())
    assert [row["samples"] for row in rows] == [300, 300, 300]
    assert rows[0]["slice"] == "b"
    assert [row["accuracy"] for row in rows] == sorted(row["accuracy"] for row in rows)
    for row in rows:
        own = records.select(groups == "abc".index(row["slice"]))
        (alone,) = sweep_thresholds(own, [choice.threshold])
        assert all(row[key] == alone[key] for key in ("accuracy", "mean_macs", "exit_share", "ece", "nll"))
        assert row["full_accuracy"] == float((own.logits[-1].argmax(-1) == own.labels).double().mean())
        early = row["full_accuracy"] - row["accuracy"]
        assert row["value"] == pytest.approx(early)
        assert (row["promise"] == "holds") == (row["supported_bound"] <= 0.1)
    assert rows[0]["selective_risk"] > 0.9
    assert "promise" not in slice_metrics(records, groups, ["a", "b", "c"], "entropy", choice.threshold)[0]
    never = slice_metrics(records, groups, ["a", "b", "c"], "entropy", 0.0, choice.to_dict())
    assert {row["selective_risk"] for row in never} == {None}


def test_a_slice_that_loses_more_breaks_the_promise_of_the_whole():
    records = make_records(2000, exits=3)
    groups = (torch.arange(2000) % 10 == 0).long()
    records.logits[0, groups == 1] = (
        50 * torch.nn.functional.one_hot((records.labels[groups == 1] + 1) % 10, 10).float()
    )
    choice = choose_threshold(records, max_accuracy_drop=0.15, confidence=0.9)
    assert not choice.never_exits
    small, large = slice_metrics(records, groups, ["large", "small"], "entropy", choice.threshold, choice.to_dict())
    assert (small["slice"], small["promise"]) == ("small", "broken")
    assert (large["slice"], large["promise"]) == ("large", "holds")


def test_what_slices_refuse():
    records, groups = make_records(60), torch.arange(60) % 2
    with pytest.raises(InputTypeError, match="groups must be a tensor of whole numbers"):
        slice_metrics(records, [0] * 60, ["a"], "entropy", 0.5)
    profile = choose_threshold(records, max_accuracy_drop=0.2, confidence=0.9).to_dict()
    with pytest.raises(UnknownNameError, match="unknown target 'mean_macs'"):
        slice_metrics(records, groups, ["a", "b"], "entropy", 0.5, profile | {"target": "mean_macs"})
    with pytest.raises(ConfigError, match="a threshold profile must have the format"):
        slice_metrics(records, groups, ["a", "b"], "entropy", 0.5, {"confidence": 0.9})
    assert slice_metrics(records, groups, ["a", "b"], "entropy", 0.5, {})
    unsure = profile | {"confidence": 0.3}
    lone = slice_metrics(records, torch.arange(60).clamp(max=1), ["one", "rest"], "entropy", 0.0, unsure)
    assert {row["slice"]: row["promise"] for row in lone}["one"] != "broken", "it lost nothing"
