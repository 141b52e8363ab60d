"""Regression with exits: predicts the angle that images were turned by, and how sure each exit is of it.

    python recipes/studies/rotation.py --output rotation.json
    python recipes/studies/rotation.py --dataset path/to/folder --output_dir runs/rotation

Trains a network with problem_type="regression" on images of any set, each turned by a known angle; fits intervals on
validation images alone; reports on test images: the error of each exit, width and coverage of the intervals of each
exit and of all exits at once (anytime-valid confidence sequences beside split conformal intervals), and what is saved
where a sample leaves as soon as its interval is narrow enough. Angles and widths are in degrees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _rotated import TARGET, rotated_images
from torch import Tensor
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper, __version__
from erde_hub._tables import format_table
from erde_hub.data.images import ImageData
from erde_hub.errors import ConfigError
from erde_hub.evaluation import ExitRecords, exit_scores, regression_per_exit, sweep_widths
from erde_hub.evaluation.formatting import mmacs, percent
from erde_hub.policies import IntervalWidthPolicy
from erde_hub.prediction_sets import ConformalRegressor, intersect_intervals
from erde_hub.prediction_sets.base import check_alpha
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import DataArguments, exit_places
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results
from erde_hub.training import DistillationArguments, Distiller, create_accelerator, run_on_main

#: Quantiles of the widths of all early exits on validation images that are swept where no widths are given.
QUANTILES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)


@dataclass
class RotationArguments:
    """What is turned, what learns it, and where the numbers go."""

    degrees: float = HfArg(default=45.0, help="largest angle, either way (degrees, at most 180)")
    copies: int = HfArg(default=4, help="how often each training image occurs, at another angle each time")
    architecture: str = HfArg(default="resnet10_cifar", help="timm name of the network")
    architecture_kwargs: dict[str, Any] = HfArg(
        default_factory=lambda: {"width": 8}, help="creation arguments of the network, e.g. width=16"
    )
    exits: list[str] | None = HfArg(
        default=None, help="stage names from shallow to deep, or a number of exits; default: auto"
    )
    head: str = HfArg(default="fc", help="head of every early exit")
    head_kwargs: dict[str, Any] = HfArg(default_factory=dict, help="arguments of the head; default: dropout=0 for fc")
    alpha: float = HfArg(default=0.1, help="error rate of intervals, 0 to 1")
    draws: int = HfArg(default=10, help="draws of the confidence sequences; as published, 1 is reported too")
    widths: list[float] | None = HfArg(
        default=None,
        help="widths (degrees) below which samples leave; default: quantiles on validation images",
    )
    output: str | None = HfArg(default=None, help="JSON file for the numbers; replaced if it exists")

    def __post_init__(self) -> None:
        """Checks what can be checked before data are loaded."""
        check_alpha(self.alpha)
        if self.draws < 1:
            raise ConfigError(f"draws must be at least 1, got {self.draws}")
        if any(not width >= 0 for width in self.widths or []):
            raise ConfigError(f"widths must be degrees of at least 0, got {self.widths}")
        recipe.check_architecture(self.architecture)
        if self.head == "fc":
            self.head_kwargs = {"dropout": 0.0, **self.head_kwargs}


@dataclass
class RotationTraining(DistillationArguments):
    """Training, with defaults that suit squared errors of radians."""

    epochs: int = HfArg(default=15, help="passes over the training split")
    batch_size: int = HfArg(default=64, help="images per forward pass and process")
    lr: float = HfArg(default=0.01, help="highest learning rate of the schedule")
    optimizer: str = HfArg(default="adamw", help="a name of timm's create_optimizer_v2")
    weight_decay: float = HfArg(default=0.01, help="weight decay; biases and norm layers get none")


def main() -> None:
    """Trains, fits on validation images, measures on test images, writes."""
    sections = {"what is done": RotationArguments, "data": DataArguments, "training": RotationTraining}
    wanted, data_args, args, _ = parse_arguments(sections, __doc__)
    accelerator = create_accelerator(args)
    recipe.configure_logging(accelerator.is_main_process)
    source = recipe.load_data(data_args, progress=accelerator.is_main_process)
    data = rotated_images(source, wanted.degrees, wanted.copies, args.seed)  # type: ignore[arg-type]
    model = build(wanted, data, args.seed)
    accelerator.print(f"{data.name}: {len(data.train)} / {len(data.validation)} / {len(data.test)} images\n")
    result = Distiller(model, data, args, "mse", accelerator=accelerator).train()
    if result.status == "interrupted":
        how = f"with --resume --output_dir {args.output_dir}" if args.output_dir else "anew: there is no --output_dir"
        raise recipe.Interrupted(f"the training is not finished: start the same command {how}", result.stopped_by)
    run = recipe.Run(accelerator, data, args, {})
    validation, test = (recipe.collect(run, model, split, features=True) for split in ("validation", "test"))
    policy = IntervalWidthPolicy.fit(validation, wanted.alpha, wanted.draws, args.seed)
    results = {
        "erde_hub": __version__,
        "torch": torch.__version__,
        "dataset": {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "samples": {split: len(getattr(data, split)) for split in ("train", "validation", "test")},
        },
        "settings": public_settings(wanted, args),
        "unit": "degrees",
        **measure(wanted, validation, test, policy, args.seed),
    }
    model.set_policy(policy)
    run_on_main(accelerator, lambda: write(wanted.output, args.output_dir, model, results))
    accelerator.print(f"\n{describe(results)}")


def build(wanted: RotationArguments, data: ImageData, seed: int) -> EarlyExitWrapper:
    """Builds the network with one output per exit."""
    torch.manual_seed(seed)
    model = EarlyExitWrapper(
        recipe.create_backbone(wanted.architecture, data, wanted.architecture_kwargs),
        exits=exit_places(wanted.exits),
        head=wanted.head,
        head_kwargs=wanted.head_kwargs,
        input_size=data.input_size,
        backbone_kwargs=wanted.architecture_kwargs,
        id2label=[TARGET],
        problem_type="regression",
    )
    model.set_preprocessing(**data.preprocessing)
    return model


def measure(
    wanted: RotationArguments, validation: ExitRecords, test: ExitRecords, policy: IntervalWidthPolicy, seed: int
) -> dict[str, Any]:
    """Errors, intervals and routing on test images, in degrees; everything is fitted on validation images."""
    published = {
        n: IntervalWidthPolicy.fit(validation, wanted.alpha, n, seed, level_share=0) for n in (1, policy.draws)
    }
    conformal = ConformalRegressor.fit(validation, wanted.alpha)
    at_once = ConformalRegressor.fit(validation, wanted.alpha, all_exits=True)
    methods: dict[str, Tensor] = {
        **{f"AVCS as published, draws: {n}": own.intervals(test) for n, own in published.items()},
        f"AVCS, level from samples, draws: {policy.draws}": policy.intervals(test),
        "conformal, each exit": conformal.intervals(test.logits),
        "conformal, all exits": intersect_intervals(at_once.intervals(test.logits)),
    }
    if wanted.widths is None:
        seen = exit_scores(validation, policy).flatten()
        seen = seen[seen.isfinite()]
        widths = [0.0, *(seen.quantile(torch.tensor(QUANTILES)).tolist() if len(seen) else [])]
    else:
        widths = [math.radians(width) for width in wanted.widths]
    return {
        "per_exit": [in_degrees(row, ("mae", "rmse")) for row in regression_per_exit(test)],
        "intervals": [interval_row(name, test, intervals) for name, intervals in methods.items()],
        "routing": [
            in_degrees(row, ("threshold", "mae", "rmse", "width")) for row in sweep_widths(test, policy, widths)
        ],
    }


def interval_row(name: str, test: ExitRecords, intervals: Tensor) -> dict[str, Any]:
    """Width, coverage and nestedness of intervals, one number per exit."""
    rows = [in_degrees(row, ("width",)) for row in regression_per_exit(test, intervals)]
    keys = ("width", "coverage", "coverage_so_far", "nested", "empty")
    return {"method": name, **{key: [row[key] for row in rows] for key in keys}}


def in_degrees(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Returns a row with some of its numbers turned from radians into degrees."""
    return {key: math.degrees(value) if key in keys else value for key, value in row.items()}


def public_settings(wanted: RotationArguments, args: DistillationArguments) -> dict[str, Any]:
    """Settings without places on this machine."""
    own = {key: value for key, value in vars(wanted).items() if key != "output"}
    shown = ("epochs", "batch_size", "lr", "optimizer", "weight_decay", "seed", "max_steps")
    return own | {key: getattr(args, key) for key in shown}


def write(output: str | None, output_dir: str | None, model: EarlyExitWrapper, results: dict[str, Any]) -> None:
    """Writes the numbers, and the model with its fitted intervals into the folder of the run."""
    write_results(output, _rounded(results))
    if output_dir is not None:
        model.save_pretrained(output_dir)


def _rounded(value: Any) -> Any:
    """Six digits, which is more than the samples tell; what is infinite becomes a word."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def describe(results: dict[str, Any]) -> str:
    """Formats the three tables for the terminal."""
    exits = [
        (row["exit"], mmacs(row["macs"]), f"{row['mae']:.2f}", f"{row['rmse']:.2f}") for row in results["per_exit"]
    ]
    intervals = [
        (
            row["method"],
            " / ".join(f"{value:.1f}" for value in row["width"]),
            " / ".join(percent(value) for value in row["coverage"]),
            " / ".join(percent(value) for value in row["coverage_so_far"]),
        )
        for row in results["intervals"]
    ]
    routing = [
        (
            f"{row['threshold']:.1f}",
            f"{row['mae']:.2f}",
            mmacs(row["mean_macs"]),
            " / ".join(f"{100 * share:.0f}" for share in row["exit_share"]),
            percent(row["coverage"]),
        )
        for row in results["routing"]
    ]
    tables = (
        format_table(("all samples at", "MMACs", "mean error, degrees", "root mean square"), exits),
        format_table(("intervals", "width per exit, degrees", "coverage %", "in all so far %"), intervals),
        format_table(("leave below, degrees", "mean error", "mean MMACs", "leave at (%)", "coverage %"), routing),
    )
    return "\n\n".join(tables)


if __name__ == "__main__":
    run_script(main, resumable=True)
