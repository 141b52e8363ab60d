"""The comparison of losses: methods as text, results that are added to, groups of coloured digits."""

import json
from pathlib import Path

import compare_losses
import pytest
from PIL import Image

from erde_hub.errors import ConfigError, ResultsError
from erde_hub.evaluation import ExitRecords

FAST = [
    "--teacher_kwargs", "width=4", "--student_kwargs", "width=4", "--epochs", "2", "--max_steps", "3", "--cpu_threads",
    "1", "--no_progress_bar", "--mixed_precision", "no", "--exits", "layer1",
]  # fmt: skip


@pytest.fixture
def compare(call):
    return lambda *flags: call(compare_losses, *FAST, *flags)


def test_a_method_is_a_loss_and_what_joins_it():
    loss = compare_losses.build_method("erde+ea_kd+dedier:temperature=3,entropy_temperature=2,readout_sticky=true")
    assert loss.temperature == 3
    assert loss.added()["ea_kd"]["entropy_temperature"] == 2
    assert loss.added()["dedier"]["readout_sticky"] is True
    for text, message in (
        ("erdee", "unknown loss 'erdee'; did you mean 'erde'"),
        ("kd:temprature=3", "'temprature=3' in method .* is not ARGUMENT=VALUE; did you mean"),
        ("kd:entropy_weight=1", "loss 'kd' has no argument 'entropy_weight'"),
        ("ce+ea_kd", "CELoss has none"),
        ("kd+egad", "unknown addition 'egad'"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_losses.build_method(text)


@pytest.mark.long
def test_coloured_digits_have_groups_and_a_file_is_added_to(compare, tmp_path, capsys):
    output = tmp_path / "results.json"
    flags = ["--dataset", "coloured_digits", "--seeds", "3", "--output", output, "--methods"]
    compare(*flags, "kd")
    first = json.loads(output.read_text())
    compare(*flags, "kd", "erde+dedier")
    results = json.loads(output.read_text())
    assert results["runs"][0] == first["runs"][0], "what was there is not trained again"
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [("kd", 3), ("erde+dedier", 3)]
    for run in results["runs"]:
        assert [group["exit"] for group in run["groups"]] == ["layer1", "classifier"]
        for group in run["groups"]:
            assert len(group["groups"]) == 4
            assert group["worst_group"] == min(group["groups"].values())
    assert [row["method"] for row in results["summary"]] == ["kd", "erde+dedier"]
    row = results["summary"][0]
    assert row["worst_group_last_exit"] == results["runs"][0]["groups"][-1]["worst_group"]
    assert row["last_exit_std"] is None
    assert "worst group last exit" in capsys.readouterr().out
    assert str(tmp_path) not in output.read_text()
    assert len(ExitRecords.load(tmp_path / "results.records" / "1.safetensors")) > 0
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 1000
    with pytest.raises(ResultsError, match=r"holds results of other settings .lr differs."):
        compare(*flags, "kd", "--lr", "0.01")
    with pytest.raises(ResultsError, match=r"exits differs: \['layer1'\] there, \['layer2'\] now"):
        compare(*flags, "kd", "--exits", "layer2")
    output.write_text(json.dumps(results | {"dataset": {"name": "coloured shoes"}}))
    with pytest.raises(ResultsError, match=r"holds results of coloured shoes, and this is coloured digits \(0.95\)"):
        compare(*flags, "erde")
    output.write_text("[1, 2]")
    with pytest.raises(ResultsError, match=r"results.json holds something else than this recipe's results"):
        compare(*flags, "kd")
    output.write_text("{")
    with pytest.raises(ResultsError, match=r"results.json is no JSON file"):
        compare(*flags, "kd")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_who_learns_from_what_and_what_is_measured(compare, monkeypatch, tmp_path, split):
    trained = []
    monkeypatch.setattr(compare_losses, "_train", trained.append)
    output = tmp_path / "results.json"
    colours = ["--correlation", "0.9", "--teacher_correlation", "0.6"]
    flags = ["--split", split, "--seeds", "3", "--output", output, "--methods", "kd"]
    compare("--dataset", "coloured_digits", *colours, *flags)
    assert [run.data.name for run in trained] == ["coloured digits (0.6)", "coloured digits (0.9)"]
    assert trained[1].teacher is trained[0].student
    results = json.loads(output.read_text())
    data = trained[1].data
    assert results["dataset"]["samples"][split] == len(getattr(data, split))
    for run, row in zip(trained, (results["teachers"][0], results["runs"][0]), strict=True):
        measured = run.evaluate(getattr(data, split))
        assert [exit_["nll"] for exit_ in row["per_exit"]] == pytest.approx(measured["nll"], rel=1e-4)
        groups = row["groups"][-1]["groups"].values()  # half the images in each colour, so two pairs of one size
        assert min(groups) <= measured["accuracy"][-1] <= max(groups)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_train_samples", "100"], "--max_train_samples 100 does nothing with --dataset coloured_digits"),
        (["--image_size", "16"], "--image_size 16 does nothing with --dataset coloured_digits"),
        (["--streaming"], "--streaming true does nothing"),
        (["--dataset", "digits", "--correlation", "0.9"], "--correlation 0.9 is for .* and this is 'digits': leave"),
        (["--dataset", "digits", "--teacher_correlation", "0.9"], "--teacher_correlation 0.9 is for --dataset"),
    ],
)
def test_flags_about_data_that_would_change_nothing_are_refused(compare, monkeypatch, flags, message):
    monkeypatch.setattr(compare_losses, "create_accelerator", lambda _: pytest.fail("it goes on"))
    with pytest.raises(ConfigError, match=message):
        compare("--dataset", "coloured_digits", *flags)


