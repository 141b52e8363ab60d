"""Batches: the same ones for any number of processes, workers and restarts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erde_hub.data.images import BatchLoader, image_data_from_arrays, load_image_data
from erde_hub.errors import ConfigError, DataError, UnknownNameError
from tests.fakes.images import joined, rows, same, write_parquet


@pytest.fixture(scope="module")
def toys():
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (2, 103, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(103) % 3
    return image_data_from_arrays("toys", {"train": (train, labels), "test": (test, labels)}, "abc")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of 120x100 pixels, too large to be decoded in advance."""
    folder = tmp_path_factory.mktemp("photos")
    write_parquet(folder, {"train": rows(40, size=(120, 100)), "test": rows(9, size=(120, 100), first_seed=90)})
    return load_image_data(folder, cache_dir=folder / "cache", input_size=32, progress=False)


def test_batches_have_the_promised_form(toys):
    loader = BatchLoader(toys.train, 16)
    batch = next(iter(loader))
    assert batch["pixel_values"].shape == (16, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64
    assert batch["pixel_values"].is_contiguous()
    last = next(iter(BatchLoader(toys.train, 16, channels_last=True)))["pixel_values"]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, batch["pixel_values"])


def test_pixels_are_normalised_with_the_statistics_of_train(toys):
    whole = joined(BatchLoader(toys.train, 50))["pixel_values"].double()
    assert whole.mean((0, 2, 3)).abs().max() < 1e-4
    assert (whole.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    pixels = toys.train.pixels(np.arange(len(toys.train)))
    expected = (torch.from_numpy(pixels).double() / 255 - torch.tensor(toys.mean)) / torch.tensor(toys.std)
    assert (whole - expected.permute(0, 3, 1, 2)).abs().max() < 1e-5


def test_evaluation_sees_every_row_once_in_order(toys):
    loader = BatchLoader(toys.test, 20)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert [len(b["labels"]) for b in batches] == [20] * 5 + [3]
    whole = joined(batches)
    assert torch.equal(whole["index"], toys.test.indices)
    assert torch.equal(whole["labels"], toys.test.labels)


def test_index_is_the_row_of_the_source_and_labels_belong_to_it(toys):
    whole = joined(BatchLoader(toys.train, 10, shuffle=True))
    assert sorted(whole["index"].tolist()) == sorted(toys.train.indices.tolist())
    assert torch.equal(whole["labels"], whole["index"] % 3)  # label of row i is i % 3
    assert not set(whole["index"].tolist()) & set(toys.validation.indices.tolist())


@given(st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 2))
def test_ranks_join_to_the_single_process(toys, batch_size, world_size, drop_last, shuffle, epoch, seed):
    args = {"shuffle": shuffle, "augment": "crop_flip", "seed": seed, "drop_last": drop_last}
    single = BatchLoader(toys.train, batch_size * world_size, **args)
    ranks = [BatchLoader(toys.train, batch_size, rank=r, world_size=world_size, **args) for r in range(world_size)]
    for loader in (single, *ranks):
        loader.set_epoch(epoch)
    assert {len(loader) for loader in ranks} == {len(single)}
    parts = [list(loader) for loader in ranks]
    for number, expected in enumerate(single):
        sizes = [len(part[number]["labels"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert same(joined([part[number] for part in parts]), expected)
    assert {len(part) for part in parts} == {len(single)}


@given(st.integers(0, 3), st.integers(0, 7))
def test_an_epoch_can_be_entered_anywhere(toys, epoch, first):
    loader = BatchLoader(toys.train, 13, shuffle=True, augment="crop_flip", seed=4)
    loader.set_epoch(epoch)
    whole = list(loader)
    other = BatchLoader(toys.train, 13, shuffle=True, augment="crop_flip", seed=4)
    other.set_epoch(epoch, first_batch=min(first, len(other)))
    rest = list(other)
    assert len(rest) == max(0, len(whole) - first)
    assert all(same(a, b) for a, b in zip(whole[first:], rest, strict=True))
    other.set_epoch(epoch)
    assert len(list(other)) == len(whole)


def test_epochs_and_seeds_differ(toys):
    def first(seed, epoch):
        loader = BatchLoader(toys.train, 30, shuffle=True, augment="crop_flip", seed=seed)
        loader.set_epoch(epoch)
        return next(iter(loader))

    a, b, c = first(0, 0), first(0, 1), first(1, 0)
    assert not torch.equal(a["index"], b["index"])
    assert not torch.equal(a["index"], c["index"])
    assert same(a, first(0, 0))


def test_a_sample_is_augmented_the_same_in_any_batch_and_anew_in_every_epoch(toys):
    def by_index(epoch, **kwargs):
        loader = BatchLoader(toys.train, **kwargs, augment="crop_flip")
        loader.set_epoch(epoch)
        whole = joined(loader)
        return whole["pixel_values"][whole["index"].argsort()]

    assert torch.equal(by_index(1, batch_size=7), by_index(1, batch_size=93, shuffle=True))
    changed = (by_index(1, batch_size=7) != by_index(2, batch_size=7)).flatten(1).any(1)
    # of 3 x 3 places and two sides, one in 18 repeats
    assert changed.float().mean() > 0.8


@pytest.mark.parametrize("augment", [None, "crop_flip", "rrc_flip", "rand_augment"])
def test_large_images_follow_the_same_rules(photos, augment):
    args = {"shuffle": True, "augment": augment, "seed": 1, "drop_last": True}
    single = BatchLoader(photos.train, 8, **args)
    single.set_epoch(2)
    whole = list(single)
    assert whole[0]["pixel_values"].shape == (8, 3, 32, 32)
    ranks = [BatchLoader(photos.train, 4, rank=r, world_size=2, **args) for r in range(2)]
    for loader in ranks:
        loader.set_epoch(2, first_batch=1)
    for expected, *parts in zip(whole[1:], *ranks, strict=True):
        assert same(joined(parts), expected)
    single.set_epoch(3)
    assert not same(next(iter(single)), whole[0])


def test_small_images_take_per_image_augmentation_too(toys):
    batch = next(iter(BatchLoader(toys.train, 6, augment="rand_augment")))
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    assert torch.isfinite(batch["pixel_values"]).all()


@pytest.mark.parametrize("augment", ["crop_flip", "rrc_flip"])
def test_workers_change_nothing(photos, augment):
    args = {"shuffle": True, "augment": augment, "channels_last": True}
    plain, working = BatchLoader(photos.train, 8, **args), BatchLoader(photos.train, 8, **args, num_workers=2)
    for loader in (plain, working):
        loader.set_epoch(1, first_batch=2)
    pairs = list(zip(plain, working, strict=True))
    assert len(pairs) == len(plain) - 2
    for a, b in pairs:
        assert same(a, b)
        assert b["pixel_values"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_generator_is_touched(photos, workers):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    list(BatchLoader(photos.train, 16, shuffle=True, augment="rand_augment", num_workers=workers))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_global_generators_change_no_batch(photos):
    loader = BatchLoader(photos.train, 8, shuffle=True, augment="rand_augment")
    first = next(iter(loader))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert same(first, next(iter(loader)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_off_is_named(tmp_path, workers):
    columns = rows(30, size=(120, 100))
    columns["img"][17] = columns["img"][17][:2000]
    write_parquet(tmp_path / "set", {"train": columns, "test": rows(6, size=(120, 100))})
    data = load_image_data(
        tmp_path / "set", cache_dir=tmp_path / "cache", input_size=32, check_images="none", progress=False
    )
    with pytest.raises(DataError, match=r"the image in row 17 of split 'train' of 'set' cannot be read"):
        list(BatchLoader(data.train, 8, num_workers=workers)) + list(BatchLoader(data.validation, 8))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"batch_size": 2.0}, "batch_size=2.0 is not allowed"),
        ({"batch_size": True}, "batch_size=True is not allowed"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank=2 is not allowed: give an integer from 0 to 1"),
        ({"batch_size": 4, "world_size": 0}, "world_size=0"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 64, "world_size": 2, "drop_last": True}, "gives no batch of 128 rows"),
    ],
)
def test_bad_arguments(toys, args, message):
    with pytest.raises(ConfigError, match=message):
        BatchLoader(toys.train, **args)


def test_bad_augmentation_and_epoch(toys):
    with pytest.raises(UnknownNameError, match="unknown augmentation 'flip'"):
        BatchLoader(toys.train, 4, augment="flip")
    loader = BatchLoader(toys.train, 40)
    with pytest.raises(ConfigError, match="first_batch=4 is not allowed: give an integer from 0 to 3"):
        loader.set_epoch(0, first_batch=4)
    with pytest.raises(ConfigError, match="epoch=-1"):
        loader.set_epoch(-1)
