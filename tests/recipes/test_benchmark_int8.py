"""Float and int8 side by side, as the command measures them."""

from __future__ import annotations

import json

import pytest
import timm
from benchmarks import int8
from pages import speed

import erde_hub.backbones.cifar_resnet  # noqa: F401 - registers resnet*_cifar
from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError


@pytest.mark.long
def test_both_files_answer_the_same_images(tmp_path, call):
    backbone = timm.create_model("resnet8_cifar", width=8, num_classes=10)
    model = EarlyExitWrapper(backbone, exits=["layer1"], threshold=2.3, backbone_kwargs={"width": 8})
    model.eval().save_pretrained(tmp_path / "model")
    output = tmp_path / "new" / "int8.json"
    flags = ["--calibration_samples", "32", "--max_eval_samples", "40", "--timed_images", "2", "--rounds", "2"]
    call(int8, "--model", tmp_path / "model", *flags, "--output", output)
    results = json.loads(output.read_text())
    entry = results["models"]["model"]
    never, stored = entry["rows"]
    assert (never["threshold"], stored["threshold"], entry["test_images"]) == (0.0, 2.3, 40)
    for kind in ("float", "int8"):
        assert never[kind]["shares"] == [0, 1]
        assert stored[kind]["mean_macs"] < never[kind]["mean_macs"]
        assert never[kind]["ms_per_image"]["median"] > 0
    assert abs(never["int8"]["accuracy"] - never["float"]["accuracy"]) <= 0.2
    assert entry["bytes"]["int8"] < entry["bytes"]["float"]
    assert speed.int8_table(results).count("model") >= 2
    assert str(tmp_path) not in output.read_text()


def test_numbers_are_checked(tmp_path, call):
    with pytest.raises(ConfigError, match="rounds must be at least 1, got 0"):
        call(int8, "--model", str(tmp_path), "--rounds", "0")
