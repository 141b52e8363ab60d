"""Files that replace others: whole, and with the rights of any new file."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from erde_hub._files import replacing, set_default_mode, write_text
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
    with pytest.raises(CheckpointWriteError, match=r"could not write b\.txt.*Check that the folder exists"):
        write_text(tmp_path / "nowhere" / "b.txt", "words")
