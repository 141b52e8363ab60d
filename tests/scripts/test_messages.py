"""What the scripts print: what the data are, and what can follow."""

import dataclasses
import os
import sys

import pytest
import torch

from erde_hub.data import load_image_data
from erde_hub.scripts.common import describe_data, describe_load, how_to_load
from erde_hub.scripts.common.messages import resume_command
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


def test_the_command_that_continues_a_run_is_whole(monkeypatch):
    flags = ["--lr", "0.1", "--resume", "--student_kwargs", "width=4", "a b=1", "--output-dir=old"]
    monkeypatch.setattr(sys, "argv", ["erde-hub distill", *flags, "--overwrite_output_dir"])
    kept = "--lr 0.1 --student_kwargs width=4 'a b=1'"
    assert resume_command("runs/digits-2") == f"erde-hub distill {kept} --resume --output_dir runs/digits-2"
    assert resume_command() == f"erde-hub distill {kept} --output-dir=old --resume"
    monkeypatch.setattr(sys, "argv", ["recipes/distill.py"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "recipes/distill.py"])
    assert resume_command() == ".venv/bin/python recipes/distill.py --resume"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert resume_command() == "accelerate launch recipes/distill.py --resume"


@pytest.mark.parametrize(("load", "threads", "said"), [(14.2, 2, True), (14.2, 1, False), (1.5, 2, False)])
def test_a_busy_machine_is_told_before_a_training(monkeypatch, load, threads, said):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    line = describe_load(torch.device("cpu"))
    assert ("its load is 14.2 on 2 cores" in line and "--cpu_threads 1" in line) is said
    assert bool(line) is said
    assert describe_load(torch.device("cuda")) == ""
