"""latency.py times every exit, and keeps the times with the checkpoint; calibrate.py takes them from there."""

import json

import pytest

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, UnknownNameError
from erde_hub.evaluation.results_file import mean_milliseconds
from erde_hub.scripts import calibrate, latency
from erde_hub.scripts.common.exit_times import _inputs, known_exit_times, measure_exits
from tests.fakes import transformers_models
from tests.fakes.networks import resnet8, wrap


def test_every_exit_is_timed_where_it_answers(monkeypatch):
    model = wrap("sequential", policy="margin", threshold=0.3)
    taken = []
    monkeypatch.setattr(
        "erde_hub.scripts.common.exit_times.take_turns",
        lambda runs, *_: {
            name: taken.append(int(run().exit_index[0])) or [len(taken) / 1000] for name, run in runs.items()
        },
    )
    measured = measure_exits(model, ["torch", "onnxruntime"], [1])
    assert taken == 2 * [0, 1, 2, 3]
    assert [row["runtime"] for row in measured["settings"]] == ["torch", "onnxruntime"]
    assert measured["settings"][0]["exit_milliseconds"] == pytest.approx([1, 2, 3, 4])
    assert (model.config.policy, model.threshold) == ("margin", 0.3), "the model itself is left alone"


@pytest.mark.slow
def test_texts_are_timed_with_both():
    said = []
    measured = measure_exits(transformers_models.tiny_bert(), threads=[1], rounds=1, say=said.append)
    assert said == []
    assert [row["runtime"] for row in measured["settings"]] == ["torch", "onnxruntime"]
    assert all(time > 0 for row in measured["settings"] for time in row["exit_milliseconds"])


def test_times_of_another_machine_are_not_taken(monkeypatch):
    row = {"runtime": "torch", "threads": 1, "exit_milliseconds": [1.0, 2.0]}
    here = {"cpu": "this", "cores": 2, "torch": "2.9", "settings": [{**row, "threads": 2}, row]}
    monkeypatch.setattr("erde_hub.scripts.common.exit_times.environment", lambda *_: here)
    assert known_exit_times({"latency": here}) == [1.0, 2.0]
    assert known_exit_times({"latency": {**here, "cpu": "that"}}) is None
    assert known_exit_times({}) is known_exit_times(None) is None
    assert mean_milliseconds([0.25, 0.75], [1.0, 2.0]) == 1.75


def test_what_cannot_be_timed_is_refused(call):
    with pytest.raises(ConfigError, match="classifiers with early exits"):
        measure_exits(resnet8(1, problem_type="regression", policy="never"))
    certain = resnet8(3).eval()
    for head in certain.heads:
        head.fc.weight.data.zero_()
        head.fc.bias.data[0] = 1e4
    with pytest.raises(ConfigError, match="certain of every random input"):
        _inputs(certain, [[1e-30, 1e-30]] * 3)
    with pytest.raises(UnknownNameError, match="unknown runtime 'onnx'; did you mean 'onnxruntime'"):
        call(latency, "--model", "nowhere", "--runtime", "onnx")


@pytest.mark.slow
def test_times_are_kept_and_used(run, call, capsys):
    call(latency, "--model", run, "--rounds", 1, "--cpu_threads", 1, "--runtime", "torch")
    said = capsys.readouterr().out
    assert "torch, 1 thread" in said
    assert "saved)" in said
    kept = json.loads((run / "results.json").read_text())["latency"]
    assert len(kept["settings"][0]["exit_milliseconds"]) == 3
    card = (run / "README.md").read_text()
    assert (run / "frontier_ms.png").is_file()
    assert "](frontier_ms.png)" in card
    assert "In time: **" in card
    assert "| ms, torch, 1 thread |" in card
    budget = 1.01 * kept["settings"][0]["exit_milliseconds"][-1]
    call(calibrate, "--model", run, "--max_mean_milliseconds", budget, "--cpu_threads", 1)
    assert "measuring" not in capsys.readouterr().out
    profile = EarlyExitWrapper.from_pretrained(run).config.threshold_profile
    assert profile["target"] == "mean_milliseconds"
    results = json.loads((run / "results.json").read_text())
    assert results["latency"] == kept, "the times of a checkpoint stay"
    del results["latency"]
    (run / "results.json").write_text(json.dumps(results))
    call(calibrate, "--model", run, "--max_mean_milliseconds", 100 * budget, "--cpu_threads", 1, "--dry_run")
    assert "measuring the time of each exit" in capsys.readouterr().out
    (run / "results.json").unlink()
    call(latency, "--model", run, "--rounds", 1, "--cpu_threads", 1, "--runtime", "torch")
    assert "the times are not kept: there is no report" in capsys.readouterr().out


@pytest.mark.parametrize(("times", "warned"), [([1.0, 2.0, 3.0], False), ([2.0, 1.0, 3.0], True)])
def test_times_that_fall_are_those_of_a_busy_machine(run, call, capsys, monkeypatch, times, warned):
    settings = [{"runtime": "torch", "threads": 1, "exit_milliseconds": times}]
    measured = {"cpu": "this", "cores": 2, "exits": ["a", "b", "c"], "settings": settings}
    monkeypatch.setattr(latency, "measure_exits", lambda *_, **__: measured)
    call(latency, "--model", run, "--dry_run")
    assert ("an exit took longer than a deeper one, as on a busy machine" in capsys.readouterr().out) is warned
