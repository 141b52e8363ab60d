"""Writes a checkpoint into one ONNX file with the exits inside, for onnxruntime without torch.

    python recipes/export_onnx.py --model runs/digits-1 --output model.onnx --verify 64
    python recipes/export_onnx.py --model runs/digits-1 --output int8.onnx --int8 --dataset digits --verify 500

With --dataset the file is compared with the model on test images, otherwise on random ones. int8 takes its ranges from
training images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from _cli import clean_errors, parse_arguments

from erde_hub import EarlyExitWrapper
from erde_hub.backbones.base import format_table
from erde_hub.errors import ConfigError
from erde_hub.export import EarlyExitSession, check_onnx, export_onnx
from erde_hub.training import recipe
from erde_hub.training.data import BatchLoader, ImageData
from erde_hub.training.recipe_arguments import DataArguments


@dataclass
class ExportArguments:
    """What is exported, where to and how it is checked."""

    model: str = field(metadata={"help": "folder or Hub repository of a checkpoint"})
    output: str = field(default="model.onnx", metadata={"help": "the file; above 2 GB the weights lie beside it"})
    opset: int = field(default=20, metadata={"help": "version of the ONNX operator set"})
    int8: bool = field(default=False, metadata={"help": "quantise to int8; needs --dataset"})
    calibration_samples: int = field(
        default=256, metadata={"help": "training images that the ranges of int8 activations are taken from"}
    )
    calibration_method: Literal["minmax", "entropy", "percentile"] = field(
        default="minmax", metadata={"help": "how int8 takes them"}
    )
    verify: int = field(default=0, metadata={"help": "compare with the model on so many images; 0: not at all"})
    thresholds: list[float] | None = field(
        default=None, metadata={"help": "thresholds to compare at; default: the stored one"}
    )
    cpu_threads: int = field(default=0, metadata={"help": "CPU threads, 0: one per core"})


@dataclass
class OptionalData(DataArguments):
    """The images for int8 and for the comparison."""

    dataset: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "as for evaluate.py; default: none, and random images for --verify"}
    )


def main() -> None:
    """Loads, exports, compares."""
    args, data_args, _ = parse_arguments({"export": ExportArguments, "data": OptionalData}, __doc__)
    recipe.configure_logging(True)
    if args.int8 and data_args.dataset is None:
        raise ConfigError("--int8 needs --dataset: the ranges of the activations come from images like those in use")
    if args.calibration_samples < 1 or args.verify < 0 or args.cpu_threads < 0:
        raise ConfigError(
            "--calibration_samples must be at least 1, --verify and --cpu_threads at least 0, got"
            f" {args.calibration_samples}, {args.verify} and {args.cpu_threads}"
        )
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    model = recipe.load_model(args.model)
    for threshold in args.thresholds or []:
        model.policy.check_threshold(threshold, len(model.heads))
    data = None
    if data_args.dataset is not None:
        limits = replace(data_args, max_train_samples=args.calibration_samples, max_eval_samples=max(args.verify, 1))
        data = recipe.load_data(limits, model.config.preprocessing)

    started = time.perf_counter()
    calibration = BatchLoader(data.train, 32) if args.int8 and data is not None else None
    path = export_onnx(
        model,
        args.output,
        opset=args.opset,
        calibration_data=calibration,
        calibration_method=args.calibration_method,
    )
    size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.is_file())
    seconds = time.perf_counter() - started
    print(f"{path}: {size / 1e6:.1f} MB, {'int8' if args.int8 else 'float32'}, written in {seconds:.0f} s\n")
    table = model.exit_table()
    rows = [
        (row.exit, str(i), f"{row.cumulative_macs / 1e6:.1f}", f"{row.cumulative_macs / table[-1].cumulative_macs:.1%}")
        for i, row in enumerate(table)
    ]
    print(format_table(("exit", "exit_index", "MMACs", "share"), rows))
    print(f"\npolicy {model.config.policy}, stored threshold {model.threshold}")
    if args.verify:
        print(f"\n{compare(model, path, data, args)}")


def compare(model: EarlyExitWrapper, path: Path, data: ImageData | None, args: ExportArguments) -> str:
    """Answers of file and model on the same images; with labels, how often each is right."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        batches = [{"pixel_values": torch.randn((args.verify, *model.config.input_size), generator=generator)}]
        kind = "random images"
    else:
        batches = list(BatchLoader(data.test, 32))
        kind = f"test images of {data.name}"
    pixel_values = torch.cat([batch["pixel_values"] for batch in batches])
    session = EarlyExitSession(path, threads=args.cpu_threads or None)
    header = ["threshold", "same exit", "same class", "largest difference", "of the largest logit"]
    rows = []
    for threshold in args.thresholds or [None]:
        check = check_onnx(model, path, pixel_values, [threshold], threads=args.cpu_threads or None)
        row = [
            "stored" if threshold is None else f"{threshold:g}",
            f"{check.same_exit:.1%}",
            f"{check.same_answer:.1%}",
            f"{check.max_difference:.1e}",
            f"{check.relative_difference:.1e}",
        ]
        if data is not None:
            labels = torch.cat([batch["labels"] for batch in batches])
            with torch.no_grad():
                answers = model(pixel_values, threshold=threshold).logits
            mine = torch.from_numpy(session(pixel_values.numpy(), threshold).logits)
            row += [f"{(z.argmax(1) == labels).float().mean():.2%}" for z in (answers, mine)]
        rows.append(row)
    if data is not None:
        header += ["model right", "file right"]
    return f"{check.samples} {kind}:\n{format_table(header, rows)}"


if __name__ == "__main__":
    with clean_errors():
        main()
