"""Processes that fork from one which has imported everything already: a start takes no seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.fakes.distiller_process"])


def run_pair(function: Callable[..., None], *args: Any) -> None:
    """Runs ``function(rank, *args)`` in two processes at once, and sees that both end well."""
    processes = [CONTEXT.Process(target=function, args=(rank, *args)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
