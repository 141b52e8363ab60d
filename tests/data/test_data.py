"""From a name to three splits: decoding, caching, statistics, limits."""

from __future__ import annotations

import io
import json
import logging
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from erde_hub._image_files import decode
from erde_hub.data import decoding as data_images
from erde_hub.data.groups import read_groups
from erde_hub.data.images import BatchLoader, image_data_from_arrays, load_image_data
from erde_hub.errors import ConfigError, DataError, InputTypeError, LabelError, MissingDependencyError, UnknownNameError
from erde_hub.scripts.common import build_model
from erde_hub.scripts.common.arguments import ExitArguments
from tests.fakes.images import encode, rows, write_parquet


def test_images_that_are_not_square_keep_their_shape(load, tmp_path):
    """What the network sees in training is what its image processor makes of the same image afterwards."""
    wide = {"size": (24, 16)}
    data = load(write_parquet(tmp_path / "set", {"train": rows(20, **wide), "test": rows(6, first_seed=50, **wide)}))
    assert data.input_size == (3, 16, 24)
    exits = ExitArguments(exits=["layer1"])
    model = build_model("resnet8_cifar", data, exits, kwargs={"width": 4}).eval()
    batch = next(iter(BatchLoader(data.test, 6)))
    processed = model.image_processor()(data.test.images(range(6)), return_tensors="pt")["pixel_values"]
    assert torch.allclose(processed, batch["pixel_values"], atol=1e-5)
    assert model(processed, threshold=0.0).logits.shape == (6, 3)
    augmented = next(iter(BatchLoader(data.train, 6, shuffle=True, augment=data.augment)))
    assert augmented["pixel_values"].shape == (6, 3, 16, 24)
    assert load(tmp_path / "set", input_size=16).input_size == (3, 16, 16)


@pytest.mark.parametrize(
    ("size", "crop_mode"), [((3, 16, 16), "center"), ((3, 16, 16), "squash"), ((3, 16, 24), "center")]
)
def test_a_checkpoint_prepares_images_as_the_data_were_prepared(load, tmp_path, size, crop_mode):
    wide = {"size": (60, 32)}
    folder = write_parquet(tmp_path / "set", {"train": rows(20, **wide), "test": rows(6, first_seed=50, **wide)})
    wishes = {"input_size": size, "crop_pct": 0.8, "interpolation": "bicubic", "crop_mode": crop_mode}
    data = load(folder, **wishes, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = build_model("resnet8_cifar", data, ExitArguments(exits=["layer1"]), kwargs={"width": 4})
    stored = load(folder).test.images(range(6))
    processed = model.image_processor()(stored, return_tensors="pt")["pixel_values"]
    batch = next(iter(BatchLoader(data.test, 6)))["pixel_values"]
    assert processed.shape == batch.shape
    assert (processed - batch).abs().max() < 0.05  # levels of 0.008: two libraries that resize


def test_digits():
    data = load_image_data("digits", progress=False)
    assert data.name == "digits"
    assert data.class_names == [str(i) for i in range(10)]
    assert data.input_size == (3, 32, 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    index = torch.cat([split.indices for split in (data.train, data.validation, data.test)])
    assert sorted(index.tolist()) == list(range(1797))
    for split in (data.train, data.validation, data.test):
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.01
    assert data.fingerprint == load_image_data("digits", progress=False).fingerprint
    assert load_image_data("digits", input_size=48, progress=False).input_size == (3, 48, 48)


def test_digits_can_be_told_apart_by_a_linear_model():
    """The images and the labels belong together, and the upright picture is the one in scikit-learn."""
    data = load_image_data("digits", progress=False)

    def table(split):
        batch = next(iter(BatchLoader(split, len(split))))
        return batch["pixel_values"][:, 0, 2::4, 2::4].flatten(1).double(), batch["labels"]

    x, y = table(data.train)
    weights = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y).double(), driver="gelsd").solution
    x, y = table(data.test)
    assert ((x @ weights).argmax(1) == y).float().mean() > 0.85


@pytest.mark.parametrize("name", ["image_column", "label_column", "config_name"])
def test_digits_have_no_columns(name):
    with pytest.raises(ConfigError, match=rf"{name}='nope' is not for 'digits'"):
        load_image_data("digits", **{name: "nope"})


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install scikit-learn"):
        load_image_data("digits")


