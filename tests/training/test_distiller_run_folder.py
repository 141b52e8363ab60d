from __future__ import annotations

import atexit
import signal

import pytest

from erde_hub.errors import CheckpointWriteError, ConfigError, RunExistsError
from erde_hub.training import open_run_folder, run_folder
from erde_hub.training.run_folder import holds_run, newest_run
from tests.fakes.processes import CONTEXT


def test_automatic_folders_count_up_and_the_newest_is_resumed(tmp_path):
    for number in (1, 2, 3):
        assert open_run_folder(None, "digits", root=tmp_path) == tmp_path / f"digits-{number}"
    (tmp_path / "digits-10").mkdir()
    (tmp_path / "digits-x").mkdir()
    (tmp_path / "digits-other-77").mkdir()
    assert open_run_folder(None, "digits", root=tmp_path) == tmp_path / "digits-11"
    assert newest_run(tmp_path, "digits") == tmp_path / "digits-11"
    assert open_run_folder(None, "digits", root=tmp_path, resume=True) == tmp_path / "digits-11"
    with pytest.raises(ConfigError, match="nothing to resume"):
        open_run_folder(None, "cifar", root=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="config name"):
        open_run_folder(None, "a/b", root=tmp_path)


@pytest.mark.parametrize(
    "left", ["results.json", "model.safetensors", "checkpoints/step-000010/manifest.json", "teacher/config.json"]
)
def test_a_folder_with_a_run_is_not_taken_by_accident(tmp_path, left):
    folder = tmp_path / "run"
    (folder / left).parent.mkdir(parents=True)
    (folder / left).write_text("{}")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match=r"--resume.*--overwrite_output_dir") as error:
        open_run_folder(folder, "digits")
    assert isinstance(error.value, FileExistsError)
    assert open_run_folder(folder, "digits", resume=True) == folder
    assert (folder / left).exists()
    assert open_run_folder(folder, "digits", overwrite=True) == folder
    assert not (folder / left).exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert open_run_folder(folder, "digits") == folder


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path):
    folder = tmp_path / "run"
    left = ["split.json", "results.json", "static/static_student.json", "static/checkpoints/step-000001/state.pt",
            "logs/erde_hub/events", "teacher/split.json", "teacher/config.json", "records.safetensors"]  # fmt: skip
    for name in [*left, "static/notes.txt", "notes.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    open_run_folder(folder, "digits", overwrite=True)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == [
        ".lock", "notes.txt", "static", "static/notes.txt",
    ]  # fmt: skip
    (folder / "static" / "static_student.json").write_text("{}")
    with pytest.raises(RunExistsError):
        open_run_folder(folder, "digits")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointWriteError, match=r"output_dir '.*file/run' cannot be written.*another --output_dir"):
        open_run_folder(tmp_path / "file" / "run", "digits")
    with pytest.raises(CheckpointWriteError, match=r"output_dir '.*file' cannot be written"):
        open_run_folder(None, "digits", root=tmp_path / "file")


@pytest.mark.parametrize("part", [".", "teacher", "static"])
def test_a_run_that_had_begun_can_be_resumed_before_its_first_checkpoint(tmp_path, part):
    folder = tmp_path / "run"
    (folder / part / "checkpoints").mkdir(parents=True)
    assert open_run_folder(folder, "digits", resume=True) == folder
    assert open_run_folder(folder, "digits") == folder  # nothing would be lost
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to resume"):
        open_run_folder(tmp_path / "empty", "digits", resume=True)


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        open_run_folder(tmp_path / "file", "digits")
    with pytest.raises(ConfigError, match="nothing to resume"):
        open_run_folder(tmp_path / "new", "digits", resume=True)
    with pytest.raises(ConfigError, match="contradict"):
        open_run_folder(tmp_path / "new", "digits", resume=True, overwrite=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("not a run")
    assert not holds_run(tmp_path / "docs")
    open_run_folder(tmp_path / "docs", "digits", overwrite=True)
    assert (tmp_path / "docs" / "README.md").exists()


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "images" / "cats").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no folder of a run, it holds 'cats'"):
            open_run_folder(tmp_path / "images", "digits", overwrite=overwrite)
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["cats"]


def hold(folder, held):
    open_run_folder(folder, "digits")
    held.set()
    signal.pause()


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder._hold, "__defaults__", (0.5,))
    held = CONTEXT.Event()
    holder = CONTEXT.Process(target=hold, args=(tmp_path, held))
    holder.start()
    try:
        assert held.wait(60)
        with pytest.raises(ConfigError, match="another process trains in"):
            open_run_folder(tmp_path, "digits")
    finally:
        holder.kill()
        holder.join()
    assert open_run_folder(tmp_path, "digits") == tmp_path
    assert open_run_folder(tmp_path, "digits") == tmp_path, "the same process may go on"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def open_and_end(folder):
    assert list(open_run_folder(folder, "digits").iterdir()) == [folder / ".lock"]
    atexit._run_exitfuncs()  # as an interpreter does that ends; one that was forked does not


def test_a_process_that_ends_leaves_no_lock(tmp_path):
    process = CONTEXT.Process(target=open_and_end, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not list(tmp_path.iterdir())
