"""The file answers what the model answers, for every family, policy, threshold and batch size."""

import re

import numpy as np
import onnxruntime
import pytest
import torch

from erde_hub import EarlyExitWrapper
from erde_hub.export import EarlyExitSession, check_onnx, export_onnx
from tests.fakes.onnx_models import (
    MORE_FAMILIES,
    build,
    first_exits,
    images,
    levels,
    read_in,
    safe_thresholds,
    tiny,
)


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


def test_one_branch_per_exit(family_file):
    model, path = family_file
    assert len(levels(path)) == model.num_exits


def test_every_initializer_lies_where_it_is_used(family_file):
    """Outside its branch a weight is no constant to onnxruntime, which then packs and fuses nothing."""
    _, path = family_file
    for graph in levels(path):
        assert set(graph.initializers) <= read_in(graph)
    largest = max(
        (value for graph in levels(path) for value in graph.initializers.values()), key=lambda v: v.const_value.nbytes
    )
    assert largest.graph is not levels(path)[0]


def test_no_trace_of_the_machine(family_file):
    _, path = family_file
    content = path.read_bytes()
    assert not re.findall(rb"(?:site-packages|/home/|/root/|\.py\b|File \")", content)


@pytest.mark.families
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_more_families(family, tmp_path):
    model = build(*MORE_FAMILIES[family])
    check_all(model, export_onnx(model, tmp_path / "model.onnx"))


def test_fused_attention_of_five_axes(tmp_path):
    """As in hiera and twins: torch's exporter knows the operator with four axes only."""

    class Windows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fused_attn = True

        def forward(self, x):
            q = x.unflatten(1, (2, 1, 4))
            if self.fused_attn:
                return torch.nn.functional.scaled_dot_product_attention(q, q, q).flatten(1, 3)
            scores = (q @ q.transpose(-1, -2)) * q.shape[-1] ** -0.5
            return (scores.softmax(-1) @ q).flatten(1, 3)

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        Windows(), torch.nn.Linear(6, 6), Windows(), torch.nn.Flatten(), torch.nn.Linear(48, 5)
    )
    model = EarlyExitWrapper(network, exits=["1"], input_size=(8, 6), feature_format="NLC").eval()
    path = export_onnx(model, tmp_path / "model.onnx")
    assert network[0].fused_attn
    x = torch.randn(5, 8, 6)
    for threshold in (0.0, 50.0):
        check = check_onnx(model, path, x, [threshold], threads=1)
        assert check.same_exit == 1
        assert check.relative_difference < 1e-5


def test_zeros_padded_before_pooling(tmp_path):
    """As in BiT: onnxruntime pools over -infinity in their place; where all else is negative, they are the answer."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ConstantPad2d(1, 0.0), torch.nn.MaxPool2d(3, 2), torch.nn.Flatten(),
        torch.nn.Linear(64, 5),
    )  # fmt: skip
    network[0].bias.data -= 9
    model = EarlyExitWrapper(network, exits=["2"], input_size=(3, 9, 9)).eval()
    path = export_onnx(model, tmp_path / "model.onnx")
    check = check_onnx(model, path, torch.randn(5, 3, 9, 9), [0.0, 50.0], threads=1)
    assert check.same_exit == 1
    assert check.relative_difference < 1e-5


@pytest.mark.parametrize("policy", ["margin", pytest.param("confidence", marks=pytest.mark.long)])
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


def test_logits_that_overflow_answer_nothing(tmp_path):
    """Finite pixels whose logits become infinite or NaN: the file, alone and in a batch, does as the model does."""
    model = tiny()
    x = images(model, 5)
    x[1] *= 1e6
    x[3] *= 1e8
    weight = model.heads[0].fc.weight
    with torch.no_grad():  # one class at minus infinity, and one that is NaN or infinite as the products are summed
        weight[3], weight[5] = -3e33, 3e31 * weight[5].sign()
    raw = model(x, output_all_exits=True).exit_logits[0]
    assert raw.isfinite().all(1).tolist() == [True, False, True, False, True]
    expected = model(x, threshold=50.0)
    assert expected.exit_index.tolist() == [0, 1, 0, 1, 0]
    session = EarlyExitSession(export_onnx(model, tmp_path / "model.onnx"), threads=1)
    got = session(x.numpy(), 50.0)
    assert got.exit_index.tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_allclose(got.logits, expected.logits.detach().numpy(), rtol=1e-3, atol=1e-3)
    assert [int(session(x[i : i + 1].numpy(), 50.0).exit_index[0]) for i in range(5)] == [0, 1, 0, 1, 0]


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
