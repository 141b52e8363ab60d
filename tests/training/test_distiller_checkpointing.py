from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch

from erde_hub.errors import CheckpointError, CheckpointWriteError
from erde_hub.training import Distiller
from erde_hub.training import checkpointing as cp
from tests.fakes.training import TinyExits, make_args, make_data


def write_some(folder):
    cp.save_tensors(folder / "model.safetensors", {"a": torch.arange(2000.0), "b": torch.ones(3, dtype=torch.int64)})
    (folder / "trainer_state.json").write_text("{}")
    torch.save({"x": 1}, folder / "state.pt")


@pytest.fixture
def root(tmp_path):
    for step in (10, 20):
        cp.write_checkpoint(tmp_path / "checkpoints", step, write_some)
    return tmp_path / "checkpoints"


def test_the_newest_complete_one_is_found_and_older_ones_go(root):
    cp.write_checkpoint(root, 30, write_some, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["step-000020", "step-000030"]
    assert cp.newest_checkpoint(root) == root / "step-000030"
    manifest = json.loads((root / "step-000030" / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["bytes"] > 8000
    assert cp.newest_checkpoint(root / "nothing") is None


def test_steps_are_compared_as_numbers(root):
    cp.write_checkpoint(root, 1_000_000, write_some)
    assert cp.newest_checkpoint(root).name == "step-1000000"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, os.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "trainer_state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(root, name, damage, caplog):
    if (name, damage) == ("manifest.json", flip_a_bit):
        (root / "step-000020" / name).write_text('{"files": 3, "format": 1}')
    else:
        damage(root / "step-000020" / name)
    with pytest.raises(CheckpointError, match="step-000020") as error:
        cp.verify_checkpoint(root / "step-000020")
    assert name in str(error.value)
    assert cp.newest_checkpoint(root) == root / "step-000010"
    assert "step-000020" in caplog.text


def test_a_process_killed_while_writing_leaves_nothing_that_counts(root):
    (root / ".tmp-step-000030").mkdir()  # what SIGKILL leaves; nothing in the process can tidy up
    cp.save_tensors(root / ".tmp-step-000030" / "model.safetensors", {"a": torch.ones(3)})
    assert cp.newest_checkpoint(root) == root / "step-000020"
    cp.write_checkpoint(root, 30, write_some)
    assert cp.newest_checkpoint(root) == root / "step-000030"
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("reason", [KeyboardInterrupt, ValueError])
def test_what_stops_the_writing_passes_through_and_is_tidied_up(root, reason):
    def interrupted(folder):
        write_some(folder)
        raise reason

    with pytest.raises(reason):
        cp.write_checkpoint(root, 30, interrupted)
    assert sorted(p.name for p in root.iterdir()) == ["step-000010", "step-000020"]


def test_an_incomplete_checkpoint_is_replaced_by_one_of_the_same_step(root):
    (root / "step-000020" / "state.pt").unlink()
    cp.write_checkpoint(root, 20, write_some)
    assert cp.newest_checkpoint(root) == root / "step-000020"


@pytest.mark.parametrize("failing", ["save_file", "torch.save", "fsync", "rename"])
def test_a_full_disk_leaves_the_checkpoints_before(root, failing, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target, name = {
        "save_file": (cp, "save_file"),
        "torch.save": (torch, "save"),
        "fsync": (os, "fsync"),
        "rename": (type(root), "rename"),
    }[failing]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        with pytest.raises(CheckpointWriteError, match="No space left") as error:
            cp.write_checkpoint(root, 30, write_some)
    assert isinstance(error.value, OSError)
    assert sorted(p.name for p in root.iterdir()) == ["step-000010", "step-000020"]
    assert cp.newest_checkpoint(root) == root / "step-000020"


@pytest.mark.parametrize("large", ["model.safetensors", "state.pt"])
def test_a_disk_that_is_really_full(tmp_path, large):
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        root = tmp_path / "checkpoints"
        cp.write_checkpoint(root, 10, write_some)

        def too_much(folder):
            write_some(folder)
            if large == "state.pt":
                torch.save(torch.zeros(100_000), folder / large)
            else:
                cp.save_tensors(folder / large, {"a": torch.zeros(100_000)})

        with pytest.raises(CheckpointWriteError, match="MiB free"):
            cp.write_checkpoint(root, 20, too_much)
        assert [p.name for p in root.iterdir()] == ["step-000010"]
        cp.verify_checkpoint(root / "step-000010")
        cp.write_checkpoint(root, 20, write_some)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_tensors_come_back_bit_by_bit_whatever_they_share(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "base": base,
        "tied": base,
        "part": base[2:4],
        "nhwc": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0),
        "empty_too": torch.zeros(0),
        "half": torch.randn(3).bfloat16(),
    }
    cp.save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = cp.load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype


def test_weights_that_do_not_fit_are_listed():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"missing: bias.*unexpected: extra.*weight \(4, 4\) instead of \(2, 3\)"):
        cp.load_into(module, {"weight": torch.zeros(4, 4), "extra": torch.zeros(1)}, "step-000001")


def test_random_states_come_back_through_a_file_that_runs_no_code(tmp_path):
    torch.save(cp.random_state(), tmp_path / "r.pt")
    expected = (random.random(), np.random.rand(3), np.random.randn(), torch.rand(3))  # noqa: NPY002 - the global one
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002 - see above
    cp.set_random_state(torch.load(tmp_path / "r.pt", weights_only=True))
    again = (random.random(), np.random.rand(3), np.random.randn(), torch.rand(3))  # noqa: NPY002 - see above
    assert expected[0] == again[0]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(expected, again, strict=True))


def test_a_fingerprint_sees_one_bit_and_no_memory_format():
    module = torch.nn.Conv2d(3, 4, 3)
    before = cp.fingerprint(module)
    assert cp.fingerprint(module.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        module.bias[0] = torch.nextafter(module.bias[0], torch.tensor(9.0))
    assert cp.fingerprint(module) != before


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        folder = cp.write_checkpoint(tmp_path / "checkpoints", 1, write_some)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ["manifest.json", "model.safetensors", "state.pt", "trainer_state.json"], 0o644
    )


def test_code_in_a_state_file_is_not_run(tmp_path):
    """A checkpoint whose hashes are right, from somebody who put code into it."""

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    data, run = make_data(), tmp_path / "run"
    Distiller(TinyExits(), data, make_args(max_steps=2, output_dir=str(run)), "ce").train()
    (folder,) = (run / "checkpoints").iterdir()
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "optimizer": Evil()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "state.pt").read_bytes()
    manifest["files"]["state.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cp.newest_checkpoint(run / "checkpoints") == folder
    again = Distiller(TinyExits(), data, make_args(max_steps=2, output_dir=str(run), resume=True), "ce")
    with pytest.raises(CheckpointError, match=r"state\.pt of step-000002 holds more than tensors"):
        again.train()
    assert not (tmp_path / "ran").exists()
