"""recipes/export_onnx.py."""

import sys

import export_onnx as recipe
import onnx
import onnx_ir as ir
import pytest
from onnx_fakes import build

from erde_hub.errors import ConfigError, ThresholdError
from erde_hub.export import EarlyExitSession, flat


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
    assert "6 random images" in printed
    assert printed.count("100.0%      100.0%") == 2


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
    with pytest.raises(ThresholdError, match=r"threshold -1\.0 is not allowed"):
        call("--thresholds", "0.5", "-1")
    assert not list(tmp_path.iterdir())
