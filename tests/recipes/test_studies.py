"""The studies run from end to end for a few steps, and continue bit by bit after a kill."""

import importlib
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch

from erde_hub import EarlyExitWrapper

pytestmark = pytest.mark.slow
STUDIES = Path(__file__).parents[2] / "recipes" / "studies"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """240 training and 30 test images of noise in 3 classes, as a folder that looks like CIFAR's."""
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for split, number in {"train": 240, "test": 30}.items():
        pixels = generator.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        columns = {"img": list(pixels), "label": [n % 3 for n in range(number)]}
        features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["no", "perhaps", "yes"]))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def run(images, monkeypatch):
    """Runs a study as the command line does, and returns its result files."""
    monkeypatch.syspath_prepend(STUDIES)
    monkeypatch.setattr(importlib.import_module("_study"), "share_cores", lambda: None)

    def run(module, output, *arguments):
        given = [str(argument) for argument in ("study.py", *arguments, "--dataset", images, "--output", output)]
        monkeypatch.setattr(sys, "argv", given)
        importlib.import_module(module).main()
        return [json.loads(file.read_text()) for file in sorted(output.glob("*/result.json"))]

    return run


@pytest.mark.long
def test_ladder_of_losses_continues_after_a_kill(run, tmp_path, monkeypatch):
    study = importlib.import_module("_study")
    arguments = ("--methods", "ce", "erde", "--max-steps", 3, "--epochs", 3, "--teacher-epochs", 3, "--width", 8)
    (whole,) = run("erde_board", tmp_path / "whole", *arguments)

    class Killed(KeyboardInterrupt):
        pass

    saved, save = [], study.save

    def save_or_die(path, state):
        save(path, state)
        if "seed0" in path.parent.name and path.name == "checkpoint.pt":
            saved.append(state["step"])
            if len(saved) == 2:
                raise Killed

    monkeypatch.setattr(study, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(study, "save", save_or_die)
    with pytest.raises(Killed):
        run("erde_board", tmp_path / "killed", *arguments)
    (continued,) = run("erde_board", tmp_path / "killed", *arguments)
    assert saved == [1, 2, 3]  # the second call went on where the first one was killed
    students = [torch.load(next(tmp_path.glob(f"{name}/*_seed0/students.pt"))) for name in ("whole", "killed")]
    assert students[0].keys() == {"ce", "erde"}
    for name, weights in students[0].items():
        assert all(torch.equal(tensor, students[1][name][key]) for key, tensor in weights.items()), name
    assert whole["methods"] == continued["methods"]
    assert whole["methods"].keys() == {"teacher", "ce", "erde"}
    assert whole["arguments"]["output"] == "whole"  # no path


@pytest.mark.long
def test_exits_on_a_pretrained_network(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    board = importlib.import_module("pretrained_board")
    torch.manual_seed(0)
    monkeypatch.setattr(
        board, "pretrained_network", lambda classes: timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    )
    monkeypatch.setattr(board, "PLACES", ["blocks.2.1", "blocks.3.2", "blocks.5.1", "blocks.6.0"])
    size = ("--size", 64, "--max-steps", 2)
    (frozen,) = run("pretrained_board", tmp_path / "frozen", "frozen", "--epochs", 1, *size)
    assert {row["place"] for row in frozen["places"]} == {*board.PLACES, "classifier"}
    for kind in (("--exits", "blocks.3.2"), ("--exits", "none"), ("--truncate", "blocks.3.2")):
        trained = run("pretrained_board", tmp_path / "runs", "finetune", *kind, *size)
    results = [frozen, *trained]
    frozen, exits, plain, cut = (result["per_exit"] for result in results)
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoint")
    saved = EarlyExitWrapper.from_pretrained(checkpoint)
    assert saved.config.id2label[1] == "perhaps"
    assert saved.threshold == results[1]["points"]["one point lost, promised at 90 %"]["threshold"]
    assert saved.config.preprocessing["size"] == [64, 64]
    assert [row["exit"] for row in exits] == ["blocks.3.2", "classifier"]
    # The same network up to the same place costs the same; exits cost a little on top.
    assert cut[0]["macs"] == exits[0]["macs"] < plain[0]["macs"] < exits[1]["macs"] < 1.01 * plain[0]["macs"]
    assert results[0]["full_macs"] == plain[0]["macs"]
    for result in results[:2]:
        for point in result["points"].values():
            assert sum(point["test"]["exit_share"]) == pytest.approx(1)
            assert result["per_exit"][0]["macs"] <= point["test"]["mean_macs"] <= result["per_exit"][-1]["macs"]
    # Side by side, image for image: whoever alone is right makes the difference in accuracy.
    run("pretrained_board", tmp_path / "runs", "compare")
    (file,) = (tmp_path / "runs").glob("compared_*.json")
    pairs = json.loads(file.read_text())["pairs"]
    statics = {"_plain_": plain, "_until_": cut}
    assert len(pairs) == 2 * len(results[1]["points"])
    for pair in pairs:
        (static,) = (rows for kind, rows in statics.items() if kind in pair["static"])
        routed = results[1]["points"][pair["point"]]["test"]["accuracy"]
        gain = (pair["only_right"]["routed"] - pair["only_right"]["static"]) / 30
        assert gain == pytest.approx(routed - static[-1]["accuracy"], abs=1e-5)


def test_calibrators_are_compared_at_equal_budgets_with_their_cost(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    torch.manual_seed(0)
    noise = {split: (torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8), torch.arange(60) % 7)
             for split in ("train", "validation", "test")}  # fmt: skip
    monkeypatch.setattr(importlib.import_module("calibrated_exits"), "load_images", lambda *_: dict(noise))
    backbone = timm.create_model("resnet8_cifar", num_classes=7, width=8)
    model = EarlyExitWrapper(backbone, exits=["layer1", "layer2"], head="linear", backbone_kwargs={"width": 8})
    model.save_pretrained(tmp_path / "model")
    run("calibrated_exits", tmp_path / "out", "--model", tmp_path / "model", "--size", 32)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    found = result["calibrators"]
    assert list(found) == ["none", "laplace", "mie", "laplace + mie"]
    assert [row["added_macs"] > 0 for row in found.values()] == [False, True, False, True]
    assert result["arguments"]["model"] == "model", "no path"
    for row in found.values():
        assert [own["exit"] for own in row["per_exit"]] == ["layer1", "layer2", "classifier"]
        for point in row["points"]:
            assert point["mean_macs"] <= 1.25 * point["budget"] * result["full_macs"]  # chosen on other images
