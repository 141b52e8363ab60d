"""recipes/studies/export_matrix.py and the table that is made of it."""

import export_matrix
import pytest
from pages import export

from erde_hub.errors import ExportError
from erde_hub.export import ExportCheck
from tests.fakes.onnx_models import images, tiny

ROW = {
    "float": {"bytes": 105_454, "onnxruntime": "yes", "openvino": "yes"},
    "float, batch 1": {"bytes": 99_000, "onnxruntime": "yes", "openvino": "50% of the samples take the same exit"},
    "int8": {"bytes": 50_400, "onnxruntime": "96%"},
    "int8, batch 1": {"refused": "no such operator"},
}


@pytest.fixture
def row(monkeypatch):
    row = {form: dict(own) for form, own in ROW.items()}
    monkeypatch.setattr(export, "load", lambda _: {"families": {"Bert": row}, "versions": {"openvino": "2026.4.1-22"}})
    return row


def test_table(row):
    header, _, line = export.export_table().splitlines()
    assert header.count("|") == line.count("|") == 11
    assert line == "| `Bert` | yes | yes | 96% | refused | yes | no | not tried | refused | 105 / 50 |"
    assert export.versions() == "OpenVINO 2026.4.1"


def test_reasons(row):
    assert export.reasons().splitlines() == [
        "- `Bert` (float, batch 1): OpenVINO: 50% of the samples take the same exit",
        "- `Bert` (int8, batch 1): no such operator",
    ]
    row["int8"]["onnxruntime"] = "89%"
    assert "- `Bert` (int8): onnxruntime: 89% of the answers are the same" in export.reasons()
    row["int8"]["onnxruntime"] = "90%"
    row["float, batch 1"]["openvino"] = "yes"
    del row["int8, batch 1"]
    assert export.reasons() == "All of them answer as torch does."


def test_times_have_columns_once_there_are_any(row):
    row["float"]["onnxruntime milliseconds"] = {}
    row["float, batch 1"]["onnxruntime milliseconds"] = {"exit 0": 0.5, "typical": 1.25, "all the way": 2}
    header, _, line = export.export_table().splitlines()
    assert header.endswith("| onnxruntime, ms | OpenVINO, ms |")
    assert line.endswith("| 0.50 / 1.25 / 2.00 | - |")


@pytest.mark.parametrize(
    ("check", "precision", "said"),
    [
        ((1e-6, 1.0, 1.0), "float", "yes"),
        ((2e-3, 1.0, 1.0), "float", "differs by 2.0e-03"),
        ((1e-6, 0.5, 1.0), "float", "50% of the samples take the same exit"),
        ((0.061, 1.0, 0.899), "int8", "89%"),
    ],
)
def test_what_is_said_of_a_file(monkeypatch, tmp_path, check, precision, said):
    difference, same_exit, same_answer = check
    monkeypatch.setattr(
        export_matrix, "check_onnx", lambda *_, **__: ExportCheck(difference, difference, same_exit, same_answer, 6)
    )
    inputs = {"pixel_values": images(tiny(), 2)}
    assert export_matrix.compare(tiny(), tmp_path, inputs, [0.5, 0.5], "openvino", precision) == said


def test_a_runtime_that_refuses_a_file(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise ExportError("no\n such operator")

    monkeypatch.setattr(export_matrix, "check_onnx", refuse)
    inputs = {"pixel_values": images(tiny(), 2)}
    assert export_matrix.compare(tiny(), tmp_path, inputs, [0.5, 0.5], "openvino", "float") == "no such operator"
