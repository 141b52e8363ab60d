"""Files that replace others: whole, and with the rights of any new file."""

import contextlib
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erde_hub._files import replacing, replacing_all, replacing_folder, set_default_mode, write_text
from erde_hub.errors import CheckpointWriteError


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_mode_is_that_of_a_new_file(tmp_path, umask, monkeypatch):
    monkeypatch.setattr(os, "umask", None)  # reading it means setting it, for every thread
    text, tensors = tmp_path / "a.txt", tmp_path / "b.safetensors"
    write_text(text, "words")
    save_file({"x": torch.ones(2)}, tensors)
    tensors.chmod(0o600)
    set_default_mode(tensors)
    with replacing(tmp_path / "c.safetensors") as temporary:
        save_file({"x": torch.ones(2)}, temporary)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o666 & ~umask}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_block_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first")

    def fail(temporary):
        temporary.write_text("second")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        fail(temporary)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointWriteError, match=r"could not write b\.txt.*Check that the folder '.*nowhere' exists"):
        write_text(tmp_path / "nowhere" / "b.txt", "words")


def test_several_files_are_moved_together_and_the_last_one_last(tmp_path, monkeypatch):
    (tmp_path / "index").write_text("old")
    moved, replace = [], os.replace

    def note(source, target, *args, **kwargs):
        moved.append(os.path.basename(target))  # noqa: PTH119 - what pathlib calls
        return replace(source, target, *args, **kwargs)

    monkeypatch.setattr(os, "replace", note)
    with replacing_all(tmp_path, last="index") as staging:
        for name in ("z", "index", "a"):
            (staging / name).write_text("new")
        assert (tmp_path / "index").read_text() == "old"
    assert moved == ["a", "z", "index"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "index", "z"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}


@pytest.mark.parametrize("point", range(1, 7))
def test_an_interruption_leaves_the_files_of_one_save(point, tmp_path, monkeypatch):
    for name in ("index", "apart"):
        (tmp_path / name).write_text("old")
    count, replace = 0, os.replace

    def stop(*args, **kwargs):
        nonlocal count
        count += 1
        if count == point:
            raise KeyboardInterrupt
        return replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", stop)
    with (
        contextlib.suppress(KeyboardInterrupt),
        replacing_all(tmp_path, last="index", apart="apart") as staging,
    ):
        for name in ("z", "index", "apart", "b"):
            (staging / name).write_text("new")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    new = dict.fromkeys(("z", "index", "apart", "b"), "new")
    assert found == ({"index": "old", "apart": "old"} if point < 5 else new)


def test_a_folder_appears_whole_and_replaces_another(tmp_path):
    target = tmp_path / "a" / "b"
    for text in ("old", "new"):
        with pytest.raises(CheckpointWriteError, match="could not write b"), replacing_folder(target) as staging:
            (staging / "nowhere" / "half").write_text(text)
        with replacing_folder(target) as staging:
            (staging / "inside").mkdir()
            (staging / "inside" / "file").write_text(text)
        assert [path.name for path in target.parent.iterdir()] == ["b"]
        assert (target / "inside" / "file").read_text() == text


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    target, rename = tmp_path / "a", Path.rename
    with replacing_folder(target) as staging:
        (staging / "old").touch()

    def fail_once(path, other):
        if other == target:
            monkeypatch.undo()
            raise OSError("input/output error")
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointWriteError, match="is untouched"), replacing_folder(target) as staging:
        (staging / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    half = tmp_path / ".saving-abcd"
    half.write_text("half")
    (tmp_path / ".saving-folder").mkdir()
    with replacing_all(tmp_path, last="b") as staging:
        assert half.exists(), "another process may be writing it"
        assert not (tmp_path / ".saving-folder").exists(), "no process holds it"
        os.utime(half, (1, 1))
        with replacing_folder(tmp_path / "c") as other, replacing_folder(tmp_path / "d"):
            assert not half.exists(), "it is older than a day"
            assert staging.exists(), "this process holds it"
            assert other.exists(), "this process holds it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


def test_one_look_for_leftovers_per_folder(tmp_path):
    for name in "ab":
        left = tmp_path / f".saving-{name}"
        left.write_text("half")
        os.utime(left, (1, 1))
        write_text(tmp_path / "words.txt", "words")
        assert left.exists() == (name == "b")
