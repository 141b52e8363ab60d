"""Measures what each threshold of a checkpoint takes on this machine: accuracy, share saved, milliseconds.

    erde-hub latency --model runs/digits-1
    erde-hub latency --model runs/digits-1 --runtime onnxruntime --cpu_threads 4

One image per call, with torch and onnxruntime, with one thread and with all. The time of a threshold is the mean over
the test images, of which results.json tells how many leave at each exit. The times are kept there, in the card and in
frontier_ms.png; a checkpoint without results.json keeps none.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from erde_hub._tables import format_table
from erde_hub.errors import ConfigError, unknown_name
from erde_hub.evaluation import load_results
from erde_hub.evaluation.formatting import percent, threshold_label, thresholds_of, with_point
from erde_hub.evaluation.results_file import mean_milliseconds
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.exit_times import RUNTIMES, measure_exits


@dataclass
class LatencyArguments:
    """What is measured, and how long."""

    model: str = HfArg(help="folder or Hub repository of a checkpoint; the report of a folder gets the times")
    runtime: list[str] = HfArg(default_factory=lambda: list(RUNTIMES), help="torch, onnxruntime, or both")
    cpu_threads: list[int] = HfArg(default_factory=lambda: [1, 0], help="numbers of CPU threads, 0: one per core")
    rounds: int = HfArg(default=50, help="rounds at most; in each, all exits take turns")
    seconds: float = HfArg(default=5.0, help="seconds per runtime and number of threads, after which rounds end")
    dry_run: bool = HfArg(default=False, help="print the times and write nothing")

    def __post_init__(self) -> None:
        """Checks names and numbers."""
        for name in self.runtime:
            if name not in RUNTIMES:
                raise unknown_name("runtime", name, RUNTIMES)
        if self.rounds < 1 or self.seconds <= 0 or min(self.cpu_threads) < 0:
            raise ConfigError(
                f"rounds must be at least 1, seconds above 0 and cpu_threads at least 0, got {self.rounds},"
                f" {self.seconds} and {self.cpu_threads}"
            )


def main() -> None:
    """Loads, measures, prints, writes."""
    args, _ = parse_arguments({"latency": LatencyArguments}, __doc__ or "")
    recipe.configure_logging(True)
    model = recipe.load_model(args.model)
    latency = measure_exits(model, args.runtime, args.cpu_threads, args.rounds, args.seconds)
    report = Path(args.model).expanduser() / "results.json"
    results = load_results(report) if report.is_file() else None
    print(format_latency(latency, results))
    if any(later < earlier for one in latency["settings"] for earlier, later in pairwise(one["exit_milliseconds"])):
        print("\nWarning: an exit took longer than a deeper one, as on a busy machine. Measure again on an idle one.")
    if results is not None and not args.dry_run:
        recipe.write_report(
            {**results, "latency": latency}, report.parent, card=(report.parent / "README.md").is_file()
        )
        print(f"\nwritten into {report}")
    elif results is None:
        print(f"\nthe times are not kept: there is no report {report} that could hold them")


def format_latency(latency: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    """Formats milliseconds per exit, and per threshold where there is a report of the checkpoint."""
    settings = latency["settings"]
    names = [f"{row['runtime']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}" for row in settings]
    exits = [
        (name, *(f"{row['exit_milliseconds'][e]:.2f}" for row in settings)) for e, name in enumerate(latency["exits"])
    ]
    title = f"{latency['cpu']}, one image per call; milliseconds"
    tables = [title, format_table(("leaves at", *names), exits)]
    if results is not None:
        among, full = thresholds_of(results), results["per_exit"][-1]["macs"]
        rows = []
        for row, stored in with_point(results["sweep"], results.get("operating_point")):
            label = threshold_label(row["threshold"], results["student"].get("policy"), among) + " *" * stored
            times = [mean_milliseconds(row["exit_share"], setting["exit_milliseconds"]) for setting in settings]
            cells = (
                f"{time:.2f} ({1 - time / setting['exit_milliseconds'][-1]:.0%} saved)"
                for time, setting in zip(times, settings, strict=True)
            )
            rows.append((label, percent(row["accuracy"]), f"{1 - row['mean_macs'] / full:.0%}", *cells))
        tables.append(format_table(("threshold", "accuracy %", "MACs saved", *names), rows))
        tables.append("* stored threshold; saved: of the time of the last exit")
    return "\n\n".join(tables)


if __name__ == "__main__":
    run_script(main)
