"""What a run left says about its data: found again where no data set is named, and rows that were trained on."""

import dataclasses
import json

import pytest
import torch

from erde_hub.calibration import check_calibration_data
from erde_hub.errors import ConfigError, DataError
from erde_hub.evaluation import ExitRecords, save_results
from erde_hub.training import recipe
from erde_hub.training.data import load_image_data
from erde_hub.training.recipe import run_data, steps
from erde_hub.training.recipe_arguments import TrainedDataArguments


@pytest.fixture(scope="module")
def data():
    return load_image_data("digits", progress=False)


def leave_report(folder, name="digits", fingerprint=None, **args):
    row = {"threshold": 0.1, "accuracy": 0.9, "mean_macs": 1.0, "exit_share": [1.0]}
    results = {
        "erde_hub": "0.1.0",
        "args": args,
        "student": {"architecture": "small", "exits": [], "macs": 1, "accuracy": 0.9},
        "dataset": {"name": name, "num_classes": 10, "fingerprint": fingerprint},
        "per_exit": [{"exit": "classifier", "accuracy": 0.9, "macs": 1}],
        "sweep": [row],
    }
    save_results(results, folder / "results.json")


def make_records(data, split, rows=None, **info):
    part = getattr(data, split)
    index = part.indices if rows is None else rows
    labels = torch.arange(len(index)) % 10
    told = {"fingerprint": data.fingerprint, "split": split, "source": data.split_info[split]["source"], **info}
    return ExitRecords(
        torch.zeros(2, len(index), 10),
        labels,
        index,
        ["a", "classifier"],
        [1, 2],
        [str(k) for k in range(10)],
        info=told,
    )


def test_the_data_of_a_run_are_found_again(tmp_path, data):
    leave_report(tmp_path, fingerprint=data.fingerprint)
    assert recipe.load_data_of(str(tmp_path), TrainedDataArguments(), progress=False).fingerprint == data.fingerprint
    leave_report(tmp_path, fingerprint="another")
    with pytest.raises(DataError, match=r"has changed since; give --dataset digits to use it all the same"):
        recipe.load_data_of(str(tmp_path), TrainedDataArguments(), progress=False)
    named = TrainedDataArguments(dataset="digits")
    assert recipe.load_data_of(str(tmp_path), named, progress=False).fingerprint == data.fingerprint


def test_columns_of_the_run_come_with_its_data_set(tmp_path):
    leave_report(tmp_path, "org/set", "f", dataset_config="small", label_column="fine", image_column="img")
    found, fingerprint = run_data.data_of_run(str(tmp_path), TrainedDataArguments(label_column="coarse"))
    assert (found.dataset, found.dataset_config, found.image_column) == ("org/set", "small", "img")
    assert found.label_column == "coarse"
    assert fingerprint == "f"
    asked = TrainedDataArguments(dataset="other")
    assert run_data.data_of_run(str(tmp_path), asked) == (asked, None)


def test_data_that_cannot_be_found_again_have_to_be_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--dataset is needed: .* has no results\.json"):
        steps.load_data_of(str(tmp_path), TrainedDataArguments())
    leave_report(tmp_path, "my_photos")
    with pytest.raises(ConfigError, match=r"was trained on 'my_photos', a folder, .* give --dataset FOLDER"):
        steps.load_data_of(str(tmp_path), TrainedDataArguments())


def test_rows_that_were_trained_on_are_recognised_by_their_number(tmp_path, data):
    assert recipe.rows_trained_on(str(tmp_path), make_records(data, "validation")) is None
    data.save_split(tmp_path / "split.json")
    for split in ("validation", "test"):
        assert len(recipe.rows_trained_on(str(tmp_path), make_records(data, split))) == 0
    seen = data.train.indices[:3]
    mixed = make_records(data, "validation", torch.cat([data.validation.indices, seen]))
    found = recipe.rows_trained_on(str(tmp_path), mixed)
    assert found.tolist() == seen.tolist()
    with pytest.raises(DataError, match=f"3 of 147 samples were trained on .the first has index {int(seen[0])}"):
        check_calibration_data(mixed, found)
    assert recipe.rows_trained_on(str(tmp_path), dataclasses.replace(mixed, info={"fingerprint": "other"})) is None
    elsewhere = dataclasses.replace(mixed, info={**mixed.info, "source": "test"})
    assert len(recipe.rows_trained_on(str(tmp_path), elsewhere)) == 0


def test_the_stored_threshold_has_one_row_in_the_table(tmp_path):
    leave_report(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [
        {"threshold": t, "accuracy": 0.9, "mean_macs": 2.0, "exit_share": s}
        for t, s in ((0.5, [1.0, 0.0]), (1.0, [0.0, 1.0]), ("inf", [0.0, 1.0]))
    ]
    results["per_exit"] = [{"exit": name, "accuracy": 0.9, "macs": 2} for name in ("a", "classifier")]
    results["student"]["policy"] = "confidence"

    def first_column(point):
        text = recipe.format_results({**results, "sweep": rows, "operating_point": point})
        return [line.split("  ")[0].strip() for line in text.split("\n\n")[1].splitlines()[2:]]

    assert first_column(None) == ["0.5", "1", "never"]
    assert first_column(rows[0]) == ["0.5 *", "1", "never"]
    assert first_column({**rows[2], "threshold": 2.0}) == ["0.5", "1", "2 *"]
    assert first_column({**rows[0], "threshold": 0.7, "exit_share": [0.5, 0.5]}) == ["0.5", "0.7 *", "1", "never"]
    results["threshold_choice"] = {"split": "validation", "samples": 1000, "confidence": 0.9, "bound": 0.03}
    text = recipe.format_results({**results, "sweep": rows, "operating_point": rows[0]})
    assert "chosen on 1,000 validation samples to lose at most 3 points of accuracy with 90 % confidence" in text
