"""The name of a run, and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from erde_hub._tables import format_table
from erde_hub.backbones import get_adapter
from erde_hub.calibration.choice import describe_bound
from erde_hub.config import EarlyExitConfig
from erde_hub.data.base import LabelledData
from erde_hub.data.decoding import evenly_spaced
from erde_hub.data.loader import EncodedSplit
from erde_hub.data.preprocessing import SMALL_IMAGE_PIXELS
from erde_hub.data.splits import SPLIT_NAMES
from erde_hub.data.tokens import TokenData
from erde_hub.evaluation.formatting import duration, mmacs, percent, threshold_label, thresholds_of, with_point
from erde_hub.losses import ExitLoss
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.training._checks import describe_exit_map
from erde_hub.training.arguments import DistillationArguments


def run_name(config: str, default_config: Path, data: LabelledData) -> str:
    """Returns what a run is called: by its configuration, or by its data where only these differ from the default's."""
    own = Path(data.name).name
    return own if config == default_config.stem and own else config


def settings_dict(config: str, *parts: Any) -> dict[str, Any]:
    """Returns everything that a recipe was told, as one flat mapping for ``results.json``."""
    settings: dict[str, Any] = {"config": config}
    for part in parts:
        values = part.public_dict() if isinstance(part, DistillationArguments) else dataclasses.asdict(part)
        settings |= {key: value for key, value in values.items() if key != "cache_dir"}
    return settings


def format_results(results: Mapping[str, Any]) -> str:
    """Formats the numbers of a run for the terminal: exits, operating points, networks."""
    per_exit, names = results["per_exit"], [row["exit"] for row in results["per_exit"]]
    full = per_exit[-1]
    networks = [("(teacher)", results.get("teacher")), ("(static student)", results.get("static_student"))]
    rows = [
        (name, percent(part["accuracy"]), mmacs(part["macs"]), f"{part['macs'] / full['macs']:.0%}")
        for name, part in [*((row["exit"], row) for row in per_exit), *networks]
        if part is not None
    ]
    tables = [format_table(("all samples at", "accuracy %", "MMACs", "cost"), rows)]
    point = results.get("operating_point")
    if len(per_exit) > 1:
        points = with_point(results["sweep"], point)
        policy, among = results["student"].get("policy"), thresholds_of(results)
        tables.append(
            format_table(
                ("threshold", "accuracy %", "mean MMACs", "cost", f"exits {' / '.join(names)} (%)"),
                [
                    (
                        threshold_label(row["threshold"], policy, among) + " *" * stored,
                        percent(row["accuracy"]),
                        mmacs(row["mean_macs"]),
                        f"{row['mean_macs'] / full['macs']:.0%}",
                        " / ".join(f"{100 * share:.0f}" for share in row["exit_share"]),
                    )
                    for row, stored in points
                ],
            )
        )
        how = results.get("threshold_choice", {})
        if point is not None and how.get("never_exits"):
            tables.append(f"* stored threshold. {how['advice']}")
        elif point is not None and how.get("split"):
            tables.append(f"* stored threshold, chosen on {how['samples']:,} {how['split']} samples{_guarantee(how)}")
            if how.get("advice"):
                tables.append(how["advice"])
        elif point is not None:
            tables.append("* stored threshold")
    if slices := results.get("slices"):
        tables.append(_format_slices(slices))
    tables += [f"Warning: {text}" for text in results.get("warnings", [])]
    times = results.get("training") or {}
    if times.get("run_seconds") is not None:
        whole, own = duration(times["run_seconds"]), duration(times["seconds"])
        tables.append(f"time: {whole} in all, {own} of it the training of this network")
    return "\n\n".join(tables)


def _format_slices(slices: Sequence[Mapping[str, Any]], most: int = 10) -> str:
    """The worst slices as a table, with whether each supports the guarantee of the threshold by itself."""
    promised = "promise" in slices[0]
    words = {"holds": "supported", "broken": "broken", "open": "too few samples"}
    rows = [
        (
            row["slice"],
            f"{row['samples']:,}",
            percent(row["accuracy"]),
            percent(row["full_accuracy"]),
            mmacs(row["mean_macs"]),
            "-" if row["selective_risk"] is None else percent(row["selective_risk"]),
            *([words[row["promise"]]] if promised else []),
        )
        for row in slices[:most]
    ]
    header = ("slice, worst first", "samples", "accuracy %", "all layers %", "mean MMACs", "early errors %")
    more = f"\n... and {len(slices) - most} more in results.json" if len(slices) > most else ""
    return format_table((*header, *(["guarantee"] if promised else [])), rows) + more