def test_cifar10(shared, load, tmp_path):
    data = load(shared / "data" / "cifar10", max_train_samples=300, max_eval_samples=100)
    assert data.name == "cifar10"
    assert data.class_names[:2] == ["airplane", "automobile"]
    assert data.input_size == (3, 32, 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (300, 100, 100)
    assert torch.bincount(data.train.labels).tolist() == [30] * 10
    assert data.split_info["validation"]["limited_from"] == 5000
    assert data.split_info["train"]["limited_from"] == 45000
    assert np.allclose(data.mean, (0.4913, 0.4821, 0.4465), atol=0.03)
    assert "/" not in json.dumps(data.summary())
    batch = next(iter(BatchLoader(data.train, 8)))
    # an independent way to the same pixels
    raw = datasets.load_dataset(str(shared / "data" / "cifar10"), split="train", cache_dir=str(tmp_path / "cache"))
    for row, values in zip(batch["index"].tolist(), batch["pixel_values"], strict=True):
        pixels = torch.from_numpy(np.array(raw[row]["img"].convert("RGB"))).permute(2, 0, 1) / 255
        expected = (pixels - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
        assert torch.allclose(values, expected, atol=1e-5)


def test_cifar100_needs_to_know_which_label(shared, load):
    folder = shared / "data" / "cifar100"
    with pytest.raises(
        DataError, match="several label columns: fine_label, coarse_label; choose one with --label_column"
    ):
        load(folder)
    data = load(folder, label_column="coarse_label", max_train_samples=100, max_eval_samples=40)
    assert data.num_classes == 20


def test_the_fingerprint_is_of_the_content(tmp_path, load):
    first = load(write_parquet(tmp_path / "a", {"train": rows(30), "test": rows(6, first_seed=500)}))
    second = load(
        write_parquet(tmp_path / "b" / "deep", {"train": rows(30), "test": rows(6, first_seed=500)}),
        max_train_samples=9,
    )
    assert first.fingerprint == second.fingerprint
    assert (first.name, second.name) == ("a", "deep")
    changed = rows(30)
    changed["img"][4] = rows(31)["img"][30]
    others = [
        load(write_parquet(tmp_path / "c", {"train": changed, "test": rows(6, first_seed=500)})),
        load(write_parquet(tmp_path / "d", {"train": rows(30), "test": rows(7, first_seed=500)})),
        load(
            write_parquet(
                tmp_path / "e", {"train": {**rows(30), "label": [0, 1, 1, 2, 0] * 6}, "test": rows(6, first_seed=500)}
            )
        ),
    ]
    assert len({first.fingerprint, *(data.fingerprint for data in others)}) == 4


def test_a_stored_split_is_used_again(tmp_path, load):
    folder = write_parquet(tmp_path / "set", {"train": rows(60), "test": rows(6, first_seed=500)})
    first = load(folder, seed=7, max_train_samples=12)
    first.save_split(tmp_path / "split.json")
    again, other = load(folder, split_file=tmp_path / "split.json"), load(folder)
    assert torch.equal(first.validation.indices, again.validation.indices)
    assert not torch.equal(first.validation.indices, other.validation.indices)
    assert len(again.train) == 54
    assert again.split_info["validation"]["seed"] == 7
    different = write_parquet(tmp_path / "other", {"train": rows(60, first_seed=1), "test": rows(6, first_seed=500)})
    with pytest.raises(DataError, match="use the data the model was trained on"):
        load(different, split_file=tmp_path / "split.json")


def test_limits_keep_the_held_out_rows(tmp_path, load):
    folder = write_parquet(tmp_path / "set", {"train": rows(60), "test": rows(30, first_seed=500)})
    whole, part = load(folder), load(folder, max_train_samples=9)
    assert torch.equal(whole.validation.indices, part.validation.indices)
    assert set(part.train.indices.tolist()) < set(whole.train.indices.tolist())
    assert torch.bincount(part.train.labels).tolist() == [3, 3, 3]
    assert load(folder, max_train_samples=1000).split_info == whole.split_info
    with pytest.raises(DataError, match="max_train_samples=1 leaves a single class"):
        load(folder, max_train_samples=1)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
def test_bad_limits(bad):
    with pytest.raises(ConfigError, match=f"max_train_samples={bad!r} is not allowed"):
        load_image_data("digits", max_train_samples=bad)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        stored = Image.fromarray(pixels[..., 0].astype(np.uint16))
        expected = np.repeat(pixels[..., :1], 3, -1)
    else:
        stored = image.convert(mode)
        expected = np.asarray(stored.convert("RGB"))
    decoded = decode(encode(stored, "TIFF" if mode == "CMYK" else "PNG"), "here")
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), expected)


