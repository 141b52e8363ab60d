"""How many processor cores there are to use."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores() -> int:
    """Returns how many cores this process may use: its affinity mask, and a container's CPU quota if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores
