"""What a run says on the terminal, and what it is called."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging as hf_logging

from erde_hub.backbones.base import format_table
from erde_hub.evaluation.formatting import duration, mmacs, percent, threshold_label
from erde_hub.losses import ExitLoss
from erde_hub.modeling import EarlyExitWrapper
from erde_hub.training._checks import describe_exit_map
from erde_hub.training.arguments import DistillationArguments
from erde_hub.training.data import ImageData
from erde_hub.training.data_preprocessing import SMALL_IMAGE_PIXELS


def run_name(config: str, default_config: Path, data: ImageData) -> str:
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
    tables = [format_table(("always leave at", "accuracy %", "MMACs", "cost"), rows)]
    point = results.get("operating_point")
    if len(per_exit) > 1:
        chosen = [(point, " *")] if point is not None else []
        points = [*((row, "") for row in results["sweep"]), *chosen]
        if not any(isinstance(row["threshold"], list) for row, _ in points):
            points.sort(key=lambda point: float(point[0]["threshold"]))
        tables.append(
            format_table(
                ("threshold", "accuracy %", "mean MMACs", "cost", f"leave at {' / '.join(names)} (%)"),
                [
                    (
                        f"{threshold_label(row['threshold'])}{mark}",
                        percent(row["accuracy"]),
                        mmacs(row["mean_macs"]),
                        f"{row['mean_macs'] / full['macs']:.0%}",
                        " / ".join(f"{100 * share:.0f}" for share in row["exit_share"]),
                    )
                    for row, mark in points
                ],
            )
        )
        how = results.get("threshold_choice", {})
        if point is not None and how.get("split"):
            sure = how.get("confidence")
            words = f" to lose at most 1 point with {100 * sure:.0f} % confidence" if sure is not None else ""
            tables.append(f"* stored threshold, chosen on {how['samples']:,} {how['split']} images{words}")
            if how.get("advice"):
                tables.append(how["advice"])
        elif point is not None:
            tables.append("* stored threshold")
    times = results.get("training") or {}
    if times.get("run_seconds") is not None:
        whole, own = duration(times["run_seconds"]), duration(times["seconds"])
        tables.append(f"time: {whole} in all, {own} of it the training of this network")
    return "\n\n".join(tables)


def how_to_load(folder: Path) -> str:
    """Says where the files are and gives the lines of Python that load the checkpoint."""
    return (
        f"checkpoint, model card and picture: {folder}\n\n"
        "    from erde_hub import EarlyExitWrapper\n"
        f'    model = EarlyExitWrapper.from_pretrained("{folder}")\n'
        '    out = model(model.image_processor()(images, return_tensors="pt")["pixel_values"])'
        "  # out.logits, out.exit_index"
    )


def describe_network(
    role: str, model: EarlyExitWrapper, loss: ExitLoss | None = None, teacher: EarlyExitWrapper | None = None
) -> str:
    """Says what is about to be trained, in a line each: network, why its exits sit there, which exits teach which.

    Args:
        role: "student" or "teacher".
        model: The network; a line is added where it is none for such images.
        loss: What a student learns from.
        teacher: Whom it learns from.
    """
    config, table = model.config, model.exit_table()
    kwargs = "".join(f", {key}={value}" for key, value in (config.backbone_kwargs or {}).items())
    costs = ", ".join(f"{row.exit} {mmacs(row.cumulative_macs)}" for row in table)
    text = f"{role}: {config.architecture}{kwargs}; MMACs up to each exit: {costs}"
    if model.exits_reason is not None:
        text += f"\nexits of the {role}: {model.exits_reason}"
    if loss is not None and teacher is not None:
        pairs = loss.teacher_exit_map(len(model.exit_names), len(teacher.exit_names))
        text += f"\nexit of the {role} <- exit of the teacher: {describe_exit_map(model, teacher, pairs)}"
    height, width = (config.input_size or (3, 32, 32))[1:]
    if str(config.architecture).endswith("_cifar") and height * width > SMALL_IMAGE_PIXELS:
        text += (
            f"\n{role}: {config.architecture} is made for images of about 32x32 and costly at {height}x{width};"
            f" --{role}_architecture resnet18, say, or a smaller --image_size would suit these"
        )
    return text


def describe_data(data: ImageData) -> str:
    """One line that says what the data are."""
    height, width = data.input_size[1:]
    counts = {name: getattr(data, name).num_samples for name in ("train", "validation", "test")}
    known = None not in counts.values()
    sizes = ", ".join(f"{count:,} {name}" for name, count in counts.items()) + " images" if known else "streamed images"
    return f"data: {data.name}, {sizes} of {height}x{width}, {data.num_classes} classes"


def configure_logging(main_process: bool) -> None:
    """Shows the library's own messages, one line each, and quiets what talks beside them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    hf_logging.disable_progress_bar()  # of writing weights: over before it can be read
    own = logging.getLogger("erde_hub")
    own.handlers[:], own.propagate = [handler], False
    own.setLevel(logging.WARNING if main_process else logging.ERROR)
