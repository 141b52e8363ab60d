"""The steps of recipes: arguments from registries, networks from names, the default threshold, what a folder says."""

import dataclasses
import json

import pytest
import torch

from erde_hub.data.images import load_image_data
from erde_hub.errors import CheckpointError, ConfigError
from erde_hub.evaluation import ExitRecords, route_records
from erde_hub.losses import ERDELoss, list_losses
from erde_hub.policies import create_policy
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common import phases
from erde_hub.scripts.common.arguments import (
    DataArguments,
    ExitArguments,
    StudentArguments,
    TeacherArguments,
    build_loss,
    changed_arguments,
    exit_places,
    loss_arguments_class,
)
from erde_hub.scripts.common.resuming import check_finished
from erde_hub.training import DistillationArguments
from tests.fakes.records import records_of


@pytest.fixture(scope="module")
def data():
    return load_image_data("digits", progress=False)


def make_records(confident_right: int, confident_wrong: int, unsure: int) -> ExitRecords:
    """Two exits, two classes; the first is sure of some samples and wrong about some of these, the last is right."""
    samples = confident_right + confident_wrong + unsure
    labels = torch.zeros(samples, dtype=torch.int64)
    first = torch.zeros(samples, 2)
    # Rising confidence, so that thresholds can cut anywhere; the wrong ones are the least confident.
    first[:, 0] = torch.linspace(0.1, 6, samples)
    wrong = slice(unsure, unsure + confident_wrong)
    first[wrong] = first[wrong].flip(1)
    last = torch.tensor([[8.0, 0.0]]).repeat(samples, 1)
    return records_of(torch.stack([first, last]), labels, cumulative_macs=[10, 100])


def accuracy_loss(records: ExitRecords, threshold: float) -> float:
    _, logits = route_records(records, "entropy", threshold)
    return 1 - (logits.argmax(-1) == records.labels).double().mean().item()


def test_default_threshold_loses_at_most_a_point_with_confidence():
    records = make_records(confident_right=1700, confident_wrong=100, unsure=200)
    choice = recipe.choose_default_threshold(records, create_policy("entropy"))
    assert accuracy_loss(records, choice.threshold) <= 0.01
    assert choice.confidence == 0.9
    assert choice.upper_bound <= 0.01 + 1e-6
    leaving = (route_records(records, "entropy", choice.threshold)[0] == 0).sum()
    assert leaving >= 1650  # nearly everybody about whom the first exit is right leaves there


def test_default_threshold_lowers_the_confidence_on_a_small_split():
    """With a hundred samples a single lost one is more than a point: nobody wrong may leave, and 0.63 is sure."""
    records = make_records(confident_right=60, confident_wrong=20, unsure=20)
    choice = recipe.choose_default_threshold(records, create_policy("entropy"))
    assert accuracy_loss(records, choice.threshold) == 0
    assert choice.confidence == pytest.approx(1 - 0.99**100, abs=1e-6)
    assert choice.saving > 0.3
    few = recipe.choose_default_threshold(make_records(40, 0, 0), create_policy("entropy"))
    assert few.never_exits
    assert few.confidence == 0.5
    assert "69 are needed" in few.advice
    assert recipe.choose_default_threshold(make_records(19, 0, 0), create_policy("entropy")) is None


def test_gains_do_not_hide_losses_on_a_small_split():
    """The first exit loses fifty samples and wins back fifty others: on another split it may win none."""
    records = make_records(confident_right=100, confident_wrong=50, unsure=0)
    logits = records.logits.clone()
    logits[1, 100:] = logits[1, 100:].flip(-1)  # the last exit is wrong where the first one is surest
    records = dataclasses.replace(records, logits=logits)
    choice = recipe.choose_default_threshold(records, create_policy("entropy"))
    right = records.logits.argmax(-1) == records.labels
    index, _ = route_records(records, "entropy", choice.threshold)
    assert not (right[1] & ~right.gather(0, index[None])[0]).any()


@pytest.mark.parametrize("policy", ["confidence", "margin", "patience"])
def test_default_threshold_is_allowed_for_every_policy(policy):
    records = make_records(confident_right=60, confident_wrong=20, unsure=20)
    created = create_policy(policy)
    created.check_threshold(recipe.choose_default_threshold(records, created).threshold, 1)
    assert recipe.choose_default_threshold(records, create_policy("never")) is None


def test_loss_arguments_come_from_the_table():
    arguments = loss_arguments_class()
    fields = {f.name: f for f in dataclasses.fields(arguments)}
    assert {"temperature", "kl_weight", "ce_weight", "entropy_weight", "correctness", "teacher_exits"} <= fields.keys()
    assert not fields.keys() & {f.name for f in dataclasses.fields(DistillationArguments)}
    assert all(f.default is None for f in fields.values())
    text = fields["temperature"].metadata["help"]
    assert "erde: 2" in text
    assert "kd: 4" in text
    assert all("%" not in f.metadata["help"].replace("%%", "") for f in fields.values())
    for name in list_losses():
        build_loss(name, arguments())


