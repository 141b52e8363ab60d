"""The file answers what the model answers, for every family, policy, threshold and batch size."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_fakes import MORE_FAMILIES, build, first_exits, images, safe_thresholds, tiny

from erde_hub import EarlyExitWrapper
from erde_hub.export import EarlyExitSession, check_onnx, export_onnx


def assert_same(model, path, batch, thresholds):
    x = images(model, 5)[:batch]
    logits, index = first_exits(model, x, thresholds)
    got = EarlyExitSession(path, threads=1)(x.numpy(), thresholds)
    assert got.exit_index.tolist() == index.tolist()
    assert got.exit_index.dtype == np.int64
    assert got.logits.dtype == np.float32
    np.testing.assert_allclose(got.logits, logits.numpy(), atol=1e-3 * float(logits.abs().max()), rtol=0)
    return index


def check_all(model, path):
    early = len(model.heads)
    thresholds = safe_thresholds(model, images(model, 5))
    index = assert_same(model, path, 5, thresholds)
    assert len(index.unique()) > 1, "the batch should split"
    assert_same(model, path, 1, thresholds)
    for batch in (1, 5):
        assert assert_same(model, path, batch, [0.0] * early).tolist() == [early] * batch
        assert assert_same(model, path, batch, [50.0] * early).tolist() == [0] * batch
    only_last = [0.0] * (early - 1) + [50.0]
    assert assert_same(model, path, 5, only_last).tolist() == [early - 1] * 5


def test_families(family_file):
    check_all(*family_file)


@pytest.mark.families
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_more_families(family, tmp_path):
    model = build(*MORE_FAMILIES[family])
    check_all(model, export_onnx(model, tmp_path / "model.onnx"))


@pytest.mark.parametrize("policy", ["confidence", "margin"])
def test_policies_that_leave_above(policy, tmp_path):
    model = tiny(policy=policy)
    path = export_onnx(model, tmp_path / "model.onnx")
    x = images(model, 5)
    index = assert_same(model, path, 5, safe_thresholds(model, x))
    assert len(index.unique()) > 1
    assert assert_same(model, path, 5, [1.001, 1.001]).tolist() == [2] * 5
    assert assert_same(model, path, 5, [0.0, 0.0]).tolist() == [0] * 5
    # At the threshold itself a sample leaves: the score that torch computes is the score in the file.
    x[1] = torch.nan
    got = EarlyExitSession(path, threads=1)(x.numpy(), 0.0)
    assert got.exit_index.tolist() == [0, 2, 0, 0, 0]


def test_one_threshold_is_for_all_exits(tiny_file):
    model, path = tiny_file
    x = images(model, 5).numpy()
    session = EarlyExitSession(path, threads=1)
    for threshold in (0.3, 1.0, 2.0):
        one, each = session(x, threshold), session(x, [threshold, threshold])
        np.testing.assert_array_equal(one.logits, each.logits)
        np.testing.assert_array_equal(one.exit_index, each.exit_index)


def test_stored_threshold_is_the_default(tiny_file):
    model, path = tiny_file
    x = images(model, 5)
    expected = model(x)
    got = EarlyExitSession(path, threads=1)(x.numpy())
    assert got.exit_index.tolist() == expected.exit_index.tolist()


def test_every_batch_size_answers_like_one_by_one(tiny_file):
    model, path = tiny_file
    x = images(model, 7).numpy()
    session = EarlyExitSession(path, threads=1)
    thresholds = safe_thresholds(model, images(model, 7))
    alone = [session(x[i : i + 1], thresholds) for i in range(7)]
    for batch in (2, 3, 7):
        together = session(x[:batch], thresholds)
        assert together.exit_index.tolist() == [int(a.exit_index[0]) for a in alone[:batch]]
        np.testing.assert_allclose(together.logits, np.concatenate([a.logits for a in alone[:batch]]), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_pixels_never_leave_early_and_say_so(tiny_file, value):
    model, path = tiny_file
    x = images(model, 5).numpy()
    session = EarlyExitSession(path, threads=1)
    whole = session(x, 50.0)
    x[3, 1, 2, 5] = value
    got = session(x, 50.0)
    assert got.exit_index.tolist() == [0, 0, 0, 2, 0]
    assert np.isnan(got.logits[3]).all()
    rest = [0, 1, 2, 4]
    np.testing.assert_allclose(got.logits[rest], whole.logits[rest], atol=1e-6)


def test_one_early_exit(tmp_path):
    model = tiny(exits=("stage2",))
    path = export_onnx(model, tmp_path / "model.onnx")
    x = images(model, 5)
    assert len(assert_same(model, path, 5, safe_thresholds(model, x)).unique()) == 2
    session = onnxruntime.InferenceSession(str(path))
    with pytest.raises(Exception, match=r"threshold.*\n.*Got: 2 Expected: 1"):
        session.run(None, {"pixel_values": x.numpy(), "threshold": np.zeros(2, np.float32)})


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_length_of_the_threshold_is_checked_inside_the_file(tiny_file, length):
    model, path = tiny_file
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options)
    feed = {"pixel_values": images(model, 2).numpy(), "threshold": np.full(length, 0.5, np.float32)}
    if length in (1, 2):
        assert session.run(["exit_index"], feed)[0].shape == (2,)
    else:
        with pytest.raises(Exception, match="threshold_must_hold_1_number_or_2"):
            session.run(None, feed)


def test_model_is_not_touched(tmp_path):
    model = tiny().to(torch.bfloat16).train()
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert model.backbone.training
    assert all(p.dtype is torch.bfloat16 and p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    # The file computes in float32, with the same weights.
    full = model.float().eval()
    check = check_onnx(full, tmp_path / "model.onnx", images(full, 5), [0.0, 50.0], threads=1)
    assert check.same_exit == 1
    assert check.relative_difference < 1e-3


def test_loaded_checkpoint_exports_alike(tmp_path):
    model = build("resnet10_cifar", 32, {"width": 4}, ["layer1"])
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = EarlyExitWrapper.from_pretrained(tmp_path / "checkpoint")
    path = export_onnx(loaded, tmp_path / "model.onnx")
    check = check_onnx(model, path, images(model, 5), [0.0, safe_thresholds(model, images(model, 5)), 50.0], threads=1)
    assert check.samples == 15
    assert check.same_exit == 1
    assert check.relative_difference < 1e-3
