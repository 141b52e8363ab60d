"""The training loop on real numbers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from erde_hub.data.images import BatchLoader
from erde_hub.errors import ConfigError, LabelError
from erde_hub.evaluation import collect_exit_records
from erde_hub.losses import MSELoss
from erde_hub.training import Distiller
from erde_hub.training._meter import StepMeter
from tests.fakes.networks import resnet8
from tests.fakes.training import make_args, make_data


def make_numbers():
    """The target is how red an image is."""
    data = make_data()
    for split in (data.train, data.validation, data.test):
        red = split.pixels(np.arange(len(split)))[..., 0].mean((1, 2)) / 60 - 1.5
        split.labels = torch.from_numpy(red)[:, None].float()
    data.class_names = ["redness"]
    return data


def make_model(outputs=1, problem_type="regression", **kwargs):
    torch.manual_seed(0)
    return resnet8(outputs, 4, 8, ("layer1", "layer2"), problem_type=problem_type, head="linear", **kwargs)


def test_the_distiller_trains_a_regression():
    data = make_numbers()
    model = make_model(id2label=data.class_names)
    distiller = Distiller(model, data, make_args(epochs=4, lr=0.02), "mse")
    before = distiller.evaluate()
    result = distiller.train()
    assert set(before) == {"mae", "mse"}
    first, last = result.history[0], result.history[-1]
    assert set(last["train"]) == {"loss", "terms", "mae"}
    assert last["train"]["loss"] < 0.5 * first["train"]["loss"]
    assert all(now < 0.5 * then for now, then in zip(last["validation"]["mse"], before["mse"], strict=True))
    records = collect_exit_records(model, BatchLoader(data.validation, 64), progress=False)
    assert (records.logits - records.labels).abs().mean((1, 2)).tolist() == pytest.approx(
        last["validation"]["mae"], rel=1e-4
    )


def test_the_sums_of_a_regression_survive_a_checkpoint():
    meter, outputs, targets = StepMeter(), [torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)], torch.tensor([0.0, 1.0])
    meter.add(1, MSELoss()(outputs, None, targets), outputs, targets)
    assert meter.collect().average() == {"loss": 3.0, "terms": {"mse": 3.0}, "mae": [1.5, 0.5]}
    again = StepMeter()
    again.restart(meter.state())
    again.add(2, MSELoss()(outputs, None, -targets), outputs, -targets)
    again.collect()
    assert again.epoch.average()["mae"] == [(1.5 + 2.5) / 2, 0.5]
    assert again.epoch.correct == []


class Means(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("numbers", "model", "loss", "message"),
    [
        (True, make_model(), "ce", "CELoss is for classification, not for regression: choose 'mse'"),
        (False, make_model(3, None), "mse", "MSELoss is for regression, not for classification: choose 'erde' or 'kd'"),
        (False, Means(), "mse", "MSELoss is for regression, not for classification"),
        (True, make_model(3, None), "mse", "labels of 'colours' are real numbers.*wrap it with problem_type"),
        (False, make_model(3), "ce", "labels of 'colours' are classes.*wrap it without problem_type"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(numbers, model, loss, message):
    with pytest.raises(ConfigError, match=message):
        Distiller(model, make_numbers() if numbers else make_data(), make_args(), loss)


def test_a_target_that_is_no_number_is_named():
    data = make_numbers()
    data.train.labels[3] = math.nan
    with pytest.raises(LabelError, match=r"labels\[3, 0\] is nan"):
        Distiller(make_model(), data, make_args(), "mse")
