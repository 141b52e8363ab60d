"""Measures one training step of the Distiller against a loop written by hand: time, memory, input pipeline.

    python recipes/benchmarks/training.py
    python recipes/benchmarks/training.py --dataset FOLDER_OR_HUB_NAME --output recipes/results/benchmark_training.json

Both loops train the same networks with the same loss, precision and batch; the input pipeline is timed alone too.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from process_memory import forget_peak, process_memory
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper, __version__
from erde_hub.data.images import BatchLoader, ImageData
from erde_hub.errors import ConfigError
from erde_hub.losses import ExitLoss, create_loss
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import (
    DataArguments,
    ExitArguments,
    StudentArguments,
    TeacherArguments,
    loss_arguments_class,
)
from erde_hub.scripts.common.command_line import CONFIGS, parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results
from erde_hub.training import DistillationArguments, Distiller, DistillerCallback, create_accelerator

#: Networks of the benchmark where no --config says otherwise; the data are digits where no --dataset does.
DEFAULT_CONFIG = CONFIGS / "cifar10_resnet18_resnet10-small.yaml"

Model = EarlyExitWrapper
Side = Literal["distiller", "by_hand"]


@dataclass
class TrainingBenchmark:
    """How much is measured, and where the numbers go."""

    rounds: int = HfArg(default=12, help="rounds; in each, both loops take turns")
    steps_per_round: int = HfArg(default=4, help="optimizer steps of each loop and round")
    memory_steps: int = HfArg(default=6, help="optimizer steps for the memory, in a process each")
    output: str | None = HfArg(default=None, help="JSON file for the numbers; replaced if it exists")
    only: str | None = HfArg(
        default=None,
        help="distiller or by_hand: run that loop alone and print how much memory it needs (MiB)",
    )

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("rounds", "steps_per_round", "memory_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.only not in (None, "distiller", "by_hand"):
            raise ConfigError(f"only must be distiller or by_hand, got {self.only!r}")


@dataclass
class Setup:
    """What both loops train: the same data, networks and loss."""

    data: ImageData
    teacher: Model
    student: Model
    loss: str
    args: DistillationArguments

    def loader(self) -> BatchLoader:
        """Builds the training batches, as the Distiller does."""
        args = self.args
        return BatchLoader(
            self.data.train,
            args.batch_size,
            shuffle=True,
            augment=args.augment or self.data.augment,
            seed=args.seed,
            drop_last=True,
            channels_last=args.channels_last,
            num_workers=args.num_workers,
        )


def training_by_hand(
    student: Model, teacher: Model, loss: ExitLoss, loader: BatchLoader, args: DistillationArguments, device: str
) -> Iterator[float]:
    """The loop that the Distiller is measured against: plain torch, and nothing that can be left out."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    student.to(device).to(memory_format=layout).train()
    teacher.to(device).to(memory_format=layout).eval()
    decayed = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in student.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": args.weight_decay}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.max_steps + 1, cycle_momentum=False)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        for batch in loader:
            images, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype is torch.bfloat16):
                with torch.no_grad():
                    teacher_logits = teacher(images, output_all_exits=True).exit_logits
                logits = student(images).exit_logits
            value = loss(logits, teacher_logits, labels).loss
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield value.item()
        epoch += 1


class TakeTurns(DistillerCallback):
    """Times each step of the Distiller, and after each round lets the others have theirs."""

    def __init__(self, steps: int, others: dict[str, Callable[[], Any]]) -> None:
        self.steps, self.others = steps, others
        self.seconds: dict[str, list[list[float]]] = {name: [] for name in ("distiller", *others)}
        self._round: list[float] = []
        self._since: float | None = None

    def on_step_end(self, distiller: Distiller) -> None:
        """Notes the time since the last step; a full round is followed by one of each other."""
        if self._since is not None:  # the first step ever warms up
            self._round.append(time.perf_counter() - self._since)
        if len(self._round) == self.steps:
            self.seconds["distiller"].append(self._round)
            self._round = []
            for name, step in self.others.items():
                self.seconds[name].append([_timed(step) for _ in range(self.steps)])
        self._since = time.perf_counter()

    def on_epoch_end(self, distiller: Distiller, record: dict[str, Any]) -> None:
        """Leaves the validation out."""
        self._since = time.perf_counter()


class StopBeforeValidation(DistillerCallback):
    """Ends a training after its last step: the validation touches images that the loop written by hand never reads."""

    class Reached(Exception):  # noqa: N818 - nothing went wrong
        """The last step is done."""

    def on_step_end(self, distiller: Distiller) -> None:
        """Raises after the last step."""
        if distiller.position.step == distiller.total_steps:
            raise self.Reached


