"""What the scripts print: what the data are, and what can follow."""

import dataclasses

import pytest

from erde_hub.data import load_image_data
from erde_hub.scripts.common import describe_data, how_to_load
from tests.fakes.images import rows, write_parquet


@pytest.mark.parametrize(("side", "image_size", "said"), [(128, None, True), (128, 112, False), (300, None, False)])
def test_images_are_not_enlarged_without_a_word(tmp_path, side, image_size, said):
    write_parquet(tmp_path / "images", {"train": rows(30, size=(side, side)), "test": rows(6, size=(side, side))})
    data = load_image_data(tmp_path / "images", input_size=image_size, cache_dir=tmp_path / "cache", progress=False)
    text = describe_data(data)
    assert ("the images are smaller (128x128) and are enlarged; --image_size 128" in text) is said
    assert text.startswith("data: images, ")
    files = {"seen": 9, "used": 6, "left_out": {"hidden": 1, "no image": 2}}
    assert "; 6 of 9 files are used (left out: 2 no image)" in describe_data(dataclasses.replace(data, files=files))


def test_three_commands_that_can_follow(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    *_, first, second, third = how_to_load(tmp_path).splitlines()
    assert first.split() == ["erde-hub", "demo", "--model", str(tmp_path)]
    assert second.split()[:4] == ["erde-hub", "calibrate", "--model", str(tmp_path)]
    assert third.split()[:4] == ["erde-hub", "export", "--model", str(tmp_path)]
    assert "--dataset" not in "".join((second, *how_to_load(tmp_path, "digits").splitlines()[-2:]))
    named = how_to_load(tmp_path, f"{tmp_path}").splitlines()[-2]
    assert named.endswith(f"--max_accuracy_drop 0.02 --dataset {tmp_path}"), "a folder must be named again"
    (tmp_path / "tokenizer_config.json").touch()
    assert how_to_load(tmp_path).splitlines()[-1].split()[:2] == ["erde-hub", "push"]
    (tmp_path / "config.json").write_text('{"task": "causal_lm"}')
    commands = [line.split()[1] for line in how_to_load(tmp_path).splitlines() if "erde-hub" in line]
    assert commands == ["evaluate", "push"], "demo, calibrate and export are for classifiers"
