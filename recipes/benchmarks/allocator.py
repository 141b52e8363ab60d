"""Measures what it costs that the C library gives freed memory back, and `keep_freed_memory()` saves.

    python recipes/benchmarks/allocator.py --output recipes/results/benchmark_allocator.json

The same plain network, without exits, runs in processes that take turns: how memory is kept is settled once for each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from transformers.hf_argparser import HfArg

from erde_hub import __version__, keep_freed_memory
from erde_hub.errors import ConfigError
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results

SIDES = ("default", "kept")
#: Says something about the allocator that changes nothing, and so leaves it as the system has it.
AS_IT_IS = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}


@dataclass
class AllocatorBenchmark:
    """What is measured, and where the numbers go."""

    model: list[str] = HfArg(
        default_factory=lambda: ["resnet18", "mobilenetv4_conv_small", "efficientnet_lite0"],
        help="timm names",
    )
    batch_size: int = HfArg(default=32, help="images per call")
    rounds: int = HfArg(default=3, help="processes of each kind, which take turns")
    calls: int = HfArg(default=5, help="calls in each process, of which the median counts")
    cpu_threads: int = HfArg(default=1, help="threads")
    output: str | None = HfArg(default=None, help="JSON file for the numbers; replaced if it exists")
    only: Literal["", "default", "kept"] = HfArg(default="", help="print one side's seconds, no more")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("batch_size", "rounds", "calls", "cpu_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def main() -> None:
    """Measures, prints, writes."""
    args, _ = parse_arguments({"benchmark": AllocatorBenchmark}, __doc__)
    if args.only:
        print(json.dumps(_seconds(args)))
        return
    if not keep_freed_memory():
        raise ConfigError("keep_freed_memory() does nothing here: it needs glibc and no MALLOC_ variables")
    models: dict[str, Any] = {}
    for name in args.model:
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                times[side].append(_in_a_process(name, side, args))
        models[name] = {side: statistics.median(values) for side, values in times.items()}
    results = {
        "erde_hub": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "batch_size": args.batch_size,
        "cpu_threads": args.cpu_threads,
        "rounds": args.rounds,
        "seconds": models,
    }
    write_results(args.output, results)


def _in_a_process(name: str, side: str, args: AllocatorBenchmark) -> float:
    numbers = {"batch_size": args.batch_size, "calls": args.calls, "cpu_threads": args.cpu_threads}
    flags = [part for key, value in numbers.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, __file__, "--model", name, "--only", side, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, **(AS_IT_IS if side == "default" else {})},
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"{name} could not be run: {done.stderr[-500:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def _seconds(args: AllocatorBenchmark) -> float:
    if keep_freed_memory() is not (args.only == "kept"):
        raise ConfigError(f"the process is not one for {args.only!r}: start the benchmark without --only")
    torch.set_num_threads(args.cpu_threads)
    model = timm.create_model(args.model[0]).eval()
    x = torch.randn((args.batch_size, *model.default_cfg["input_size"]), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(1 + args.calls):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    run_script(main)
