"""Trains one student per loss and seed under the same teacher, and compares them: accuracy, cost, worst group.

    python recipes/studies/compare_losses.py --methods kd erde ea_kd erde+ea_kd --seeds 0 1 2
    python recipes/studies/compare_losses.py --dataset coloured_digits --methods kd erde dedier --output results.json

A method is a loss, what joins it, and arguments: `erde+ea_kd:temperature=3,entropy_temperature=2`. `coloured_digits`
are digits whose colour is a misleading cue; their results hold the accuracy of every group, and their teacher learns
from digits whose colour says nothing. A file that is there already is added to: what it holds is not trained again.

Numbers, records and a picture of accuracy against cost go to runs/compare_losses-<n>.json, .records and .png; the same
settings find their file again.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from _coloured import DATASET as COLOURED
from _coloured import GroupedImages, coloured_digits
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper
from erde_hub._tables import format_table
from erde_hub.data.base import LabelledData
from erde_hub.errors import ConfigError, ResultsError, nearest
from erde_hub.evaluation import (
    ExitRecords,
    accuracy_at_cost,
    fine_thresholds,
    group_metrics,
    per_exit_metrics,
    plot_curves,
    sweep_thresholds,
)
from erde_hub.evaluation.figures import save_figure
from erde_hub.evaluation.formatting import duration
from erde_hub.evaluation.report import published_arguments
from erde_hub.losses import ExitLoss
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import (
    DataArguments,
    ExitArguments,
    StudentArguments,
    StudentNetworkArguments,
    TeacherArguments,
    build_loss,
    changed_arguments,
    loss_arguments_class,
    plain_text,
    plain_weights,
)
from erde_hub.scripts.common.command_line import base_config, parse_arguments, parse_scalar, run_script
from erde_hub.scripts.common.results_files import means_and_deviations, open_results, write_results
from erde_hub.training import DistillationArguments, Distiller, create_accelerator


@dataclass
class Comparison:
    """What is compared, and where the numbers go."""

    methods: list[str] = HfArg(
        default_factory=lambda: ["ce", "kd", "erde"],
        help="LOSS[+ADDITION...][:ARGUMENT=VALUE,...], one student each per seed",
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="each trains a teacher and all students")
    correlation: float = HfArg(
        default=0.95, help="coloured_digits: share of training images whose colour is that of their class"
    )
    teacher_correlation: float = HfArg(
        default=0.5, help="coloured_digits: the same share for the images that the teacher learns from"
    )
    split: Literal["validation", "test"] = HfArg(
        default="test", help="what is measured on: choose settings on validation, report on test"
    )
    output: str | None = HfArg(
        default=None, help="JSON file for the numbers; added to if it exists; default: runs/compare_losses-<n>.json"
    )


def build_method(text: str) -> ExitLoss:
    """Builds a loss from `LOSS[+ADDITION...][:ARGUMENT=VALUE,...]`; an argument goes to whichever takes it.

    Raises:
        ConfigError: No such loss, addition or argument, or they do not go together.
    """
    names, _, settings = text.partition(":")
    loss, *additions = names.split("+")
    arguments: Any = loss_arguments_class()()
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        known = [f.name for f in dataclasses.fields(arguments)]
        if not equals or key not in known:
            raise ConfigError(f"{part!r} in method {text!r} is not ARGUMENT=VALUE{nearest(key, known)}")
        setattr(arguments, key, plain_weights(parse_scalar(value)))
    return build_loss(loss, arguments, additions)


def check_data_arguments(data_args: DataArguments, comparison: Comparison) -> None:
    """Refuses flags that would change nothing about the data, and stand in the results as if they had.

    Raises:
        ConfigError: A part or a form of coloured digits, or a correlation of other data, is asked for.
    """
    coloured = data_args.dataset == COLOURED
    given = _changed(comparison, ("correlation", "teacher_correlation"))
    if coloured:
        given = _changed(data_args, [f.name for f in dataclasses.fields(data_args) if f.name != "dataset"])
    for name, value in given.items():
        shapes = f"does nothing with --dataset {COLOURED}, which is made anew for every seed and always used as it is"
        why = shapes if coloured else f"is for --dataset {COLOURED} only, and this is {data_args.dataset!r}"
        raise ConfigError(f"--{name} {plain_text(value)} {why}: leave it out")


def main() -> None:
    """Trains what is missing, seed by seed, and writes after every student."""
    sections = {
        "comparison": Comparison,
        "data (also coloured_digits)": DataArguments,
        "student": StudentNetworkArguments,
        "teacher": TeacherArguments,
        "exits": ExitArguments,
        "training of teacher and students": DistillationArguments,
    }
    base = base_config()
    comparison, data_args, student_args, teacher_args, exits, args, config = parse_arguments(
        sections, __doc__, default_config=base, ignored=[StudentArguments, loss_arguments_class()]
    )
    check_data_arguments(data_args, comparison)
    for method in comparison.methods:
        build_method(method)
    accelerator = create_accelerator(args)
    recipe.configure_logging(accelerator.is_main_process)
    args.output_dir = None
    settings = {
        "config": config,
        "split": comparison.split,
        "student": [student_args.student_architecture, student_args.student_kwargs],
        "teacher": [teacher_args.teacher_architecture, teacher_args.teacher_kwargs, teacher_args.teacher_training],
        "correlation": comparison.correlation if data_args.dataset == COLOURED else None,
        "teacher_correlation": comparison.teacher_correlation if data_args.dataset == COLOURED else None,
        "max_train_samples": data_args.max_train_samples,
        **{key: value for key, value in args.public_dict().items() if key not in ("seed", "checkpoint_steps")},
    }
    pretrained = [teacher_args.teacher_pretrained, student_args.student_pretrained]
    settings |= {"pretrained": pretrained} if any(pretrained) else {}
    settings |= {name: value for part in (exits, teacher_args, data_args) for name, value in _unusual(part).items()}
    preprocessing = recipe.existing_preprocessing(None, teacher_args, student_args)
    output, results = find_results(comparison.output, published_arguments(settings))
    say = Announcements(comparison.methods, comparison.seeds, results["runs"], accelerator.print)
    for seed in comparison.seeds:
        missing = [m for m in comparison.methods if not _find(results["runs"], m, seed)]
        if not missing:
            continue
        own = dataclasses.replace(args, seed=seed)
        grouped, teacher_data = _data(data_args, comparison, seed, preprocessing)
        data = grouped.data if isinstance(grouped, GroupedImages) else grouped
        if results.get("dataset", {}).get("name", data.name) != data.name:
            raise ResultsError(
                f"{output.name} holds results of {results['dataset']['name']}, and this is {data.name}: give the"
                " same data, or another --output"
            )
        results["dataset"] = {
            "name": data.name,
            "samples": {s: len(getattr(data, s)) for s in ("train", comparison.split)},
        }
        teacher = recipe.build_model(
            teacher_args.teacher_architecture, data, exits, places=teacher_args.teacher_exit_points,
            kwargs=teacher_args.teacher_kwargs, pretrained=teacher_args.teacher_pretrained, seed=seed,
        )  # fmt: skip
        teacher_args_of_seed = changed_arguments("teacher_training", own, teacher_args.teacher_training)
        with torch.random.fork_rng(devices=[]):  # what does not go together is found before the teacher takes its time
            student = recipe.build_student(student_args, exits, data, own)
            for loss in map(build_method, missing):
                recipe.check_trainable(accelerator, student, teacher if loss.reads_teacher else None, data, loss, own)
        say.training(f"seed {seed}, the teacher")
        _train(Distiller(teacher, teacher_data, teacher_args_of_seed, "ce", accelerator=accelerator))
        run = recipe.Run(accelerator, data, own, {})
        if not _find(results["teachers"], None, seed):
            results["teachers"].append({"seed": seed, **_measure(run, teacher, grouped, comparison.split)[0]})
        for method in missing:
            say.training(f"seed {seed}, {method}")
            student = recipe.build_student(student_args, exits, data, own)
            started = time.perf_counter()
            loss = build_method(method)
            _train(Distiller(student, data, own, loss, teacher if loss.reads_teacher else None, accelerator))
            measured, records = _measure(run, student, grouped, comparison.split)
            row = {"method": method, "seed": seed, **measured}
            if accelerator.is_main_process:
                records.save(records_file(output, len(results["runs"])))
            results["runs"].append(row | {"seconds": round(time.perf_counter() - started, 1)})
            results["summary"] = summarize(results["runs"])
            write_results(output, results)
            accelerator.print(f"seed {seed}, {method}: {_short(row)}")
    results["summary"] = summarize(results["runs"])
    write_results(output, results)
    if accelerator.is_main_process:
        draw(output, results["runs"])
    accelerator.print(f"\n{format_summary(results['summary'])}\n\n{output}, {output.with_suffix('.png').name}")


def find_results(output: str | None, settings: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Returns the file of the results and what it holds; without a name the first in runs/ that is free or fits.

    Raises:
        ResultsError: The named file holds results of other settings.
    """
    if output is not None:
        return Path(output), open_results(output, settings)
    for n in itertools.count(1):
        path = Path("runs", f"compare_losses-{n}.json")
        try:
            return path, open_results(path, settings)
        except ResultsError:
            continue
    raise AssertionError