def test_loss_gets_what_was_set_and_its_own_defaults_for_the_rest():
    arguments = loss_arguments_class()
    loss = build_loss("erde", arguments(temperature=3.0, exit_weights=["1", "0.5"], teacher_exits=[0, 2]))
    assert isinstance(loss, ERDELoss)
    assert loss.settings() == ERDELoss(temperature=3.0, exit_weights=[1.0, 0.5], teacher_exits=[0, 2]).settings()
    assert build_loss("erde", arguments(exit_weights=["sdn"])).exit_weights == "sdn"
    with pytest.raises(ConfigError, match=r"loss 'kd' has no argument 'entropy_weight'"):
        build_loss("kd", arguments(entropy_weight=0.1))


@pytest.mark.parametrize(
    ("given", "places"),
    [(None, "auto"), (["auto"], "auto"), (["2"], 2), (["layer1"], ["layer1"]), (["a", "b"], ["a", "b"])],
)
def test_exit_places(given, places):
    assert exit_places(given) == places


def test_teacher_training_takes_training_arguments_only():
    args = DistillationArguments(epochs=3, lr=0.1)
    assert changed_arguments("teacher_training", args, {"epochs": 7}) == DistillationArguments(epochs=7, lr=0.1)
    with pytest.raises(ConfigError, match=r"no argument 'epoch'; did you mean 'epochs'"):
        changed_arguments("teacher_training", args, {"epoch": 7})
    with pytest.raises(ConfigError, match=r"no argument 'output_dir'"):
        changed_arguments("teacher_training", args, {"output_dir": "x"})


