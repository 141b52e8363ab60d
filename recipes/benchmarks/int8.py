"""Measures what 8-bit integers do to a model with exits, its answers and its time, beside the float file.

    python recipes/benchmarks/int8.py --model runs/digits-1 --dataset digits

Both files route on the test images in onnxruntime. Times are of one image per call; the two files take turns.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper, __version__
from erde_hub.data.images import BatchLoader
from erde_hub.errors import ConfigError
from erde_hub.export import EarlyExitSession, export_onnx
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import DataArguments
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results
from erde_hub.scripts.common.turns import summary, take_turns

KINDS = ("float", "int8")


@dataclass
class Int8Benchmark:
    """What is measured, and where the numbers go."""

    model: str = HfArg(help="folder or Hub repository of a checkpoint")
    thresholds: list[float] | None = HfArg(
        default=None, help="thresholds to route at; default: one that nobody passes, and the stored one"
    )
    calibration_samples: int = HfArg(
        default=256, help="training images that the ranges of int8 activations are taken from"
    )
    timed_images: int = HfArg(default=64, help="test images that are run one by one in every round")
    rounds: int = HfArg(default=15, help="rounds; in each, both files take turns")
    cpu_threads: int = HfArg(default=1, help="threads of onnxruntime")
    output: str | None = HfArg(default=None, help="JSON file for the numbers; other models that it holds are kept")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("calibration_samples", "timed_images", "rounds", "cpu_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Int8Data(DataArguments):
    """The images: of training for the ranges, of test for the answers."""

    dataset: str = HfArg(default="digits", help="as for evaluate.py")


def main() -> None:
    """Exports twice, compares, prints, writes."""
    args, data_args, _ = parse_arguments({"benchmark": Int8Benchmark, "data": Int8Data}, __doc__)
    recipe.configure_logging(True)
    model = recipe.load_model(args.model)
    thresholds = args.thresholds or [0.0, model.threshold]
    for threshold in thresholds:
        model.policy.check_threshold(threshold, model.num_exits - 1)
    data = recipe.load_data(replace(data_args, max_train_samples=args.calibration_samples), model.config.preprocessing)
    batches = list(BatchLoader(data.test, 64))
    images = np.concatenate([batch["pixel_values"].numpy() for batch in batches])
    labels = np.concatenate([batch["labels"].numpy() for batch in batches])
    with tempfile.TemporaryDirectory() as folder:
        sessions, sizes = _files(model, BatchLoader(data.train, 32), Path(folder), args.cpu_threads)
        rows = [_row(model, sessions, images, labels, threshold, args) for threshold in thresholds]
    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    entry = {
        "architecture": model.config.architecture,
        "dataset": data.name,
        "test_images": len(labels),
        "calibration_images": len(data.train),
        "threads": args.cpu_threads,
        "bytes": sizes,
        "rows": rows,
    }
    results = {"erde_hub": __version__, "models": {name: entry}}
    if args.output is not None:
        path = Path(args.output)
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8")).get("models", {})
            results["models"] = {**kept, name: entry}
        write_results(args.output, results)


def _files(
    model: EarlyExitWrapper, calibration: BatchLoader, folder: Path, threads: int
) -> tuple[dict[str, EarlyExitSession], dict[str, int]]:
    sessions, sizes = {}, {}
    for kind in KINDS:
        path = export_onnx(model, folder / f"{kind}.onnx", calibration_data=calibration if kind == "int8" else None)
        sessions[kind], sizes[kind] = EarlyExitSession(path, threads=threads), path.stat().st_size
    return sessions, sizes


def _row(
    model: EarlyExitWrapper,
    sessions: Mapping[str, EarlyExitSession],
    images: np.ndarray,
    labels: np.ndarray,
    threshold: float | Sequence[float],
    args: Int8Benchmark,
) -> dict[str, Any]:
    macs = np.array(model.exit_table().cumulative_macs)
    row: dict[str, Any] = {"threshold": threshold}
    for kind, session in sessions.items():
        outputs = [session(part, threshold=threshold) for part in np.array_split(images, math.ceil(len(images) / 64))]
        exits = np.concatenate([out.exit_index for out in outputs])
        right = np.concatenate([out.logits for out in outputs]).argmax(1) == labels
        row[kind] = {
            "accuracy": float(right.mean()),
            "mean_macs": float(macs[exits].mean()),
            "shares": (np.bincount(exits, minlength=len(macs)) / len(exits)).tolist(),
        }
    singles = [images[i : i + 1] for i in range(min(args.timed_images, len(images)))]
    runs = {
        kind: lambda session=session: [session(x, threshold=threshold) for x in singles]
        for kind, session in sessions.items()
    }
    times = take_turns(runs, args.rounds, args.rounds, math.inf)
    for kind, spread in summary(times)["seconds"].items():
        row[kind]["ms_per_image"] = {key: 1e3 * value / len(singles) for key, value in spread.items()}
    return row


if __name__ == "__main__":
    run_script(main)
