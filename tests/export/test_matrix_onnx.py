"""What recipes/studies/support_matrix.py writes into the column of ONNX files."""

import math

import pytest
import support_matrix

import erde_hub.export
from erde_hub.errors import ExportError
from erde_hub.export import ExportCheck
from tests.fakes.onnx_models import images


@pytest.mark.parametrize(
    ("difference", "same_exit", "same_answer", "said"),
    [
        (1e-6, 1.0, 1.0, "yes"),
        (1e-6, 0.5, 1.0, "50% of the samples take the same exit"),
        (2e-3, 1.0, 1.0, "differs by 2.0e-03"),
        (math.inf, 1.0, 1.0, "differs by inf"),
        (1e-6, 1.0, 0.5, "50% of the samples get the same class"),
    ],
)
def test_a_file_that_answers_otherwise(tiny_file, monkeypatch, difference, same_exit, same_answer, said):
    model, _ = tiny_file
    check = ExportCheck(difference, difference, same_exit, same_answer, support_matrix.BATCH)
    monkeypatch.setattr(erde_hub.export, "export_onnx", lambda _, path: path)
    monkeypatch.setattr(erde_hub.export, "check_onnx", lambda *_, **__: check)
    assert support_matrix._onnx(model, {"pixel_values": images(model, support_matrix.BATCH)}) == said


def test_a_network_that_exports_for_one_sample_only(tiny_file, monkeypatch):
    model, _ = tiny_file
    sizes = []

    def export(_, path, batch_size=None):
        sizes.append(batch_size)
        if batch_size is None:
            raise ExportError("cannot be exported for batches of any size: try batch_size=1")
        return path

    monkeypatch.setattr(erde_hub.export, "export_onnx", export)
    monkeypatch.setattr(erde_hub.export, "check_onnx", lambda *_, **__: ExportCheck(0.0, 0.0, 1.0, 1.0, 6))
    inputs = {"pixel_values": images(model, support_matrix.BATCH)}
    assert support_matrix._onnx(model, inputs) == "one sample only"
    assert sizes == [None, 1]
