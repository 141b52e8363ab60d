"""What the command measures of loading: its instruments, and memory on a network large enough to be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import loading
from pages.speed import MEMORY_BOUND, loading_table, time_bound

linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read off /proc")


@linux
def test_passing_and_lasting_memory_are_told_apart():
    def load():
        passing = torch.ones(24 * 2**18)  # 24 MiB
        return torch.nn.Parameter(passing[: 8 * 2**18].clone())

    loading._memory(load)
    peak, kept = loading._memory(load)
    assert 31 < peak < 36
    assert 7 < kept < 12


@linux
@pytest.mark.long
def test_a_checkpoint_is_loaded_within_its_own_size(call, tmp_path, monkeypatch):
    output = tmp_path / "new" / "loading.json"
    flags = ["--rounds", "1", "--output", str(output)]
    call(loading, "--model", "resnet18", *flags)
    results = json.loads(output.read_text())
    assert list(results["networks"]) == ["resnet18"]
    found = results["networks"]["resnet18"]
    assert found["exits"]["weights_mib"] > found["bare"]["weights_mib"] > 44
    for side in ("exits", "bare"):
        assert 0.9 < found[side]["kept_memory"] < found[side]["peak_memory"] + 0.02
        assert found[side]["seconds"] > 0
    assert found["exits"]["peak_memory"] < MEMORY_BOUND
    assert "`resnet18`" in loading_table(results)
    monkeypatch.setattr(loading, "_network", lambda name, rounds: {**found, "ratio": rounds})
    for rounds, kept in ((1, ["resnet18", "a"]), (2, ["a"])):  # numbers of other settings are not mixed in
        call(loading, "--model", "a", "--rounds", str(rounds), *flags[2:])
        assert list(json.loads(output.read_text())["networks"]) == kept


def test_what_misses_its_bound_is_marked():
    assert time_bound(0.1) == pytest.approx(0.2)
    assert time_bound(1.0) == pytest.approx(1.3)
    side = {"weights_mib": 10.0, "seconds": 1.0, "peak_memory": 1.0, "kept_memory": 1.0}
    late = {"bare": side, "exits": {**side, "seconds": 1.31}, "ratio": 1.31}
    large = {"bare": side, "exits": {**side, "peak_memory": 1.21}, "ratio": 1.0}
    rows = loading_table({"networks": {"late": late, "large": large, "good": {**large, "exits": side}}})
    missed = {row.split("`")[1]: row.count("(missed)") for row in rows.splitlines() if "`" in row}
    assert missed == {"late": 1, "large": 1, "good": 0}
