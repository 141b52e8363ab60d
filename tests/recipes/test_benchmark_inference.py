"""The inference benchmark: plans that the engine follows, ratios within rounds, targets, a table and a picture."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import inference_extras as extras
import pytest
import torch
from benchmarks import inference
from pages.inference import CONTROL, draw_saving, saving_points, target_rows, targets
from PIL import Image

from erde_hub.errors import ConfigError, ResultsError
from erde_hub.scripts import benchmark
from erde_hub.scripts.common import turns
from erde_hub.scripts.common.contestants import by_hand, load_subject, plan_for, routed, shares_of
from erde_hub.scripts.common.turns import summary, take_turns

SMALL = ["--model", "test_resnet", "--exits", "2", "--cpu_threads", "1", "--rounds", "2", "--min_rounds", "1",
         "--seconds", "0.1", "--compiled", "none"]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run of the command as a user would type it, without the parts that take their time."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--batch_size", "1", "8", "--output", str(folder / "new" / "b.json")]
    argv = sys.argv
    sys.argv = ["inference.py", *SMALL, *flags, "--onnx", "false", "--memory", "false"]
    try:
        inference.main()
    finally:
        sys.argv = argv
    return folder, json.loads((folder / "new" / "b.json").read_text())


def test_it_measures_and_writes_what_it_found(measured):
    folder, results = measured
    (network,) = results["networks"].values()
    assert network["weights"] == "random"
    assert network["driven_by"] == "stages"
    assert [(s["batch"], s["channels_last"]) for s in network["settings"]] == [(1, 0), (8, 0), (1, 1), (8, 1)]
    single, several = network["settings"][:2]
    assert {"bare", "never", "never by hand", "exit 0", "exit 0 by hand", "static 1"} <= set(single["seconds"])
    assert several["shares"] == {"even": [0.25, 0.25, 0.5], "one_hard": [0.875, 0.0, 0.125]}
    assert {"even / even by hand", "one_hard / one_hard by hand"} <= set(several["ratios"])
    if network["earlyon"] is None:  # installed: beside us everywhere
        assert all(setting["earlyon"] is None for setting in network["settings"])
        for setting in network["settings"]:
            own = ["never", "exit 0", "exit 1"] if setting["batch"] == 1 else ["even"]
            assert {f"{name} / earlyon {name}" for name in own} <= set(setting["ratios"])
    assert network["stream"][0]["images_per_second"]["stream"] > 0
    assert str(folder) not in json.dumps(results)
    draw_saving(results, str(folder / "b.png"))
    with Image.open(folder / "b.png") as picture:
        assert picture.size == (1280, 1240)


def test_one_checkpoint_is_measured_next_to_the_ideal(tmp_path, call, capsys):
    output = tmp_path / "new" / "b.json"
    small = [*SMALL[:-2], "--batch_size", "1", "8", "--output", str(output)]
    call(benchmark, *small)
    results = json.loads(output.read_text())
    single, several = results["settings"]
    assert {"bare", "never", "exit 0 by hand", "static 1"} <= set(single["seconds"])
    assert {"even / even by hand", "even / bare"} <= set(several["ratios"])
    assert results["args"]["model"] == "test_resnet"
    assert str(tmp_path) not in output.read_text()
    text = capsys.readouterr().out
    for words in ("batch 1, 1 thread(s), ", "even: 25 / 25 / 50 % exit", "by hand (the ideal)", "one_hard"):
        assert words in text


@pytest.mark.parametrize("counts", [[2, 2], [7, 0], [0, 3], [8, 0], [0, 0]])
def test_the_engine_follows_a_plan_and_the_stages_by_hand_do_the_same_work(counts):
    subject = load_subject("test_resnet", 2)
    x = subject.images(8)
    plan = plan_for(subject.model, x, counts)
    assert torch.bincount(plan.taken, minlength=3)[:2].tolist() == counts
    rows = []
    handle = subject.model.backbone.fc.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    with torch.no_grad():
        out = routed(subject, x, plan.thresholds)()
        last = by_hand(subject, x, plan.stays, [n > 0 for n in counts])()
    handle.remove()
    reached = 8 - sum(counts)
    assert rows == [reached] * 2 * (reached > 0)
    if reached:
        torch.testing.assert_close(out[plan.taken == 2], last)


def test_shares():
    assert shares_of(32, 3) == {"even": [8, 8, 8], "one_hard": [31, 0, 0]}


def test_contestants_take_turns_and_ratios_are_within_a_round(monkeypatch):
    monkeypatch.setattr(turns, "TURN", 0)
    order = []
    times = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, 1, 60.0)
    rounds = {"".join(order[i : i + 2]) for i in range(4, len(order), 2)}
    assert rounds == {"ab", "ba"}, "every round runs both, not always the same one first"
    assert [len(values) for values in times.values()] == [3, 3]
    monkeypatch.setattr(turns, "TURN", 0.01)
    order.clear()
    monkeypatch.setattr(turns.time, "perf_counter", lambda: 0.005 * len(order))
    times = take_turns({"a": lambda: order.append("a")}, 1, 1, 60.0)
    assert len(order) == 2 + 1 + 2, "twice to see how long it takes, once to warm up, and the turn"
    assert times["a"][0] == pytest.approx(0.005), "of one call"
    slow = summary({"even": [1.1, 2.2, 3.3], "even by hand": [1.0, 2.0, 3.0], "bare": [2.0, 4.0, 6.0]})
    assert slow["ratios"]["even / even by hand"]["median"] == pytest.approx(1.1)
    assert slow["ratios"]["even / bare"]["median"] == pytest.approx(0.55), "divided within a round, as all others"
    assert slow["seconds"]["even"]["median"] == 2.2


def test_where_earlyon_cannot_run_the_file_says_so(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such\nthing")

    subject, args = load_subject("test_resnet", 2), inference.InferenceBenchmark(rounds=1, min_rounds=1, seconds=0.1)
    monkeypatch.setattr(inference, "earlyon_contestants", refuse)
    with torch.no_grad():
        setting = inference._setting(subject, object(), 1, 1, False, args)
    assert setting["earlyon"] == "RuntimeError: no such thing"
    assert "exit 0 / exit 0 by hand" in setting["ratios"]


def test_onnxruntime_runs_batches_too(monkeypatch):
    seen = []
    monkeypatch.setattr(extras, "export_files", lambda *_: defaultdict(lambda: Path(__file__)))
    monkeypatch.setattr(
        extras, "onnx_contestant", lambda *given: lambda: seen.append((len(given[1]["pixel_values"]), given[2]))
    )
    args = inference.InferenceBenchmark(batch_size=[1, 8, 64], cpu_threads=[1], rounds=1, min_rounds=1, seconds=0.1)
    monkeypatch.setattr(turns, "TURN", 0)
    with torch.no_grad():
        single, eight = extras.onnx_times(load_subject("test_resnet", 2), args)
    assert (single["batch"], eight["batch"]) == (1, 8)
    assert "float, even" not in single["seconds"]
    assert {"float, even / torch, even", "int8, exit 0 / int8 prefix"} <= set(eight["ratios"])
    assert {len_ for len_, _ in seen} == {1, 8}


def made_up(even: float, memory: float) -> dict:
    def spread(value):
        return {"median": value, "q1": value, "q3": value}

    setting = {
        "batch": 32, "threads": 1, "channels_last": False, "shares": {"even": [0.25] * 4}, "rounds": 3,
        "seconds": {"bare": spread(2.0), "even": spread(even), "even by hand": spread(1.0),
                    "earlyon even": spread(2.0), "earlyon one by one": spread(1.25)},
        "ratios": {"even / even by hand": spread(even), "even / earlyon even": spread(0.5),
                   "even / earlyon one by one": spread(0.96), "even by hand / earlyon one by one": spread(0.8),
                   "even / bare": spread(even / 2), "even by hand / bare": spread(0.5),
                   "never, heads skipped / bare": spread(1.01)},
    }  # fmt: skip
    entry = {
        "weights": "random", "input_size": [3, 8, 8], "exits": ["a", "b", "classifier"], "macs": [1, 2, 4],
        "earlyon": None, "settings": [setting], "memory": {"batch": 32, "mib": {"bare": 10.0, "routed": memory}},
    }  # fmt: skip
    return {"cpu": "made up", "cores": 1, "torch": "0", "networks": {"net": entry}}


def test_targets_are_met_or_missed_by_their_bounds():
    found = {target.name: (target.value, target.met) for target in targets(made_up(1.08, 10.6))}
    assert found["batch 32, a quarter leaving at each exit / ideal"] == (1.08, True)
    assert found["peak memory of a routed batch / bare backbone"] == (pytest.approx(1.06), False)
    assert found["batch 32, a quarter at each exit / earlyon's batched call"] == (0.5, True)
    assert found["batch 32, a quarter at each exit / earlyon one by one"] == (0.96, False)
    assert not any("31 leaving" in name for name in found)
    rows = {row[0]: row[1:] for row in target_rows(made_up(1.0812, 10.0))}
    assert rows["batch 32, a quarter leaving at each exit / ideal"] == ("1.08", "1.081 (missed)")
    assert rows["batch 32, a quarter at each exit / earlyon one by one"] == ("0.95", "0.960 (missed; by hand 0.800)")
    assert rows[f"{CONTROL}, batch 32"] == ("-", "1.010")
    points = saving_points(made_up(1.2, 10.0))["net"]
    assert points == [(pytest.approx(0.5), pytest.approx(0.4), 32)]


def test_a_picture_of_nothing_is_refused(tmp_path):
    results = made_up(1.0, 10.0)
    results["networks"]["net"]["settings"][0]["threads"] = 2
    with pytest.raises(ResultsError, match="nothing to draw"):
        draw_saving(results, str(tmp_path / "x.png"))


def test_memory_is_measured_apart(capsys, call):
    if not inference.Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured on Linux only")
    call(inference, *SMALL, "--batch_size", "8", "--only_memory")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["batch"] == 8
    assert set(found["mib"]) == {"bare", "routed"}


@pytest.mark.parametrize("script", [benchmark, inference])
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--rounds", "0"], "rounds"),
        (["--seconds", "0"], "seconds above 0"),
    ],
)
def test_bad_input_is_refused(script, argv, says, call):
    with pytest.raises(ConfigError, match=says):
        call(script, "--model", "test_resnet", *argv)


def test_networks_measured_before_stay_in_the_file(call, measured, tmp_path, monkeypatch):
    folder, results = measured
    output = tmp_path / "b.json"
    output.write_text((folder / "new" / "b.json").read_text())
    monkeypatch.setattr(inference, "_measure", lambda subject, name, args: {"settings": []})
    call(inference, "--model", "test_vit", "--exits", "2", "--output", str(output))
    both = json.loads(output.read_text())["networks"]
    assert both == {**results["networks"], "test_vit": {"settings": []}}
    output.write_text(output.read_text().replace('"cores": ', '"cores": 9'))
    inference.main()
    assert list(json.loads(output.read_text())["networks"]) == ["test_vit"]
