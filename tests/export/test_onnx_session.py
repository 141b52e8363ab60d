"""The runtime without torch: what it takes, how it prepares images, what it refuses."""

import copy
import json
import math
import pickle
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from erde_hub.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputTypeError,
    MissingDependencyError,
    ShapeError,
    ThresholdError,
)
from erde_hub.export import EarlyExitSession, export_onnx, runtimes
from erde_hub.export._inputs import read_picture
from erde_hub.prediction_sets import ConformalClassifier
from tests.fakes.onnx_models import images, tiny


@pytest.fixture
def session(tiny_file):
    return EarlyExitSession(tiny_file[1], threads=1)


def photos(*sizes):
    """Smooth pictures, so that resizing has one right answer."""
    generator = np.random.default_rng(0)
    coarse = [Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in sizes]
    return [np.asarray(c.resize(size[::-1], Image.Resampling.BICUBIC)) for c, size in zip(coarse, sizes, strict=True)]


@pytest.mark.parametrize("size", [(16, 16), (18, 18), (40, 40), (24, 60), (60, 24), (17, 19)])
def test_images_are_prepared_like_the_models(tiny_file, session, size):
    model, _ = tiny_file
    (photo,) = photos(size)
    expected = model.image_processor()(Image.fromarray(photo), return_tensors="pt")["pixel_values"].numpy()
    got = session.preprocess(photo[None])
    assert got.shape == expected.shape
    step = 1 / 255 / min(model.config.preprocessing["std"])  # one level of a pixel
    np.testing.assert_allclose(got, expected, atol=1.01 * step)


@pytest.mark.usefixtures("flat_is_known")
def test_sizes_that_are_not_square(tmp_path):
    model = tiny()
    model.set_preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=(16, 16), interpolation="nearest")
    path = export_onnx(model, tmp_path / "model.onnx")
    session = EarlyExitSession(path)
    session.info.preprocessing.update(size=[16, 24], crop_pct=0.8)
    model.set_preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=(16, 24), interpolation="nearest", crop_pct=0.8)
    (photo,) = photos((30, 50))
    expected = model.image_processor()(Image.fromarray(photo), return_tensors="np")["pixel_values"]
    assert session.preprocess([photo]).shape == (1, 3, 16, 24)
    assert np.mean(np.abs(session.preprocess([photo]) - expected)) < 0.02


def test_images_of_several_sizes(session):
    batch = photos((40, 30), (16, 16), (99, 20))
    together = session(batch, 0.0)
    assert together.exit_index.tolist() == [2, 2, 2]
    for photo, logits in zip(batch, together.logits, strict=True):
        np.testing.assert_allclose(session(photo[None], 0.0).logits[0], logits, atol=1e-5)


