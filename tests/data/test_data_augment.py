"""Hashes instead of generators: order, crops and mirrors as functions of (seed, epoch, sample)."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erde_hub.data.augment import (
    AUGMENT_STREAM,
    AUGMENTATIONS,
    ORDER_STREAM,
    Augmentation,
    counter_hash,
    epoch_order,
    get_augmentation,
    isolated_rng,
)
from erde_hub.errors import UnknownNameError

seeds = st.integers(-(2**70), 2**70)


def splitmix64(state):
    """The published generator, in Python integers: the state after `state` and its output."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, z ^ (z >> 31)


def test_splitmix_is_the_published_one():
    # first outputs for state 0, as in the reference implementation by Vigna
    state, first = splitmix64(0)
    assert first == 0xE220A8397B1DCDAF
    assert splitmix64(state)[1] == 0x6E789E6AA1B965F4


@given(seeds, st.integers(0, 2**40), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_hash_agrees_with_plain_integers(seed, epoch, index):
    mask = 2**64 - 1
    start = splitmix64(splitmix64(splitmix64(seed & mask)[1] ^ epoch)[1] ^ AUGMENT_STREAM)[1]

    def finalise(value):  # splitmix64 adds the constant before it mixes
        return splitmix64((value - 0x9E3779B97F4A7C15) & mask)[1]

    expected = [finalise((i * 0x9E3779B97F4A7C15 + start) & mask) for i in index]
    assert counter_hash(seed, epoch, np.array(index), AUGMENT_STREAM).tolist() == expected


@given(st.integers(0, 300), seeds, st.integers(0, 1000))
def test_order_is_a_permutation_and_repeats(size, seed, epoch):
    order = epoch_order(size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, epoch_order(size, seed, epoch))


def test_order_changes_with_epoch_and_seed_and_is_even():
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # two random orders of 1,000 agree in one place on average
            assert (first == second).sum() < 10
    places = np.stack([np.argsort(epoch_order(50, 0, epoch)) for epoch in range(400)])
    # mean place of each sample: 24.5 with standard error 14.4 / 20 = 0.72
    assert np.abs(places.mean(0) - 24.5).max() < 4 * 0.72


def test_streams_are_apart():
    index = np.arange(1000)
    a, b = counter_hash(0, 0, index, ORDER_STREAM), counter_hash(0, 0, index, AUGMENT_STREAM)
    assert not np.isin(a, b).any()


@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_a_crop_is_a_window_of_the_padded_image(height, width, seed):
    pixels = np.random.default_rng(0).integers(1, 256, (3, height, width, 3), dtype=np.uint8)
    bits = counter_hash(seed, 0, np.arange(3), AUGMENT_STREAM)
    before = pixels.copy()
    out = Augmentation("x", "", pad=1 / 4, flip=True).apply(pixels, bits)
    assert np.array_equal(pixels, before)
    border_y, border_x = max(1, round(height / 4)), max(1, round(width / 4))
    for image, result in zip(pixels, out, strict=True):
        padded = np.pad(image, ((border_y, border_y), (border_x, border_x), (0, 0)))
        windows = [
            padded[y : y + height, x : x + width] for y in range(2 * border_y + 1) for x in range(2 * border_x + 1)
        ]
        assert any(np.array_equal(w, result) or np.array_equal(w[:, ::-1], result) for w in windows)


def test_every_crop_and_mirror_is_equally_likely():
    count = 20_000
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[0, 3, 2] = 255  # its place tells the crop, and on which side it is the mirror
    bits = counter_hash(0, 0, np.arange(count), AUGMENT_STREAM)
    out = get_augmentation("crop_flip").apply(np.repeat(image, count, 0), bits)
    y, x = np.divmod(out[..., 0].reshape(count, -1).argmax(1), 8)
    pairs, counts = np.unique(np.stack([y, x]), axis=1, return_counts=True)
    assert pairs.shape[1] == 3 * 6  # rows 2 to 4; columns 1 to 3 and, mirrored, 4 to 6
    assert np.abs(counts - count / 18).max() < 5 * (count / 18) ** 0.5


def test_none_and_shift_do_not_mirror():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    bits = counter_hash(0, 0, np.arange(4), AUGMENT_STREAM)
    assert np.array_equal(get_augmentation(None).apply(pixels, bits), pixels)
    asymmetric = np.zeros((500, 8, 8, 3), np.uint8)
    asymmetric[:, :, 0] = 255
    shifted = get_augmentation("shift").apply(asymmetric, counter_hash(0, 0, np.arange(500), AUGMENT_STREAM))
    assert not shifted[:, :, 4:].any()


def test_isolated_rng_repeats_and_leaves_the_world_alone():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    random.seed(1)
    expected = draw()
    random.seed(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with isolated_rng(2**64 - 1):
        first = draw()
    with suppress(KeyError), isolated_rng(2**64 - 1):
        assert draw() == first
        raise KeyError
    with isolated_rng(3):
        assert draw() != first
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert random.random() == expected[0]


def test_table():
    assert {"none", "shift", "crop_flip", "rrc_flip", "rand_augment"} <= set(AUGMENTATIONS)
    with pytest.raises(UnknownNameError, match=r"unknown augmentation 'cropflip'; did you mean 'crop_flip'\?"):
        get_augmentation("cropflip")