def main() -> None:
    """Compares the Distiller with a loop written by hand."""
    sections = {
        "benchmark": TrainingBenchmark,
        "data": DataArguments,
        "student": StudentArguments,
        "teacher": TeacherArguments,
        "exits": ExitArguments,
        "training": DistillationArguments,
    }
    benchmark, data_args, student_args, teacher_args, exits, args, config = parse_arguments(
        sections, __doc__, default_config=DEFAULT_CONFIG, ignored=[loss_arguments_class()]
    )
    argv = sys.argv[1:]
    if not any(flag.partition("=")[0] in ("--dataset", "--config") for flag in argv):
        data_args.dataset = "digits"
    if (args.optimizer, args.scheduler) != ("sgd", "onecycle"):
        raise ConfigError("the loop written by hand has SGD and one-cycle only: leave optimizer and scheduler alone")
    steps = benchmark.memory_steps if benchmark.only else 1 + benchmark.rounds * benchmark.steps_per_round
    args.epochs, args.max_steps, args.output_dir, args.progress_bar = 1_000_000, steps, None, False
    accelerator = create_accelerator(args)
    data = recipe.load_data(data_args, progress=False)
    student = recipe.build_student(student_args, exits, data, args)
    teacher = recipe.build_model(
        teacher_args.teacher_architecture, data, exits, kwargs=teacher_args.teacher_kwargs, seed=args.seed
    )
    setup = Setup(data, teacher, student, student_args.loss, args)
    if benchmark.only:
        print(_peak_memory(setup, benchmark.only, str(accelerator.device)))
        return

    # The memory of each loop first: it is that of a whole process, and this one is still small.
    memory = {side: _in_a_process_of_its_own(argv, side) for side in ("by_hand", "distiller")}
    own = training_by_hand(
        deepcopy(student), deepcopy(teacher), create_loss(setup.loss), setup.loader(), args, str(accelerator.device)
    )
    batches = _endless(setup.loader())
    next(own), next(batches)
    turns = TakeTurns(benchmark.steps_per_round, {"by_hand": lambda: next(own), "input": lambda: next(batches)})
    Distiller(student, data, args, setup.loss, teacher, accelerator=accelerator, callbacks=[turns]).train()

    results = {
        "erde_hub": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": accelerator.device.type,
        "threads": torch.get_num_threads(),
        "config": config,
        "dataset": data.name,
        "loss": setup.loss,
        "batch_size": args.batch_size,
        "mixed_precision": accelerator.mixed_precision,
        "channels_last": args.channels_last,
        "rounds": benchmark.rounds,
        "steps_per_round": benchmark.steps_per_round,
        **_summary(turns.seconds, memory),
    }
    print(_table(results))
    write_results(benchmark.output, results)


def _summary(seconds: dict[str, list[list[float]]], memory: dict[str, float]) -> dict[str, Any]:
    """Medians over all steps; the ratio is the median over rounds, whose two halves saw the same machine."""
    step = {name: statistics.median(s for round_ in rounds for s in round_) for name, rounds in seconds.items()}
    pairs = zip(seconds["distiller"], seconds["by_hand"], strict=True)
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "step_seconds": {"distiller": step["distiller"], "by_hand": step["by_hand"]},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "memory_growth_mib": memory,
        "memory_ratio": memory["distiller"] / memory["by_hand"],
        "input_seconds": step["input"],
        "input_share": step["input"] / step["distiller"],
    }


def _table(results: dict[str, Any]) -> str:
    step, memory = results["step_seconds"], results["memory_growth_mib"]
    low, high = results["ratio_quartiles"]
    rows: list[tuple[str, float | None, float, float, str]] = [
        (
            "step (ms, median)",
            1e3 * step["by_hand"],
            1e3 * step["distiller"],
            results["ratio"],
            f"1.05 (quartiles {low:.3f} to {high:.3f})",
        ),
        ("memory growth (MiB)", memory["by_hand"], memory["distiller"], results["memory_ratio"], "no more"),
        ("input pipeline (ms)", None, 1e3 * results["input_seconds"], results["input_share"], "0.10 of the step"),
    ]
    title = (
        f"{results['config']} on {results['dataset']}: {results['loss']}, batch {results['batch_size']},"
        f" {results['mixed_precision']}, {results['threads']} thread(s), {results['rounds']} rounds of"
        f" {results['steps_per_round']} steps, interleaved"
    )
    lines = [title, "", f"{'':22}{'by hand':>10}{'Distiller':>11}{'ratio':>8}   target"]
    for name, by_hand, distiller, ratio, target in rows:
        first = "" if by_hand is None else f"{by_hand:.1f}"
        lines.append(f"{name:22}{first:>10}{distiller:11.1f}{ratio:8.3f}   {target}")
    return "\n".join(lines)


def _peak_memory(setup: Setup, side: Side, device: str) -> float:
    """Runs one loop and returns its peak memory in MiB: the GPU's, or that of this process above where it started."""
    before = 0.0 if torch.device(device).type == "cuda" else forget_peak()
    if side == "distiller":
        stop = StopBeforeValidation()
        with contextlib.suppress(StopBeforeValidation.Reached):
            Distiller(setup.student, setup.data, setup.args, setup.loss, setup.teacher, callbacks=[stop]).train()
    else:
        loss = create_loss(setup.loss)
        loop = training_by_hand(setup.student, setup.teacher, loss, setup.loader(), setup.args, device)
        for _ in range(setup.args.max_steps):
            next(loop)
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return process_memory("VmHWM") - before


def _in_a_process_of_its_own(argv: list[str], side: Side) -> float:
    """Returns the lower peak of two processes that run one loop only.

    The allocator hands freed memory back at once: otherwise what it happens to keep is more than what is compared.
    """
    command = [sys.executable, __file__, *argv, "--only", side]
    eager = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc
    runs = [
        subprocess.run(command, capture_output=True, text=True, env=os.environ | eager, check=False) for _ in range(2)
    ]
    failed = next((run for run in runs if run.returncode), None)
    if failed is not None:
        raise ConfigError(f"the loop {side} failed in a process of its own:\n{failed.stderr[-2000:]}")
    return min(float(run.stdout.split()[-1]) for run in runs)


def _endless(loader: BatchLoader) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_script(main)
