"""calibrate.py writes what it chose into checkpoint and report; compare_policies.py and --compare read records."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import compare_policies
import pytest
import simulate_guarantee
import torch
from pages import calibration
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, DataError, RecordsError, ThresholdError, UnknownNameError
from erde_hub.policies import EENetPolicy
from erde_hub.scripts import calibrate, evaluate


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_threshold_profile_and_report_are_rewritten(call, run, capsys):
    weights = (run / "model.safetensors").read_bytes()
    flags = ["--model", run, "--max_accuracy_drop", 0.2, "--confidence", 0.8, "--cpu_threads", 1]
    flags += ["--group_column", "label"]
    call(calibrate, *flags, "--dry_run")
    assert "threshold_profile" not in config_of(run) or config_of(run)["threshold_profile"] is None
    call(calibrate, *flags)
    printed = capsys.readouterr().out
    assert f"10 classes (what {run} was trained on)" in printed
    assert "objective: loss of accuracy against the full model at most 20 points with 80 % confidence" in printed
    profile = config_of(run)["threshold_profile"]
    assert profile["samples"] == 144
    assert profile["split"] == "validation"
    assert config_of(run)["threshold"] == profile["threshold"]
    assert (run / "model.safetensors").read_bytes() == weights
    results = json.loads((run / "results.json").read_text())
    assert results["threshold_choice"]["confidence"] == 0.8
    assert results["operating_point"]["threshold"] == profile["threshold"]
    card = (run / "README.md").read_text()
    assert "with 80 % confidence" in card
    slices = results["slices"]
    assert sorted(row["slice"] for row in slices) == [str(digit) for digit in range(10)]
    assert sum(row["samples"] for row in slices) == results["metrics"]["samples"]
    assert {row["promise"] for row in slices} <= {"holds", "open", "broken"}
    unsupported = profile["unsupported_slices"]
    assert f"slices that do not support the bound by themselves: {', '.join(unsupported)}" in printed
    assert f"| {slices[0]['slice']} | {slices[0]['samples']} |" in card
    loaded = EarlyExitWrapper.from_pretrained(run)
    assert loaded.threshold == profile["threshold"]
    assert loaded.config.threshold_profile == profile
    assert EarlyExitWrapper.from_pretrained(run, threshold=0.123).config.threshold_profile is None
    loaded.threshold = 0.5
    assert loaded.config.threshold_profile is None
    (run / "results.json").write_text(json.dumps(results | {"figures": ["contact_sheet.png"]}))
    call(calibrate, "--model", run, "--max_accuracy_drop", 0.001, "--cpu_threads", 1)
    assert config_of(run)["threshold"] == 0.0
    assert "slices" not in json.loads((run / "results.json").read_text()), "those of the old threshold would stay"
    figures = json.loads((run / "results.json").read_text())["figures"]
    assert figures == ["reliability.png", "scores.png", "shares.png", "contact_sheet.png", "sample.png"]
    assert all((run / name).is_file() for name in figures), "those of the old threshold would stay"
    assert "No sample exits early" in capsys.readouterr().out


def test_sets_of_the_answers_are_stored(call, run, capsys):
    macs = EarlyExitWrapper.from_pretrained(run).exit_table().cumulative_macs
    budget = ["--max_mean_macs", sum(macs[-2:]) / 2, "--cpu_threads", 1]
    call(calibrate, "--model", run, *budget, "--set_alpha", 0.2)
    assert "prediction sets with error rate 0.2, images that took each exit: " in capsys.readouterr().out
    model = EarlyExitWrapper.from_pretrained(run)
    assert model.config.threshold_profile["samples"] == 144 - 57  # two fifths are for the sets
    assert model.prediction_sets.routed
    assert model.prediction_sets.alpha == 0.2
    assert min(model.prediction_sets.quantiles) < 1
    assert model(torch.zeros(2, *model.config.input_size), output_sets=True).sets.shape == (2, 10)
    call(calibrate, "--model", run, *budget)  # another threshold, for which they do not hold
    assert EarlyExitWrapper.from_pretrained(run).prediction_sets is None
    with pytest.raises(ConfigError, match="alpha"):
        call(calibrate, "--model", run, *budget, "--set_alpha", 1)


def test_eenet_is_trained_for_the_budget(call, run, monkeypatch):
    fit, seen = EENetPolicy.fit.__func__, []

    def short(cls, records, budget=None, *, costs=None, allow_missing_classes=False):
        seen.append((budget, costs))
        return fit(cls, records, budget, costs=costs, epochs=2, restarts=1, allow_missing_classes=allow_missing_classes)

    monkeypatch.setattr(EENetPolicy, "fit", classmethod(short))
    flags = ["--model", run, "--policy", "eenet", "--dry_run", "--cpu_threads", 1]
    macs = [row["macs"] for row in json.loads((run / "results.json").read_text())["per_exit"]]
    budget = (macs[0] + macs[-1]) // 2
    call(calibrate, *flags, "--max_mean_macs", budget)
    call(calibrate, *flags, "--max_mean_milliseconds", 2.5, "--exit_milliseconds", 1, 2, 3)
    call(calibrate, *flags, "--max_accuracy_drop", 0.5)
    assert seen == [(budget, None), (2.5, [1, 2, 3]), (None, None)]
    with pytest.raises(ConfigError, match=r"budget .* is outside the costs of the exits"):
        call(calibrate, *flags, "--max_mean_macs", 2 * macs[-1])


@pytest.mark.slow
def test_parts_are_fitted_and_records_compared(call, run, tmp_path, capsys):
    call(
        calibrate, "--model", run, "--max_accuracy_drop", 0.3, "--calibrator", "temperature", "--policy", "eefp",
        "--confidence", 0.7, "--cpu_threads", 1,
    )  # fmt: skip
    config = config_of(run)
    assert (config["calibrator"], config["policy"]) == ("temperature", "eefp")
    assert config["threshold_profile"]["samples"] == 87
    assert (EarlyExitWrapper.from_pretrained(run).calibrator.temperature != 1).all()
    for split in ("validation", "test"):
        call(evaluate, "--model", run, "--split", split, "--save_records", "--output_dir", split, "--cpu_threads", 1)
        drawn = json.loads((tmp_path / split / "results.json").read_text())["figures"]
        sets = ["sets.png"] if split == "test" else []  # fitted on validation images
        assert drawn == ["reliability.png", "scores.png", "shares.png", "contact_sheet.png", "sample.png", *sets]
        assert all((tmp_path / split / name).is_file() for name in drawn)
    report = json.loads((tmp_path / "test" / "results.json").read_text())
    assert report["student"]["calibrator"] == "temperature"
    points = [report["operating_point"], json.loads((run / "results.json").read_text())["operating_point"]]
    sizes = [(point.pop("coverage"), point.pop("set_size")) for point in points]
    assert points[0] == points[1]
    assert sizes[0] != sizes[1], "calibrate.py leaves out the images that the calibrator was fitted on"
    assert len(report["sweep"]) < 20
    pair = [tmp_path / split / "records.safetensors" for split in ("validation", "test")]
    capsys.readouterr()
    call(evaluate, "--model", run, "--compare", *pair)
    assert "support a bound of" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="takes two files of records, before and now, got 1"):
        call(evaluate, "--model", run, "--compare", pair[0])
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for i, image in enumerate(load_digits().images[:60]):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(tmp_path / "new" / "deep" / f"{i:02}.png")
    call(evaluate, "--model", run, "--compare", pair[0], "--images", "new", "--cpu_threads", 1)
    printed = capsys.readouterr().out
    assert "threshold: unknown: the new samples have no labels" in printed
    assert "input: " in printed
    assert re.search(r"accuracy % +\d+\.\d+ +-", printed)
    for flags, message in (
        (["--images", "new"], "give --compare FILE"),
        (["--images", "new", "--compare", *pair], "with --images it takes one, before"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(evaluate, "--model", run, *flags)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="'empty' holds no image"):
        call(evaluate, "--model", run, "--compare", pair[0], "--images", "empty")
    call(compare_policies, "--validation", pair[0], "--test", pair[1], "--output", "p.json", "--resamples", 10,
         "--low", 0.5)  # fmt: skip
    rows = json.loads((tmp_path / "p.json").read_text())["policies"]
    assert {"entropy", "eefp (learned)", "entropy, mie"} <= {row["policy"] for row in rows}
    assert next(row for row in rows if row["policy"] == "entropy")["difference"] == 0
    patience = next(row for row in rows if row["policy"] == "patience")
    assert patience["range"][0] > 0.5, "it cannot reach the lower end"
    with pytest.raises(ConfigError, match=r"begin at the lowest cost that can be reached, 0\.46"):
        call(compare_policies, "--validation", pair[0], "--test", pair[1], "--output", "p.json")
    with pytest.raises(ConfigError, match="of the test split"):
        call(compare_policies, "--validation", pair[1], "--test", pair[1], "--output", "p.json")
    other = EarlyExitWrapper.from_pretrained(run)
    with torch.no_grad():
        other.heads[0].get_parameter(next(name for name, _ in other.heads[0].named_parameters())).add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RecordsError, match="were not collected with this model"):
        call(evaluate, "--model", "other", "--compare", *pair)

    again = ("--max_disagreement", 0.3, "--confidence", 0.7, "--cpu_threads", 1)
    call(calibrate, "--model", run, *again)
    assert config_of(run)["threshold_profile"]["samples"] == 87, "what parts were fitted on proves nothing of them"
    call(calibrate, "--model", run, *again, "--split", "test")
    call(calibrate, "--model", run, *again)
    assert config_of(run)["threshold_profile"]["samples"] == 87, "other images in between do not make one forget them"
    (run / "fitted_on.safetensors").unlink()
    capsys.readouterr()
    call(calibrate, "--model", run, *again, "--dry_run")
    assert "it is not known which samples" in capsys.readouterr().out
    call(calibrate, "--model", run, *again, "--policy", "eefp")
    assert not (run / "fitted_on.safetensors").exists(), "it would make the calibrator look known too"
    call(calibrate, "--model", run, *again, "--calibrator", "none", "--policy", "entropy")
    assert config_of(run)["threshold_profile"]["samples"] == 144
    assert not (run / "fitted_on.safetensors").exists()


def test_no_guarantee_survives_a_kill_on_samples_that_its_parts_were_fitted_on(call, run, tmp_path, monkeypatch):
    """Killed before each single file is put in place: what is stored is known, and promised only for what is stored."""
    flags = ["--max_accuracy_drop", 0.3, "--confidence", 0.7, "--cpu_threads", 1]
    call(calibrate, "--model", run, "--calibrator", "temperature", *flags)
    shutil.copytree(run, tmp_path / "whole")
    call(calibrate, "--model", tmp_path / "whole", "--policy", "eefp", *flags)

    def state(folder):
        """What is loaded, from whichever of the two saves, and which samples its parts were fitted on."""
        config = EarlyExitWrapper.from_pretrained(folder).config
        return (
            config.policy,
            config.threshold_profile,
            set(load_file(folder / "fitted_on.safetensors")["hashes"].tolist()),
        )

    (_, before, old_fitted), (_, after, fitted) = state(run), state(tmp_path / "whole")
    assert before
    assert after
    assert old_fitted < fitted
    put, seen = Path.replace, []
    for moves in (0, 1, 3, 4, 5, 6):
        killed, left = tmp_path / f"killed-{moves}", iter(range(moves))
        shutil.copytree(run, killed)

        def replace(path, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return put(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                call(calibrate, "--model", killed, "--policy", "eefp", *flags)
        policy, profile, listed = state(killed)
        if policy == "eefp":
            assert listed >= fitted
        assert profile in ((before, None) if policy == "entropy" else (after, None))
        seen.append((policy, bool(profile)))
    assert {("entropy", True), ("eefp", True)} <= set(seen), "killed before and after the new policy is in place"


@pytest.mark.slow
def test_data_that_were_trained_on_are_refused_and_the_run_names_its_data(call, run, monkeypatch, capsys):
    monkeypatch.setattr(calibrate.recipe, "rows_trained_on", lambda model, records, split: records.index[:2])
    with pytest.raises(DataError, match="2 of 144 samples were trained on"):
        call(calibrate, "--model", run, "--max_accuracy_drop", 0.2, "--cpu_threads", 1)
    group = ("--group_column", "label")
    call(evaluate, "--model", run, "--cpu_threads", 1, "--output_dir", "e", "--set_alpha", 0, *group)
    printed = capsys.readouterr().out
    assert f"(what {run} was trained on)" in printed
    assert "slice, worst first" in printed
    assert Path("e", "slices.png").is_file()
    with pytest.raises(DataError, match=r"'digits' has no column 'camera' \(columns: none; 'label' groups by class\)"):
        call(evaluate, "--model", run, "--cpu_threads", 1, "--output_dir", "f", "--group_column", "camera")
    with pytest.raises(ConfigError, match=r"--set_alpha must be at least 0 and below 1, got 1\.5"):
        call(evaluate, "--model", run, "--set_alpha", 1.5)


def test_refusals_come_before_data_are_read(call, run, monkeypatch):
    with pytest.raises(ConfigError, match=r"give exactly one of --max_accuracy_drop, .* got none"):
        call(calibrate, "--model", run)
    with pytest.raises(UnknownNameError, match="unknown calibrator 'temp'; did you mean 'temperature'"):
        call(calibrate, "--model", run, "--max_accuracy_drop", 0.1, "--calibrator", "temp")
    with pytest.raises(ConfigError, match="is no folder: only a checkpoint on this machine"):
        call(calibrate, "--model", "org/name", "--max_accuracy_drop", 0.1)
    with pytest.raises(ThresholdError, match="NeverPolicy has no threshold to choose"):
        call(calibrate, "--model", "org/name", "--max_accuracy_drop", 0.1, "--policy", "never")
    for flags, message in (
        (("--max_accuracy_drop", 0.1, "--method", "crc", "--confidence", 0.9), "'crc' takes no confidence.* use 'ltt'"),
        (("--max_accuracy_drop", 0.1, "--method", "search", "--confidence", 0.95), "'search' takes no confidence"),
        (("--max_mean_macs", 1e6, "--confidence", 0.95), "max_mean_macs is a budget.* leave confidence 0.95 out"),
        (("--max_mean_milliseconds", 2), "needs exit_milliseconds"),
    ):
        with pytest.raises(ConfigError, match=message):  # and not: there is no such folder
            call(calibrate, "--model", "org/name", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate.recipe, "load_data_of", lambda *args: pytest.fail("data were loaded"))
        with pytest.raises(ConfigError, match="must be 3 positive times, one per exit"):
            call(calibrate, "--model", run, "--max_mean_milliseconds", 2, "--exit_milliseconds", 1, 2)
        with pytest.raises(ConfigError, match="a budget of 10 is below the cheapest exit's cost"):
            call(calibrate, "--model", run, "--max_mean_macs", 10)


def test_the_simulation_writes_its_table(call, tmp_path):
    call(simulate_guarantee, "--output", "s.json", "--sizes", 400, "--draws", 2, "--population", 2000,
         "--other_bounds", 0.05, "--near_bounds", 0.04, "--near_samples", 300)  # fmt: skip
    results = json.loads((tmp_path / "s.json").read_text())
    rows = results["rows"]
    assert [(row["bound"], row["samples"]) for row in results["nearby"]] == [(0.04, 300)]
    assert all(0 <= row["ceiling"] < 1 for row in rows)
    methods = {row["method"] for row in rows}
    assert {f"{m}, {k}" for m in ("search", "crc", "ltt", "exact", "ucb") for k in ("shared", "per exit")} < methods
    assert {"greedy (earlyon)", "guarantee, shared", "guarantee, per exit"} < methods
    assert {row["bound"] for row in rows} == {0.01, 0.05}
    assert all(0 <= row["broken"] <= 1 for row in rows)


def test_the_page_shows_a_policy_that_reaches_no_cost_of_the_range(monkeypatch):
    nothing = dict.fromkeys(("area", "difference", "difference_interval", "to_margin", "to_margin_interval", "eefp"))
    row = {"policy": "patience", **nothing, "accuracy_at": [None, None, 0.9]}
    monkeypatch.setattr(calibration, "load", lambda name: {"policies": [row]})
    assert calibration.comparison_table("digits").splitlines()[-1] == "| patience | - | - | - | - | - | 90.0 |"