class Announcements:
    """Says what trains, which of how many it is, and about how long all the rest will take."""

    def __init__(
        self,
        methods: Sequence[str],
        seeds: Sequence[int],
        runs: Sequence[Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        missing = [sum(not _find(runs, method, seed) for method in methods) for seed in seeds]
        self.total = sum(count + 1 for count in missing if count)  # with a teacher for each seed
        self.begun, self.started, self.say = 0, time.perf_counter(), say

    def training(self, what: str) -> None:
        """Announces the next training."""
        left = ""
        if self.begun:
            passed = time.perf_counter() - self.started
            left = f"; about {duration(passed / self.begun * (self.total - self.begun))} left in all"
        self.begun += 1
        self.say(f"training {self.begun} of {self.total}: {what}{left}")


def records_file(output: Path, run: int) -> Path:
    """Returns where the records of a run lie, by its place in the results."""
    folder = output.with_suffix(".records")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run}.safetensors"


def draw(output: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Draws accuracy against cost, each method with a band over its seeds; runs without records are left out."""
    methods: dict[str, list[ExitRecords]] = {}
    for number, run in enumerate(runs):
        if records_file(output, number).is_file():
            methods.setdefault(run["method"], []).append(ExitRecords.load(records_file(output, number)))
    if methods:
        save_figure(
            lambda figure: plot_curves(methods, figure.add_subplot()), output.with_suffix(".png"), size=(7.0, 4.5)
        )


def _unusual(arguments: Any) -> dict[str, Any]:
    """Returns what of a section decides about results, where it is not the default."""
    names = (
        "exits", "head", "head_kwargs", "teacher_exit_points", "teacher_exit_weights", "image_size", "max_eval_samples",
    )  # fmt: skip
    return _changed(arguments, names)


def _changed(arguments: Any, names: Sequence[str]) -> dict[str, Any]:
    usual = vars(type(arguments)())
    return {name: value for name, value in vars(arguments).items() if name in names and value != usual[name]}


def _train(distiller: Distiller) -> None:
    """Trains to the end; a signal ends everything, and what was finished before is in the file."""
    result = distiller.train()
    if result.status == "interrupted":
        raise recipe.Interrupted("stopped; the same command goes on with the student that it was at")


def _data(
    data_args: DataArguments, comparison: Comparison, seed: int, preprocessing: Mapping[str, Any] | None
) -> tuple[GroupedImages | LabelledData, LabelledData]:
    """Returns what students learn from, with groups where there are some, and what the teacher learns from."""
    if data_args.dataset != COLOURED:
        data = recipe.load_data(data_args, preprocessing, progress=False)
        return data, data
    grouped = coloured_digits(comparison.correlation, seed)
    return grouped, coloured_digits(comparison.teacher_correlation, seed).data


def _measure(
    run: recipe.Run, model: EarlyExitWrapper, grouped: GroupedImages | LabelledData, split: str
) -> tuple[dict[str, Any], ExitRecords]:
    """Measures a model: every exit, accuracy at matched cost, groups; returns its records as well."""
    records = recipe.collect(run, model, split)
    rows = per_exit_metrics(records)
    sweep = sweep_thresholds(records, fine_thresholds(records))
    full = rows[-1]["macs"]
    measured: dict[str, Any] = {
        "per_exit": [{key: row[key] for key in ("exit", "accuracy", "macs", "ece", "nll")} for row in rows],
        "accuracy_at_cost": {f"{share:g}": accuracy_at_cost(sweep, share * full) for share in (0.5, 0.75)},
    }
    if isinstance(grouped, GroupedImages):
        groups = grouped.groups[split][records.index]
        measured["groups"] = group_metrics(records, groups, grouped.group_names)
    return measured, records


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, one row per method."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        series = {
            "first_exit": [run["per_exit"][0]["accuracy"] for run in own],
            "half_cost": [run["accuracy_at_cost"]["0.5"] for run in own],
            "last_exit": [run["per_exit"][-1]["accuracy"] for run in own],
            "nll_last_exit": [run["per_exit"][-1]["nll"] for run in own],
            "seconds": [run["seconds"] for run in own],
        }
        if all("groups" in run for run in own):
            series["worst_group_first_exit"] = [run["groups"][0]["worst_group"] for run in own]
            series["worst_group_last_exit"] = [run["groups"][-1]["worst_group"] for run in own]
            series["mean_of_groups_last_exit"] = [run["groups"][-1]["mean_of_groups"] for run in own]
        rows.append({"method": method, "seeds": [run["seed"] for run in own], **means_and_deviations(series)})
    return rows


def format_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the summary for the terminal, accuracies in percent."""
    shown = ["first_exit", "half_cost", "last_exit", "worst_group_first_exit", "worst_group_last_exit"]
    shown = [name for name in shown if all(name in row for row in rows)]
    cells = [[row["method"], str(len(row["seeds"])), *(_percent(row, name) for name in shown)] for row in rows]
    return format_table(("method", "seeds", *(name.replace("_", " ") for name in shown)), cells)


def _percent(row: Mapping[str, Any], name: str) -> str:
    deviation = row[f"{name}_std"]
    return f"{100 * row[name]:.1f}" + ("" if deviation is None else f" ±{100 * deviation:.1f}")


def _short(row: Mapping[str, Any]) -> str:
    text = _percents(exit_["accuracy"] for exit_ in row["per_exit"])
    if "groups" in row:
        text += f", worst group {_percents(exit_['worst_group'] for exit_ in row['groups'])}"
    return text


def _percents(values: Iterable[float]) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values)


def _find(rows: Sequence[Mapping[str, Any]], method: str | None, seed: int) -> bool:
    return any(row.get("method") == method and row["seed"] == seed for row in rows)


if __name__ == "__main__":
    run_script(main)
