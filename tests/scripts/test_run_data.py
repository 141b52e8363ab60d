"""What a run left says about its data: found again where no data set is named, and rows that were trained on."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from _rotated import rotated_images
from PIL import Image

from erde_hub.calibration import check_calibration_data
from erde_hub.data.images import load_image_data
from erde_hub.data.texts import TextSplit
from erde_hub.errors import ConfigError, DataError
from erde_hub.evaluation import save_results
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common import phases, run_data
from erde_hub.scripts.common.arguments import TrainedDataArguments
from tests.fakes.records import records_of
from tests.fakes.texts import make_tokenizer


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
    return records_of(torch.zeros(2, len(index), 10), labels, index=index, info=told)


def test_the_data_of_a_run_are_found_again(tmp_path, data):
    leave_report(tmp_path, fingerprint=data.fingerprint)
    assert recipe.load_data_of(str(tmp_path), TrainedDataArguments(), progress=False).fingerprint == data.fingerprint
    leave_report(tmp_path, fingerprint="another")
    with pytest.raises(DataError, match=r"has changed since; give --dataset digits to use it all the same"):
        recipe.load_data_of(str(tmp_path), TrainedDataArguments(), progress=False)
    assert recipe.is_other_data(data, str(tmp_path))
    leave_report(tmp_path, fingerprint=data.fingerprint)
    assert not recipe.is_other_data(data, str(tmp_path))
    (tmp_path / "results.json").write_text("{")
    assert recipe.is_other_data(data, str(tmp_path))
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
        phases.load_data_of(str(tmp_path), TrainedDataArguments())
    leave_report(tmp_path, "my_photos")
    with pytest.raises(ConfigError, match=r"was trained on 'my_photos', a folder, .* give --dataset FOLDER"):
        phases.load_data_of(str(tmp_path), TrainedDataArguments())


def test_rows_that_were_trained_on_are_recognised_by_their_number(tmp_path, data):
    assert recipe.rows_trained_on(str(tmp_path), make_records(data, "validation")) is None
    data.save_split(tmp_path / "split.json")
    for split in ("validation", "test"):
        assert len(recipe.rows_trained_on(str(tmp_path), make_records(data, split))) == 0
    seen = data.train.indices[:3]
    mixed = make_records(data, "validation", torch.cat([data.validation.indices, seen]))
    found = recipe.rows_trained_on(str(tmp_path), mixed)
    assert found.tolist() == seen.tolist()
    with pytest.raises(DataError, match=f"3 of 147 samples were trained on .index {int(seen[0])}, "):
        check_calibration_data(mixed, found)
    assert recipe.rows_trained_on(str(tmp_path), dataclasses.replace(mixed, info={"fingerprint": "other"})) is None
    elsewhere = dataclasses.replace(mixed, info={**mixed.info, "source": "test"})
    assert len(recipe.rows_trained_on(str(tmp_path), elsewhere)) == 0


def save_images(folder, pixels, labels):
    for row, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        place = folder / "train" / str(label) / f"{row:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return load_image_data(folder, progress=False, cache_dir=folder.parent / f"{folder.name}_cache")


def test_images_that_were_trained_on_are_recognised_in_another_folder_and_order(tmp_path, data):
    recipe.run_data.save_trained_on(data, tmp_path)
    assert (tmp_path / "trained_on.safetensors").stat().st_size < 8 * len(data.train) + 500
    train, test = (part.pixels(np.arange(60)) for part in (data.train, data.test))
    labels = np.tile(np.arange(10), 6)
    for images, known in ((train[::-1], True), (test, False)):
        other = save_images(tmp_path / str(known), images, labels)
        assert other.fingerprint != data.fingerprint
        for split in ("train", "validation"):
            records = make_records(other, split)
            assert recipe.rows_trained_on(str(tmp_path), records) is None, "by number nothing is known"
            found = recipe.rows_trained_on(str(tmp_path), records, getattr(other, split))
            assert found.tolist() == (records.index.tolist() if known else [])
    records = make_records(data, "validation")
    with pytest.raises(DataError, match=r"144 of 144 samples were trained on .index \d+, \d+, \d+, \d+, \d+, \.\.\.."):
        check_calibration_data(records, records.index)
    (tmp_path / "trained_on.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"trained_on\.safetensors of .* is damaged"):
        recipe.rows_trained_on(str(tmp_path), records, other.validation)


def test_large_images_texts_and_turned_images_are_known_by_what_they_hold(tmp_path, data):
    pixels = torch.randint(
        256, (12, 110, 100, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).numpy()
    labels = torch.arange(12) % 2
    first = save_images(tmp_path / "first", pixels, labels.numpy())
    second = save_images(tmp_path / "second", pixels[::-1], labels.numpy())
    assert type(first.train).__name__ == "EncodedSplit"
    held = [
        np.concatenate([getattr(d, s).content_hashes() for s in ("train", "validation", "test")])
        for d in (first, second)
    ]
    assert len(set(held[0].tolist())) == 12
    assert sorted(held[0]) == sorted(held[1])
    texts = [
        TextSplit("train", labels[:3], torch.arange(3), [np.array(ids, np.int32) for ids in own], make_tokenizer())
        for own in ([[1, 2], [3], [1]], [[1], [9], [1, 2]])
    ]
    hashes = [split.content_hashes().tolist() for split in texts]
    assert (hashes[0][0], hashes[0][2]) == (hashes[1][2], hashes[1][0])
    assert hashes[0][1] != hashes[1][1]
    turned = rotated_images(data, copies=2).train
    assert turned.content_hashes().tolist() == np.repeat(data.train.content_hashes(), 2).tolist()


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
    results["threshold_choice"] |= {"never_exits": True, "advice": "Nobody leaves: too few."}
    text = recipe.format_results({**results, "sweep": rows, "operating_point": rows[0], "warnings": ["short."]})
    assert "\n\n* stored threshold. Nobody leaves: too few.\n\nWarning: short." in text