def _guarantee(how: Mapping[str, Any]) -> str:
    """The guarantee of a threshold in words; empty if there is none."""
    sure, bound = how.get("confidence"), how.get("bound", 0.01)
    if sure is None or how.get("target", "accuracy_drop") != "accuracy_drop":
        return ""
    points = describe_bound("accuracy_drop", bound)
    return f" to lose at most {points} of accuracy with {100 * sure:.0f} % confidence"


def how_to_load(folder: Path, dataset: str | None = None) -> str:
    """Says where the files are, how they are loaded in Python, and commands that can follow.

    Args:
        folder: Of the checkpoint.
        dataset: What it was trained on; a local folder must be named again, since reports do not keep its place.
    """
    lines = [
        "from erde_hub import EarlyExitWrapper",
        f'model = EarlyExitWrapper.from_pretrained("{folder}")',
        'out = model(model.image_processor()(images, return_tensors="pt")["pixel_values"])',
    ]
    again = f" --dataset {shlex.quote(dataset)}" if dataset is not None and Path(dataset).expanduser().is_dir() else ""
    push, answers = "push --model {} --repo_id org/name", "  # out.logits, out.exit_index"
    commands = ["demo --model {}", f"calibrate --model {{}} --max_accuracy_drop 0.02{again}", push]
    if EarlyExitConfig.read(folder / "config.json").get("task") == "causal_lm":
        commands, answers = [f"evaluate --model {{}}{again}", push], ""
        lines[0] += "; from transformers import AutoTokenizer"
        lines[2:] = [
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
            'ids = model.generate(**tokenizer("To be", return_tensors="pt"), threshold=1.0, max_new_tokens=50)',
        ]
    elif (folder / "tokenizer_config.json").is_file():
        lines[0] += "; from transformers import AutoTokenizer"
        lines.insert(2, f'tokenizer = AutoTokenizer.from_pretrained("{folder}")')
        lines[3] = 'out = model(**tokenizer(texts, padding=True, return_tensors="pt"))'
    else:
        commands[-1] = "export --model {} --output model.onnx"
    code = "\n".join(f"    {line}" for line in lines)
    following = "\n".join(f"    erde-hub {command.format(folder)}" for command in commands)
    return f"checkpoint, model card and picture: {folder}\n\n{code}{answers}\n\nnext, for example:\n{following}"


def resume_command(folder: Path | str | None = None) -> str:
    """Returns the command of this process, with ``--resume``, as it is typed to continue a run.

    Args:
        folder: Of the run; None leaves ``--output_dir`` as it was given.
    """
    name, own = sys.argv[0], argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("resume", "overwrite_output_dir", *(["output_dir"] if folder is not None else [])):
        own.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", dest=flag, nargs="?")
    flags = [*own.parse_known_args(sys.argv[1:])[1], "--resume"]
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # the launcher's flags are not known here
        return f"the same command and --resume{'' if folder is None else f' --output_dir {folder}'}"
    launch = ["accelerate", "launch"] if "ACCELERATE_DYNAMO_BACKEND" in os.environ else [sys.orig_argv[0]]
    program = [*launch, name] if name.endswith(".py") else name.split()
    return shlex.join([*program, *flags, *([] if folder is None else ["--output_dir", str(folder)])])


