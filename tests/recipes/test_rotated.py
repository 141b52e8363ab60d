"""Images turned by a known angle."""

import math

import numpy as np
import pytest
import torch
from _rotated import TARGET, rotate, rotated_images
from PIL import Image

from erde_hub.data.images import BatchLoader
from erde_hub.errors import ConfigError, InputTypeError
from tests.fakes.training import make_data


def test_images_are_turned_as_pillow_turns_them():
    rows, columns = np.mgrid[0:24, 0:24]
    smooth = np.stack([127 + 80 * np.sin(rows / 4), 127 + 80 * np.cos(columns / 5), 5 * rows + 5 * columns], -1)
    image = smooth.clip(0, 255).astype(np.uint8)
    inside = np.hypot(rows - 11.5, columns - 11.5) < 11
    for degrees in (30.0, -45.0, 90.0):
        (turned,) = rotate(image[None], torch.tensor([math.radians(degrees)]), [1, 2, 3])
        wanted = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR))
        assert np.abs(turned[inside].astype(int) - wanted[inside]).max() <= 2
        assert turned[0, 0].tolist() == [1, 2, 3], "no corner tells the angle"
    (straight,) = rotate(image[None], torch.zeros(1), [0, 0, 0])
    assert np.array_equal(straight[inside], image[inside])


def test_angles_are_a_function_of_seed_and_sample():
    source = make_data(30)
    data = rotated_images(source, 45, copies=3, seed=1)
    assert (len(data.train), len(data.validation)) == (3 * len(source.train), len(source.validation))
    assert data.class_names == [TARGET]
    assert data.num_classes == 1
    assert data.split_info["train"]["rows"] == len(data.train)
    angles = data.train.labels
    assert angles.dtype == torch.float32
    assert angles.shape == (len(data.train), 1)
    assert angles.abs().max() <= math.radians(45)
    assert len(angles.unique()) == len(angles)
    assert torch.equal(angles, rotated_images(source, 45, copies=3, seed=1).train.labels)
    assert not torch.equal(angles, rotated_images(source, 45, copies=3, seed=2).train.labels)
    assert len(set(data.train.indices.tolist())) == len(data.train)
    (batch,) = BatchLoader(data.validation, 64)
    assert torch.equal(batch["labels"], data.validation.labels)
    whole = source.validation.pixels(np.arange(len(source.validation)))
    fill = [round(255 * mean) for mean in source.mean]
    turned = rotate(whole, data.validation.labels[:, 0], fill)
    assert np.array_equal(data.validation.pixels(np.arange(len(data.validation))), turned)
    assert np.array_equal(np.asarray(data.validation.images([1])[0]), turned[1])


def test_what_cannot_be_turned():
    data = make_data(30)
    for degrees in (0, 181, float("nan"), True, "45"):
        with pytest.raises(ConfigError, match="degrees must be above 0 and at most 180"):
            rotated_images(data, degrees)
    with pytest.raises(ConfigError, match="copies must be an integer of at least 1, got 0"):
        rotated_images(data, 45, copies=0)
    for augment in ("crop_flip", "rrc_flip"):
        with pytest.raises(ConfigError, match=f"augmentation {augment!r} mirrors or warps images"):
            BatchLoader(rotated_images(data).train, 8, augment=augment)
    BatchLoader(rotated_images(data).train, 8, augment="shift")
    data.test = object()
    with pytest.raises(InputTypeError, match="images that can be turned are needed, 'colours' gives object"):
        rotated_images(data)
