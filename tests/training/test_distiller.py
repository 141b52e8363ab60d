from __future__ import annotations

import importlib.util
import math
import os
import signal
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch import nn
from torch.nn import functional as F

from erde_hub.data.images import BatchLoader, load_image_data
from erde_hub.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    InputTypeError,
    LabelError,
    NonFiniteLossError,
    RunExistsError,
)
from erde_hub.losses import CELoss, ERDELoss, ExitLoss, LossResult
from erde_hub.outputs import EarlyExitOutput
from erde_hub.training import Distiller, DistillerCallback
from tests.fakes.images import rows, write_parquet
from tests.fakes.training import CLASSES, TinyExits, assert_same, make_args, make_data, network, weights


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_name_in_the_place_of_a_model_is_refused_with_the_way_to_load_it(data, role):
    models = {"student": TinyExits(), "teacher": TinyExits(seed=1)} | {role: "org/name"}
    with pytest.raises(InputTypeError, match=rf"{role} must be a model.*from_pretrained\('org/name'\)"):
        Distiller(models["student"], data, make_args(), "kd", models["teacher"])
    with pytest.raises(InputTypeError, match=rf"{role} must be a model.*got 3"):
        Distiller(**(models | {role: 3}), data=data, args=make_args(), loss="kd")


def train(data, loss="ce", student=None, teacher=None, callbacks=(), **changes):
    student = TinyExits() if student is None else student
    distiller = Distiller(student, data, make_args(**changes), loss, teacher, callbacks=callbacks)
    return student, distiller.train()


