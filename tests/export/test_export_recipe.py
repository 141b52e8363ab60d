"""recipes/export_onnx.py."""

import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from erde_hub.errors import ConfigError, ThresholdError
from erde_hub.export import EarlyExitSession, flat
from erde_hub.scripts import export_onnx as recipe
from erde_hub.scripts.common.patterns import coarse_patterns
from tests.fakes.onnx_models import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = build("resnet10_cifar", 32, {"width": 4}, ["layer1", "layer2"])
    model.set_preprocessing(mean=(0.3,) * 3, std=(0.4,) * 3, size=(32, 32))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flat_bytes(checkpoint):
    return ir.to_proto(flat.flat_model(recipe.recipe.load_model(str(checkpoint)), 20)).SerializeToString()


@pytest.fixture
def call(monkeypatch, tmp_path, checkpoint, flat_bytes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flat, "flat_model", lambda *_: ir.from_proto(onnx.load_from_string(flat_bytes)))

    def _call(*flags):
        command = ["export_onnx.py", "--model", str(checkpoint), "--cpu_threads", "1", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        recipe.main()

    return _call


def test_float_against_random_images(call, tmp_path, capsys):
    call("--output", "float.onnx", "--verify", "6", "--thresholds", "0", "1.5")
    printed = capsys.readouterr().out
    assert EarlyExitSession(tmp_path / "float.onnx").info.exit_names == ["layer1", "layer2", "classifier"]
    assert "float.onnx: 0." in printed
    assert "classifier           2" in printed
    assert "6 random patterns" in printed
    assert printed.count("100.0%      100.0%") == 2
    assert "0 0 6" in printed, "where they leave at threshold 0"


def test_the_printed_lines_run(call, capsys):
    call("--output", "my file.onnx")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert "file names, PIL images, uint8 (N, H, W, 3) or normalised floats (N, 3, 32, 32)" in lines[1]
    for images in (np.zeros((2, 40, 50, 3), np.uint8), np.zeros((2, 3, 32, 32), np.float32)):
        names = {"images": images}
        exec("\n".join(line.strip() for line in lines), names)
        assert names["out"].logits.shape == (2, 10)


def test_patterns_differ_to_the_exits():
    """White noise is the same to a network from image to image, and a comparison on it shows little."""
    patterns = coarse_patterns(12, (3, 32, 32))
    assert torch.equal(patterns, coarse_patterns(12, (3, 32, 32)))
    coarse = torch.nn.functional.avg_pool2d(patterns, 4)
    assert coarse.std((1, 2, 3)).max() > 2 * coarse.std((1, 2, 3)).min()


def test_a_misspelt_flag_is_named(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--modle", "runs/digits-1")
    assert ended.value.code == 2
    assert "export_onnx.py: error: unknown argument '--modle'; did you mean '--model'?" in capsys.readouterr().err


def test_int8_against_images(call, tmp_path, capsys):
    call("--output", "int8.onnx", "--int8", "--dataset", "digits", "--calibration_samples", "32", "--verify", "24")
    printed = capsys.readouterr().out
    assert EarlyExitSession(tmp_path / "int8.onnx").info.quantization == "int8"
    assert "24 test images of digits" in printed
    assert "model right  file right" in printed


def test_refusals_come_first(call, tmp_path):
    with pytest.raises(ConfigError, match="--int8 needs --dataset"):
        call("--int8")
    with pytest.raises(ConfigError, match="at least 0, got 256, -1 and 1"):
        call("--verify", "-1")
    with pytest.raises(ConfigError, match="--calibration_method entropy is for --int8, which is not given"):
        call("--calibration_method", "entropy")
    with pytest.raises(ConfigError, match="--max_train_samples is not for this recipe: --calibration_samples says"):
        call("--max_train_samples", "9", "--dataset", "digits")
    with pytest.raises(ConfigError, match="--max_eval_samples is not for this recipe: --verify says"):
        call("--max_eval_samples", "9", "--dataset", "digits")
    with pytest.raises(ThresholdError, match=r"threshold -1\.0 is not allowed"):
        call("--thresholds", "0.5", "-1")
    assert not list(tmp_path.iterdir())
