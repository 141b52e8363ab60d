"""What is in the file: nested branches that hold their own weights, skipped when all have left; metadata; no traces."""

import collections
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import erde_hub
from erde_hub.errors import (
    CheckpointWriteError,
    ConfigError,
    ExportError,
    InputTypeError,
    MissingDependencyError,
    ShapeError,
)
from erde_hub.export import EarlyExitSession, SessionOutput, export_onnx, nesting, onnx_file
from tests.fakes.onnx_models import TinyNet, images, levels, safe_thresholds, tiny


def executed(path, feed):
    """Counts the operators that onnxruntime ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options)
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return collections.Counter(event["args"]["op_name"] for event in ran)


def test_later_layers_do_not_run(tiny_file):
    model, path = tiny_file
    x = images(model, 5)
    thresholds = safe_thresholds(model, x)
    index = model(x, threshold=thresholds).exit_index
    assert sorted(index.unique().tolist()) == [0, 1, 2], "the fixture should use every exit"
    for threshold, convolutions in (([50, 50], 1), ([0, 50], 2), ([0, 0], 3)):
        ran = executed(path, {"pixel_values": x.numpy(), "threshold": np.array(threshold, np.float32)})
        assert ran["Conv"] == convolutions
    # One by one: each sample runs to its own exit.
    for i in range(5):
        feed = {"pixel_values": x[i : i + 1].numpy(), "threshold": np.array(thresholds, np.float32)}
        assert executed(path, feed)["Conv"] == int(index[i]) + 1
    # A batch runs as far as its last sample.
    feed = {"pixel_values": x[index < 2].numpy(), "threshold": np.array(thresholds, np.float32)}
    assert executed(path, feed)["Conv"] == 2


def test_file_passes_the_checker_and_says_what_it_takes(tiny_file):
    _, path = tiny_file
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path))
    described = [(v.name, v.type, v.shape) for v in (*session.get_inputs(), *session.get_outputs())]
    assert described == [
        ("pixel_values", "tensor(float)", ["batch", 3, 16, 16]),
        ("threshold", "tensor(float)", ["thresholds"]),
        ("logits", "tensor(float)", ["batch", 10]),
        ("exit_index", "tensor(int64)", ["batch"]),
    ]


def test_metadata(tiny_file):
    model, path = tiny_file
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert stored == {
        "erde_hub_version": erde_hub.__version__,
        "policy": "entropy",
        "threshold": [0.5, 0.5],
        "threshold_range": [0.0, "inf"],
        "exit_names": ["stage1", "stage2", "classifier"],
        "cumulative_macs": model.exit_table().cumulative_macs,
        "id2label": {str(i): f"class {i}" for i in range(10)},
        "input_size": [3, 16, 16],
        "preprocessing": model.config.preprocessing,
        "quantization": None,
        "prediction_sets": None,
        "input_names": ["pixel_values"],
        "batch_size": None,
        "max_length": None,
        "vocab_size": None,
        "pad_token_id": None,
        "tokenizer": None,
    }
    info = EarlyExitSession(path).info
    assert info.id2label[3] == "class 3"
    assert info.threshold_range == [0.0, float("inf")]
    assert info.num_early_exits == 2


@pytest.mark.parametrize("opset", [18, pytest.param(21, marks=pytest.mark.long)])
def test_operator_sets(opset, tmp_path):
    model = tiny()
    path = export_onnx(model, tmp_path / "model.onnx", opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    x = images(model, 5)
    thresholds = safe_thresholds(model, x)
    got = EarlyExitSession(path, threads=1)(x.numpy(), thresholds)
    assert got.exit_index.tolist() == model(x, threshold=thresholds).exit_index.tolist()


@pytest.mark.usefixtures("flat_is_known")
def test_large_files_keep_their_weights_beside(tiny_file, tmp_path, monkeypatch):
    model, small = tiny_file
    monkeypatch.setattr(nesting, "EXTERNAL_DATA_LIMIT", 1000)
    path = export_onnx(model, tmp_path / "export" / "model.onnx")
    first, second = sorted(p.name for p in path.parent.iterdir())
    assert first == "model.onnx"
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{8}\.data", second)
    external = [
        (graph.name, name)
        for graph in levels(path)
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    assert len({graph for graph, _ in external}) == 3, "each branch keeps its own weights there"
    moved = path.parent.rename(tmp_path / "moved") / "model.onnx"
    x = images(model, 5).numpy()
    for threshold in (0.0, 50.0):
        a, b = EarlyExitSession(small, threads=1)(x, threshold), EarlyExitSession(moved, threads=1)(x, threshold)
        np.testing.assert_array_equal(a.logits, b.logits)


@pytest.mark.usefixtures("flat_is_known")
def test_interrupted_export_leaves_the_old_file(tiny_file, tmp_path, monkeypatch):
    model, _ = tiny_file
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("flat_is_known")
def test_full_disk(tiny_file, tmp_path, monkeypatch):
    model, _ = tiny_file
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        export_onnx(model, path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


class NotInONNX(torch.nn.Module):
    def forward(self, x):
        return x if x.is_meta else x + torch.linalg.svdvals(x.mean((2, 3))[:, None])[:, :, None, None]


class Undecided(torch.nn.Module):
    def forward(self, x):
        return x if x.is_meta or x.sum() > 0 else -x


class CountsTheBatch(torch.nn.Module):
    def forward(self, x):
        return x * min(len(range(len(x))), 1)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (NotInONNX, r"TinyNet cannot be exported: torch\.onnx.*exit 'stage2' \(number 1 of 0 to 2\).*_linalg_svd"),
        (Undecided, r"TinyNet cannot be exported: torch\.export.*exit 'stage2' \(number 1 of 0 to 2\).*data-dependent"),
        (CountsTheBatch, r"TinyNet cannot be exported for batches of any size.*constant \(2\)"),
    ],
)
def test_what_cannot_be_exported_says_where_and_why(between, message, tmp_path, capfd):
    model = erde_hub.EarlyExitWrapper(TinyNet(between()), exits=["stage1", "stage2"], input_size=(3, 16, 16)).eval()
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    assert "def forward" not in capfd.readouterr().err


@pytest.mark.parametrize("policy", ["patience", "never", "always"])
def test_policies_that_have_no_file(policy, tmp_path):
    with pytest.raises(ExportError, match=f"policy '{policy}'.*entropy, confidence, margin"):
        export_onnx(tiny(policy=policy), tmp_path / "model.onnx")


def test_bad_arguments(tiny_file, tmp_path):
    model, _ = tiny_file
    with pytest.raises(InputTypeError, match="TinyNet: wrap it first"):
        export_onnx(model.backbone, tmp_path / "model.onnx")
    for opset in (17, 999, True, "20"):
        with pytest.raises(ConfigError, match=f"opset must be 18 to .* got {opset!r}"):
            export_onnx(model, tmp_path / "model.onnx", opset=opset)
    for batch_size in (0, 2, True, "1"):
        with pytest.raises(ConfigError, match=f"batch_size must be 1, or None .* got {batch_size!r}"):
            export_onnx(model, tmp_path / "model.onnx", batch_size=batch_size)
    with pytest.raises(ConfigError, match="is a folder"):
        export_onnx(model, tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnx_ir"])
def test_missing_packages(tiny_file, tmp_path, monkeypatch, package):
    model, _ = tiny_file
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {package}: pip install 'erde-hub\[onnx\]'"):
        export_onnx(model, tmp_path / "model.onnx")


def test_check_wants_something_to_compare(tiny_file):
    model, path = tiny_file
    with pytest.raises(ValueError, match="no sample"):
        onnx_file.check_onnx(model, path, images(model, 1)[:0])
    with pytest.raises(InputTypeError, match="must be a tensor"):
        onnx_file.check_onnx(model, path, images(model, 1).numpy())
    with pytest.raises(ShapeError, match="stage1, stage2, classifier and 10 classes, the model stage1, class"):
        onnx_file.check_onnx(tiny(("stage1",)), path, images(model, 1))


def answers(monkeypatch, spoil):
    """Lets files answer something else."""
    honest = EarlyExitSession.__call__

    def call(self, *given):
        out = honest(self, *given)
        logits = out.logits.copy()
        spoil(logits)
        return SessionOutput(logits, out.exit_index)

    monkeypatch.setattr(EarlyExitSession, "__call__", call)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_check_of_a_file_that_answers_no_numbers(tiny_file, monkeypatch, wrong):
    model, path = tiny_file
    x = images(model, 4)
    answers(monkeypatch, lambda logits: logits.fill(wrong))
    check = onnx_file.check_onnx(model, path, x, [0.0])
    assert check.max_difference == check.relative_difference == np.inf
    assert check.same_exit == 1
    if np.isnan(wrong):
        assert check.same_answer == 0


def test_check_of_one_answer_that_is_no_number(tiny_file, monkeypatch):
    model, path = tiny_file
    x = images(model, 4)
    best = model(x, threshold=0.0).logits[1].argmax()  # NaN there is what argmax finds
    answers(monkeypatch, lambda logits: logits[1].__setitem__(best, np.nan))
    check = onnx_file.check_onnx(model, path, x, [0.0])
    assert check.relative_difference == np.inf
    assert check.same_answer == 0.75


def test_check_where_both_answer_no_numbers(tiny_file):
    model, path = tiny_file
    x = images(model, 4)
    x[2, 0, 0, 0] = torch.nan
    check = onnx_file.check_onnx(model, path, x.requires_grad_(), [0.0, 50.0])
    assert 0 < check.relative_difference < 1e-5
    assert check.same_exit == check.same_answer == 1
    x = torch.full((2, 3, 16, 16), torch.nan)
    assert onnx_file.check_onnx(model, path, x).relative_difference == 0


def test_heads_under_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = tiny()
    name = next(name for name, module in model.backbone.named_modules() if isinstance(module, torch.nn.Conv2d))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=[f"backbone.{name}"], modules_to_save=["heads"])).eval()
    torch.nn.init.ones_(model.heads.active[0].fc.bias)
    check = onnx_file.check_onnx(
        model, export_onnx(model, tmp_path / "a.onnx"), torch.randn(8, *model.config.input_size)
    )
    assert check.same_exit == check.same_answer == 1
