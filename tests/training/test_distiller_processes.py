"""Real processes: killed, orphaned, two of them, on two machines, and started wrongly."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from erde_hub._cores import available_cores
from erde_hub.errors import LaunchError
from erde_hub.training import _launch
from tests.fakes import distiller_process
from tests.fakes.distiller_process import one_step, texts, train
from tests.fakes.processes import CONTEXT, free_port, join_group, run_pair
from tests.fakes.training import assert_same, weights

SCRIPT = Path(distiller_process.__file__)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def start(command, mode, folder, **env):
    kept = {k: v for k, v in os.environ.items() if not re.match("ACCELERATE|MASTER_|OMP_|WORLD_|LOCAL_|RANK", k)}
    return subprocess.Popen(
        [*command, str(SCRIPT), mode, str(folder)],
        env=kept | {"HF_HUB_OFFLINE": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, step):
    """Reads what the process says until it has done that many steps."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step ") and int(line.split()[1]) >= step:
            return
    pytest.fail(f"ended before step {step}:\n{''.join(seen[-30:])}")


@pytest.mark.long
def test_killed_orphaned_and_resumed_it_is_the_run_that_never_stopped(tmp_path):
    """SIGKILL to the training process, then SIGTERM to a launcher, which dies and leaves its child behind."""
    folder = tmp_path / "run"
    killed_at = random.SystemRandom().randint(4, 12)
    process = start([sys.executable], "train", folder)
    wait_for_step(process, killed_at)
    process.kill()
    process.communicate()

    launcher = start([*LAUNCH, "--num_processes", "1"], "resume", folder)
    wait_for_step(launcher, killed_at + 3)
    launcher.terminate()
    output, _ = launcher.communicate(timeout=280)  # until the child, too, has closed its end
    orphan = re.search(r"stopped at step (\d+) \(its launcher died\)", output)
    assert orphan, output
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved[-1] == f"step-{int(orphan[1]):06d}"

    resumed, result = train(folder, resume=True)
    assert result.status == "completed"
    assert result.step == result.total_steps == 20
    expected, whole = train(None)
    assert_same(weights(expected), weights(resumed))
    assert [entry["train"] for entry in result.history] == [entry["train"] for entry in whole.history]


@pytest.fixture(scope="module")
def alone():
    return one_step(128)


def check_group(folder, alone):
    values, gradients = alone
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["rank"] for report in reports] == [0, 1]
    assert 0.05 < values["teacher_right"] < 0.95
    for report in reports:
        assert report["processes"] == 2
        for name, value in report["values"].items():
            assert value == pytest.approx(values[name], abs=1e-5), name
        assert report["stopped"][:2] == ["interrupted", 5]
        assert report["resumed"] == ["completed", 7]
        assert report["same"]
        assert re.search("became nan at step 3: term 'ce' of exit 'layer1'", report["error"])
    assert [report["stopped"][2] for report in reports] == [True, False], "the main process alone writes"
    assert reports[0]["history"] == reports[1]["history"]
    assert reports[0]["weights"] == reports[1]["weights"]
    rounds = [report["round"] for report in reports]
    assert len(rounds[0]) == 5
    assert max(rounds[0]["table"]) > 1
    assert all(rounds[0].values())
    for what, values in rounds[0].items():
        assert values == rounds[1][what], f"{what} differs between the processes"
    for name, gradient in torch.load(folder / "gradients.pt").items():
        torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-5, msg=name)


def group_of_two(rank, folder, port):
    join_group(rank, port)
    distiller_process.group(folder)
    os._exit(0)  # gloo's threads can abort a process that ends while its cores are busy


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path, alone):
    run_pair(group_of_two, tmp_path, free_port())
    check_group(tmp_path, alone)


@pytest.mark.long
def test_two_processes_that_a_launcher_starts_are_one_with_twice_the_batch(tmp_path, alone):
    command = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    output, _ = start(command, "group", tmp_path, ACCELERATE_USE_CPU="true").communicate(timeout=280)
    assert (tmp_path / "rank1.json").exists(), output
    check_group(tmp_path, alone)


