"""What was trained from Python answers the same in a pipeline: preprocessing and class names are those of the data."""

from __future__ import annotations

import re
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from erde_hub.data import BatchLoader, load_image_data
from erde_hub.evaluation import collect_exit_records, sweep_thresholds
from erde_hub.training import Distiller, adopt_data
from tests.fakes.networks import resnet8
from tests.fakes.training import CLASSES, TinyExits, make_args, make_data, network

ROOT = Path(__file__).parents[2]
README, TRAINED_ON_DIGITS = ROOT / "README.md", ROOT / "erde_hub" / "scripts" / "playground" / "digits"


@pytest.fixture
def photographs(tmp_path):
    """Dark JPEGs of several sizes whose classes differ by little."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 8), ("test", 20)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "photographs" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (100 + number % 3 * 10, 110, 3))
                pixels[..., label] += 30
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg")
    return load_image_data(tmp_path / "photographs", input_size=24, progress=False)


def check_served(student, data, folder):
    """A pipeline of the saved student is as accurate as its records, which is better than guessing."""
    student.save_pretrained(folder)
    served = pipeline("image-classification", model=str(folder))
    records = collect_exit_records(student, BatchLoader(data.test, batch_size=64))
    (row,) = sweep_thresholds(records, [student.threshold])
    answers = [answer[0]["label"] for answer in served(data.test.images(range(len(data.test))))]
    expected = [data.class_names[label] for label in data.test.labels]
    accuracy = np.mean([given == label for given, label in zip(answers, expected, strict=True)])
    assert accuracy == pytest.approx(row["accuracy"], abs=1 / len(expected))
    assert accuracy > 1.3 / data.num_classes


def test_a_pipeline_is_as_accurate_as_the_records(photographs, tmp_path):
    student = resnet8(photographs.num_classes, 8, photographs.input_size[1], ("layer1", "layer2"))
    assert set(student.config.preprocessing["mean"]).isdisjoint(photographs.mean)
    Distiller(student, photographs, make_args(epochs=4, batch_size=16, lr=0.05), "ce").train()
    check_served(student, photographs, tmp_path / "saved")


@pytest.mark.long
def test_what_the_readme_trains_is_served_as_it_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    imports, (training,) = blocks[0].partition("\n\n")[0], [block for block in blocks if "train()" in block]
    shutil.copytree(TRAINED_ON_DIGITS, "runs/digits-1/teacher")
    names: dict = {}
    exec(compile(f"{imports}\n{training}", README, "exec"), names)
    check_served(names["student"], names["data"], tmp_path / "saved")


def test_names_and_preprocessing_of_the_data_are_stored():
    data = make_data()
    model = resnet8(3, 4, 8, ("layer1",))
    adopt_data(model, data)
    assert model.config.preprocessing["mean"] == list(data.mean)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {name: index for index, name in enumerate(CLASSES)}
    before = deepcopy(vars(plain := TinyExits()))
    adopt_data(plain, data)
    assert vars(plain).keys() == before.keys()


def test_a_frozen_backbone_that_expects_other_images_is_told(caplog):
    data, model = make_data(), network()
    model.set_preprocessing(**(data.preprocessing | {"mean": [0.1, 0.2, 0.3]}))
    Distiller(model, data, make_args(freeze_backbone=True), "ce")
    assert "frozen and was made for images of mean [0.1, 0.2, 0.3]" in caplog.text
    caplog.clear()
    Distiller(network(), data, make_args(), "ce")
    Distiller(model, data, make_args(freeze_backbone=True), "ce")  # has the mean of the data by now
    assert not caplog.text


def test_a_teacher_gets_images_as_it_knows_them(caplog):
    """A teacher with another mean and std teaches the same as one whose first layer has taken the change over."""
    data = make_data()
    changed = data.preprocessing | {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.1]}
    student, teacher = network(), network(seed=1)
    teacher.set_preprocessing(**changed)
    distiller = Distiller(student, data, make_args(), "kd", teacher)
    assert "the teacher was trained on images of mean [0.3, 0.4, 0.5]" in caplog.text
    batch = next(iter(BatchLoader(data.train, 8)))
    pixels = torch.from_numpy(data.train.pixels(np.arange(8))).permute(0, 3, 1, 2) / 255
    own = (pixels - torch.tensor(changed["mean"]).view(3, 1, 1)) / torch.tensor(changed["std"]).view(3, 1, 1)
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    distiller.training_step(student.train(), batch)
    torch.testing.assert_close(seen[0], own)

    caplog.clear()
    teacher.set_preprocessing(**data.preprocessing)
    distiller = Distiller(student, data, make_args(), "kd", teacher)
    distiller.training_step(student.train(), batch)
    assert torch.equal(seen[-1], batch["pixel_values"])
    assert not caplog.text


def test_training_leaves_the_teachers_config_alone():
    data, teacher = make_data(), network(seed=1)
    before = teacher.config.to_dict()
    Distiller(network(), data, make_args(epochs=1), "kd", teacher).train()
    assert teacher.config.to_dict() == before
