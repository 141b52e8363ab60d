"""Presets of exit weights, and schedules that follow the epoch."""

import math

import pytest
import torch

from erde_hub.errors import ConfigError, InputTypeError, UnknownNameError
from erde_hub.losses import CELoss, ERDELoss, KDLoss, exit_weights_preset, list_exit_weights_presets


def test_sdn_schedule_is_the_golden_one(golden):
    case = next(case for case in golden("baselines")["cases"] if case["name"] == "sdn_weight_schedule")
    given = case["inputs"]
    for epoch, expected in zip(given["epoch"], case["expected"]["weights"], strict=True):
        *early, final = exit_weights_preset("sdn", 7, epoch, given["epochs"])
        assert early == pytest.approx(expected, rel=1e-9)
        assert final == 1.0
    assert exit_weights_preset("sdn", 7)[:-1] == pytest.approx(given["max_weights"])


def test_presets_by_hand():
    assert exit_weights_preset("uniform", 3) == exit_weights_preset("msdnet", 3) == [1.0, 1.0, 1.0]
    assert exit_weights_preset("linear", 4) == [0.05, 0.1, 0.15, 0.2]
    assert sum(exit_weights_preset("linear", 9)) == pytest.approx(0.5)
    assert exit_weights_preset("branchynet", 2) == [1.0, 0.3]


@pytest.mark.parametrize("name", list_exit_weights_presets())
@pytest.mark.parametrize("exits", [1, 2, 7])
def test_every_preset_weighs_every_exit(name, exits):
    weights = exit_weights_preset(name, exits, epoch=1, epochs=10)
    assert len(weights) == exits
    assert all(math.isfinite(weight) and weight > 0 for weight in weights)


def test_a_loss_follows_the_schedule():
    logits, labels = [torch.randn(4, 3) for _ in range(3)], torch.randint(3, (4,))
    loss = CELoss(exit_weights="sdn")
    per_exit = loss(logits, None, labels).exit_terms["ce"]
    for epoch in (1, 5, 10):
        loss.set_epoch(epoch, 10)
        weights = exit_weights_preset("sdn", 3, epoch, 10)
        assert loss.weights_for(3) == weights
        torch.testing.assert_close(loss(logits, None, labels).loss, (per_exit * torch.tensor(weights)).sum())


@pytest.mark.parametrize("loss", [CELoss(), KDLoss(), ERDELoss()], ids=["ce", "kd", "erde"])
def test_without_a_schedule_the_epoch_changes_nothing(loss):
    before = loss.weights_for(3)
    loss.set_epoch(3, 10)
    assert loss.weights_for(3) == before == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("epoch", "epochs"), [(0, 10), (11, 10), (1, None), (1.0, 10), (True, 10)])
def test_epochs_outside_the_training_are_refused(epoch, epochs):
    with pytest.raises(ConfigError, match=rf"epoch={epoch!r}, epochs={epochs!r}"):
        CELoss().set_epoch(epoch, epochs)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("unifrom", UnknownNameError, "'unifrom'; did you mean 'uniform'"),
        ([1.0, -0.5], ConfigError, r"exit_weights\[1\].*-0.5"),
        ([1.0, math.nan], ConfigError, r"exit_weights\[1\].*nan"),
        ([math.inf], ConfigError, r"exit_weights\[0\].*inf"),
        ([0.0, 0.0], ConfigError, "nothing to train"),
        ([], ConfigError, "nothing to train"),
        ([1.0, "0.5"], InputTypeError, r"exit_weights\[1\].*'0.5'"),
        ([True], InputTypeError, r"exit_weights\[0\].*True"),
        (0.5, InputTypeError, "one number per exit or a preset.*0.5"),
        (None, InputTypeError, "None"),
    ],
)
def test_bad_weights_are_refused_when_the_loss_is_built(weights, error, message):
    with pytest.raises(error, match=message):
        CELoss(exit_weights=weights)


def test_a_wrong_number_of_weights_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"2 entries, \[1.0, 0.3\], for 3 exits"):
        CELoss(exit_weights=[1.0, 0.3]).weights_for(3)


@pytest.mark.parametrize("exits", [0, -1, 2.0, True])
def test_a_preset_needs_exits(exits):
    with pytest.raises(ConfigError, match=rf"num_exits.*{exits!r}"):
        exit_weights_preset("uniform", exits)
