"""Measures exported files of texts, and files for one sample, next to the flat graph and to the part up to exit 0.

    python recipes/benchmarks/exported.py --output recipes/results/benchmark_exported.json

Texts of 32 and of 128 tokens in the file for any batch, at batch 1 and 8; images and texts in the file for one sample,
next to the file for any batch. Weights are random: time does not depend on them. The flat graph computes every exit,
the prefix is the network up to exit 0. Wanted: texts at most 1.10 of the flat graph all the way and 1.15 of the prefix
at exit 0, files for one sample at most 1.05 of the prefix at exit 0. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from inference_extras import export_files, onnx_contestant
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper, __version__
from erde_hub.export.executorch_file import export_executorch, lower
from erde_hub.export.flat import EveryExit, exportable_copy, trace
from erde_hub.export.runtimes import CPU_PROVIDER, ExecuTorch
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results
from erde_hub.scripts.common.turns import summary, take_turns


@dataclass
class ExportedBenchmark:
    """What is measured, and where the numbers go."""

    models: list[str] = HfArg(
        default_factory=lambda: ["minilm", "resnet18", "vit_small_patch16_224"],
        help="minilm, for texts, and names of timm",
    )
    cpu_threads: int = HfArg(default=1, help="threads of the runtime")
    rounds: int = HfArg(default=30, help="rounds at most; in each, all files take turns")
    min_rounds: int = HfArg(default=10, help="rounds at least")
    seconds: float = HfArg(default=60.0, help="seconds after which no round begins")
    output: str | None = HfArg(default=None, help="JSON file for the numbers")


def main() -> None:
    """Exports, measures, prints the ratios, writes."""
    args, _ = parse_arguments({"benchmark": ExportedBenchmark}, __doc__)
    rows = [row for name in args.models for row in measure_model(name, args)]
    for row in rows:
        ratios = "  ".join(f"{name}: {spread['median']:.3f}" for name, spread in row["ratios"].items())
        print(f"{row['model']}, {row['file']}, {row['inputs']}: {ratios}")
    if args.output is not None:
        write_results(args.output, {"erde_hub": __version__, "threads": args.cpu_threads, "rows": rows})


def measure_model(name: str, args: ExportedBenchmark) -> list[dict[str, Any]]:
    """Rows of one network: the file for any batch, then the one for one sample."""
    torch.manual_seed(0)
    model = text_model() if name == "minilm" else image_model(name)
    rows = []
    if name != "minilm" and importlib.util.find_spec("executorch") is not None:
        rows.append({"model": name, "file": "ExecuTorch, batch 1", **measure_executorch(model, args, name)})
    for batch_size in (None, 1):
        with tempfile.TemporaryDirectory() as folder:
            files = export_files(model, inputs_of(model, 4, 128), Path(folder), batch_size)
            sizes = [(1, 128)] if batch_size or name != "minilm" else [(1, 32), (1, 128), (8, 128)]
            for batch, length in sizes:
                inputs = inputs_of(model, batch, length)
                described = " x ".join(str(size) for size in next(iter(inputs.values())).shape)
                row = measure_files(files, inputs, len(model.heads), args, f"{name}, {described}")
                rows.append({"model": name, "file": f"batch {batch_size or 'free'}", "inputs": described, **row})
    return rows


def text_model() -> EarlyExitWrapper:
    """The size of all-MiniLM-L6-v2, with exits after two and four of six layers."""
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    exits = ["bert.encoder.layer.1", "bert.encoder.layer.3"]
    return EarlyExitWrapper(BertForSequenceClassification(config), exits=exits).eval()


def image_model(name: str) -> EarlyExitWrapper:
    """A network of timm with two exits."""
    return EarlyExitWrapper(timm.create_model(name), exits=2).eval()


def inputs_of(model: EarlyExitWrapper, batch: int, length: int) -> dict[str, Tensor]:
    """Noise, or texts of so many tokens."""
    size = model.config.input_size or []
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, *size)}
    ids = torch.randint(1000, 20000, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def measure_files(
    files: dict[str, Path], inputs: dict[str, Tensor], early: int, args: ExportedBenchmark, label: str
) -> dict[str, Any]:
    """Times of the nested file at both ends, of the flat graph and of the prefix, in float and int8."""
    runs = {}
    for kind in ("float", "int8"):
        runs[f"{kind} flat"] = onnx_contestant(files[f"{kind}_flat"], inputs, [0.0] * early, args.cpu_threads)
        runs[f"{kind} prefix"] = onnx_contestant(files[f"{kind}_prefix"], inputs, [0.0] * early, args.cpu_threads)
        for name, threshold in (("all the way", 0.0), ("exit 0", math.inf)):
            nested = onnx_contestant(files[f"{kind}_nested"], inputs, [threshold] * early, args.cpu_threads)
            runs[f"{kind}, {name}"] = nested
    return summary(take_turns(runs, args.rounds, args.min_rounds, args.seconds, label))


def measure_executorch(model: EarlyExitWrapper, args: ExportedBenchmark, label: str) -> dict[str, Any]:
    """Times of the program at both ends, of one method with all exits and no decision, and of one up to exit 0."""
    from executorch.runtime import Runtime  # noqa: PLC0415 - an extra

    x, early, runs = torch.randn(1, *(model.config.input_size or [])), len(model.heads), {}
    with tempfile.TemporaryDirectory() as folder:
        path = export_executorch(model, Path(folder) / "model.pte")
        program = ExecuTorch(path, args.cpu_threads, CPU_PROVIDER)
        for name, last in (("flat", None), ("prefix", 0)):
            other = path.with_name(f"{name}.pte")
            other.write_bytes(lower({"forward": trace(EveryExit(exportable_copy(model), last), 1)}))
            method = Runtime.get().load_program(other).load_method("forward")
            runs[f"executorch {name}"] = functools.partial(method.execute, (x, torch.zeros(early)))
    for name, threshold in (("all the way", 0.0), ("exit 0", math.inf)):
        feed = {"pixel_values": x.numpy(), "threshold": np.full(early, threshold, np.float32)}
        runs[f"executorch, {name}"] = functools.partial(program.run, feed)
    pairs = [("executorch, all the way", "executorch flat"), ("executorch, exit 0", "executorch prefix")]
    times = take_turns(runs, args.rounds, args.min_rounds, args.seconds, f"{label}, ExecuTorch")
    return {"inputs": " x ".join(map(str, x.shape)), **summary(times, pairs)}


if __name__ == "__main__":
    run_script(main)
