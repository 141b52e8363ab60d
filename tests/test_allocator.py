"""Freed memory that stays with the process."""

import os
import subprocess
import sys

import pytest

from erde_hub import allocator
from erde_hub.allocator import keep_freed_memory

#: Page faults of the second to fifth time that 64 MiB are asked for, written and freed.
SCRIPT = """
import ctypes, resource, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[2])["keep_freed_memory"]  # without the package, which takes seconds
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def once():
    block = libc.malloc(64 * 2**20)
    ctypes.memset(block, 1, 64 * 2**20)
    libc.free(block)
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    once()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **env: str) -> tuple[bool, int]:
    given = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "TUNABLES" not in name}
    script = [sys.executable, "-c", SCRIPT, mode, allocator.__file__]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env={**given, **env})
    kept, count = done.stdout.split()
    return kept == "1", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_block_is_used_again_without_asking_the_kernel():
    kept, count = faults("keep")
    if not kept:
        pytest.skip("not glibc")
    _, without = faults("leave")
    assert count < 100 < without


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=3")]
)
def test_what_the_environment_says_stands(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert keep_freed_memory() is False


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