def test_files_and_images_of_pillow(session, tmp_path):
    (photo,) = photos((40, 30))
    expected = session([photo], 0.0).logits
    image, path = Image.fromarray(photo), tmp_path / "a.png"
    image.save(path)
    palette = image.quantize(64)
    for given in (str(path), path, image, [path], (image,)):
        np.testing.assert_array_equal(session(given, 0.0).logits, expected)
    mixed = session([path, image.convert("L"), palette, np.zeros((5, 9, 3), np.uint8)], 0.0).logits
    np.testing.assert_allclose(mixed[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(mixed[2], session(palette.convert("RGB"), 0.0).logits[0], atol=1e-5)
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    np.testing.assert_array_equal(
        session(tmp_path / "turned.png", 0.0).logits, session(image.rotate(-90, expand=True), 0.0).logits
    )


def test_files_for_models_of_other_channels():
    image = Image.fromarray(photos((4, 5))[0])
    np.testing.assert_array_equal(read_picture(image, 1, 0)[..., 0], np.asarray(image.convert("L")))
    with pytest.raises(ShapeError, match="takes images of 4 channels, which files do not have"):
        read_picture(image, 4, 0)


def test_floats_of_every_kind(tiny_file, session):
    model, _ = tiny_file
    x = images(model, 2)
    expected = session(x.numpy(), 0.0).logits
    learned = x.clone().requires_grad_()
    for same in (x.numpy().astype(np.float64), x, learned, [*learned], [*x.numpy()], x.numpy().tolist()):
        np.testing.assert_allclose(session(same, 0.0).logits, expected, atol=1e-6)
    half = x.bfloat16()
    np.testing.assert_array_equal(session(half, 0.0).logits, session(half.float(), 0.0).logits)
    strided = np.asfortranarray(x.numpy())
    np.testing.assert_array_equal(session(strided, 0.0).logits, expected)


def test_no_image(session):
    out = session(np.zeros((0, 3, 16, 16), np.float32))
    assert out.logits.shape == (0, 10)
    assert out.exit_index.shape == (0,)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((3, 16, 16), np.float32), ShapeError, r"\(N, 3, 16, 16\), got \(3, 16, 16\)"),
        (np.zeros((1, 3, 16, 20), np.float32), ShapeError, "images of other sizes can be given as uint8"),
        (np.zeros((1, 16, 16, 3), np.float32), ShapeError, r"got \(1, 16, 16, 3\)"),
        (np.zeros((1, 1, 16, 16), np.float32), ShapeError, r"got \(1, 1, 16, 16\)"),
        (np.zeros((1, 3, 16, 16), np.int64), InputTypeError, "got int64"),
        (np.zeros((1, 3, 16, 16), bool), InputTypeError, "got bool"),
        ("cat.png", DataError, r"image 0, 'cat\.png', cannot be read: No such file"),
        ([Image.new("RGB", (9, 9)), Path(__file__)], DataError, r"the image in '.*\.py' cannot be read"),
        ([Image.new("F", (9, 9))], DataError, "the image in the batch, number 0, cannot be read .*floating-point"),
        (np.zeros((16, 16, 3), np.uint8), ShapeError, r"for one image: images\[None\]"),
        (np.zeros((2, 3, 16, 16), np.uint8), ShapeError, r"channels last, got \(3, 16, 16\)"),
        (np.zeros((1, 0, 16, 3), np.uint8), ShapeError, r"got \(0, 16, 3\)"),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 1), np.uint8)], ShapeError, r"got \(16, 16, 1\)"),
        ([np.zeros((3, 16, 16)), np.zeros((3, 8, 8))], ShapeError, "floats .* of one shape, got float64"),
        (torch.zeros((1, 3, 16, 16), device="meta"), InputTypeError, "images cannot be made an array, got Tensor"),
        ([[1.0, 2.0], [[3.0], 4.0]], InputTypeError, "image 1 cannot be made an array, got list"),
    ],
)
def test_images_that_it_refuses(session, images, error, message):
    with pytest.raises(error, match=message):
        session(images)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (float("nan"), r"threshold nan is not allowed for policy 'entropy': give a number in \[0, inf\]"),
        (-0.1, "threshold -0.1 is not allowed"),
        ([0.1], "got 1 thresholds for 2 early exits"),
        ([0.1, 0.2, 0.3], "got 3 thresholds for 2"),
        ([0.1, float("nan")], "threshold nan"),
        ("0.5", "must be a number"),
        ("inf", "must be a number.*got 'inf'; a text is no number: write float"),
        (["inf", 0.3], "must be a number.*a text is no number"),
        (True, "must be a number"),
        (10**400, "must be a number"),
        (torch.zeros(2, device="meta"), "must be a number"),
        (np.zeros((2, 2)), "must be a number"),
    ],
)
def test_thresholds_that_it_refuses(session, threshold, message):
    with pytest.raises(ThresholdError, match=message):
        session(np.zeros((1, 3, 16, 16), np.float32), threshold)


def test_every_sample_may_have_thresholds_of_its_own(session):
    x = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    generator = np.random.default_rng(0)
    for rows in (generator.uniform(0, 2.4, (7, 2)), generator.choice([0.0, 2.0, 5.0], (7, 1)), np.full(7, 2.0)):
        out = session(x, rows)
        alone = [session(x[i : i + 1], np.broadcast_to(rows[i], 2).tolist()) for i in range(7)]
        assert out.exit_index.tolist() == [int(own.exit_index[0]) for own in alone]
        np.testing.assert_allclose(out.logits, np.concatenate([own.logits for own in alone]), atol=1e-5)
    assert session(x[:0], np.zeros((0, 2))).logits.shape == (0, 10)
    with pytest.raises(ThresholdError, match=r"of shape \(7, 1\) .* got \(6, 2\)"):
        session(x, np.ones((6, 2)))
    with pytest.raises(ThresholdError, match="threshold nan is not allowed"):
        session(x, np.array([[1.0]] * 6 + [[np.nan]]))


def test_thresholds_of_every_kind(session):
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    expected = session(x, [1.0, 1.0]).exit_index.tolist()
    for threshold in (1, 1.0, np.float32(1), (1, 1.0), np.ones(2), torch.ones(2)):
        assert session(x, threshold).exit_index.tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for above in (float("inf"), 1e39):
            assert session(x, above).exit_index.tolist() == [0, 0, 0]


