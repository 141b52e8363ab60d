"""What recipes/studies/support_matrix.py writes into the column of ONNX files."""

import math

import pytest
import support_matrix

import erde_hub.export
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
