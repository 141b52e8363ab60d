"""Accuracy per group, worst group and mean of groups."""

import pytest
import torch

from erde_hub.errors import InputTypeError, ShapeError
from erde_hub.evaluation import group_accuracies, group_metrics
from tests.fakes.records import records_of


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
