"""Where a file goes: beside its place first, then moved in whole or not at all; what is refused before the work."""

import copy
import itertools
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from erde_hub.errors import (
    CheckpointWriteError,
    ConfigError,
    ErdeError,
    ExportError,
    InputTypeError,
    MissingDependencyError,
    UnknownNameError,
)
from erde_hub.export import EarlyExitSession, _runtime, export_onnx, flat, nesting
from tests.fakes.kills import run_killed
from tests.fakes.onnx_models import images, tiny


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


class Stopped(BaseException):
    """As Ctrl-C: not an Exception."""


def stop_at(monkeypatch, move, behind):
    """Every move from this one on is stopped, before or behind its effect; returns what counts them."""
    moves = itertools.count(1)
    for name in ("replace", "rename"):
        real = getattr(Path, name)

        def moving(self, target, real=real):
            number = next(moves)
            if number == move and not behind:
                raise Stopped
            result = real(self, target)
            if number == move:
                raise Stopped
            return result

        monkeypatch.setattr(Path, name, moving)
    return moves


@pytest.mark.usefixtures("flat_is_known")
@pytest.mark.parametrize("old", ["large", "small", None])
@pytest.mark.parametrize("behind", [False, True])
def test_stopped_at_every_move(tiny_file, monkeypatch, tmp_path, old, behind):
    """What was there before, or all of the new, is there in the end: never an old file with new weights."""
    model, _ = tiny_file
    for move in (1, 2):
        folder = tmp_path / str(move)
        folder.mkdir()
        path = folder / "m.onnx"
        (folder / "other.data").write_text("somebody else's")
        if old is not None:
            with monkeypatch.context() as patch:
                patch.setattr(nesting, "EXTERNAL_DATA_LIMIT", 1000 if old == "large" else 10**9)
                export_onnx(model, path)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(nesting, "EXTERNAL_DATA_LIMIT", 1000)
            stop_at(patch, move, behind)
            with pytest.raises(Stopped):
                export_onnx(model, path)
        after = {file.name: file.read_bytes() for file in folder.iterdir()}
        if move == 2 and behind:  # the new one is complete; the weights of the old one may stay
            assert before.items() - {("m.onnx", before.get("m.onnx"))} <= after.items()
            assert len(after) == len(before | {"m.onnx": b""}) + 1
        else:
            assert after == before
        if "m.onnx" in after:
            assert EarlyExitSession(path).info.num_early_exits == 2


@pytest.mark.slow
@pytest.mark.parametrize("old_is_large", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_kill_at_any_point_leaves_one_of_two_large_files(tiny_file, tiny_flat, monkeypatch, tmp_path, old_is_large):
    """Graph and weights, in two files, are of one export."""
    model, changed = copy.deepcopy(tiny_file[0]), onnx.load_from_string(tiny_flat)
    for tensor in changed.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.5), tensor.name))
    flats = {"old": tiny_flat, "new": changed.SerializeToString()}
    x, thresholds = images(model, 4).numpy(), {"old": 0.25, "new": 0.75}

    def export(which, path, large=True):
        monkeypatch.setattr(flat, "flat_model", lambda *_: ir.from_proto(onnx.load_from_string(flats[which])))
        monkeypatch.setattr(nesting, "EXTERNAL_DATA_LIMIT", 1000 if large else 10**9)
        model.threshold = thresholds[which]
        export_onnx(model, path)

    expected = {}
    for which in flats:
        export(which, tmp_path / f"{which}.onnx", large=False)
        expected[which] = EarlyExitSession(tmp_path / f"{which}.onnx", threads=1)(x, 0.0).logits
    path, found, point, done = tmp_path / "large" / "m.onnx", set(), 0, False
    path.parent.mkdir()
    while not done:
        point += 1
        export("old", path, old_is_large)
        done = run_killed(lambda: export("new", path), point)
        session = EarlyExitSession(path, threads=1)
        (which,) = (name for name, value in thresholds.items() if session.info.threshold == [value] * 2)
        np.testing.assert_array_equal(session(x, 0.0).logits, expected[which])
        found.add(which)
    assert found == {"old", "new"}
    assert point > 3
    assert len(list(path.parent.iterdir())) == 2, "what killed exports left is removed by the next one"


@pytest.mark.usefixtures("flat_is_known")
def test_a_file_of_its_own_weights_replaces_theirs_and_others_stay(tiny_file, tmp_path, monkeypatch):
    model, _ = tiny_file
    path, foreign = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    foreign.write_text("somebody's")
    export_onnx(model, path)
    assert nesting.weights_of(path) is None
    with monkeypatch.context() as patch:
        patch.setattr(nesting, "EXTERNAL_DATA_LIMIT", 1000)
        names = set()
        for _ in range(2):  # the weights of the file before go
            export_onnx(model, path)
            weights = nesting.weights_of(path)
            assert {file.name for file in tmp_path.iterdir()} == {path.name, foreign.name, weights.name}
            names.add(weights.name)
        assert len(names) == 2
    killed = path.with_name(f"{path.name}.0123abcd.data")  # the weights of an export that did not end
    killed.write_bytes(weights.read_bytes())
    assert weights.stat().st_mode == path.stat().st_mode, "others may read one as they may read the other"
    export_onnx(model, path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, foreign.name}
    assert foreign.read_text() == "somebody's"