@pytest.mark.parametrize(
    ("architecture", "kwargs", "message"),
    [
        ("resnet10_cifr", {}, r"no model 'resnet10_cifr'; did you mean 'resnet10_cifar'"),
        ("resnet10_cifar", {"widht": 8}, r"cannot be created with \{'widht': 8\}.*widht.*kwargs and mine\.yaml say"),
        ("resnet10_cifar", {"num_classes": 8}, r"'num_classes' cannot be a creation argument"),
    ],
)
def test_networks_that_cannot_be_built_say_why(data, architecture, kwargs, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill", "--config", "mine.yaml"])
    with pytest.raises(ConfigError, match=message):
        recipe.build_model(architecture, data, ExitArguments(), kwargs=kwargs)


def test_networks_carry_classes_and_preprocessing_of_the_data(data):
    exits = ExitArguments(exits=["layer1"], head="linear", policy="confidence", threshold=[0.7])
    model = recipe.build_model("resnet8_cifar", data, exits, kwargs={"width": 4}, seed=1)
    assert list(model.config.id2label.values()) == data.class_names
    assert model.config.preprocessing["mean"] == pytest.approx(data.mean)
    assert (model.config.head, model.config.policy, model.threshold) == ("linear", "confidence", 0.7)
    again = recipe.build_model("resnet8_cifar", data, exits, kwargs={"width": 4}, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_teacher_has_the_exits_of_the_student_unless_told_otherwise(data):
    exits, args = ExitArguments(exits=["layer2"]), DistillationArguments()
    teacher_args = TeacherArguments(teacher_kwargs={"width": 4}, teacher_architecture="resnet8_cifar")
    assert recipe.TeacherPlan.build(teacher_args, exits, data, args).model.config.exits == ["layer2"]
    teacher_args = dataclasses.replace(teacher_args, teacher_exit_points=["layer1"], teacher_exit_weights=["1", "2"])
    plan = recipe.TeacherPlan.build(teacher_args, exits, data, args)
    assert plan.model.config.exits == ["layer1"]
    assert list(plan.loss.exit_weights) == [1.0, 2.0]


def test_every_data_argument_reaches_the_data(monkeypatch):
    seen = {}
    monkeypatch.setattr(phases, "load_image_data", lambda dataset, **given: seen.update(given, dataset=dataset))
    names = {"dataset_config": "config_name", "image_size": "input_size"}
    of_texts = ("text_column", "max_length", "block_size", "tokenizer_size")  # tests of recipes with texts
    for number, field in enumerate(f for f in dataclasses.fields(DataArguments) if f.name not in of_texts):
        value = "headers" if field.name == "check_images" else f"value {number}"
        recipe.load_data(DataArguments(**{field.name: value}))
        assert seen[names.get(field.name, field.name)] == value


def test_preprocessing_of_weights_reaches_the_data_whole(monkeypatch):
    seen = {}
    monkeypatch.setattr(phases, "load_image_data", lambda _, **given: seen.update(given))
    preprocessing = recipe.pretrained_preprocessing("convnext_atto.d2_in1k")
    squash = preprocessing | {"crop_mode": "squash"}
    recipe.load_data(DataArguments(), squash)
    assert seen["input_size"] == (3, 224, 224)
    assert {key: seen[key] for key in squash if key != "size"} == {key: squash[key] for key in squash if key != "size"}
    with pytest.raises(ConfigError, match="crop_mode must be one of center, squash, got 'border'"):
        recipe.load_data(DataArguments(), preprocessing | {"crop_mode": "border"})
    assert recipe.pretrained_preprocessing("convnext_base.fb_in22k_ft_in1k_384")["crop_mode"] == "squash"


def test_a_network_stores_how_its_data_were_cropped(data):
    own = dataclasses.replace(data, transform=dataclasses.replace(data.transform, crop_mode="squash"))
    model = recipe.build_model("resnet8_cifar", own, ExitArguments(exits=["layer1"]), kwargs={"width": 4})
    assert model.config.preprocessing["crop_mode"] == "squash"


STORED = recipe.settings_dict(
    "digits", DataArguments(), StudentArguments(), ExitArguments(), TeacherArguments(), DistillationArguments()
)


def check(data, changes, role="student", stored=STORED):
    results = {"args": stored, "dataset": {"fingerprint": data.fingerprint}}
    check_finished(results, STORED | changes, data, role)


@pytest.mark.parametrize(
    ("changes", "role", "message"),
    [
        ({"epochs": 2}, "student", r"with epochs=2, .*student.*finished.*epochs=10: continue with --epochs 10"),
        ({"temperature": 3.0}, "student", r"temperature=3\.0.*temperature=None: continue without --temperature"),
        ({"teacher_kwargs": {"width": 8}}, "teacher", r"teacher_kwargs=\{'width': 8\}.*without --teacher_kwargs"),
        ({"teacher_training": {"lr": 0.1}}, "teacher", r"lr=0\.1.*lr=0\.2: continue with --teacher_training lr=0\.2"),
        ({"student_kwargs": {"width": 8}}, "static student", r"student_kwargs"),
        ({"exits": ["layer1"]}, "teacher", r"exits=\['layer1'\]"),
    ],
)
def test_a_finished_network_is_not_handed_out_under_other_settings(data, changes, role, message):
    with pytest.raises(ConfigError, match=message):
        check(data, changes, role)


def test_what_does_not_change_a_finished_network_is_free(data):
    check(data, {"num_workers": 2, "checkpoint_steps": 7, "cpu_threads": 1, "check_images": "none", "config": "x"})
    check(data, {"loss": "kd", "temperature": 3.0, "student_kwargs": {"width": 8}}, "teacher")
    check(data, {"loss": "kd", "teacher_kwargs": {"width": 8}}, "static student")
    apart = STORED | {"teacher_exit_points": ["layer1"], "teacher_training": {"epochs": 10}}
    check(data, {**apart, "exits": ["layer2"], "epochs": 3}, "teacher", stored=apart)
    old = {key: value for key, value in STORED.items() if key not in ("check_images", "train_static", "ema_decay")}
    check(data, {}, stored=old)
    check(data, {"teacher": "runs/a/teacher"}, stored=STORED | {"teacher": "teacher"})
    with pytest.raises(ConfigError, match=r"ema_decay=0\.9.*ema_decay=0\.0"):
        check(data, {"ema_decay": 0.9}, stored=old)
    with pytest.raises(ConfigError, match="other data"):
        check_finished({"args": STORED, "dataset": {"fingerprint": "0"}}, STORED, data)


def test_timm_weights_bring_their_preprocessing():
    found = recipe.pretrained_preprocessing("convnext_atto.d2_in1k")
    assert found["size"] == [224, 224]
    assert found["mean"] == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(ConfigError, match="did you mean 'convnext_atto'"):
        recipe.pretrained_preprocessing("convnext_ato")


def test_folders_without_a_checkpoint_and_other_models_are_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        recipe.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        recipe.load_model(str(tmp_path))
    (tmp_path / "runs" / "digits-1").mkdir(parents=True)
    (tmp_path / "runs" / "digits-1" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no folder '.*digits-2'; did you mean '.*digits-1'\?"):
        recipe.load_model(str(tmp_path / "runs" / "digits-2"))
    with pytest.raises(CheckpointError, match=r"no folder '[^']*nope' \(there are: "):
        recipe.load_model(str(tmp_path / "runs" / "nope"))
    monkeypatch.chdir(tmp_path / "runs" / "digits-1")
    with pytest.raises(CheckpointError, match="there is no folder 'nowhere', and a repository of the Hub is"):
        recipe.load_model("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder 'digits-2'; did you mean 'runs/digits-1'\?"):
        recipe.load_model("digits-2")
    with pytest.raises(CheckpointError, match=r"no folder 'nobody/nothing', and on the Hub .* cannot be loaded"):
        recipe.load_model("nobody/nothing")


def test_a_folder_counts_as_finished_only_with_a_whole_report(tmp_path):
    assert recipe.finished(tmp_path) is None
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "results.json").write_text('{"erde_hub": "0.1.0"')
    assert recipe.finished(tmp_path) is None
