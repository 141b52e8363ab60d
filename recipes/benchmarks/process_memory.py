"""How much memory this process needs, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

from erde_hub.errors import ConfigError


def forget_peak() -> float:
    """Sets the peak of this process back, since loading data and libraries may have needed more; returns its memory."""
    if not Path("/proc/self/clear_refs").exists():
        raise ConfigError("the peak memory is measured on Linux only")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return process_memory("VmRSS")


def process_memory(name: str) -> float:
    """Returns an entry of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
