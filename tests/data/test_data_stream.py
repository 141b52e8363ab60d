"""Streams: the same rules without row numbers and without knowing the length."""

from __future__ import annotations

import datasets
import pytest
import torch

from erde_hub.data.images import BatchLoader, load_image_data
from erde_hub.data.splits import bucket_of
from erde_hub.errors import ConfigError, DataError, InputTypeError, LabelError
from tests.fakes.images import joined, picture, rows, same, write_parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parquet(
        tmp_path_factory.mktemp("stream"), {"train": rows(120), "test": rows(30, first_seed=500)}, shards=3
    )


@pytest.fixture(scope="module")
def stream(folder):
    return load_image_data(folder, streaming=True, progress=False)


def content(batch):
    return {tuple(image.flatten().tolist()) for image in batch["pixel_values"]}


def test_splits_are_disjoint_and_complete(folder, stream):
    train, validation = joined(BatchLoader(stream.train, 7)), joined(BatchLoader(stream.validation, 7))
    assert not content(train) & content(validation)
    assert len(content(train) | content(validation)) == 120
    share = len(validation["labels"]) / 120
    assert 0.02 < share < 0.2
    assert len(joined(BatchLoader(stream.test, 7))["labels"]) == 30
    expected = sum(bucket_of(image) < 10 for image in rows(120)["img"])
    assert len(validation["labels"]) == expected
    assert stream.split_info["validation"] == {
        "rows": None,
        "source": "train",
        "rule": "hash of the image modulo 100",
        "from": 0,
        "below": 10,
    }


def test_labels_belong_to_their_images(stream):
    whole = joined(BatchLoader(stream.train, 50, shuffle=True))
    red = whole["pixel_values"][:, 0, 0, 0] * stream.std[0] + stream.mean[0]
    assert torch.equal((red * 255 / 20).round().long(), whole["labels"])
    ordered = joined(BatchLoader(stream.train, 50))
    assert ordered["index"].tolist() == sorted(whole["index"].tolist())
    assert torch.equal(whole["labels"][whole["index"].argsort()], ordered["labels"])
    assert set((ordered["index"] >> 32).tolist()) == {0, 1, 2}  # the files
    assert not torch.equal(whole["labels"], ordered["labels"])