@pytest.fixture
def nothing_is_traced(monkeypatch):
    def trace(*_):
        raise AssertionError("this takes time, the check was to come first")

    monkeypatch.setattr(flat, "flat_model", trace)


@pytest.mark.usefixtures("nothing_is_traced")
@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, InputTypeError, "path must be text or a pathlib.Path.* got None"),
        (5, InputTypeError, "path must be text.* got 5"),
        (b"x.onnx", InputTypeError, "path must be text.* got b'x.onnx'"),
        ("a\0b", InputTypeError, "path must be text"),
        ("", ConfigError, "is a folder"),
        ("a" * 300, CheckpointWriteError, "could not write aaa.*too long"),
        ("file/m.onnx", CheckpointWriteError, "could not write file: .*File exists"),
        ("file/b/m.onnx", CheckpointWriteError, "could not write b: .*Not a directory: 'file/b'"),
    ],
)
def test_places_that_cannot_be(tiny_file, tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with pytest.raises(error, match=message):
        export_onnx(tiny_file[0], path)
    assert content(tmp_path) == {"file": "x"}


@pytest.mark.usefixtures("nothing_is_traced")
def test_a_place_that_cannot_be_written(tiny_file, tmp_path, monkeypatch):
    def refuse(path, *arguments, **kwargs):
        if path.name.startswith(".saving-"):
            raise PermissionError(13, "Permission denied")
        return make(path, *arguments, **kwargs)

    make = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointWriteError, match=r"Permission denied.*what was there before is untouched"):
        export_onnx(tiny_file[0], tmp_path / "a" / "b" / "model.onnx")
    assert not list(tmp_path.iterdir()), "folders that were made for it go again"


def test_errors_of_the_work_itself_keep_their_name(tiny_file, tmp_path, monkeypatch):
    def missing(*_):
        raise FileNotFoundError(2, "no images/1.png")

    monkeypatch.setattr(flat, "flat_model", missing)
    with pytest.raises(FileNotFoundError, match="no images/1") as caught:
        export_onnx(tiny_file[0], tmp_path / "new" / "model.onnx")
    assert not isinstance(caught.value, ErdeError)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_traced")
def test_settings_are_checked_first(tiny_file, tmp_path, monkeypatch):
    model, path = tiny_file[0], tmp_path / "model.onnx"
    with pytest.raises(UnknownNameError, match="calibration method 'minmaxx'; did you mean 'minmax'"):
        export_onnx(model, path, calibration_method="minmaxx")
    with pytest.raises(ConfigError, match=r"'entropy' says how int8 .*: give calibration_data too"):
        export_onnx(model, path, calibration_method="entropy")
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(MissingDependencyError, match="int8 needs onnxruntime"):
        export_onnx(model, path, calibration_data=[])
    other = tiny()
    other.set_preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=(12, 16))
    with pytest.raises(ConfigError, match=r"makes images of shape \(3, 12, 16\), .* wrapped for \(3, 16, 16\)"):
        export_onnx(other, path)
    other.set_preprocessing(mean=(0.5,), std=(0.5,), size=(16, 16))
    with pytest.raises(ConfigError, match=r"makes images of shape \(1, 16, 16\)"):
        export_onnx(other, path)
    assert not list(tmp_path.iterdir())


def test_operator_sets_are_those_that_onnxruntime_loads(monkeypatch):
    runtime = _runtime._installed()
    assert _runtime._takes(runtime, 20)
    assert not _runtime._takes(runtime, 999)
    monkeypatch.setattr(_runtime, "_takes", lambda _, opset: opset <= 21)
    assert _runtime.check_opset(21, 18, 30) == 21
    said = f"opset must be 18 to 21, which the installed onnxruntime {runtime.__version__} loads, got 22"
    with pytest.raises(ConfigError, match=said):
        _runtime.check_opset(22, 18, 30)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert _runtime.check_opset(22, 18, 30) == 22
    with pytest.raises(ConfigError, match=r"18 to 30 \(onnx knows versions up to 30\), got 31"):
        _runtime.check_opset(31, 18, 30)


@pytest.mark.usefixtures("flat_is_known")
def test_a_file_is_loaded_before_it_replaces_another(tiny_file, tmp_path, monkeypatch):
    model, path = tiny_file[0], tmp_path / "model.onnx"
    path.write_text("old")
    save = onnx.save

    def spoil(proto, *args, **kwargs):
        for node in proto.graph.node:
            if node.op_type == "Conv":  # valid ONNX, and nothing that anybody can run
                node.domain, node.op_type = "nobody", "Konv"
        proto.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
        return save(proto, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(onnx, "save", spoil)
        with pytest.raises(ExportError, match=r"onnxruntime .* does not load what was exported with opset 20: .*obody"):
            export_onnx(model, path)
    assert content(tmp_path) == {"model.onnx": "old"}
    export_onnx(model, path)
    assert EarlyExitSession(path).info.num_early_exits == 2


@pytest.mark.usefixtures("flat_is_known")
def test_the_name_says_nothing_of_the_format(tiny_file, tmp_path):
    """onnx would write text into a file of that name, which onnxruntime cannot read."""
    path = export_onnx(tiny_file[0], tmp_path / "model.json")
    assert EarlyExitSession(path).info.num_early_exits == 2
