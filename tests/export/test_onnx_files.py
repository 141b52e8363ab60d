"""Where a file goes: beside its place first, then moved in whole or not at all; what is refused before the work."""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import onnx
import pytest

from erde_hub.errors import (
    CheckpointWriteError,
    ConfigError,
    ErdeError,
    ExportError,
    InputTypeError,
    MissingDependencyError,
    UnknownNameError,
)
from erde_hub.export import EarlyExitSession, _runtime, _staging, export_onnx, flat, nesting
from tests.fakes.onnx_models import tiny

NAMES = ["m.onnx.data", "m.onnx"]


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


def fill(folder, old):
    for name in old:
        (folder / name).write_text("old")
    (folder / "other.data").write_text("somebody else's")


@pytest.mark.parametrize("old", [NAMES, ["m.onnx"], []])
@pytest.mark.parametrize("behind", [False, True])
def test_stopped_at_every_move(monkeypatch, tmp_path, old, behind):
    """What was there before, or all of the new, is there in the end: never an old file with new weights."""
    seen = []
    for move in range(1, 7):
        folder = tmp_path / str(move)
        folder.mkdir()
        fill(folder, old)
        before = content(folder)
        with monkeypatch.context() as patch, _staging.staging(folder / "m.onnx") as staged:
            for name in NAMES:
                (staged / name).write_text("new")
            moves = stop_at(patch, move, behind)
            try:
                _staging.move_in(staged, folder / "m.onnx", NAMES)
                stopped = False
            except Stopped:
                stopped = True
        after = content(folder)
        new = {**before, **dict.fromkeys(NAMES, "new")}
        if not stopped:
            assert after == new
            seen.append(next(moves) - 1)
            break
        last = move == len(old) + len(NAMES) + 1
        assert after == (new if last and behind else before), move
    assert seen == [len(old) + len(NAMES) + 1], "the last round is the one that nothing stops"


def test_stopped_again_while_putting_back_loses_nothing(monkeypatch, tmp_path):
    fill(tmp_path, NAMES)
    real = Path.replace

    def replace(self, target):
        if self.parent.name.startswith(".m.onnx") or self.parent.name == "before":
            raise Stopped
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with _staging.staging(tmp_path / "m.onnx") as staged:
        for name in NAMES:
            (staged / name).write_text("new")
        with pytest.raises(Stopped):
            _staging.move_in(staged, tmp_path / "m.onnx", NAMES)
    (kept,) = tmp_path.glob(".m.onnx-exporting-*")
    assert content(kept / "before") == dict.fromkeys(NAMES, "old")
    os.utime(kept, (1, 1))
    with _staging.staging(tmp_path / "m.onnx"):  # nor does the next export remove them
        assert content(kept / "before") == dict.fromkeys(NAMES, "old")


def abandoned(tmp_path, name="m.onnx", age=10 * _staging.ABANDONED):
    folder = tmp_path / f".{name}-exporting-abcd_123"
    folder.mkdir()
    (folder / name).write_text("half")
    os.utime(folder, (time.time() - age,) * 2)
    return folder


def test_what_a_killed_export_left_is_removed(tmp_path):
    left, other = abandoned(tmp_path), abandoned(tmp_path, "other.onnx")
    with _staging.staging(tmp_path / "m.onnx") as folder:
        assert not left.exists()
        assert folder.parent == tmp_path
        assert not list(folder.iterdir())
    assert list(tmp_path.iterdir()) == [other]


def test_what_may_be_in_use_stays(tmp_path):
    young = abandoned(tmp_path, age=0)
    with _staging.staging(tmp_path / "m.onnx"):
        pass
    assert young.is_dir()
    os.utime(young, (1, 1))
    held = _staging._hold(young)
    assert held is not None
    with _staging.staging(tmp_path / "m.onnx") as mine:
        os.utime(mine, (1, 1))
        with _staging.staging(tmp_path / "m.onnx"):  # another export of the same file, at the same time
            assert mine.is_dir()
    assert young.is_dir()
    os.close(held)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_lock_ends_with_its_process(tmp_path):
    child = os.fork()
    if child == 0:
        with _staging.staging(tmp_path / "m.onnx"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    os.utime(left, (1, 1))
    with _staging.staging(tmp_path / "m.onnx"):
        assert not left.exists()


@pytest.mark.usefixtures("flat_is_known")
def test_weights_of_the_file_itself_go_and_others_stay(tiny_file, tmp_path, monkeypatch):
    model, _ = tiny_file
    path = tmp_path / "model.onnx"
    beside = tmp_path / "model.onnx.data"
    beside.write_text("somebody's")
    export_onnx(model, path)
    assert beside.read_text() == "somebody's"
    with monkeypatch.context() as patch:
        patch.setattr(nesting, "EXTERNAL_DATA_LIMIT", 1000)
        with pytest.raises(CheckpointWriteError, match=r"model\.onnx\.data, which is there and does not belong"):
            export_onnx(model, path)
        assert beside.read_text() == "somebody's"
        assert not onnx.load(path).graph.name.startswith("until"), "the old file can still be read"
        beside.unlink()
        for _ in range(2):  # its own weights it replaces
            export_onnx(model, path)
            assert _staging.weights_of(path) == beside
    assert beside.stat().st_mode == path.stat().st_mode, "others may read one as they may read the other"
    export_onnx(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


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
        ("a" * 300, CheckpointWriteError, "cannot write aaa.*too long"),
        ("a" * 250, CheckpointWriteError, "cannot write aaa.*too long"),
        ("file/m.onnx", CheckpointWriteError, r"cannot write into 'file': 'file' is a file and no folder"),
        ("file/b/m.onnx", CheckpointWriteError, r"cannot write into 'file/b': 'file' is a file and no folder"),
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
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_staging.tempfile, "mkdtemp", refuse)
    with pytest.raises(CheckpointWriteError, match=r"Permission denied.*what was there is unchanged"):
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
