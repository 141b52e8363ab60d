"""A checkpoint that is saved over another one: a kill at any point, and every reader meanwhile, gets one of the two."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline

from erde_hub import EarlyExitWrapper
from erde_hub.errors import CheckpointError
from tests.fakes.kills import run_killed

pytestmark = pytest.mark.usefixtures("quiet_transformers")

THRESHOLDS = {"old": 0.25, "new": 0.75}


def make(name: str, width: int = 4) -> EarlyExitWrapper:
    torch.manual_seed(len(name) + width)
    backbone = timm.create_model("resnet8_cifar", num_classes=4, width=width)
    model = EarlyExitWrapper(backbone, exits=["layer1"], backbone_kwargs={"width": width}, threshold=THRESHOLDS[name])
    model.backbone.conv1.weight.data[0] = THRESHOLDS[name]
    model.set_preprocessing(mean=[0.5] * 3, std=[0.5] * 3, size=[32, 32])
    return model.eval()


@pytest.fixture(scope="module")
def old() -> EarlyExitWrapper:
    return make("old")


@pytest.fixture(scope="module")
def new() -> EarlyExitWrapper:
    return make("new")


def which(folder: Path, load: Callable = EarlyExitWrapper.from_pretrained) -> str:
    """Loads a checkpoint and returns which one it is; its parts must agree."""
    model = load(folder)
    weights, threshold = model.backbone.conv1.weight[0, 0, 0, 0].item(), model.threshold
    assert weights == threshold, f"weights of {weights}, threshold of {threshold}"
    return "old" if threshold == THRESHOLDS["old"] else "new"


FILE, SHARDS = {}, {"max_shard_size": "10KB"}
#: Arguments of older versions, which Accelerate's documentation still passes.
LEGACY = {"safe_serialization": True, "save_function": torch.save}


@pytest.mark.parametrize(
    ("before", "width", "after"),
    [
        pytest.param(FILE, 4, FILE, id="file-file"),
        pytest.param(SHARDS, 8, FILE, id="shards-wider"),
        pytest.param(FILE, 4, SHARDS, id="file-shards"),
        pytest.param(LEGACY, 4, LEGACY, id="legacy", marks=pytest.mark.long),
        pytest.param(SHARDS, 4, FILE, id="shards-file", marks=pytest.mark.long),
        pytest.param(FILE, 8, FILE, id="file-wider", marks=pytest.mark.long),
        pytest.param(SHARDS, 4, SHARDS, id="shards-shards", marks=pytest.mark.long),
    ],
)
def test_a_kill_at_any_point_leaves_one_of_the_two(old, before, width, after, tmp_path):
    model, folder, saved, found, point = make("new", width), tmp_path / "a", tmp_path / "saved", set(), 0
    old.save_pretrained(saved, **before)
    done = False
    while not done:
        point += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        done = run_killed(lambda: model.save_pretrained(folder, **after), point)
        found.add(which(folder))
        if not done and point % 5 == 0:
            old.save_pretrained(folder, **before)
            assert not list(folder.glob(".saving-*")), "the next save removes what is left"
            assert which(folder) == "old"
    assert found == {"old", "new"}
    assert point > 8


def test_after_a_kill_the_auto_classes_load_one_of_the_two_or_say_what_does(old, new, tmp_path):
    folder, saved, found, done, point = tmp_path / "a", tmp_path / "saved", set(), False, 0
    old.save_pretrained(saved)
    while not done:
        point += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        done = run_killed(lambda: new.save_pretrained(folder), point)
        try:
            found.add(which(folder, AutoModelForImageClassification.from_pretrained))
        except CheckpointError as error:
            assert "EarlyExitWrapper.from_pretrained loads what belongs together" in str(error)  # noqa: PT017
            found.add("refused")
    assert found == {"old", "refused", "new"}


@pytest.mark.slow
@pytest.mark.parametrize("after", [FILE, pytest.param(SHARDS, marks=pytest.mark.long)])
def test_after_a_kill_the_image_processor_is_that_of_the_model_or_missing(after, tmp_path):
    model, folder, saved, found, done, point = make("old"), tmp_path / "a", tmp_path / "saved", set(), False, 0
    model.save_pretrained(saved)
    model.set_preprocessing(mean=[0.75] * 3, std=[0.5] * 3, size=[32, 32])
    while not done:
        point += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        done = run_killed(lambda: model.save_pretrained(folder, **after), point)
        try:
            loaded = pipeline("image-classification", model=str(folder))
        except (OSError, ValueError):
            found.add("refused")
            again = EarlyExitWrapper.from_pretrained(folder)
            again.save_pretrained(folder)
            loaded = pipeline("image-classification", model=str(folder))
        assert list(loaded.image_processor.image_mean) == loaded.model.config.preprocessing["mean"]
        found.add(loaded.image_processor.image_mean[0])
    assert found == {0.5, "refused", 0.75}


def read_while_saving(models: list[EarlyExitWrapper], folder: Path, reads: int) -> set[str]:
    models[0].save_pretrained(folder)
    done, failed = threading.Event(), []

    def save() -> None:
        turn = 0
        try:
            while not done.is_set():
                turn += 1
                models[turn % 2].save_pretrained(folder, **({"max_shard_size": "10KB"} if turn % 3 == 0 else {}))
        except Exception as error:  # noqa: BLE001 - shown below
            failed.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        found = {which(folder) for _ in range(reads)}
    finally:
        done.set()
        thread.join()
    assert not failed
    return found


def test_readers_never_mix_two_saves(old, new, tmp_path):
    assert read_while_saving([old, new], tmp_path, 12) <= {"old", "new"}


@pytest.mark.long
def test_readers_never_mix_two_saves_for_long(old, new, tmp_path):
    assert read_while_saving([old, new], tmp_path, 400) == {"old", "new"}


# What belongs together


@pytest.fixture
def torn(old, new, tmp_path) -> Path:
    """The old config with the new weights."""
    old.save_pretrained(tmp_path / "torn")
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "torn")
    return tmp_path / "torn"


def test_weights_of_another_save_come_with_their_own_config(torn, caplog):
    with caplog.at_level(logging.WARNING, "erde_hub"):
        assert which(torn) == "new"
    assert "belongs to other weights" in caplog.text
    assert EarlyExitWrapper.from_pretrained(torn, threshold=0.5).threshold == 0.5
    with pytest.raises(CheckpointError, match="does not belong to the weights"):
        AutoModelForImageClassification.from_pretrained(torn)
    with pytest.raises(ValueError, match=r"EarlyExitWrapper\.from_pretrained loads what belongs together"):
        pipeline("image-classification", model=str(torn))
    EarlyExitWrapper.from_pretrained(torn).save_pretrained(torn)
    assert which(torn, AutoModelForImageClassification.from_pretrained) == "new"


def test_a_config_without_an_id_is_not_taken_for_that_of_weights_with_one(torn, caplog):
    """As an older version wrote it, or somebody by hand: only that in the header is known to belong to the weights."""
    config = json.loads((torn / "config.json").read_text())
    del config["save_id"]
    (torn / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "erde_hub"):
        assert which(torn) == "new"
    assert "belongs to other weights" in caplog.text
    with pytest.raises(CheckpointError, match=r"holds none of theirs.*EarlyExitWrapper\.from_pretrained"):
        AutoModelForImageClassification.from_pretrained(torn)


def test_a_config_that_is_edited_counts(old, tmp_path):
    old.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["save_id"] == config["save_id"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "threshold": 0.5}))
    for load in (EarlyExitWrapper.from_pretrained, AutoModelForImageClassification.from_pretrained):
        assert load(tmp_path).threshold == 0.5


def test_variants_share_a_folder_and_its_config(old, tmp_path):
    old.save_pretrained(tmp_path)
    old.save_pretrained(tmp_path, variant="other")
    for load in (EarlyExitWrapper.from_pretrained, AutoModelForImageClassification.from_pretrained):
        for variant in (None, "other"):
            assert which(tmp_path, partial(load, variant=variant)) == "old"


def test_equal_weights_are_one_save(old, tmp_path):
    for name in "ab":
        old.save_pretrained(tmp_path / name)
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert one == two
    old.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert json.loads((tmp_path / "shards" / "config.json").read_text())["save_id"] == one["save_id"]


class Gathered(torch.Tensor):
    """Stands for tensors that transformers has to gather before it writes them."""


@pytest.mark.parametrize("arguments", [LEGACY, {"token": "a"}, {"max_shard_size": "10KB", "variant": "b"}])
@pytest.mark.parametrize("kind", [torch.Tensor, Gathered])
def test_every_save_marks_what_belongs_together(new, kind, arguments, tmp_path):
    new.save_pretrained(tmp_path, state_dict={k: v.as_subclass(kind) for k, v in new.state_dict().items()}, **arguments)
    config = json.loads((tmp_path / "config.json").read_text())
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["save_id"] == config["save_id"]
    load = partial(EarlyExitWrapper.from_pretrained, variant=arguments.get("variant"))
    assert which(tmp_path, load) == "new"
    config |= {"save_id": "0" * 32, "threshold": THRESHOLDS["old"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert which(tmp_path, load) == "new"


@pytest.mark.parametrize("mark", [None, {"format": "pt"}])
@pytest.mark.parametrize("load", [EarlyExitWrapper, AutoModelForImageClassification])
def test_weights_without_an_id_go_with_a_config_without_one(old, load, mark, tmp_path):
    """As an older version saved them; a config with an id next to them is that of another save."""
    old.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors.new", mark)
    (tmp_path / "model.safetensors.new").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="another program"):
        load.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"save_id": None}))
    assert which(tmp_path, load.from_pretrained) == "old"


def test_shards_of_two_saves(old, new, tmp_path):
    for name, model in (("old", old), ("new", new)):
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
    ours, theirs = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("old", "new"))
    assert not {path.name for path in ours} & {path.name for path in theirs}
    shutil.copy(theirs[0], ours[0])
    with pytest.raises(CheckpointError, match="several saves"):
        EarlyExitWrapper.from_pretrained(tmp_path / "old")
    ours[0].unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        EarlyExitWrapper.from_pretrained(tmp_path / "old")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "", "model.bin", 3])
def test_an_index_leads_nowhere_else(old, name, tmp_path):
    old.save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"heads.0.fc.weight": name}}))
    with pytest.raises(CheckpointError, match="must name files of weights next to it"):
        EarlyExitWrapper.from_pretrained(tmp_path)
