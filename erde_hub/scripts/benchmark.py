"""Measures what the early exits of a checkpoint save on this machine, next to its bare backbone and to the ideal.

    python recipes/benchmark.py --model runs/digits-1 --batch_size 1 64
    python recipes/benchmark.py --model runs/digits-1 --cpu_threads 0 --output latency.json

"By hand" is the ideal: the same stages and heads called one after the other, without any decision. All functions take
turns, round by round; times are medians over rounds. Run it on a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.hf_argparser import HfArg

from erde_hub._tables import format_table
from erde_hub.errors import ConfigError
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.contestants import Subject, contestants, load_subject, shares_of, thread_count
from erde_hub.scripts.common.results_files import environment, write_results
from erde_hub.scripts.common.turns import summary, take_turns


@dataclass
class LatencyArguments:
    """What is measured, how long, and where the numbers go."""

    model: str = HfArg(help="folder or Hub repository of a checkpoint, or a timm name for random weights")
    exits: int = HfArg(default=3, help="early exits of a timm model, evenly spaced in MACs")
    batch_size: list[int] = HfArg(default_factory=lambda: [1, 32], help="images per call")
    cpu_threads: int = HfArg(default=1, help="CPU threads, 0: one per core")
    rounds: int = HfArg(default=150, help="rounds at most; in each, all functions take turns")
    min_rounds: int = HfArg(default=4, help="rounds at least")
    seconds: float = HfArg(default=12.0, help="seconds per batch size, after which rounds end")
    output: str | None = HfArg(default=None, help="JSON file for the numbers; replaced if it exists")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("exits", "rounds", "min_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.batch_size or min(self.batch_size) < 1 or self.cpu_threads < 0 or self.seconds <= 0:
            raise ConfigError(
                f"batch_size must be at least 1, cpu_threads at least 0 and seconds above 0, got {self.batch_size},"
                f" {self.cpu_threads} and {self.seconds}"
            )


def main() -> None:
    """Loads, measures, prints, writes."""
    args, _ = parse_arguments({"benchmark": LatencyArguments}, __doc__)
    torch.set_num_threads(thread_count(args.cpu_threads))
    subject = load_subject(args.model, args.exits)
    settings = [measure(subject, batch, args) for batch in args.batch_size]
    for setting in settings:
        print(f"\n{format_setting(setting)}")
    results = {**environment(), "args": asdict(args) | {"model": subject.name, "output": None}}
    write_results(args.output, {**results, "macs": subject.model.exit_table().cumulative_macs, "settings": settings})


@torch.no_grad()
def measure(subject: Subject, batch: int, args: LatencyArguments) -> dict[str, Any]:
    """Times the bare backbone, the routed model and the stages by hand on one batch size."""
    counts = {} if batch == 1 else shares_of(batch, subject.model.num_exits - 1)
    functions, shares = contestants(subject, subject.images(batch), counts, full=batch == 1)
    label = f"{subject.name}, batch {batch}"
    times = take_turns(functions, args.rounds, args.min_rounds, args.seconds, label)
    return {"batch": batch, "threads": torch.get_num_threads(), "shares": shares, **summary(times)}


def format_setting(setting: Mapping[str, Any]) -> str:
    """Formats milliseconds per call, and their ratio to the bare backbone and to the stages by hand."""
    rows = []
    for name, time in setting["seconds"].items():
        ratios = [setting["ratios"].get(f"{name} / {other}") for other in ("bare", f"{name} by hand")]
        rows.append(
            (
                name,
                f"{1e3 * time['median']:.2f}",
                f"{1e3 * time['q1']:.2f}-{1e3 * time['q3']:.2f}",
                *("" if ratio is None else f"{ratio['median']:.3f}" for ratio in ratios),
            )
        )
    shares = "".join(
        f"; {key}: {' / '.join(f'{100 * share:.0f}' for share in own)} % exit at each exit"
        for key, own in setting["shares"].items()
    )
    title = f"batch {setting['batch']}, {setting['threads']} thread(s), {setting['rounds']} rounds{shares}"
    header = ("", "ms per call", "quartiles", "/ bare backbone", "/ by hand (the ideal)")
    return f"{title}\n{format_table(header, rows)}"


if __name__ == "__main__":
    run_script(main)