def test_statistics_are_those_of_the_pixels(stream):
    values = joined(BatchLoader(stream.train, 50))["pixel_values"]
    assert values.mean((0, 2, 3)).abs().max() < 1e-3
    assert (values.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_order_depends_on_seed_and_epoch_alone(stream):
    def epoch(number, seed=0, **kwargs):
        loader = BatchLoader(stream.train, 16, shuffle=True, augment="crop_flip", seed=seed, **kwargs)
        loader.set_epoch(number)
        return list(loader)

    assert all(same(a, b) for a, b in zip(epoch(1), epoch(1), strict=True))
    assert not torch.equal(joined(epoch(1))["labels"], joined(epoch(2))["labels"])
    assert not torch.equal(joined(epoch(1))["labels"], joined(epoch(1, seed=1))["labels"])
    assert all(same(a, b) for a, b in zip(epoch(1), epoch(1, num_workers=2), strict=True))


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_batches_of_one_process(stream, drop_last):
    args = {"shuffle": True, "augment": "crop_flip", "drop_last": drop_last}
    single = list(BatchLoader(stream.train, 16, **args))
    parts = [list(BatchLoader(stream.train, 8, rank=r, world_size=2, **args)) for r in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(single)
    for expected, *both in zip(single, *parts, strict=True):
        assert not set(both[0]["index"].tolist()) & set(both[1]["index"].tolist())
        assert same(joined(both), expected)
    assert all(len(b["labels"]) == 16 for b in single) is drop_last


def test_resuming_skips_what_was_seen(stream):
    loader = BatchLoader(stream.train, 16, shuffle=True, augment="crop_flip")
    loader.set_epoch(3)
    whole = list(loader)
    loader.set_epoch(3, first_batch=4)
    rest = list(loader)
    assert len(rest) == len(whole) - 4
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_what_a_stream_cannot_tell(stream):
    loader = BatchLoader(stream.train, 16)
    assert loader.num_batches is None
    with pytest.raises(InputTypeError, match="number of rows of the streamed split 'train' is unknown: set max_steps"):
        len(loader)
    with pytest.raises(DataError, match="no list of labels"):
        _ = stream.train.labels
    with pytest.raises(DataError, match="no list of rows"):
        _ = stream.train.indices


def test_a_limit_makes_a_prefix(folder, load):
    data = load(folder, streaming=True, max_train_samples=20)
    assert len(joined(BatchLoader(data.train, 8))["labels"]) <= 20
    with pytest.raises(ConfigError, match="streaming does not go with max_eval_samples"):
        load(folder, streaming=True, max_eval_samples=5)


@pytest.mark.parametrize("sources", [("train",), ("train", "test"), ("train", "validation")], ids="-".join)
def test_a_split_of_a_stream_is_the_same_when_the_data_are_loaded(tmp_path, sources, load):
    """Trained on a stream, evaluated without: no row that was trained on may be reported on."""
    columns = {name: rows(120, first_seed=1000 * i) for i, name in enumerate(sources)}
    folder = write_parquet(tmp_path / "set", columns, shards=2)
    stream = load(folder, streaming=True, max_train_samples=40)
    stream.save_split(tmp_path / "split.json")
    loaded = load(folder, split_file=tmp_path / "split.json", mean=stream.mean, std=stream.std)
    stream = load(folder, streaming=True)
    for name in ("train", "validation", "test"):
        streamed, read = (joined(BatchLoader(getattr(data, name), 50)) for data in (stream, loaded))
        assert torch.equal(streamed["labels"], read["labels"]), name
        assert torch.allclose(streamed["pixel_values"], read["pixel_values"], atol=1e-5), name
    usual = load(folder)
    assert loaded.split_info["validation"]["digest"] != usual.split_info["validation"]["digest"]
    again = load(folder, streaming=True, split_file=tmp_path / "split.json")
    assert again.split_info == stream.split_info
    loaded.save_split(tmp_path / "rows.json")  # and on: what was loaded holds out the same rows in a file of its own
    rows_too = load(folder, split_file=tmp_path / "rows.json")
    assert rows_too.split_info["train"] == loaded.split_info["train"]


def test_row_numbers_are_of_no_use_to_a_stream(folder, tmp_path, load):
    load(folder).save_split(tmp_path / "split.json")
    with pytest.raises(DataError, match=r"'split\.json' holds out rows by their number.*without streaming"):
        load(folder, streaming=True, split_file=tmp_path / "split.json")
    other = write_parquet(tmp_path / "other", {"train": rows(120, first_seed=9), "test": rows(30, first_seed=500)})
    with pytest.raises(DataError, match="was written for data with fingerprint"):
        load(other, streaming=True, split_file=tmp_path / "split.json")


def test_given_splits_need_no_row_numbers(tmp_path, load):
    splits = {"train": rows(20), "validation": rows(6, first_seed=50), "test": rows(5, first_seed=80)}
    folder = write_parquet(tmp_path / "set", splits)
    load(folder).save_split(tmp_path / "split.json")
    data = load(folder, streaming=True, split_file=tmp_path / "split.json")
    assert {how["rule"] for how in data.split_info.values()} == {"given"}


@pytest.mark.parametrize("held_out", [("validation",), ("test",), ("validation", "test")], ids="-".join)
def test_copies_across_given_splits_are_counted_and_left_out_of_train(tmp_path, held_out, load, caplog):
    splits = {"train": rows(60), **{name: rows(12, first_seed=500 + len(name)) for name in held_out}}
    for number, name in enumerate(held_out):  # three images of each occur in train too, one of them twice
        for column in ("img", "label"):
            splits["train"][column][number * 5 : number * 5 + 4] = [splits[name][column][row] for row in (0, 3, 7, 7)]
    folder = write_parquet(tmp_path / "set", splits, shards=2)
    data = load(folder, streaming=True)
    data.save_split(tmp_path / "split.json")
    assert not caplog.text, "held-out rows are read when training begins"
    loaders = [BatchLoader(data.train, 8, shuffle=True, num_workers=workers) for workers in (0, 1)]
    passes = [joined(loader)["index"].tolist() for loader in loaders]
    assert passes[0] == passes[1]
    assert f"{4 * len(held_out)} rows of train are copies of held-out rows and are left out" in caplog.text
    assert data.split_info["train"]["copies"] == "left out as they are read"
    loaded = load(folder, split_file=tmp_path / "split.json")  # counts them before training, and keeps the same rows
    assert loaded.split_info["train"]["copies_left_out"] == 4 * len(held_out)
    streamed, read = joined(BatchLoader(data.train, 50)), joined(BatchLoader(loaded.train, 50))
    assert torch.equal(streamed["labels"], read["labels"])
    assert len(streamed["labels"]) == len(passes[0])
    kept = load(folder, streaming=True, check_images="none").train
    assert len(joined(BatchLoader(kept, 50))["labels"]) == len(passes[0]) + 4 * len(held_out)


def test_a_stream_of_copies_leaves_nothing_to_train_on(tmp_path, load):
    data = load(write_parquet(tmp_path, {"train": rows(20), "test": rows(40)}), streaming=True)
    with pytest.raises(DataError, match="nothing is left to train on"):
        list(BatchLoader(data.train, 4))


def test_given_splits_and_large_images(tmp_path, load):
    size = {"size": (120, 100)}
    splits = {
        "train": rows(20, **size),
        "validation": rows(6, first_seed=50, **size),
        "test": rows(5, first_seed=80, **size),
    }
    data = load(write_parquet(tmp_path, splits), streaming=True, input_size=32)
    counts = [len(joined(BatchLoader(split, 4))["labels"]) for split in (data.train, data.validation, data.test)]
    assert counts == [20, 6, 5]
    batch = next(iter(BatchLoader(data.train, 4, shuffle=True, augment=data.augment)))
    assert batch["pixel_values"].shape == (4, 3, 32, 32)


def test_an_unlabelled_test_split_is_left_out(tmp_path, load):
    splits = {"train": rows(30), "validation": rows(40, first_seed=50), "test": {**rows(6), "label": [-1] * 6}}
    data = load(write_parquet(tmp_path, splits), streaming=True)
    validation, test = joined(BatchLoader(data.validation, 4)), joined(BatchLoader(data.test, 4))
    assert len(validation["labels"]) + len(test["labels"]) == 40
    assert not content(validation) & content(test)


def test_bad_rows_are_named(tmp_path, load):
    columns = rows(30)
    columns["img"][21] = b"this is no image"
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    folder = write_parquet(tmp_path / "set", {"train": columns, "validation": rows(6), "test": rows(6)}, features)
    with pytest.raises(DataError, match=r"row 21 of split 'train' of 'set' \(streamed\) cannot be read"):
        load(folder, streaming=True)
    columns = rows(30)
    columns["label"][4] = None
    folder = write_parquet(tmp_path / "other", {"train": columns, "validation": rows(6), "test": rows(6)}, features)
    with pytest.raises(LabelError, match=r"label None in row 4 of split 'train'"):
        load(folder, streaming=True)
    plain = {"img": datasets.Image(), "label": datasets.Value("int64")}
    folder = write_parquet(tmp_path / "plain", {"train": {"img": [picture(0, 0)], "label": [0]}}, plain)
    with pytest.raises(DataError, match="'label' of 'plain' does not name its classes"):
        load(folder, streaming=True)
