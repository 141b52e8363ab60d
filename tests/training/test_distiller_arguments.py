from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import HfArgumentParser

from erde_hub.errors import ConfigError, InputTypeError, UnknownNameError
from erde_hub.training import DistillationArguments
from erde_hub.training.arguments import FREE_ON_RESUME, OTHER_NAMES, list_schedulers
from erde_hub.training.schedules import create_schedule


def test_every_field_is_explained_and_is_a_flag():
    parser = HfArgumentParser(DistillationArguments)
    for field in dataclasses.fields(DistillationArguments):
        assert field.metadata.get("help"), field.name
    parser.format_help()
    (args,) = parser.parse_args_into_dataclasses(
        ["--epochs", "3", "--lr", "1e-3", "--optimizer", "adamw", "--decay_milestones", "0.3", "0.6", "--channels_last"]
    )
    assert (args.epochs, args.lr, args.optimizer, args.channels_last) == (3, 1e-3, "adamw", True)
    assert args.decay_milestones == [0.3, 0.6]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("epochs", 0, "at least 1"),
        ("batch_size", -4, "-4"),
        ("max_steps", -1, "0 or more"),
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "nan"),
        ("lr", float("inf"), "finite"),
        ("momentum", 1.0, r"\[0, 1\)"),
        ("warmup", 1.5, "1.5"),
        ("label_smoothing", -0.1, "-0.1"),
        ("ema_decay", 1.0, r"\[0, 1\)"),
        ("max_grad_norm", -1.0, "-1"),
        ("weight_decay", float("nan"), "nan"),
        ("seed", 2**32, "seed"),
        ("keep_checkpoints", 0, "keep_checkpoints"),
        ("logging_steps", 0, "logging_steps"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps"),
        ("decay_milestones", [0.5, 2.0], "2.0"),
        ("output_dir", " ", "output_dir"),
    ],
)
def test_a_value_out_of_range_is_named(name, value, says):
    with pytest.raises(ConfigError, match=says) as error:
        DistillationArguments(**{name: value})
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("optimizer", "adamv", "adamw"),
        ("scheduler", "onecycel", "onecycle"),
        ("scheduler", "plateau", "available"),
        ("mixed_precision", "bf32", "bf16"),
        ("report_to", "tensorbord", "tensorboard"),
        ("augment", "crop_flop", "crop_flip"),
    ],
)
def test_an_unknown_name_shows_the_nearest(name, value, nearest):
    with pytest.raises(ConfigError, match=nearest) as error:
        DistillationArguments(**{name: value})
    assert repr(value) in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "3"), ("epochs", 2.5), ("epochs", True), ("lr", "1e-3"), ("resume", "yes"), ("optimizer", 3)],
)
def test_a_value_of_the_wrong_type_is_refused_not_converted(name, value):
    with pytest.raises(InputTypeError, match=name):
        DistillationArguments(**{name: value})


def test_combinations_are_checked():
    with pytest.raises(ConfigError, match="contradict"):
        DistillationArguments(resume=True, overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="second derivatives"):
        DistillationArguments(optimizer="adahessian")
    assert DistillationArguments(optimizer="lookahead_adamw").optimizer == "lookahead_adamw"
    assert DistillationArguments(lr=1).lr == 1.0


def test_published_settings_hold_no_path_and_resume_settings_no_output_settings():
    args = DistillationArguments(output_dir="/somewhere/runs/a", resume=True)
    assert "/somewhere" not in str(args.public_dict())
    assert "epochs" in args.public_dict()
    assert not FREE_ON_RESUME & args.resume_dict().keys()
    assert {field.name for field in dataclasses.fields(args)} >= FREE_ON_RESUME
    assert {"seed", "lr", "batch_size", "optimizer", "label_smoothing"} <= args.resume_dict().keys()


def schedule(name, total=40, **changes):
    args = DistillationArguments(scheduler=name, lr=0.2, **changes)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler = create_schedule(args, optimizer, total, steps_per_epoch=10)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, total):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, scheduler, optimizer


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.9])
def test_one_cycle_is_that_of_torch(warmup):
    rates, _, _ = schedule("onecycle", warmup=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=40, pct_start=warmup, cycle_momentum=False
    )
    expected = [optimizer.param_groups[0]["lr"]]
    for _ in range(39):
        optimizer.step()
        reference.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, rel=1e-9)
    assert max(rates) == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("name", list_schedulers())
def test_every_schedule_is_a_function_of_the_step_alone(name):
    rates, scheduler, optimizer = schedule(name, warmup=0.25)
    assert all(0 <= rate <= 0.2 + 1e-12 for rate in rates)
    assert rates[0] < max(rates) == pytest.approx(0.2, rel=0.15)
    for step in (33, 7, 20):
        scheduler.step_update(step)
        assert optimizer.param_groups[0]["lr"] == rates[step]


def test_schedules_decay_where_they_say():
    rates, _, _ = schedule("multistep", warmup=0.0, decay_milestones=[0.5, 0.75])
    assert rates[18:20] == pytest.approx([0.2, 0.02])  # timm counts from 1 here
    assert rates[28:30] == pytest.approx([0.02, 0.002])
    rates, _, _ = schedule("step", warmup=0.0, decay_epochs=1.0, decay_rate=0.5)
    assert rates[9:11] == pytest.approx([0.2, 0.1])
    rates, _, _ = schedule("constant", warmup=0.0)
    assert set(rates) == {0.2}
    with pytest.raises(UnknownNameError):
        DistillationArguments(scheduler="none")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("learning_rate", "lr"), ("num_train_epochs", "epochs"), ("epoch", "epochs"), ("bf16", "mixed_precision")],
)
def test_an_argument_that_does_not_exist_names_the_one_that_is_meant(name, meant):
    with pytest.raises(ConfigError, match=rf"DistillationArguments has no argument '{name}'; did you mean '{meant}'\?"):
        DistillationArguments(**{name: 1})


def test_other_trainers_names_lead_to_fields():
    fields = {f.name for f in dataclasses.fields(DistillationArguments)}
    assert set(OTHER_NAMES.values()) <= fields
    assert not OTHER_NAMES.keys() & fields
    assert dataclasses.replace(DistillationArguments(epochs=3), lr=0.5) == DistillationArguments(epochs=3, lr=0.5)