@pytest.mark.parametrize(
    ("method", "message"),
    [("egad", "EGADLoss is for causal language models"), ("kd+dedier:readout_exit=7", "reads early exit 7")],
)
def test_methods_that_cannot_train_are_refused_before_the_teacher_trains(compare, monkeypatch, method, message):
    monkeypatch.setattr(compare_losses, "_train", lambda _: pytest.fail("something trains"))
    with pytest.raises(ConfigError, match=message):
        compare("--methods", "kd", method)


@pytest.mark.parametrize("flag", ["--loss", "--teacher", "--sample_weight", "--train_static"])
def test_flags_that_would_change_nothing_are_refused(compare, capsys, flag):
    with pytest.raises(SystemExit) as ended:
        compare(flag, "kd")
    assert ended.value.code == 2
    assert f"unknown argument '{flag}'" in capsys.readouterr().err


def test_the_same_settings_find_their_file_again_and_others_take_the_next(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path, results = compare_losses.find_results(None, {"lr": 1})
    assert path == Path("runs/compare_losses-1.json")
    compare_losses.write_results(path, results)
    assert compare_losses.find_results(None, {"lr": 1})[0] == path
    assert compare_losses.find_results(None, {"lr": 2})[0] == Path("runs/compare_losses-2.json")


def test_what_trains_is_said_with_the_time_that_all_will_take(monkeypatch):
    said, now = [], [0.0]
    monkeypatch.setattr(compare_losses.time, "perf_counter", lambda: now[0])
    say = compare_losses.Announcements(["kd", "erde"], [0, 1], [{"method": "kd", "seed": 1}], said.append)
    say.training("seed 0, the teacher")
    now[0] = 60.0
    say.training("seed 0, kd")
    assert said == ["training 1 of 5: seed 0, the teacher", "training 2 of 5: seed 0, kd; about 4 min 0 s left in all"]


def test_summary_by_hand():
    runs = [
        {"method": "kd", "seed": seed, "seconds": 1.0, "accuracy_at_cost": {"0.5": half, "0.75": 0.5},
         "per_exit": [{"accuracy": 0.4, "nll": 2.0}, {"accuracy": last, "nll": 1.0}]}
        for seed, half, last in ((0, 0.5, 0.6), (1, None, 0.8))
    ]  # fmt: skip
    (row,) = compare_losses.summarize(runs)
    assert row["last_exit"] == pytest.approx(0.7)
    assert row["last_exit_std"] == pytest.approx(0.1414, abs=1e-4)
    assert "half_cost" not in row, "one seed does not reach that cost"
    assert "worst_group_last_exit" not in row
    assert "70.0 ±14.1" in compare_losses.format_summary([row])
