"""Writes a checkpoint into one ONNX file with the exits inside, for onnxruntime without torch.

    python recipes/export_onnx.py --model runs/digits-1 --output model.onnx --verify 64
    python recipes/export_onnx.py --model runs/digits-1 --output int8.onnx --int8 --dataset digits --verify 500

    python recipes/export_onnx.py --model runs/digits-1 --output one.onnx --batch_size 1

With --dataset the file is compared with the model on test images or texts, otherwise on random inputs. int8 takes its
ranges from the training split. The file of a text model also holds the tokenizer of the checkpoint, if it has one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper
from erde_hub._tables import format_table
from erde_hub.data.base import LabelledData
from erde_hub.data.images import BatchLoader
from erde_hub.data.texts import load_tokenizer
from erde_hub.errors import ConfigError
from erde_hub.export import EarlyExitSession, check_onnx, export_onnx
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import DataArguments
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.patterns import coarse_patterns


@dataclass
class ExportArguments:
    """What is exported, where to and how it is checked."""

    model: str = HfArg(help="folder or Hub repository of a checkpoint")
    output: str = HfArg(
        default="model.onnx",
        help="the file, replaced if it exists; above 2 GB the weights lie next to it",
    )
    opset: int = HfArg(default=20, help="version of the ONNX operator set")
    batch_size: int | None = HfArg(
        default=None, help="1 fixes every shape, for compilers that want that; default: batches of any size"
    )
    int8: bool = HfArg(default=False, help="quantise to int8; needs --dataset")
    calibration_samples: int = HfArg(
        default=256, help="training images or texts that the ranges of int8 activations are taken from"
    )
    calibration_method: Literal["minmax", "entropy", "percentile"] = HfArg(
        default="minmax", help="how int8 takes them; the others cut rare large values off"
    )
    verify: int = HfArg(default=0, help="compare with the model on so many samples; 0: not at all")
    thresholds: list[float] | None = HfArg(default=None, help="thresholds to compare at; default: the stored one")
    cpu_threads: int = HfArg(default=0, help="CPU threads, 0: one per core")


@dataclass
class OptionalData(DataArguments):
    """The images or texts for int8 and for the comparison."""

    dataset: str | None = HfArg(  # type: ignore[assignment]
        default=None, help="as for evaluate.py; default: none, and random inputs for --verify"
    )
    max_train_samples: int | None = HfArg(default=None, help="not here: --calibration_samples says it")
    max_eval_samples: int | None = HfArg(default=None, help="not here: --verify says it")


def main() -> None:
    """Loads, exports, compares."""
    args, data_args, _ = parse_arguments({"export": ExportArguments, "data": OptionalData}, __doc__)
    recipe.configure_logging(True)
    check_arguments(args, data_args)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    model = recipe.load_model(args.model)
    for threshold in args.thresholds or []:
        model.policy.check_threshold(threshold, model.num_exits - 1)
    data = None
    if data_args.dataset is not None:
        limits = replace(data_args, max_train_samples=args.calibration_samples, max_eval_samples=max(args.verify, 1))
        data = recipe.load_data(limits, recipe.preprocessing_of(model, args.model))

    started = time.perf_counter()
    calibration = BatchLoader(data.train, 32) if args.int8 and data is not None else None
    path = export_onnx(
        model,
        args.output,
        opset=args.opset,
        batch_size=args.batch_size,
        tokenizer=find_tokenizer(model, args.model),
        calibration_data=calibration,
        calibration_method=args.calibration_method,
    )
    from erde_hub.export.nesting import weights_of  # noqa: PLC0415 - needs onnx, an extra

    size = sum(file.stat().st_size for file in (path, weights_of(path)) if file is not None)
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
    print(f"\nto run it, torch is not needed:\n{example(path)}")


def check_arguments(args: ExportArguments, data_args: OptionalData) -> None:
    """Refuses what contradicts itself, before anything is loaded."""
    if args.int8 and data_args.dataset is None:
        raise ConfigError("--int8 needs --dataset: the ranges of the activations come from images like those in use")
    if args.calibration_method != "minmax" and not args.int8:
        raise ConfigError(f"--calibration_method {args.calibration_method} is for --int8, which is not given")
    if args.batch_size not in (None, 1):
        raise ConfigError(f"--batch_size must be 1, or left out for batches of any size, got {args.batch_size}")
    if args.calibration_samples < 1 or args.verify < 0 or args.cpu_threads < 0:
        raise ConfigError(
            "--calibration_samples must be at least 1, --verify and --cpu_threads at least 0, got"
            f" {args.calibration_samples}, {args.verify} and {args.cpu_threads}"
        )
    for name, flag in (("max_train_samples", "--calibration_samples"), ("max_eval_samples", "--verify")):
        if getattr(data_args, name) is not None:
            raise ConfigError(f"--{name} is not for this recipe: {flag} says how many samples are used")


def example(path: Path) -> str:
    """Two lines of Python that answer with a file."""
    info = EarlyExitSession(path).info
    if info.reads_texts:
        given = '["a text"]' if info.tokenizer else "tokens"
        return (
            "  from erde_hub.export import EarlyExitSession  # NumPy, onnxruntime and tokenizers are enough\n"
            f"  out = EarlyExitSession({str(path)!r})({given})  # out.logits, out.exit_index"
        )
    channels = info.input_size[0]
    kinds = [] if info.preprocessing is None else [f"uint8 (N, H, W, {channels})"]
    if kinds and channels in (1, 3):
        kinds = ["file names", "PIL images", *kinds]
    floats = f"normalised floats (N, {', '.join(map(str, info.input_size))})"
    given = f"{', '.join(kinds)} or {floats}" if kinds else floats
    return (
        "  from erde_hub.export import EarlyExitSession  # NumPy and onnxruntime are enough\n"
        f"  out = EarlyExitSession({str(path)!r})(images)  # out.logits, out.exit_index; images: {given}"
    )


def find_tokenizer(model: EarlyExitWrapper, place: str) -> Any:
    """The fast tokenizer next to a text model; None where there is none."""
    if model.main_input_name != "input_ids":
        return None
    try:
        tokenizer = load_tokenizer(place)
    except ConfigError as error:
        print(f"no tokenizer in the file: {error}\n")
        return None
    return tokenizer if tokenizer.is_fast else None


def random_inputs(model: EarlyExitWrapper, count: int) -> dict[str, torch.Tensor]:
    """Patterns, or for a text model tokens, as many as costs are counted at."""
    size = model.config.input_size or ()
    if model.main_input_name != "input_ids":
        return {"pixel_values": coarse_patterns(count, size)}
    generator = torch.Generator().manual_seed(0)
    vocabulary: Any = model.get_input_embeddings()
    ids = torch.randint(0, vocabulary.num_embeddings, (count, *size), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compare(model: EarlyExitWrapper, path: Path, data: LabelledData | None, args: ExportArguments) -> str:
    """Answers of file and model on the same samples; with labels, how often each is right."""
    texts = model.main_input_name == "input_ids"
    labels = None
    if data is None:
        inputs, kind = random_inputs(model, args.verify), "random texts" if texts else "random patterns"
    else:
        (batch,) = BatchLoader(data.test, args.verify)  # which holds no more
        labels, kind = batch["labels"], f"test {'texts' if texts else 'images'} of {data.name}"
        inputs = {name: value for name, value in batch.items() if name in EarlyExitSession(path).info.input_names}
    given: Any = inputs if texts else inputs["pixel_values"]
    session = EarlyExitSession(path, threads=args.cpu_threads or None)
    header = ["threshold", "leave at", "same exit", "same class", "largest difference", "of the largest logit"]
    rows = []
    thresholds: list[float | None] = [*args.thresholds] if args.thresholds else [None]
    for threshold in thresholds:
        check = check_onnx(
            model,
            path,
            given,
            [model.threshold if threshold is None else threshold],
            threads=args.cpu_threads or None,
        )
        mine = session(given, threshold)
        row = [
            "stored" if threshold is None else f"{threshold:g}",
            " ".join(str(int((mine.exit_index == e).sum())) for e in range(model.num_exits)),
            f"{check.same_exit:.1%}",
            f"{check.same_answer:.1%}",
            f"{check.max_difference:.1e}",
            f"{check.relative_difference:.1e}",
        ]
        if labels is not None:
            with torch.no_grad():
                answers = model(**inputs, threshold=threshold).logits
            both = (answers, torch.from_numpy(mine.logits))
            row += [f"{(z.argmax(1) == labels).float().mean():.2%}" for z in both]
        rows.append(row)
    if data is not None:
        header += ["model right", "file right"]
    return f"{check.samples} {kind}:\n{format_table(header, rows)}"


if __name__ == "__main__":
    run_script(main)