def describe_load(device: torch.device) -> str:
    """Says, as a line of its own, that other programs keep the processor busy; empty where they do not."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if device.type != "cpu" or threads < 2 or load <= cores:
        return ""
    return (
        f"\nother programs keep this machine busy: its load is {load:.1f} on {cores} cores, and {threads} threads wait"
        " for each other; --cpu_threads 1 is quicker beside them"
    )


def describe_networks(networks: Mapping[str, EarlyExitWrapper], loss: ExitLoss | None = None) -> str:
    """Says what is about to be trained: the networks as a table, why their exits sit there, which exits teach which.

    Args:
        networks: By role: "teacher", "student"; a line is added for one that is not made for such images.
        loss: What the student learns from the teacher.
    """
    rows, lines = [], []
    for role, model in networks.items():
        config, table = model.config, model.exit_table()
        exits = " / ".join(row.exit for row in table)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        macs = " / ".join(mmacs(row.cumulative_macs) for row in table)
        rows.append((role, str(config.architecture), exits, f"{parameters:,}", macs))
        if notable := get_adapter(config.library).notable_arguments(config):
            lines.append(f"arguments of the {role}: {', '.join(f'{key}={value}' for key, value in notable.items())}")
        if model.exits_reason is not None:
            lines.append(f"exits of the {role}: {model.exits_reason}")
        height, width = (config.input_size or (3, 32, 32))[1:] if model.main_input_name == "pixel_values" else (1, 1)
        if str(config.architecture).endswith("_cifar") and height * width > SMALL_IMAGE_PIXELS:
            lines.append(
                f"{role}: {config.architecture} is made for images of about 32x32 and costly at {height}x{width};"
                f" --{role}_architecture resnet18, say, or a smaller --image_size would suit these"
            )
    if loss is not None and {"teacher", "student"} <= networks.keys():
        teacher, student = networks["teacher"], networks["student"]
        pairs = loss.teacher_exit_map(len(student.exit_names), len(teacher.exit_names))
        lines.append(f"exit of the student <- exit of the teacher: {describe_exit_map(student, teacher, pairs)}")
    return "\n".join((format_table(("role", "network", "exits", "parameters", "MMACs up to each"), rows), *lines))


def describe_data(data: LabelledData, trained: str | None = None) -> str:
    """One line that says what the data are.

    Args:
        data: All three splits.
        trained: The model whose run says which data these are; None where the user named them.
    """
    shape = data.input_size
    if isinstance(data, TokenData):
        sizes = ", ".join(f"{len(getattr(data, name)):,} {name}" for name in SPLIT_NAMES)
        return f"data: {data.name}, {sizes} blocks of {data.block_size} tokens, vocabulary of {data.vocab_size:,}"
    size = f"up to {shape[0]} tokens" if data.kind == "text" else f"{shape[1]}x{shape[2]}"
    counts = {name: getattr(data, name).num_samples for name in ("train", "validation", "test")}
    known = None not in counts.values()
    sizes = ", ".join(f"{count:,} {name}" for name, count in counts.items()) if known else "streamed"
    origin = "" if trained is None else f" (what {trained} was trained on)"
    return (
        f"data: {data.name}, {sizes} {data.kind}s of {size}, {data.num_classes} classes{origin}{_files(data.files)}"
        f"{_enlargement(data)}"
    )


def _files(files: Mapping[str, Any] | None) -> str:
    """How many files of a folder are used, and how many are left out for which reason; hidden ones are not named."""
    if not files:
        return ""
    reasons = [f"{count:,} {reason}" for reason, count in files.get("left_out", {}).items() if reason != "hidden"]
    left_out = f" (left out: {', '.join(reasons)})" if reasons else ""
    return f"; {files['used']:,} of {files['seen']:,} files are used{left_out}"


def _enlargement(data: LabelledData) -> str:
    """Says that the images are smaller than the network's input, which costs time and adds nothing to them."""
    if not isinstance(data.train, EncodedSplit):
        return ""
    height, width = data.input_size[1:]
    sizes = [image.size for image in data.train.images(evenly_spaced(len(data.train), 8))]
    if any(w >= width or h >= height for w, h in sizes):
        return ""
    w, h = sizes[0]
    return f"\ndata: the images are smaller ({h}x{w}) and are enlarged; --image_size {max(w, h)} would compute less"


def configure_logging(main_process: bool) -> None:
    """Shows the library's own messages, one line each, and silences other libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    hf_logging.disable_progress_bar()  # of writing weights: over before it can be read
    own = logging.getLogger("erde_hub")
    own.handlers[:], own.propagate = [handler], False
    own.setLevel(logging.WARNING if main_process else logging.ERROR)
