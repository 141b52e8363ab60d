"""Coloured digits: shares of colours, groups, splits without a leak."""

import numpy as np
import pytest
import torch
from _coloured import COLOURS, coloured_digits, save_coloured_digits

from erde_hub.data import load_image_data
from erde_hub.data.groups import read_groups
from erde_hub.errors import ConfigError

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def grouped():
    return coloured_digits(0.9, seed=3)


def colour_of(split):
    """What an eye sees: which of the two colours the brightest pixel has."""
    pixels = split.pixels(np.arange(len(split))).astype(int)
    return (pixels[..., 1].max((1, 2)) > pixels[..., 0].max((1, 2))).astype(int)


def test_groups_are_class_and_colour_of_the_image(grouped):
    for name in SPLITS:
        split = getattr(grouped.data, name)
        groups = grouped.groups[name][split.indices]
        assert torch.equal(groups // 2, split.labels)
        assert (groups % 2).tolist() == colour_of(split).tolist()
    assert grouped.group_names[2] == "five or more, red"
    assert list(COLOURS) == ["red", "green"]


def test_the_colour_agrees_with_the_class_for_the_stated_share(grouped):
    train = grouped.data.train
    agree = torch.from_numpy(colour_of(train)) == train.labels
    for class_ in (0, 1):
        members = train.labels == class_
        assert abs(agree[members].double().mean() - 0.9) < 1 / members.sum()


def test_in_validation_and_test_every_image_occurs_in_both_colours(grouped):
    for name in ("validation", "test"):
        split = getattr(grouped.data, name)
        shapes = split.pixels(np.arange(len(split))).max(-1)
        assert np.array_equal(shapes[::2], shapes[1::2])
        assert torch.equal(split.labels[::2], split.labels[1::2])
        assert colour_of(split).tolist() == [0, 1] * (len(split) // 2)


def test_no_shape_is_in_two_splits(grouped):
    hashes = {}
    for name in SPLITS:
        split = getattr(grouped.data, name)
        hashes[name] = {shape.tobytes() for shape in split.pixels(np.arange(len(split))).max(-1)}
    assert not hashes["train"] & hashes["test"]
    assert not hashes["train"] & hashes["validation"]
    assert not hashes["validation"] & hashes["test"]


def test_the_seed_chooses_the_exceptions_and_nothing_else(grouped):
    other, again = coloured_digits(0.9, seed=4), coloured_digits(0.9, seed=3)
    assert torch.equal(other.data.train.indices, grouped.data.train.indices)
    assert torch.equal(other.data.test.labels, grouped.data.test.labels)
    assert not torch.equal(other.groups["train"], grouped.groups["train"])
    assert torch.equal(again.groups["train"], grouped.groups["train"])
    assert again.data.fingerprint == grouped.data.fingerprint != other.data.fingerprint


def test_a_folder_with_a_column_for_the_colour(tmp_path):
    save_coloured_digits(tmp_path, 0.9)
    data, grouped = load_image_data(str(tmp_path)), coloured_digits(0.9)
    assert data.class_names == ["below five", "five or more"]
    for name in SPLITS:
        rows, expected = getattr(data, name), getattr(grouped.data, name)
        np.testing.assert_array_equal(rows.pixels(np.arange(len(rows))), expected.pixels(np.arange(len(rows))))
        groups, names = read_groups(data, name, ["label", "colour"], rows.indices, str(tmp_path))
        found = [names[group] for group in groups]
        assert found == [grouped.group_names[i].replace(", ", " / ") for i in grouped.groups[name][expected.indices]]


@pytest.mark.parametrize("correlation", [0, 0.5, 1.0])
def test_extreme_shares(correlation):
    grouped = coloured_digits(correlation)
    train = grouped.data.train
    agree = (grouped.groups["train"][train.indices] % 2 == train.labels).double().mean()
    assert abs(agree - correlation) < 0.002


@pytest.mark.parametrize("correlation", [-0.1, 1.1, True, "0.9", float("nan")])
def test_a_share_that_is_none_is_refused(correlation):
    with pytest.raises(ConfigError, match="correlation must be a share from 0 to 1"):
        coloured_digits(correlation)
