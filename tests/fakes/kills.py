"""Processes that are killed between two operations on files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def run_killed(function: Callable[[], None], before: int) -> bool:
    """Runs a function in a process that is killed before the given file operation; whether it came to its end."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == before:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0