def test_images_are_turned_upright():
    image = Image.fromarray(np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(buffer.getvalue(), "here")), np.rot90(np.asarray(image), -1))


def test_floating_point_pixels_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(DataError, match=r"the image in row 3 cannot be read \(ValueError: floating-point pixels"):
        decode(buffer.getvalue(), "row 3")


def test_small_images_are_resized_once(tmp_path, load):
    folder = write_parquet(tmp_path / "set", {"train": rows(30, size=(12, 12)), "test": rows(6, size=(12, 12))})
    data = load(folder, input_size=8)
    assert data.input_size == (3, 8, 8)
    assert type(data.train).__name__ == "DecodedSplit"
    assert next(iter(BatchLoader(data.train, 4)))["pixel_values"].shape == (4, 3, 8, 8)
    assert load(folder, input_size=(3, 128, 128)).train.__class__.__name__ == "EncodedSplit"


def test_images_of_several_sizes_stay_encoded(tmp_path, load):
    columns = rows(60)
    columns["img"][41] = rows(1, size=(9, 9))["img"][0]
    data = load(write_parquet(tmp_path / "set", {"train": columns, "test": rows(6, first_seed=500)}))
    assert type(data.train).__name__ == "EncodedSplit"
    assert data.input_size == (3, 224, 224)
    assert (data.transform.interpolation, data.transform.crop_pct, data.augment) == ("bicubic", 0.875, "rrc_flip")
    assert next(iter(BatchLoader(data.train, 2)))["pixel_values"].shape == (2, 3, 224, 224)


def test_decoded_images_are_kept_and_checked(tmp_path, load, monkeypatch, caplog):
    monkeypatch.setattr(data_images, "_CACHE_MIN_ROWS", 10)
    folder = write_parquet(tmp_path / "set", {"train": rows(30), "test": rows(12, first_seed=500)})
    first = load(folder)
    kept = sorted((tmp_path / "cache" / "erde_hub_decoded").iterdir())
    assert len(kept) == 2
    assert all(first.fingerprint in path.name for path in kept)

    def refuse(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(data_images, "decode", refuse)
        for data in (load(folder), load(folder, max_train_samples=6)):
            positions = np.searchsorted(first.train.indices.numpy(), data.train.indices.numpy())
            assert np.array_equal(data.train.pixels(np.arange(len(data.train))), first.train.pixels(positions))
        with pytest.raises(AssertionError, match="decoded again"):
            load(folder, input_size=6)

    everything = first.train.pixels(np.arange(27))
    for path, damage in [
        (kept[1], lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        (kept[1], lambda content: content[:-9]),
        (kept[1], lambda _: b""),
    ]:
        path.write_bytes(damage(path.read_bytes()))
        with caplog.at_level(logging.WARNING):
            again = load(folder)
        assert "decoding again" in caplog.text
        caplog.clear()
        assert np.array_equal(again.train.pixels(np.arange(27)), everything)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, load, monkeypatch, caplog):
    monkeypatch.setattr(data_images, "_CACHE_MIN_ROWS", 10)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_images, "save_file", full)
    with caplog.at_level(logging.WARNING):
        data = load(write_parquet(tmp_path / "set", {"train": rows(30), "test": rows(12, first_seed=500)}))
    assert len(data.train) == 27
    assert "could not be kept" in caplog.text
    assert not list((tmp_path / "cache" / "erde_hub_decoded").iterdir())


