"""The allocator's two sides, as the command measures them."""

from __future__ import annotations

import json

import pytest
from benchmarks import allocator
from pages import speed

from erde_hub.allocator import keep_freed_memory
from erde_hub.errors import ConfigError


@pytest.mark.skipif(not keep_freed_memory(), reason="an allocator that is not glibc's")
@pytest.mark.long
def test_both_sides_run_in_processes_of_their_own(tmp_path, call):
    output = tmp_path / "new" / "allocator.json"
    flags = ["--model", "test_resnet", "--batch_size", "2", "--rounds", "1", "--calls", "1", "--output", str(output)]
    call(allocator, *flags)
    results = json.loads(output.read_text())
    assert results["seconds"]["test_resnet"].keys() == {"default", "kept"}
    assert min(results["seconds"]["test_resnet"].values()) > 0
    assert "`test_resnet`" in speed.allocator_table(results)


def test_a_side_is_not_measured_where_it_is_not_in_force(call, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    with pytest.raises(ConfigError, match="not one for 'kept'"):
        call(allocator, "--model", "test_resnet", "--only", "kept")
