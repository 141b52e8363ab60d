"""Measures how much of what early exits leave out a clock shows.

    python recipes/benchmarks/inference.py --output recipes/results/benchmark_inference.json

Contestants take turns, round by round; numbers are medians, with quartiles in the file. Run it on a machine that does
nothing else: with several threads on shared cores the times mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inference_earlyon import earlyon_contestants, load_earlyon
from inference_extras import compiled_stages, memory_of, onnx_times, peak_memory, stream_of
from transformers.hf_argparser import HfArg

from erde_hub import keep_freed_memory
from erde_hub.errors import ConfigError
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.contestants import (
    Subject,
    contestants,
    load_subject,
    shares_of,
    thread_count,
)
from erde_hub.scripts.common.results_files import environment, write_results
from erde_hub.scripts.common.turns import summary, take_turns

NETWORKS = (
    "resnet18",
    "resnet50",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
)


@dataclass
class InferenceBenchmark:
    """What is measured, how long, and where the numbers go."""

    model: list[str] = HfArg(
        default_factory=lambda: list(NETWORKS),
        help="checkpoints (folder or Hub repository), or timm names for random weights",
    )
    exits: int = HfArg(default=3, help="early exits of a timm model, evenly spaced in MACs")
    batch_size: list[int] = HfArg(default_factory=lambda: [1, 8, 32, 128], help="images per call")
    cpu_threads: list[int] = HfArg(
        default_factory=lambda: [1, 0],
        help="CPU threads, 0: one per core; everything is run with the first",
    )
    channels_last: bool = HfArg(default=True, help="the first number of threads in channels_last as well")
    rounds: int = HfArg(default=150, help="rounds at most; in each, all contestants take turns")
    seconds: float = HfArg(default=12.0, help="seconds per network and setting, after which rounds end")
    min_rounds: int = HfArg(default=4, help="rounds at least")
    peer: bool = HfArg(default=True, help="earlyon beside it, where it is installed and runs")
    onnx: bool = HfArg(default=True, help="onnxruntime: nested, flat and prefix, float and int8, batches up to 32")
    stream: bool = HfArg(default=True, help="route_batches beside plain batching")
    memory: bool = HfArg(default=True, help="peak memory, in a process of its own (Linux)")
    compiled: list[str] = HfArg(
        default_factory=lambda: ["resnet18", "mobilenetv4_conv_small"],
        help="networks to run after compile_stages() as well, or none (minutes each; needs a C++ compiler)",
    )
    output: str | None = HfArg(
        default=None,
        help="JSON file for the numbers; networks that it holds from such a machine are kept",
    )
    only_memory: bool = HfArg(default=False, help="print the peak memory of the first model, no more")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("exits", "rounds", "min_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.model or not self.batch_size or not self.cpu_threads:
            raise ConfigError("model, batch_size and cpu_threads need one value at least")
        if min(self.batch_size) < 1 or min(self.cpu_threads) < 0 or self.seconds <= 0:
            raise ConfigError(
                f"batch_size must be at least 1, cpu_threads at least 0 and seconds above 0, got {self.batch_size},"
                f" {self.cpu_threads} and {self.seconds}"
            )


def main() -> None:
    """Measures and writes."""
    args, _ = parse_arguments({"benchmark": InferenceBenchmark}, __doc__)
    if args.only_memory:
        print(json.dumps(peak_memory(load_subject(args.model[0], args.exits), args)))
        return
    machine = {**environment("torch", "timm", "onnxruntime", "earlyon"), "freed_memory_kept": keep_freed_memory()}
    results: dict[str, Any] = {**machine, "networks": _networks_in(args.output, machine)}
    for name in args.model:
        torch.set_num_threads(thread_count(args.cpu_threads[0]))
        subject = load_subject(name, args.exits)
        results["networks"][subject.name] = _measure(subject, name, args)
        results["networks"] = dict(sorted(results["networks"].items(), key=lambda item: _place(item[0])))
        write_results(args.output, results)  # after every network, so that hours are not lost


def _networks_in(path: str | None, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds that was measured with the same versions on the same kind of machine; those are kept."""
    if path is None or not Path(path).is_file():
        return {}
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    networks = stored.pop("networks", None)
    return networks if stored == machine and isinstance(networks, dict) else {}


def _place(name: str) -> int:
    """Where a network stands in the file: the default ones first, as they are listed."""
    return NETWORKS.index(name) if name in NETWORKS else len(NETWORKS)


@torch.no_grad()
def _measure(subject: Subject, name: str, args: InferenceBenchmark) -> dict[str, Any]:
    table = subject.model.exit_table()
    peer, reason = load_earlyon(subject) if args.peer else (None, "left out")
    result: dict[str, Any] = {
        "weights": subject.weights,
        "input_size": list(subject.model.config.input_size or ()),
        "exits": subject.model.exit_names,
        "macs": table.cumulative_macs,
        "driven_by": "hooks" if subject.stages() is None else "stages",
        "earlyon": reason,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "settings": [],
    }
    first = args.cpu_threads[0]
    for threads in args.cpu_threads:
        torch.set_num_threads(thread_count(threads))
        for batch in args.batch_size:
            result["settings"].append(_setting(subject, peer, batch, threads, False, args))
    torch.set_num_threads(thread_count(first))
    if args.channels_last and not _without_maps(subject):
        networks = [subject.model, *([] if peer is None else [peer])]
        for network in networks:
            network.to(memory_format=torch.channels_last)
        for batch in args.batch_size:
            result["settings"].append(_setting(subject, peer, batch, first, True, args))
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
    if args.onnx:
        result["onnx"], *result["onnx_batches"] = onnx_times(subject, args)
    if args.stream:
        result["stream"] = [stream_of(subject, batch, args) for batch in args.batch_size if 1 < batch <= 32]
    if args.memory:
        result["memory"] = memory_of(name, args)
    if subject.name in args.compiled:
        result["compiled"] = compiled_stages(subject, args)
    return result


def _without_maps(subject: Subject) -> bool:
    """Whether the network reads tokens at all its exits, where a memory format of maps says nothing."""
    return all(values["format"] != "NCHW" for values in subject.model.config.exit_features or [])


def _setting(
    subject: Subject, peer: Any, batch: int, threads: int, channels_last: bool, args: InferenceBenchmark
) -> dict[str, Any]:
    """All contestants on one batch size, number of threads and memory format."""
    x = subject.images(batch, channels_last)
    full = threads == args.cpu_threads[0] and not channels_last
    counts = {} if batch == 1 else shares_of(batch, subject.model.num_exits - 1)
    if not full:
        counts.pop("one_hard", None)
    runs, shares = contestants(subject, x, counts, full)
    setting = {"batch": batch, "threads": thread_count(threads), "channels_last": channels_last, "shares": shares}
    if peer is not None:
        try:
            runs |= earlyon_contestants(peer, x, {key: own for key, own in counts.items() if key in shares}, full)
            setting["earlyon"] = None
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is a reason not to compare
            setting["earlyon"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    label = f"batch {batch}, {setting['threads']} thread(s){', channels_last' if channels_last else ''}"
    times = take_turns(runs, args.rounds, args.min_rounds, args.seconds, f"{subject.name}, {label}")
    return {**setting, **summary(times)}


if __name__ == "__main__":
    run_script(main)
