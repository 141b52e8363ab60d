"""Loads a checkpoint once for every stored value that was replaced by an absurd one."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ErdeError

MEMORY, SECONDS = 300 * 2**20, 5.0
DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]
VALUES = [
    *(None, -1, 10**6, 10**9, 10**30, float("nan"), float("inf"), "", "x" * 100_000, "a.b\n\x00", {"a": {}}, DEEP),
    *([1000] * 100_000, [f"a{i}" for i in range(100_000)], {str(i): i for i in range(100_000)}),
]
#: Values that fit a field and are absurd all the same.
FIELDS = {
    "policy": [
        {"policy": "eenet", "policy_kwargs": {"num_exits": 20_000, "num_classes": 20_000}, "threshold": None},
        {"policy": "eenet", "policy_kwargs": {"num_exits": 3, "num_classes": 10**10}, "threshold": None},
        {"policy": "set_size", "policy_kwargs": {"num_exits": 10**9}, "threshold": None},
    ],
    "calibrator": [
        {"calibrator": name, "calibrator_kwargs": {"num_exits": exits, **more}}
        for name, more in (
            ("temperature", {}),
            ("laplace", {"num_classes": 4, "feature_sizes": [8] * 3, "draws": 10**10}),
            ("laplace", {"num_classes": 10**6, "feature_sizes": [10**6] * 3}),
        )
        for exits in (2, 3, 10**9)
    ],
    "exits": [{"exits": [f"layer{i}" for i in range(30_000)], "exit_features": None}],
    "num_labels": [
        *({"num_labels": number, "id2label": None} for number in (10**5, 10**6, 10**9)),
        {"id2label": {str(i): "a" for i in range(300_000)}},
    ],
}


def places(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the way to every value inside."""
    if at:
        yield at
    inner = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    for key, value in inner:
        yield from places(value, (*at, key))


def changed(config: dict[str, Any], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what was changed, and the config."""
    for at in places(config) if what == "all" else ():
        for value in VALUES:
            other = json.loads(json.dumps(config))
            target = other
            for key in at[:-1]:
                target = target[key]
            target[at[-1]] = value
            yield f"{at}={value!r:.30}", other
    for changes in (entry for entries in FIELDS.values() for entry in entries):
        yield f"{changes!r:.120}", {**config, **changes}


class Slow(BaseException):
    """Raised after :data:`SECONDS`; nothing on the way catches it."""


def stop(*_: Any) -> None:
    raise Slow


def main(folder: Path, which: str, found: Path) -> None:
    """Writes a line for every value that ends otherwise than with a model or an error of ours, or that costs too much.

    Sets limits of this process. ``which`` is ``all``, or ``fields``: only the values that fit a field and are absurd
    all the same. Too much is more than 300 MiB, or 5 seconds of the processor.
    """
    lines = []
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    EarlyExitWrapper.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * MEMORY, used + 8 * MEMORY))
    signal.signal(signal.SIGPROF, stop)
    tried = 0
    for what, other in changed(config, which):
        tried += 1
        (folder / "config.json").write_text(json.dumps(other))
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            EarlyExitWrapper.from_pretrained(folder)
            end = ""
        except ErdeError:
            end = ""
        except BaseException as error:  # noqa: BLE001 - printed
            end = f"{type(error).__name__}: {str(error)[:100]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        if end or grown > MEMORY:
            lines.append(f"{what}: {end} {time.process_time() - start:.1f} s, {grown >> 20} MiB")
    found.write_text("\n".join([*lines, f"{tried} configs"]))