@pytest.mark.usefixtures("flat_is_known")
def test_sets_of_the_file_are_those_of_the_model(session, tmp_path):
    model = tiny()
    model.set_prediction_sets(ConformalClassifier([0.3, 0.9, math.inf], alpha=0.2, penalty=0.01, randomized=False))
    own = EarlyExitSession(export_onnx(model, tmp_path / "model.onnx"), threads=1)
    assert own.info.prediction_sets == model.prediction_sets
    x = images(model, 16)
    with torch.no_grad():
        expected = model(x, threshold=1.0, output_sets=True)
    out = own(x, 1.0, output_sets=True)
    assert len({*out.exit_index.tolist()}) > 1
    np.testing.assert_array_equal(out.sets, expected.sets.numpy())
    np.testing.assert_array_equal(own(x, np.full((16, 1), 1.0), output_sets=True).sets, out.sets)
    assert own(x, 1.0).sets is None
    with pytest.raises(ConfigError, match="holds no prediction sets"):
        session(x, output_sets=True)


@pytest.mark.usefixtures("flat_is_known")
def test_file_without_preprocessing(tmp_path):
    model = tiny()
    session = EarlyExitSession(export_onnx(model, tmp_path / "model.onnx"))
    with pytest.raises(ConfigError, match="holds no preprocessing"):
        session(np.zeros((1, 16, 16, 3), np.uint8))
    assert session(np.zeros((1, 3, 16, 16), np.float32), 0.0).exit_index.tolist() == [2]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("erde_hub_version", [None, 3, ""]),
        ("policy", [None, 7, "", "x" * 2000, ["entropy"]]),
        ("threshold", [None, [], [0.5], [0.5] * 3, [0.5, "nan"], [0.5, -1.0], 0.5, ["a", "b"], [[0.5], 1]]),
        ("threshold_range", [None, [], [0.0], [1.0, 0.0], ["nan", "nan"], [0.6, 0.4], [2.0, "inf"]]),
        ("exit_names", [None, [], ["classifier"], ["stage1"] * 3, ["stage1", 2, "classifier"], "abc", {"a": 1}]),
        ("cumulative_macs", [None, [], [1, 2], [-1, 2, 3], [3, 2, 1], [1.5, 2, 3], [1, 2, 10**30], ["1", "2", "3"]]),
        ("id2label", [None, [], {}, {"0": "a"}, {str(i): "a" for i in range(9)}, {str(i): "a" for i in range(1, 11)}]),
        ("id2label", [{"x": "a"}, {str(i): "a" for i in range(11)}]),
        ("input_size", [None, [], [3, 16], [3, 16, 17], [1, 16, 16], [3, 16, -16], [3.0, 16, 16], [3, 10**9, 10**9]]),
        ("quantization", [8, "int4", True]),
        ("input_names", [None, [], ["threshold"], ["input_ids"], "pixel_values", 3]),
        ("batch_size", [0, 2, "1", 1.0, True]),
        ("tokenizer", ["{}", 3]),
        ("max_length", [8, "long"]),
        ("vocab_size", [8]),
        ("pad_token_id", [0]),
        ("preprocessing.mean", [None, [], [0.5], ["nan"] * 3, ["inf"] * 3, 0.5, "abc"]),
        ("preprocessing.std", [None, [0.0] * 3, [-1.0] * 3, ["nan"] * 3, [1.0]]),
        ("preprocessing.size", [None, [], [16], [10**9, 10**9], [17, 17], ["nan", 16], [-16, -16]]),
        ("preprocessing.crop_pct", [None, 0.0, 1e-9, "nan", 2.0, []]),
        ("preprocessing.interpolation", [None, "best", 3, []]),
        ("preprocessing.crop_mode", [3, "left", []]),
        ("preprocessing.other", [1]),
        ("preprocessing", ["text", 5, [], {}]),
    ],
)
def test_metadata_that_were_edited(tiny_file, field, values, tmp_path):
    file = onnx.load(tiny_file[1])
    name, _, inner = field.partition(".")
    (entry,) = (entry for entry in file.metadata_props if entry.key == name)
    stored = json.loads(entry.value)
    for value in values:
        entry.value = json.dumps({**stored, inner: value} if inner else value)
        onnx.save(file, tmp_path / "edited.onnx")
        with pytest.raises(CheckpointError, match=r"metadata of edited\.onnx are damaged"):
            EarlyExitSession(tmp_path / "edited.onnx", threads=1)
    for text in ("{", "[" * 100_000, "9" * 10_000, ""):
        entry.value = text
        onnx.save(file, tmp_path / "edited.onnx")
        with pytest.raises(CheckpointError, match=r"metadata of edited\.onnx are damaged"):
            EarlyExitSession(tmp_path / "edited.onnx", threads=1)