class Hook(DistillerCallback):
    """Runs a function after every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, distiller):
        self.function(distiller.position.step)


# The loop


@pytest.mark.parametrize("loss", ["ce", "erde"])
def test_the_loop_is_the_plain_loop(data, loss):
    """Momentum, weight decay, one-cycle, clipping, accumulation, moving average, dropout, against plain torch."""
    settings = {"lr": 0.1, "weight_decay": 0.01, "max_grad_norm": 0.5, "ema_decay": 0.9, "seed": 3}
    teacher = TinyExits(seed=9) if loss == "erde" else None
    trained, _ = train(data, loss, teacher=teacher, gradient_accumulation_steps=2, **settings)

    student = TinyExits()
    per_epoch = len(data.train) // 8 // 2
    steps = 2 * per_epoch
    decay = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decay}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.3, cycle_momentum=False)
    criterion = CELoss() if loss == "ce" else ERDELoss()
    loader = BatchLoader(data.train, 8, shuffle=True, seed=3, drop_last=True)
    average = weights(student)
    torch.manual_seed(3)
    step = 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        student.train()
        for i, batch in enumerate(loader):
            if i // 2 == per_epoch:
                break
            with torch.no_grad():
                targets = teacher.eval()(batch["pixel_values"], True).exit_logits if teacher else None
            result = criterion(student(batch["pixel_values"]).exit_logits, targets, batch["labels"])
            (result.loss / 2).backward()
            if i % 2 == 0:
                continue
            nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step() if step < steps - 1 else None
            step += 1
            share = 0.0 if step == 1 else min(0.9, 1 - step ** (-2 / 3))  # timm's warm-up
            for name, value in student.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - share)
    for name, value in trained.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6, msg=name)


def test_it_learns_and_leaves_both_models_as_promised(data):
    teacher, result = train(data, "ce", epochs=6, lr=0.1)
    assert result.status == "completed"
    assert result.step == result.total_steps == 6 * (len(data.train) // 8)
    assert result.history[-1]["validation"]["accuracy"][-1] > 0.8
    assert result.teacher_exits is None
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4, 5, 6]
    assert set(result.history[0]["train"]["terms"]) == {"ce"}
    before = weights(teacher)
    teacher.train()
    student, result = train(data, "erde", teacher=teacher, epochs=12, lr=0.1)
    assert result.history[-1]["validation"]["accuracy"][-1] > 0.8
    assert result.teacher_exits == [0, 1]
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert_same(before, weights(teacher))
    assert not student.training
    assert "forward" not in student.__dict__
    assert "/" not in str(result.to_dict())


def test_the_validation_is_that_of_the_weights_handed_out(data):
    student, result = train(data, ema_decay=0.9)
    batch = next(iter(BatchLoader(data.validation, 1000)))
    logits = student(batch["pixel_values"], output_all_exits=True).exit_logits
    last = result.history[-1]["validation"]
    assert last["accuracy"] == pytest.approx([(z.argmax(1) == batch["labels"]).float().mean().item() for z in logits])
    assert last["nll"] == pytest.approx([F.cross_entropy(z, batch["labels"]).item() for z in logits], rel=1e-5)


def test_training_accuracy_and_loss_are_sums_over_the_epoch(data):
    seen = []

    class Spy(CELoss):
        def forward(self, *args):
            result = super().forward(*args)
            seen.append((result.loss.item(), [(z.argmax(1) == args[2]).sum().item() for z in args[0]]))
            return result

    _, result = train(data, Spy(), epochs=1, logging_steps=3)
    assert result.history[0]["train"]["loss"] == pytest.approx(sum(loss for loss, _ in seen) / len(seen), rel=1e-6)
    correct = [sum(c[e] for _, c in seen) / (8 * len(seen)) for e in (0, 1)]
    assert result.history[0]["train"]["accuracy"] == pytest.approx(correct)


def test_bf16_trains_in_bf16_and_hands_back_a_float_model(data):
    kinds = set()

    class Probe(TinyExits):
        def forward(self, images, output_all_exits=False):
            kinds.add((self.training, torch.is_autocast_enabled("cpu"), self.stem[0](images).dtype))
            return super().forward(images, output_all_exits)

    student, teacher = Probe(), Probe()
    train(data, "kd", student, teacher, mixed_precision="bf16", max_steps=3, channels_last=True)
    assert kinds == {(True, True, torch.bfloat16), (False, True, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert "forward" not in student.__dict__
    kinds.clear()
    student(torch.zeros(2, 3, 8, 8), output_all_exits=True)
    assert kinds == {(False, False, torch.float32)}


def test_one_process_has_one_precision(data):
    train(data, mixed_precision="bf16", max_steps=1)
    assert Distiller(TinyExits(), data, make_args(mixed_precision=None), "ce").accelerator.mixed_precision == "bf16"
    with pytest.raises(ConfigError, match="'no' was asked for, but this process already runs in 'bf16'"):
        Distiller(TinyExits(), data, make_args(mixed_precision="no"), "ce")
    with pytest.raises(ConfigError, match="'no', the accelerator was built with 'bf16'"):
        Distiller(TinyExits(), data, make_args(mixed_precision="no"), "ce", accelerator=Accelerator())


@pytest.fixture
def wrapped():
    return network(exits=["layer1"], head_kwargs={"dropout": 0.0})


def test_a_frozen_backbone_stays_as_it_is(data, wrapped):
    before = weights(wrapped.backbone)
    heads = weights(wrapped.heads)
    train(data, "ce", wrapped, freeze_backbone=True, max_steps=4, ema_decay=0.5)
    assert_same(before, weights(wrapped.backbone))
    assert any(not torch.equal(heads[name], value) for name, value in wrapped.heads.state_dict().items())


def test_gradient_checkpointing_trains_to_the_same_weights(data, wrapped):
    copy = deepcopy(wrapped)
    expected, _ = train(data, "ce", wrapped, max_steps=3)
    trained, _ = train(data, "ce", copy, max_steps=3, gradient_checkpointing=True)
    assert copy.is_activation_checkpointing
    for name, value in expected.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_plain_module_trains_as_a_static_student(data):
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    _, result = train(data, "ce", student, epochs=4)
    assert result.exit_names == ["classifier"]
    assert result.history[-1]["validation"]["accuracy"][0] > 0.8


def test_max_steps_ends_training_and_schedule(data):
    _, result = train(data, epochs=9, max_steps=14)
    per_epoch = len(data.train) // 8
    assert (result.step, result.total_steps) == (14, 14)
    assert len(result.history) == math.ceil(14 / per_epoch)
    assert result.history[-1]["lr"] < 1e-4


def test_a_stream_trains_and_what_does_not_fill_a_step_is_left_out(tmp_path):
    splits = {"train": rows(96), "validation": rows(12, first_seed=200), "test": rows(12, first_seed=300)}
    folder = write_parquet(tmp_path / "set", splits)
    data = load_image_data(folder, streaming=True, progress=False, cache_dir=tmp_path / "cache")
    data.train.num_samples = None  # as on the Hub, where nobody says how many there are
    with pytest.raises(ConfigError, match="set max_steps"):
        Distiller(TinyExits(), data, make_args(), "ce")
    left = []

    class Gradients(DistillerCallback):
        def on_epoch_end(self, distiller, record):
            left.extend(p.grad for p in distiller.student.parameters())

    settings = {"batch_size": 32, "gradient_accumulation_steps": 2, "max_steps": 9, "epochs": 3}
    _, result = train(data, callbacks=[Gradients()], **settings)
    assert (result.step, len(result.history)) == (3, 3)  # of the three batches of an epoch two fill a step
    assert len(left) > 3
    assert all(gradient is None for gradient in left)


def test_the_loss_hears_of_every_epoch(data):
    heard = []

    class Listens(CELoss):
        def set_epoch(self, epoch, epochs):
            heard.append((epoch, epochs))

    train(data, Listens(), epochs=3)
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_label_smoothing_reaches_the_loss(data):
    loss = ERDELoss()
    Distiller(TinyExits(), data, make_args(label_smoothing=0.2), loss, TinyExits())
    assert loss.label_smoothing == 0.2


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.lines, self.finished = {}, [], 0

    @property
    def tracker(self):
        return self

    @on_main_process
    def store_init_configuration(self, values):
        self.config = values

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))

    @on_main_process
    def finish(self):
        self.finished += 1


def test_trackers_get_numbers_by_name_and_no_paths(data, tmp_path):
    tracker = Recorder()
    accelerator = Accelerator(log_with=[tracker])
    args = make_args(report_to="tensorboard", logging_steps=5, output_dir=str(tmp_path / "run"))
    Distiller(TinyExits(), data, args, "ce", accelerator=accelerator).train()
    assert str(tmp_path) not in str(tracker.config)
    assert tracker.config["batch_size"] == 8
    steps = [step for step, values in tracker.lines if "train/loss" in values]
    assert steps == [5, 10, 15, 16]
    assert {"train/loss", "train/terms/ce", "train/accuracy/early", "lr"} <= tracker.lines[0][1].keys()
    assert any("validation/accuracy/classifier" in values for _, values in tracker.lines)
    assert tracker.finished == 1


def test_a_real_tracker_writes_into_the_run(data, tmp_path):
    train(data, max_steps=3, report_to="tensorboard", output_dir=str(tmp_path / "run"))
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_refused():
    missing = [name for name in ("comet_ml", "aim", "dvclive", "clearml") if importlib.util.find_spec(name) is None]
    with pytest.raises(ConfigError, match=f"{missing[0]}.*pip install"):
        Distiller(TinyExits(), make_data(), make_args(report_to=missing[0]), "ce")


# Stopping and continuing


def full_run(**changes):
    """Dropout, moving average, accumulation and mid-epoch checkpoints: all that a resumed run has to restore."""
    settings = {"epochs": 3, "batch_size": 4, "gradient_accumulation_steps": 3, "ema_decay": 0.9, "checkpoint_steps": 2}
    return settings | {"augment": "crop_flip", "label_smoothing": 0.1, **changes}


@pytest.fixture(scope="module")
def never_stopped(data):
    return train(data, "erde", teacher=TinyExits(seed=9), **full_run())


@pytest.mark.parametrize(
    ("number", "at"),
    [
        ("SIGTERM", 1),
        ("SIGINT", 7),
        pytest.param("SIGINT", 4, marks=pytest.mark.long),
        pytest.param("SIGTERM", 9, marks=pytest.mark.long),
    ],
)
def test_stopped_by_a_signal_and_resumed_it_is_the_run_that_never_stopped(data, tmp_path, never_stopped, number, at):
    teacher = TinyExits(seed=9)
    expected, whole = never_stopped
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    stop = Hook(lambda step: os.kill(os.getpid(), signal.Signals[number]) if step == at else None)
    settings = full_run(output_dir=str(tmp_path / "run"))
    _, result = train(data, "erde", teacher=teacher, callbacks=[stop], **settings)
    assert (result.status, result.step) == ("interrupted", at + 1)
    assert result.checkpoint.name == f"step-{at + 1:06d}"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    settings["resume"] = True
    resumed, again = train(data, "erde", teacher=teacher, **settings)
    assert again.status == "completed"
    assert_same(weights(expected), weights(resumed))
    assert [without_time(entry) for entry in again.history] == [without_time(entry) for entry in whole.history]
    if at == 9:  # a run that is finished stays as it is
        once_more, result = train(data, "erde", teacher=teacher, **settings)
        assert (result.status, result.step) == ("completed", whole.step)
        assert_same(weights(expected), weights(once_more))


def test_a_signal_behind_the_last_step_is_not_lost(data, tmp_path):
    """Whoever trains a teacher and then a student must not go on with the student."""

    class InTheLastValidation(DistillerCallback):
        def on_epoch_end(self, distiller, record):
            if distiller.position.step == distiller.total_steps:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"max_steps": 3, "ema_decay": 0.5, "output_dir": str(tmp_path / "run")}
    stopped, result = train(data, callbacks=[InTheLastValidation()], **settings)
    assert (result.status, result.step) == ("interrupted", 3)
    again, result = train(data, **settings, resume=True)
    assert (result.status, result.step) == ("completed", 3)
    assert_same(weights(stopped), weights(again))


def without_time(entry):
    return {key: value for key, value in entry.items() if key != "seconds"}


def test_a_second_ctrl_c_stops_at_once(data, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("erde_hub.training._launch.time.monotonic", lambda: now[0])

    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)  # a launcher that passes on what the terminal has sent already
        now[0] += 5
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    student = TinyExits()
    with pytest.raises(KeyboardInterrupt):
        train(data, student=student, callbacks=[Hook(twice)])
    assert now[0] == 5.5
    assert signal.getsignal(signal.SIGINT) is before
    assert "forward" not in student.__dict__


def test_without_an_output_dir_a_signal_stops_too(data, caplog):
    _, result = train(data, callbacks=[Hook(lambda step: os.kill(os.getpid(), signal.SIGTERM))])
    assert result.status == "interrupted"
    assert result.checkpoint is None
    assert "SIGTERM" in caplog.text


@pytest.fixture(scope="module")
def two_steps(data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "run")
    train(data, **full_run(output_dir=folder, max_steps=2))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 4},
        {"lr": 0.2},
        {"augment": "none"},
        {"optimizer": "adamw"},
        pytest.param({"seed": 1}, marks=pytest.mark.long),
        pytest.param({"batch_size": 8}, marks=pytest.mark.long),
        pytest.param({"ema_decay": 0.5}, marks=pytest.mark.long),
        pytest.param({"label_smoothing": 0.0}, marks=pytest.mark.long),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(data, two_steps, change):
    settings = full_run(output_dir=two_steps)
    with pytest.raises(ConfigError, match=next(iter(change))) as error:
        train(data, **{**settings, "max_steps": 2, "resume": True, **change})
    assert repr(next(iter(change.values()))) in str(error.value)


def test_resuming_with_another_teacher_loss_data_or_network_is_refused(data, tmp_path):
    settings = full_run(output_dir=str(tmp_path / "run"), max_steps=2)
    train(data, "erde", teacher=TinyExits(seed=9), **settings)
    settings["resume"] = True
    with pytest.raises(ConfigError, match="teacher"):
        train(data, "erde", teacher=TinyExits(seed=8), **settings)
    with pytest.raises(ConfigError, match="loss"):
        train(data, ERDELoss(kl_weight=2.0), teacher=TinyExits(seed=9), **settings)
    with pytest.raises(ConfigError, match="data"):
        train(make_data(seed=1), "erde", teacher=TinyExits(seed=9), **settings)
    with pytest.raises(CheckpointError, match=r"(?s)step-000002 do not fit.*size mismatch for stem\.0\.weight"):
        train(data, "erde", TinyExits(width=4), TinyExits(seed=9), **settings)
    _, result = train(
        data, "erde", teacher=TinyExits(seed=9), **{**settings, "logging_steps": 1, "checkpoint_steps": 0}
    )
    assert result.step == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_kwargs": {"dropout": 0.1}}, r"head_kwargs=\{'dropout': 0.1\}.* was written with"),
        ({"exits": ("layer1", "layer3")}, "exits="),
    ],
)
def test_resuming_with_another_network_of_the_same_shapes_is_refused(data, tmp_path, changes, words):
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    train(data, "ce", network(), **settings)
    with pytest.raises(ConfigError, match=words):
        train(data, "ce", network(**changes), resume=True, **settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "data must come from load_image_data"),
        ({"args": {"epochs": 1}}, r"args must be DistillationArguments\(...\), got dict"),
        ({"loss": None}, "loss must be a key such as 'erde' or an ExitLoss, got None"),
        ({"loss": ERDELoss}, r"write ERDELoss\(\)"),
    ],
)
def test_things_of_another_kind_are_refused(data, changes, words):
    with pytest.raises(InputTypeError, match=words):
        Distiller(**{"student": TinyExits(), "data": data, "args": make_args(), "loss": "ce", **changes})


def test_a_folder_with_a_run_is_refused_before_time_is_lost(data, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 2}
    train(data, **settings)
    with pytest.raises(RunExistsError, match="--resume"):
        Distiller(TinyExits(), data, make_args(**settings), "ce")
    _, result = train(data, **settings, overwrite_output_dir=True, seed=5)
    assert result.step == 2
    with pytest.raises(ConfigError, match="output_dir"):
        Distiller(TinyExits(), data, make_args(resume=True), "ce")


def test_resume_without_a_checkpoint_starts_at_the_beginning(data, tmp_path, caplog):
    _, result = train(data, max_steps=2, resume=True, output_dir=str(tmp_path / "run"))
    assert result.step == 2
    assert "no complete checkpoint" in caplog.text


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(data, tmp_path, monkeypatch):
    settings = full_run(output_dir=str(tmp_path / "run"))

    def fill(step):
        if step == 4:
            monkeypatch.setattr(
                torch, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
            )

    with pytest.raises(CheckpointWriteError, match=r"step-000004.*No space left"):
        train(data, callbacks=[Hook(fill)], **settings)
    monkeypatch.undo()
    expected, _ = train(data, **full_run())
    resumed, _ = train(data, **{**settings, "resume": True})
    assert_same(weights(expected), weights(resumed))


# Losses that are no numbers


class Breaks(CELoss):
    """A cross-entropy whose value at one exit is not a number from one call on."""

    def __init__(self, at, value=float("nan")):
        super().__init__()
        self.calls, self.at, self.value = 0, at, value

    def forward(self, *args):
        result = super().forward(*args)
        self.calls += 1
        if self.calls < self.at:
            return result
        terms = {"ce": result.exit_terms["ce"].clone()}
        terms["ce"][0] = self.value
        return LossResult(result.loss * self.value, result.terms, terms)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_step_exit_and_term(data, tmp_path, value):
    student = TinyExits()
    with pytest.raises(
        NonFiniteLossError, match=rf"became {value} at step 6: term 'ce' of exit 'early'.*step-000004"
    ) as e:
        train(data, Breaks(6, value), student, checkpoint_steps=4, output_dir=str(tmp_path / "run"))
    assert isinstance(e.value, ArithmeticError)
    assert all(p.isfinite().all() for p in student.parameters())
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]


def test_weights_that_are_no_numbers_are_not_saved(data, tmp_path):
    student = TinyExits(dropout=0.0)

    def poison(step):
        if step == 3:
            with torch.no_grad():
                student.classifier.bias[0] = float("nan")

    with pytest.raises(NonFiniteLossError, match=r"classifier\.bias"):
        train(data, "ce", student, callbacks=[Hook(poison)], checkpoint_steps=3, output_dir=str(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


# What is refused before training


class NoSmoothing(ExitLoss):
    needs_teacher = False


def broken_labels():
    data = make_data()
    data.train.labels[5] = 3
    return data


class WithConfig(TinyExits):
    def __init__(self, id2label, input_size=(3, 8, 8)):
        super().__init__()
        self.config = type("Config", (), {"num_labels": 3, "id2label": id2label, "input_size": input_size})


@pytest.mark.parametrize(
    ("error", "says", "build"),
    [
        (ConfigError, "student has 4 classes.*num_classes=3", lambda d: (TinyExits(classes=4), d, {}, "ce", None)),
        (ConfigError, "teacher has 5 classes", lambda d: (TinyExits(), d, {}, "kd", TinyExits(classes=5))),
        (ConfigError, "learns from a teacher", lambda d: (TinyExits(), d, {}, "erde", None)),
        (ConfigError, "does not use a teacher", lambda d: (TinyExits(), d, {}, "ce", TinyExits())),
        (ConfigError, "unknown loss 'erd'.*'erde'", lambda d: (TinyExits(), d, {}, "erd", None)),
        (
            ConfigError,
            "NoSmoothing has none",
            lambda d: (TinyExits(), d, {"label_smoothing": 0.1}, NoSmoothing(), None),
        ),
        (ConfigError, "exit_weights", lambda d: (TinyExits(), d, {}, CELoss(exit_weights=[1.0, 1.0, 1.0]), None)),
        (ConfigError, "teacher", lambda d: (TinyExits(), d, {}, ERDELoss(teacher_exits=[0, 7]), TinyExits())),
        (ConfigError, "gives no batch", lambda d: (TinyExits(), d, {"batch_size": 1000}, "ce", None)),
        (ConfigError, "'fusedsgd' cannot be built", lambda d: (TinyExits(), d, {"optimizer": "fusedsgd"}, "ce", None)),
        (ConfigError, "accumulation", lambda d: (TinyExits(), d, {"gradient_accumulation_steps": 50}, "ce", None)),
        (ConfigError, "freeze_backbone", lambda d: (TinyExits(), d, {"freeze_backbone": True}, "ce", None)),
        (ConfigError, "checkpointing", lambda d: (TinyExits(), d, {"gradient_checkpointing": True}, "ce", None)),
        (LabelError, "label 3 of row 5 in the train split", lambda d: (TinyExits(), broken_labels(), {}, "ce", None)),
        (ConfigError, "fp16", lambda d: (TinyExits(), d, {"mixed_precision": "fp16"}, "ce", None)),
        (
            ConfigError,
            "class 1 is 'grass' for the teacher and 'green'",
            lambda d: (TinyExits(), d, {}, "kd", WithConfig({0: "red", 1: "grass", 2: "blue"})),
        ),
        (
            ConfigError,
            r"student was built for inputs \(3, 9, 9\)",
            lambda d: (WithConfig(dict(enumerate(CLASSES)), (3, 9, 9)), d, {}, "ce", None),
        ),
    ],
)
def test_what_does_not_go_together_is_refused_at_construction(data, error, says, build):
    if "fp16" in says and torch.cuda.is_available():
        pytest.skip("fp16 exists here")
    student, data, changes, loss, teacher = build(data)
    with pytest.raises(error, match=says):
        Distiller(student, data, make_args(**changes), loss, teacher)


def test_teacher_and_student_must_be_two_objects(data):
    student = TinyExits()
    with pytest.raises(ConfigError, match="same object"):
        Distiller(student, data, make_args(), "kd", student)


@pytest.mark.parametrize(("rows", "told"), [(720, 1), (96, 0)])
def test_a_teacher_that_is_wrong_everywhere_and_a_collapsed_exit_are_told(rows, told, caplog):
    class Wrong(TinyExits):
        def forward(self, images, output_all_exits=False):
            darkest = 9.0 * F.one_hot(images.mean((2, 3)).argmin(1), 3)
            return EarlyExitOutput(logits=darkest, exit_logits=(darkest, darkest))

    student = TinyExits()
    nn.init.zeros_(student.early[-1].weight)
    student.early.requires_grad_(False)
    train(make_data(rows), "kd", student=student, teacher=Wrong())
    assert caplog.text.count("so it teaches errors") == 1, "after the first epoch"
    assert caplog.text.count("exit early has collapsed: it is correct on") == told, "after the last"
