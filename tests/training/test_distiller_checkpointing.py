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
from accelerate.utils import load

from erde_hub.errors import CheckpointError, CheckpointWriteError
from erde_hub.training import Distiller, DistillerCallback
from erde_hub.training import checkpointing as cp
from tests.fakes.training import TinyExits, assert_same, make_args, make_data, weights

WEIGHTS, OPTIMIZER = "state/pytorch_model.bin", "state/optimizer.bin"


def write_some(folder):
    (folder / "state").mkdir()
    torch.save({"a": torch.arange(2000.0), "b": torch.ones(3, dtype=torch.int64)}, folder / WEIGHTS)
    torch.save({"x": 1}, folder / OPTIMIZER)
    (folder / "trainer_state.json").write_text("{}")


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
    assert manifest["files"][WEIGHTS]["bytes"] > 8000
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
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "trainer_state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(root, name, damage, caplog):
    if (name, damage) == ("manifest.json", flip_a_bit):
        (root / "step-000020" / name).write_text('{"files": 3, "format": 2}')
    else:
        damage(root / "step-000020" / name)
    with pytest.raises(CheckpointError, match="step-000020") as error:
        cp.verify_checkpoint(root / "step-000020")
    assert name in str(error.value)
    assert cp.newest_checkpoint(root) == root / "step-000010"
    assert "step-000020" in caplog.text


def test_a_process_killed_while_writing_leaves_nothing_that_counts(root):
    (root / ".saving-step-000030-12ab").mkdir()  # what SIGKILL leaves; nothing in the process can tidy up
    write_some(root / ".saving-step-000030-12ab")
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
    (root / "step-000020" / OPTIMIZER).unlink()
    cp.write_checkpoint(root, 20, write_some)
    assert cp.newest_checkpoint(root) == root / "step-000020"


@pytest.mark.parametrize("failing", ["torch.save", "fsync", "rename"])
def test_a_full_disk_leaves_the_checkpoints_before(root, failing, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target, name = {
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


@pytest.mark.parametrize(
    "room", [0.0, 0.4, 0.8, *(pytest.param(room, marks=pytest.mark.long) for room in (0.2, 0.6, 0.95))]
)
def test_a_disk_that_is_really_full(tmp_path, room):
    """It fills up in the weights, in the optimizer, in the averaged weights: the checkpoint before is continued."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    data, root, filler = make_data(), tmp_path / "run" / "checkpoints", tmp_path / "filler"

    class Fill(DistillerCallback):
        def on_step_end(self, distiller):
            if distiller.position.step == 2:
                size = sum(path.stat().st_size for path in root.rglob("*"))
                filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free - int(room * size)))

    def train(callbacks=(), **changes):
        args = make_args(**{"max_steps": 3, "checkpoint_steps": 1, "ema_decay": 0.9, **changes})
        student = TinyExits(width=32)
        Distiller(student, data, args, "ce", callbacks=callbacks).train()
        return student

    try:
        with pytest.raises(CheckpointWriteError, match=r"step-000002.*MiB free"):
            train([Fill()], output_dir=str(tmp_path / "run"))
        assert [p.name for p in root.iterdir()] == ["step-000001"]
        filler.unlink()
        again = train(output_dir=str(tmp_path / "run"), resume=True)
        assert_same(weights(train()), weights(again))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class Shared(TinyExits):
    """Tensors that are one, that overlap, and that are parts of one memory without overlapping."""

    def __init__(self):
        super().__init__(dropout=0.0)
        both = torch.randn(6, 4)
        self.register_buffer("upper", both[:3])
        self.register_buffer("lower", both[3:])
        self.register_buffer("part", both[1:4])
        self.register_buffer("half_precision", torch.randn(3).bfloat16())
        self.register_buffer("nhwc", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.register_buffer("none", torch.zeros(0))
        self.tied = self.classifier


def test_tensors_come_back_bit_by_bit_whatever_they_share(tmp_path):
    def train(student, **changes):
        args = make_args(max_steps=2, output_dir=str(tmp_path / "run"), **changes)
        Distiller(student, make_data(), args, "ce").train()
        return student

    torch.manual_seed(0)
    first = train(Shared())
    torch.manual_seed(1)
    again = Shared()
    assert not torch.equal(again.lower, first.lower)
    train(again, resume=True)
    assert_same(weights(first), weights(again))
    assert again.upper.untyped_storage().data_ptr() == again.part.untyped_storage().data_ptr()
    assert again.half_precision.dtype == torch.bfloat16


def test_a_run_of_another_format_is_refused_and_not_begun_anew(tmp_path):
    data, run = make_data(), tmp_path / "run"
    Distiller(TinyExits(), data, make_args(max_steps=2, output_dir=str(run)), "ce").train()
    (folder,) = (run / "checkpoints").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    again = Distiller(TinyExits(), data, make_args(max_steps=2, output_dir=str(run), resume=True), "ce")
    with pytest.raises(CheckpointError, match="format 1, and this erde_hub continues format 2 only: use the version"):
        again.train()


def test_random_states_come_back_through_a_file_that_runs_no_code(tmp_path):
    torch.save(cp.random_state(), tmp_path / "r.pt")
    expected = (random.random(), np.random.rand(3), np.random.randn(), torch.rand(3))  # noqa: NPY002 - the global one
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002 - see above
    cp.set_random_state(load(tmp_path / "r.pt", weights_only=True))
    again = (random.random(), np.random.rand(3), np.random.randn(), torch.rand(3))  # noqa: NPY002 - see above
    assert expected[0] == again[0]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(expected, again, strict=True))


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        folder = cp.write_checkpoint(tmp_path / "checkpoints", 1, write_some)
    finally:
        os.umask(before)
    assert {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*")} == {
        **dict.fromkeys(["manifest.json", "trainer_state.json", WEIGHTS, OPTIMIZER], 0o644),
        "state": 0o755,
    }


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER, "extra.pt"])
def test_code_in_a_state_file_is_not_run(tmp_path, file):
    """A checkpoint whose hashes are right, from somebody who put code into it."""

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    data, run = make_data(), tmp_path / "run"
    Distiller(TinyExits(), data, make_args(max_steps=2, output_dir=str(run)), "ce").train()
    (folder,) = (run / "checkpoints").iterdir()
    torch.save({"optimizer": Evil()}, folder / file)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / file).read_bytes()
    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cp.newest_checkpoint(run / "checkpoints") == folder
    again = Distiller(TinyExits(), data, make_args(max_steps=2, output_dir=str(run), resume=True), "ce")
    with pytest.raises(CheckpointError, match="step-000002 holds more than tensors"):
        again.train()
    assert not (tmp_path / "ran").exists()