def test_a_session_says_what_it_is(session):
    text = repr(session)
    assert re.fullmatch(
        r"EarlyExitSession\('.*\.onnx': exits .*/.*, (OnnxRuntime|OpenVino), threshold [\d./e-]+\)", text
    )


def test_a_session_is_pickled_by_its_file(tiny_file, session, monkeypatch, tmp_path):
    x = images(tiny_file[0], 3).numpy()
    data = pickle.dumps(session)
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(data)
    np.testing.assert_array_equal(again(x, 1.0).logits, session(x, 1.0).logits)
    assert copy.deepcopy(session).info == session.info


def test_files_that_it_refuses(tiny_file, tmp_path):
    with pytest.raises(CheckpointError, match="no file"):
        EarlyExitSession(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(CheckpointError, match="onnxruntime cannot load"):
        EarlyExitSession(tmp_path / "text.onnx")
    file = onnx.load(tiny_file[1])
    del file.metadata_props[:]
    onnx.save(file, tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match=r"foreign\.onnx was not written by erde_hub"):
        EarlyExitSession(tmp_path / "foreign.onnx")
    for path in (None, 5, b"model.onnx"):
        with pytest.raises(InputTypeError, match=f"path must be text or a pathlib.Path.* got {path!r}"):
            EarlyExitSession(path)
    with pytest.raises(CheckpointError, match="no file 'aaa"):
        EarlyExitSession("a" * 300)
    for threads in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="threads must be"):
            EarlyExitSession(tiny_file[1], threads=threads)


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        (["Foo"], r"unknown execution provider 'Foo' \(available: .*CPUExecutionProvider"),
        (["CPUExecutionProvider", "CpuExecutionProvidr"], "did you mean 'CPUExecutionProvider'"),
        ([("Foo", {})], "unknown execution provider 'Foo'"),
        ("CPUExecutionProvider", r"must be a list of names .* got 'CPUExecutionProvider' \(available: .*CPUExec"),
        ([], r"must be a list of names .* got \[\]"),
        (None, "must be a list of names .* got None"),
        ([3], r"must be a list of names .* got \[3\]"),
    ],
)
def test_providers_that_are_none(tiny_file, capfd, providers, message):
    with pytest.raises(ConfigError, match=message):
        EarlyExitSession(tiny_file[1], providers=providers)
    assert capfd.readouterr() == ("", ""), "onnxruntime would print that it takes another"


def test_providers_with_options(tiny_file):
    session = EarlyExitSession(tiny_file[1], threads=1, providers=[("CPUExecutionProvider", {})])
    assert session(np.zeros((1, 3, 16, 16), np.float32), 0.0).exit_index.tolist() == [2]


@pytest.mark.parametrize(
    ("flags", "overflows"),
    [("sse avx2 avx512f", True), ("avx2 avx512_vnni", False), ("avx2 avx_vnni", False), ("asimd", False)],
)
def test_exact_products_where_they_would_saturate(monkeypatch, flags, overflows):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags : {flags}\n")
    assert runtimes._products_overflow.__wrapped__() is overflows


def test_missing_packages(tiny_file, session, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    (photo,) = photos((40, 40))
    with pytest.raises(MissingDependencyError, match="reading an image needs PIL: pip install pillow; or pass arrays"):
        session("a.jpg")
    with pytest.raises(MissingDependencyError, match="40x40 pixels to 18x18 needs PIL: pip install pillow"):
        session(photo[None])
    instead = r"or pass normalised floats \(3, 16, 16\), or pixels of 18x18, whose centre is taken \(crop_pct is 0.875"
    with pytest.raises(MissingDependencyError, match=instead):
        session(np.zeros((1, 16, 16, 3), np.uint8))  # the very size of the model
    assert session(photos((18, 18))[0][None], 0.0).exit_index.tolist() == [2]  # nothing to resize
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    for runtime in (None, "onnxruntime"):
        with pytest.raises(MissingDependencyError, match="EarlyExitSession needs onnxruntime: pip install onnxruntime"):
            EarlyExitSession(tiny_file[1], runtime=runtime)
    with pytest.raises(MissingDependencyError, match="runtime='openvino' needs openvino: pip install openvino"):
        EarlyExitSession(tiny_file[1], runtime="openvino")