@pytest.mark.long
def test_two_processes_train_a_language_model_as_one_with_twice_the_batch(tmp_path):
    command = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    output, _ = start(command, "texts", tmp_path, ACCELERATE_USE_CPU="true").communicate(timeout=280)
    assert (tmp_path / "rank1.json").exists(), output
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    values, gradients = one_step(8, parts=texts)
    for name, value in values.items():
        assert first["values"][name] == second["values"][name] == pytest.approx(value, abs=1e-5), name
    for name, gradient in torch.load(tmp_path / "gradients.pt").items():
        torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-5, msg=name)
    assert first["steps"] == 10
    assert first["weights"] == second["weights"]
    assert first["history"] == second["history"]
    assert first["history"][-1]["validation"]["perplexity"][-1] > 1


def machine(rank):
    return ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]


@pytest.mark.long
def test_two_machines_are_one_with_twice_the_batch(tmp_path, alone):
    port = str(free_port())
    machines = [
        start(
            [*LAUNCH, "--multi_gpu", "--num_processes", "2", *machine(rank), "--main_process_port", port],
            "group",
            tmp_path,
            ACCELERATE_USE_CPU="true",
        )
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=280)[0] for machine in machines]
    assert (tmp_path / "rank1.json").exists(), "\n".join(outputs)
    check_group(tmp_path, alone)


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--num_processes", "2"], ["--multi_gpu", "--num_processes", "2"]])
def test_spellings_that_start_lonely_processes_are_refused_with_the_right_one(tmp_path, flags):
    if torch.cuda.is_available():
        pytest.skip("with GPUs these spellings start what they say")
    process = start([*LAUNCH, *flags, "--main_process_port", str(free_port())], "check", tmp_path / "run")
    output, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert "LaunchError" in output, output
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in output
    assert not (tmp_path / "run").exists()


LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND": "NO"}


class Accelerator:
    def __init__(self, num_processes):
        self.num_processes = num_processes


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, 1),
        (LAUNCHED, 1),
        ({"MASTER_ADDR": "10.0.0.1"}, 1),
        ({**LAUNCHED, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}, 2),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, 1),
    ],
)
def test_a_launch_that_is_what_it_says_passes(env, found):
    _launch.check_launch(env)
    _launch.check_launch(env, Accelerator(found))


@pytest.mark.parametrize(("announced", "found"), [(2, 1), (4, 1), (4, 2), (1, 2)])
def test_processes_that_do_not_know_each_other_are_refused(announced, found):
    with pytest.raises(LaunchError, match=f"started {announced} processes.*--num_processes {announced}"):
        _launch.check_launch({"WORLD_SIZE": str(announced)}, Accelerator(found))


def test_a_lonely_process_of_a_group_is_refused_before_any_group_is_built():
    with pytest.raises(LaunchError, match="unset MASTER_ADDR"):
        _launch.check_launch({**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})


def test_threads(monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert _launch.set_cpu_threads(0) == 1, "without a launcher torch's own number stays"
    assert _launch.set_cpu_threads(2) == 2
    monkeypatch.setattr(_launch, "available_cores", lambda: 6)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert _launch.set_cpu_threads(0) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _launch.set_cpu_threads(0) == 3
    assert _launch.set_cpu_threads(1) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert _launch.set_cpu_threads(0) == 1, "what the user told the launcher stays"
    monkeypatch.undo()
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def notice_a_launcher_that_dies():
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "NO"
    with _launch.StopRequest() as stop:
        assert not stop
        os.getppid = lambda: 1
        assert stop
        assert stop.reason == "its launcher died"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_a_launcher_that_dies_is_noticed():
    process = CONTEXT.Process(target=notice_a_launcher_that_dies)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:6001", True),
        ("NCCL communicator was aborted on rank 0: remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied (8x4 and 5x3)", False),
    ],
)
def test_a_survivor_of_a_lost_process_ends_with_one_sentence(monkeypatch, text, lost):
    def fail():
        with _launch.lost_process_named():
            raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=re.escape(text)):
        fail()  # one process has lost nobody
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(LaunchError if lost else RuntimeError) as error:
        fail()
    assert ("another process of this run ended, so process 1 stops" in str(error.value)) == lost
