from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import training

from erde_hub.errors import ConfigError

SMALL = [
    "--teacher_kwargs", "width=4", "--student_kwargs", "width=4", "--batch_size", "16", "--max_train_samples", "64",
    "--rounds", "2", "--steps_per_round", "3", "--cpu_threads", "1", "--mixed_precision", "no",
]  # fmt: skip


def test_both_loops_are_timed_in_turns_and_the_numbers_written(call, tmp_path, monkeypatch, capsys):
    sides = []
    monkeypatch.setattr(training, "_in_a_process_of_its_own", lambda argv, side: sides.append(side) or 100.0)
    call(training, *SMALL, "--output", str(tmp_path / "new" / "b.json"))
    results = json.loads((tmp_path / "new" / "b.json").read_text())
    assert sides == ["by_hand", "distiller"]
    assert results["dataset"] == "digits"
    assert min(results["step_seconds"].values()) > 0
    assert results["input_seconds"] > 0
    assert results["memory_ratio"] == 1.0
    assert str(tmp_path) not in json.dumps(results)
    assert "by hand" in capsys.readouterr().out


def test_ratios_are_those_of_the_rounds():
    """The machine was twice as slow in the second round, for both loops; worked by hand."""
    seconds = {
        "distiller": [[1.0, 1.1, 1.2], [2.1, 2.2, 2.3]],
        "by_hand": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]],
        "input": [[0.1, 0.1, 0.1], [0.2, 0.2, 0.2]],
    }
    summary = training._summary(seconds, {"distiller": 110.0, "by_hand": 100.0})
    assert summary["ratio"] == pytest.approx(1.1)
    assert summary["step_seconds"] == pytest.approx({"distiller": 1.65, "by_hand": 1.5})
    assert summary["input_share"] == pytest.approx(0.15 / 1.65)
    assert summary["memory_ratio"] == pytest.approx(1.1)


@pytest.mark.parametrize("side", ["distiller", "by_hand"])
def test_one_side_alone_prints_what_it_needs(side, capsys, call):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured on Linux only")
    call(training, *SMALL, "--memory_steps", "2", "--only", side)
    assert float(capsys.readouterr().out.split()[-1]) >= 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--rounds", "0"], "rounds"),
        (["--only", "nobody"], "by_hand"),
        (["--optimizer", "adamw"], "SGD"),
    ],
)
def test_bad_input_is_refused(argv, says, call):
    with pytest.raises(ConfigError, match=says):
        call(training, *argv)
