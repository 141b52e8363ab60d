"""Measures what loading a checkpoint takes, beside the bare model's own way to load its weights.

    python recipes/benchmarks/loading.py --output recipes/results/benchmark_loading.json

Both sides load turn by turn in one process, from files that the system already holds in memory:
`timm.create_model(name, checkpoint_path=...)`, for texts `from_pretrained` of transformers, and
`EarlyExitWrapper.from_pretrained`. Memory is what the process has for itself: pages of a mapped file, which the system
may drop at any time, are not counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from process_memory import process_memory
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper, __version__
from erde_hub.errors import ConfigError
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results

#: Text classifiers by name: the sizes of all-MiniLM-L6-v2 and of bert-base.
TEXTS = {
    "bert_6x384": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert_12x768": {},
}
_MIB = 2**20


@dataclass
class LoadingBenchmark:
    """What is measured, and where the numbers go."""

    model: list[str] = HfArg(
        default_factory=lambda: [
            "resnet18",
            "resnet50",
            "vit_tiny_patch16_224",
            "efficientnet_lite0",
            *TEXTS,
        ],
        help=f"timm names, or text classifiers: {', '.join(TEXTS)}",
    )
    rounds: int = HfArg(default=9, help="times that each side loads, in turns, after one to warm up")
    cpu_threads: int = HfArg(default=1, help="threads")
    output: str | None = HfArg(
        default=None,
        help="JSON file for the numbers; other networks stay in it if versions and settings are the same",
    )

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("rounds", "cpu_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def main() -> None:
    """Measures, prints, writes."""
    args, _ = parse_arguments({"benchmark": LoadingBenchmark}, __doc__)
    torch.set_num_threads(args.cpu_threads)
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        networks = {name: _network(name, args.rounds) for name in args.model}
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    settings = {
        "erde_hub": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": transformers.__version__,
        "cpu_threads": args.cpu_threads,
        "rounds": args.rounds,
    }
    results = {**settings, "networks": {**_measured_before(args.output, settings), **networks}}
    write_results(args.output, results)


def _measured_before(output: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The networks of a file that was written with the same versions and settings."""
    if output is None or not Path(output).is_file():
        return {}
    stored = json.loads(Path(output).read_text(encoding="utf-8"))
    same = all(stored.get(key) == value for key, value in settings.items())
    return dict(stored["networks"]) if same else {}


def _network(name: str, rounds: int) -> dict[str, Any]:
    """Writes the checkpoints of one network and loads them in turns; watching the memory is left out of the times."""
    with tempfile.TemporaryDirectory() as folder:
        bare, wrapped = Path(folder, "bare"), Path(folder, "wrapped")
        sides = {"bare": _save_bare(name, bare, wrapped), "exits": lambda: EarlyExitWrapper.from_pretrained(wrapped)}
        weights = {side: _tensor_bytes(load()) for side, load in sides.items()}  # and both are warm
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        memory: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, load in sides.items():
                seconds[side].append(_seconds(load))
        for _ in range(min(rounds, 3)):
            for side, load in sides.items():
                memory[side].append(_memory(load))
    result: dict[str, Any] = {"exits": {}, "bare": {}}
    for side in sides:
        result[side] = {
            "weights_mib": weights[side] / _MIB,
            "seconds": statistics.median(seconds[side]),
            "peak_memory": statistics.median(peak for peak, _ in memory[side]) / weights[side] * _MIB,
            "kept_memory": statistics.median(kept for _, kept in memory[side]) / weights[side] * _MIB,
        }
    pairs = zip(seconds["exits"], seconds["bare"], strict=True)
    result["ratio"] = statistics.median(own / other for own, other in pairs)
    return result


def _save_bare(name: str, bare: Path, wrapped: Path) -> Callable[[], nn.Module]:
    """Saves a network by itself and with exits; returns how the first is loaded."""
    if name in TEXTS:
        text = BertForSequenceClassification(BertConfig(num_labels=2, **TEXTS[name]))
        text.save_pretrained(bare)
        EarlyExitWrapper(text, exits=3, head="fc").save_pretrained(wrapped)
        return lambda: BertForSequenceClassification.from_pretrained(bare)
    network = timm.create_model(name)
    bare.mkdir()
    save_file(network.state_dict(), bare / "model.safetensors")
    EarlyExitWrapper(network, exits=3, head="fc").save_pretrained(wrapped)
    return lambda: timm.create_model(name, checkpoint_path=str(bare / "model.safetensors"))


def _tensor_bytes(model: nn.Module) -> int:
    """Each tensor once, however often it is used."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _seconds(load: Callable[[], nn.Module]) -> float:
    _give_back()
    start = time.perf_counter()
    load()
    return time.perf_counter() - start


def _memory(load: Callable[[], nn.Module]) -> tuple[float, float]:
    """MiB that loading adds to the process's own memory: the most at any time, and what stays as long as the model."""
    _give_back()
    before = process_memory("RssAnon")
    with _watched() as seen:
        model = load()
    gc.collect()
    _give_back()
    kept = process_memory("RssAnon") - before
    del model
    return max(*seen, before) - before, kept


@contextmanager
def _watched() -> Iterator[list[float]]:
    """Gives a list to which a thread adds the process's own memory, a thousand times per second."""
    seen: list[float] = [process_memory("RssAnon")]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(process_memory("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(process_memory("RssAnon"))


def _give_back() -> None:
    """Returns freed memory to the system, which otherwise the next load would use without it being seen."""
    gc.collect()
    if os.name == "posix":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc
            trim(0)


if __name__ == "__main__":
    run_script(main)