def test_given_preprocessing_wins(tmp_path, load):
    folder = write_parquet(tmp_path / "set", {"train": rows(30), "test": rows(6, first_seed=500)})
    data = load(folder, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), interpolation="bicubic", crop_pct=0.5)
    assert (data.mean, data.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert (data.transform.interpolation, data.transform.crop_pct) == ("bicubic", 0.5)
    half = load(folder, mean=(0.5, 0.4, 0.3))
    assert half.mean == (0.5, 0.4, 0.3)
    assert half.std == load(folder).std


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"input_size": (1, 32, 32)}, ConfigError, r"input_size=\(1, 32, 32\)"),
        ({"input_size": -4}, ConfigError, "input_size=-4"),
        ({"input_size": (3, 32)}, ConfigError, r"input_size=\(3, 32\)"),
        ({"mean": (0.5, 0.5)}, ConfigError, r"mean=\(0.5, 0.5\) is not allowed"),
        ({"std": (0.5, 0.5, 0.0)}, ConfigError, r"std=\(0.5, 0.5, 0.0\) is not allowed: give three positive numbers"),
        ({"mean": (0.5, float("nan"), 0.5)}, ConfigError, "mean="),
        ({"interpolation": "bilinaer"}, UnknownNameError, "did you mean 'bilinear'"),
        ({"interpolation": "hamming"}, UnknownNameError, "available: bicubic, bilinear, lanczos, nearest"),
        ({"crop_mode": "squish"}, UnknownNameError, "did you mean 'squash'"),
        ({"crop_pct": 0.0}, ConfigError, "crop_pct=0.0"),
        ({"streaming": True}, ConfigError, "streaming does not go with 'digits'"),
    ],
)
def test_bad_preprocessing(args, error, message):
    with pytest.raises(error, match=message):
        load_image_data("digits", **args)


PIXELS, HALVES = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 2
RED_AND_GREEN = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8) * np.uint8([1, 1, 0])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"train": (PIXELS.astype(np.float32), HALVES)}, InputTypeError, r"'train' are float32 \(6, 4, 4, 3\)"),
        ({"train": (PIXELS[..., 0], HALVES)}, InputTypeError, "give uint8"),
        ({"train": (PIXELS, HALVES[:5])}, InputTypeError, "with 5 labels"),
        ({"train": (PIXELS, HALVES + 1)}, LabelError, "range from 1 to 2: give 0 to 1"),
        ({"dev": (PIXELS, HALVES)}, DataError, "a split 'dev': allowed are train, validation, test"),
        ({"train": (PIXELS, HALVES), "test": (PIXELS[:, :2], HALVES)}, InputTypeError, "differ in size"),
        ({"test": (PIXELS, HALVES)}, DataError, "no split 'train'"),
        ({"train": (RED_AND_GREEN, HALVES)}, DataError, "colour channel 2 has the same value in all training pixels"),
    ],
)
def test_arrays_are_checked(args, error, message):
    with pytest.raises(error, match=message):
        image_data_from_arrays("toys", args, "ab")


def test_groups_are_read_by_row_from_columns_of_the_data_set(tmp_path):
    """Also where rows were dropped and splits were cut: records know their row number."""
    columns = rows(90)
    cameras = [["left", "right"][i % 2] for i in range(90)]
    features = {
        "img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "camera": datasets.Value("string"), "night": datasets.Value("bool"),
        "sizes": datasets.Sequence(datasets.Value("int64")), "side": datasets.Value("string"),
        "grade": datasets.ClassLabel(names=["low", "high"]),
    }  # fmt: skip
    extra = {"camera": cameras, "night": [i % 4 == 0 for i in range(90)], "sizes": [[1]] * 90}
    extra["side"] = ["y / z" if i % 2 else None for i in range(90)]
    extra["grade"] = [-1 if i % 3 == 0 else i % 2 for i in range(90)]
    folder = write_parquet(tmp_path, {"train": columns | extra}, features)
    data = load_image_data(folder, image_column="img", label_column="label", progress=False)
    index = data.test.indices
    groups, names = read_groups(data, "test", ["camera"], index, folder)
    assert names == ["left", "right"]
    assert [names[g] for g in groups] == [cameras[i] for i in index]
    both, names = read_groups(data, "test", ["label", "night"], index, folder)
    assert [names[g] for g in both] == [f"{'abc'[i % 3]} / {i % 4 == 0}" for i in index.tolist()]
    with pytest.raises(DataError, match="no column is named to group by"):
        read_groups(data, "test", [], index, folder)
    with pytest.raises(DataError, match=r"has no column 'camra'; did you mean 'camera'.*columns: img, label, camera"):
        read_groups(data, "test", ["camra"], index, folder)
    groups, names = read_groups(data, "test", ["side", "grade"], index, folder)
    assert [names[g] for g in groups] == [
        f"{'y / z' if i % 2 else '(none)'} / {'(none)' if i % 3 == 0 else ['low', 'high'][i % 2]}"
        for i in index.tolist()
    ]
    with pytest.raises(DataError, match=r"column 'sizes' of .* holds list: name one of texts or numbers"):
        read_groups(data, "test", ["sizes"], index, folder)
