"""Measures a checkpoint on a data set: every exit alone, and the threshold sweep.

    python recipes/evaluate.py --model runs/digits-1
    python recipes/evaluate.py --model org/name --dataset uoft-cs/cifar10 --output_dir runs/check
    python recipes/evaluate.py --model runs/digits-1 --compare old.safetensors new.safetensors
    python recipes/evaluate.py --model runs/digits-1 --compare old.safetensors --images folder

Leaves results.json, sweep.csv and figures, and changes nothing in the checkpoint. --compare reads two files of
--save_records instead and tells whether the stored threshold still holds on the second, or on images without labels
(--images). Where the model was trained on the same data, the images that its run held out are used; without --dataset
these are the data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers.hf_argparser import HfArg

from erde_hub._image_files import decode
from erde_hub.data.folders import list_files
from erde_hub.data.tokens import TokenData
from erde_hub.errors import ConfigError, DataError
from erde_hub.evaluation import (
    Drift,
    ExitRecords,
    build_results,
    calibrate_records,
    check_records_of,
    collect_exit_records,
    compare_records,
)
from erde_hub.evaluation.report import SET_ALPHA
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.policies import get_policy
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import TrainedDataArguments
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.training import DistillationArguments, create_accelerator, open_run_folder, run_on_main


@dataclass
class EvaluationArguments:
    """What is measured and where the files go."""

    model: str = HfArg(help="folder or Hub repository of a checkpoint")
    split: Literal["test", "validation"] = HfArg(default="test", help="images to report on")
    policy: str | None = HfArg(default=None, help="sweep another policy than the stored one")
    thresholds: list[float] | None = HfArg(
        default=None, help="thresholds of the sweep; default: about eleven, evenly spaced by the cost that they save"
    )
    batch_size: int = HfArg(default=256, help="images per forward pass and process")
    num_workers: int = HfArg(default=0, help="processes that load large images")
    cpu_threads: int = HfArg(default=0, help="CPU threads per process, 0: cores / processes")
    save_records: bool = HfArg(
        default=False, help="also write records.safetensors: the logits of every exit for every image"
    )
    set_alpha: float = HfArg(
        default=SET_ALPHA,
        help="error rate of the prediction sets whose coverage and size are reported; they are fitted on"
        " validation images, so there are none with --split validation; 0: none",
    )
    compare: list[str] | None = HfArg(
        default=None,
        help="two files of records, before and now: tell whether the stored threshold still holds; no images are read",
    )
    images: str | None = HfArg(
        default=None,
        help="folder of images without labels, in place of the second file of --compare: exits and scores need none",
    )
    group_column: list[str] | None = HfArg(
        default=None,
        help="report accuracy, cost and exits per value of a column of the data set, worst first; several columns: per"
        " combination of values; label: per class",
    )
    output_dir: str | None = HfArg(
        default=None, help="folder of the report; default: runs/evaluate-<model>-<n>, the next free n"
    )
    overwrite_output_dir: bool = HfArg(default=False, help="replace the report that output_dir already holds")


@dataclass
class EvaluationDataArguments(TrainedDataArguments):
    """Which data, and which part of them; images are read as they come, since no training can be lost."""

    check_images: Literal["all", "headers", "none"] = HfArg(
        default="headers",
        help="what is looked at before the model runs: every image, the headers of some, or nothing",
    )


def main() -> None:
    """Loads, measures, writes."""
    sections = {"what and where": EvaluationArguments, "data": EvaluationDataArguments}
    evaluation, data_args, _ = parse_arguments(sections, __doc__)
    args = DistillationArguments(
        batch_size=evaluation.batch_size,
        num_workers=evaluation.num_workers,
        cpu_threads=evaluation.cpu_threads,
    )
    accelerator = create_accelerator(args)
    recipe.configure_logging(accelerator.is_main_process)

    if not 0 <= evaluation.set_alpha < 1:
        raise ConfigError(f"--set_alpha must be at least 0 and below 1, got {evaluation.set_alpha}")
    overrides: dict[str, Any] = {}
    if evaluation.policy is not None:
        overrides = {"policy": evaluation.policy, "threshold": get_policy(evaluation.policy).cls.default_threshold}
    model = recipe.load_model(evaluation.model, **overrides)
    for threshold in evaluation.thresholds or ():
        model.policy.check_threshold(threshold, model.num_exits - 1)
    if evaluation.images is not None and evaluation.compare is None:
        raise ConfigError("--images is compared with records: give --compare FILE, written with --save_records")
    if evaluation.compare is not None:
        accelerator.print(compare(evaluation.compare, model, evaluation.images, evaluation.batch_size))
        return
    data = recipe.load_data_of(
        evaluation.model,
        data_args,
        recipe.preprocessing_of(model, evaluation.model),
        evaluation.split,
        accelerator.is_main_process,
    )
    recipe.check_measurable(model, data)

    name = f"evaluate-{Path(evaluation.model).name}"
    refuse_checkpoint_folder(evaluation.output_dir)
    folder = run_on_main(
        accelerator,
        lambda: open_run_folder(evaluation.output_dir, name, overwrite=evaluation.overwrite_output_dir),
    )
    accelerator.print(recipe.describe_data(data, evaluation.model if data_args.dataset is None else None))
    settings = asdict(evaluation) | asdict(data_args)
    run = recipe.Run(accelerator, data, args, settings)
    records = recipe.collect(run, model, evaluation.split, args.batch_size)
    sets = evaluation.set_alpha > 0 and not isinstance(data, TokenData)  # of a vocabulary: none, as in distill's report
    with_sets = sets and evaluation.split != "validation"
    held_out = recipe.collect(run, model, "validation", args.batch_size) if with_sets else None

    def write() -> dict[str, Any]:
        groups = recipe.groups_of(records, data, evaluation.group_column, evaluation.model, data_args)
        results = build_results(
            records,
            model,
            data,
            settings,
            held_out=held_out,
            set_alpha=evaluation.set_alpha,
            thresholds=evaluation.thresholds,
            groups=groups,
            other_data=data_args.dataset is not None and recipe.is_other_data(data, evaluation.model),
        )
        results["figures"] = recipe.draw_figures(
            records, model, getattr(data, evaluation.split), folder, results.get("slices")
        )
        if held_out is not None:
            results["figures"] += recipe.draw_sets(held_out, records, model, folder)
        recipe.write_report(results, folder, card=False)
        if evaluation.save_records:
            records.save(folder / "records.safetensors")
        return results

    results = run_on_main(accelerator, write)
    accelerator.print(f"\n{recipe.format_results(results)}\n\nresults.json, sweep.csv, frontier.png: {folder}")


def compare(paths: list[str], model: EarlyExitWrapper, images: str | None, batch_size: int) -> Drift:
    """Compares what the model's threshold does on records and on later ones, or on images without labels."""
    if len(paths) != (2 if images is None else 1):
        raise ConfigError(
            f"--compare takes two files of records, before and now, got {len(paths)}; with --images it takes one,"
            " before"
        )
    before = ExitRecords.load(paths[0])
    now = ExitRecords.load(paths[1]) if images is None else collect_unlabelled(images, model, batch_size)
    if model.calibrator is not None:
        before, now = (calibrate_records(records, model.calibrator) for records in (before, now))
    check_records_of(before, model)
    profile = model.config.threshold_profile or {}
    guaranteed = profile.get("bound") is not None and profile.get("confidence") is not None
    options = {name: profile[name] for name in ("bound", "confidence", "target")} if guaranteed else {}
    return compare_records(before, now, model.policy, model.threshold, **options)


def collect_unlabelled(folder: str, model: EarlyExitWrapper, batch_size: int) -> ExitRecords:
    """Runs every exit over all images below a folder; their labels, if there are any, are not read.

    Raises:
        DataError: There is no image, or one is damaged.
    """
    paths = [Path(folder, *parts) for parts in list_files(Path(folder)).images]
    if not paths:
        raise DataError(f"--images {folder!r} holds no image: give a folder of images")
    processor = model.image_processor()

    def batch(start: int) -> dict[str, Tensor]:
        images = [decode(path.read_bytes(), path.name) for path in paths[start : start + batch_size]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    features = model.calibrator is not None and model.calibrator.uses_features
    batches = (batch(start) for start in range(0, len(paths), batch_size))
    return collect_exit_records(model, batches, features, progress=False, labels=False)


def refuse_checkpoint_folder(output_dir: str | None) -> None:
    """A report is not written over a checkpoint: --overwrite_output_dir would delete its weights."""
    if output_dir is not None and (Path(output_dir) / "config.json").is_file():
        raise ConfigError(f"output_dir {output_dir!r} holds a checkpoint: choose another folder for the report")


if __name__ == "__main__":
    run_script(main)
