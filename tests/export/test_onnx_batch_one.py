"""Files for one sample: every shape is fixed, and answers are those of the file for any batch."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from erde_hub.errors import ShapeError
from erde_hub.export import EarlyExitSession, check_onnx, export_onnx
from tests.fakes.onnx_models import dynamic_parts, images, levels, safe_thresholds, tiny
from tests.fakes.texts import make_tokenizer


def test_no_axis_is_free(one_sample_file, tiny_file):
    _, path = one_sample_file
    onnx.checker.check_model(str(path), full_check=True)
    assert dynamic_parts(path) == []
    assert len(levels(path)) == 3
    session = onnxruntime.InferenceSession(str(path))
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {"pixel_values": [1, 3, 16, 16], "threshold": [2], "logits": [1, 10], "exit_index": [1]}
    assert any("pixel_values" in fault for fault in dynamic_parts(tiny_file[1])), "of the file for any batch"


def test_nothing_is_merged(one_sample_file):
    kinds = {node.op_type for graph in levels(one_sample_file[1]) for node in graph}
    assert not kinds & {"Where", "ReduceMin", "Or", "Gather"}


def test_answers_of_a_batch(one_sample_file, tiny_file):
    model, path = one_sample_file
    x = images(model, 5)
    thresholds = safe_thresholds(model, x)
    assert sorted(model(x, threshold=thresholds).exit_index.unique().tolist()) == [0, 1, 2]
    check = check_onnx(model, path, x, [0.0, thresholds, 50.0], threads=1)
    assert check.same_exit == check.same_answer == 1
    assert check.max_difference < 1e-4
    one, several = EarlyExitSession(path, threads=1), EarlyExitSession(tiny_file[1], threads=1)
    assert one.info.batch_size == 1
    assert several.info.batch_size is None
    for threshold in (0.7, 2.0, None):
        assert one(x.numpy(), threshold).exit_index.tolist() == several(x.numpy(), threshold).exit_index.tolist()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 18, 3), dtype=np.uint8)
    np.testing.assert_allclose(one(pixels, 1.0).logits, several(pixels, 1.0).logits, atol=1e-5)
    assert one(x[:0].numpy()).logits.shape == (0, 10)


def test_bad_pixels(one_sample_file):
    model, path = one_sample_file
    x = images(model, 3).numpy()
    x[1, 0, 0, 0] = np.nan
    got = EarlyExitSession(path, threads=1)(x, 50.0)
    assert got.exit_index.tolist() == [0, 2, 0]
    assert np.isnan(got.logits[1]).all()
    assert np.isfinite(got.logits[[0, 2]]).all()


def test_int8(one_sample_file, tmp_path):
    model, _ = one_sample_file
    data = images(model, 16, seed=5).split(8)
    path = export_onnx(model, tmp_path / "int8.onnx", batch_size=1, calibration_data=data)
    assert dynamic_parts(path) == []
    check = check_onnx(model, path, images(model, 8, seed=7), [0.0, 50.0], threads=1)
    assert check.same_exit == 1
    assert 0 < check.relative_difference < 0.1


@pytest.mark.slow
def test_a_batch_that_the_network_counts(tmp_path):
    """What cannot be exported for any batch can for one."""

    class CountsTheBatch(torch.nn.Module):
        def forward(self, x):
            return x * min(len(range(len(x))), 1)

    model = tiny()
    model.backbone.between = CountsTheBatch()
    path = export_onnx(model, tmp_path / "model.onnx", batch_size=1)
    assert check_onnx(model, path, images(model, 3), [0.0, 50.0], threads=1).same_exit == 1


@pytest.mark.slow
def test_texts(text_file, tmp_path):
    model, several = text_file
    path = export_onnx(model, tmp_path / "one.onnx", batch_size=1, tokenizer=make_tokenizer())
    assert dynamic_parts(path) == []
    one, several = EarlyExitSession(path, threads=1), EarlyExitSession(several, threads=1)
    texts = ["good film", "a very long and not short plot", "bad " * 60]
    assert one.tokenize(texts)["input_ids"].shape == (3, 40)
    for threshold in (0.0, 50.0):
        np.testing.assert_allclose(one(texts, threshold).logits, several(texts, threshold).logits, atol=1e-5)
    short = {"input_ids": np.array([[2, 4, 6, 3]])}
    np.testing.assert_allclose(one(short, 0.0).logits, several(short, 0.0).logits, atol=1e-5)
    with pytest.raises(ShapeError, match="texts must have 1 to 40 tokens, got 41"):
        one({"input_ids": np.ones((1, 41), int)})


@pytest.mark.slow
def test_texts_in_int8(text_model_and_flat, tmp_path):
    model, _ = text_model_and_flat
    data = [{"input_ids": torch.randint(0, 14, (4, 40)), "attention_mask": torch.ones(4, 40, dtype=torch.long)}]
    path = export_onnx(model, tmp_path / "one.onnx", batch_size=1, calibration_data=data)
    one = {key: value[:1] for key, value in data[0].items()}
    assert check_onnx(model, path, one, [0.0, 50.0], threads=1).same_exit == 1
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for graph in levels(tmp_path / "optimised.onnx") for node in graph)
    assert kinds["MatMulIntegerToFloat"] >= 6, "layers of the encoder that int8 instructions compute"
