"""benchmarks/calibration.py: every function of records is timed, and a part leaves the other in the file."""

from __future__ import annotations

import json

import pytest
from benchmarks import calibration

from erde_hub.errors import ConfigError, UnknownNameError


def test_both_parts_are_measured_and_kept(tmp_path, capsys, call):
    file = tmp_path / "b.json"
    small = ["--samples", "60", "--exits", "2", "--classes", "3", "--width", "4", "--output", str(file)]
    for flags in (
        ["--parts", "laplace", "--batch_size", "2", "--draws", "2", "--rounds", "1"],
        ["--parts", "functions"],
    ):
        call(calibration, *small, *flags)
    results = json.loads(file.read_text())
    assert [row["classes"] for row in results["laplace"]] == [10, 3]
    assert all(row["share"] == row["calibrator_seconds"] / row["forward_seconds"] for row in results["laplace"])
    names = [row["function"] for row in results["functions"]]
    assert {"choose_threshold, exact, per exit", "LaplaceCalibrator.fit", "EENetPolicy.fit"} <= set(names)
    assert len(names) == len(set(names))
    assert all(row["seconds"] > 0 for row in results["functions"])
    assert "choose_threshold, ltt" in capsys.readouterr().out


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="exits and classes must be at least 2, got 1 and 100"):
        calibration.CalibrationBenchmark(exits=1)
    with pytest.raises(ConfigError, match="draws must be at least 1, got 0"):
        calibration.CalibrationBenchmark(draws=0)
    with pytest.raises(UnknownNameError, match="did you mean 'laplace'"):
        calibration.CalibrationBenchmark(parts=["laplce"])
