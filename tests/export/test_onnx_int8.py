"""int8: quantised flat, nested afterwards."""

import logging

import numpy as np
import onnxruntime.quantization
import pytest
import torch

from erde_hub.errors import DataError, ExportError, InputTypeError, ShapeError, UnknownNameError
from erde_hub.export import EarlyExitSession, export_onnx
from tests.fakes.onnx_models import images, levels, read_in


@pytest.fixture
def int8_file(tiny_file, flat_is_known, tmp_path):
    model, _ = tiny_file
    handlers = list(logging.getLogger().handlers)
    path = export_onnx(model, tmp_path / "int8.onnx", calibration_data=images(model, 32, seed=5).split(8))
    assert logging.getLogger().handlers == handlers
    return model, path


def test_every_branch_is_quantised(int8_file):
    """Quantising a nested file would leave everything behind exit 0 in float."""
    _, path = int8_file
    for graph in levels(path):
        kinds = [node.op_type for node in graph]
        assert kinds.count("QuantizeLinear") >= 1
        convolutions = [node for node in graph if node.op_type == "Conv"]
        assert convolutions
        for node in convolutions:
            for value in node.inputs[:2]:
                # Fused only with a DequantizeLinear of the same graph.
                assert value.producer().op_type == "DequantizeLinear"
                assert value.producer().graph is graph
    assert EarlyExitSession(path).info.quantization == "int8"


def test_decisions_stay_in_float(int8_file):
    _, path = int8_file
    for graph in levels(path):
        for node in graph:
            if node.op_type in ("LogSoftmax", "Exp", "Less", "If"):
                assert all(v.producer() is None or v.producer().op_type != "DequantizeLinear" for v in node.inputs)


def test_weights_are_bytes_and_lie_in_their_branches(int8_file):
    _, path = int8_file
    for graph in levels(path):
        assert set(graph.initializers) <= read_in(graph)
        for value in graph.initializers.values():
            if value.const_value.nbytes > 600:
                assert value.dtype.itemsize == 1


def test_answers_stay_close(int8_file):
    model, path = int8_file
    x = images(model, 32, seed=7)
    session = EarlyExitSession(path, threads=1)
    for threshold, index in ((0.0, 2), (50.0, 0)):
        expected = model(x, threshold=threshold).logits
        got = session(x.numpy(), threshold)
        assert (got.exit_index == index).all()
        difference = (torch.from_numpy(got.logits) - expected).abs().max() / expected.abs().max()
        assert 0 < difference < 0.1


def test_bad_pixels_are_not_rounded_away(int8_file):
    model, path = int8_file
    x = images(model, 3).numpy()
    x[1, 0, 0, 0] = np.nan
    got = EarlyExitSession(path, threads=1)(x, 50.0)
    assert got.exit_index.tolist() == [0, 2, 0]
    assert np.isnan(got.logits[1]).all()
    assert np.isfinite(got.logits[[0, 2]]).all()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], DataError, "holds no image"),
        ([torch.zeros(0, 3, 16, 16)], DataError, "holds no image"),
        ([torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8, 8)], ShapeError, r"batch 1 must have shape \(N, 3, 16, 16\)"),
        ([torch.zeros(2, 3, 16, 16, dtype=torch.uint8)], InputTypeError, "batch 0 must hold normalised floats"),
        ([torch.full((2, 3, 16, 16), torch.nan)], DataError, "batch 0 holds NaN"),
        ([{"image": 1}], InputTypeError, r"has no 'pixel_values', it has \['image'\]"),
        (torch.zeros, InputTypeError, "must be an iterable of batches"),
        ("digits", InputTypeError, "must be an iterable of batches, got str"),
    ],
)
def test_calibration_data_are_checked_first(tiny_file, tmp_path, data, error, message):
    model, _ = tiny_file
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "model.onnx", calibration_data=data)


@pytest.mark.usefixtures("flat_is_known")
def test_calibration_methods(tiny_file, tmp_path):
    model, _ = tiny_file
    data = [{"pixel_values": images(model, 8)}, (images(model, 8, seed=3), torch.zeros(8))]
    path = export_onnx(model, tmp_path / "model.onnx", calibration_data=data, calibration_method="percentile")
    assert EarlyExitSession(path).info.quantization == "int8"
    with pytest.raises(UnknownNameError, match="'min'; did you mean 'minmax'"):
        export_onnx(model, tmp_path / "model.onnx", calibration_data=data, calibration_method="min")


@pytest.mark.usefixtures("flat_is_known")
def test_what_cannot_be_quantised(tiny_file, tmp_path, monkeypatch):
    model, _ = tiny_file

    def fail(*_args, **_kwargs):
        raise ValueError("unknown tensor")

    monkeypatch.setattr(onnxruntime.quantization, "quantize_static", fail)
    with pytest.raises(ExportError, match=r"cannot quantise.*unknown tensor.*leaving calibration_data out"):
        export_onnx(model, tmp_path / "model.onnx", calibration_data=[images(model, 2)])
