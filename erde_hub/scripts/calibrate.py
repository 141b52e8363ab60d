"""Chooses the threshold of a checkpoint on held-out images and writes it into the checkpoint.

    python recipes/calibrate.py --model runs/digits-1 --max_accuracy_drop 0.01
    python recipes/calibrate.py --model runs/digits-1 --max_mean_macs 2e6 --per_exit
    python recipes/calibrate.py --model runs/digits-1 --max_accuracy_drop 0.03 --calibrator temperature --policy eefp

A bound on the loss is guaranteed with --confidence; if the images do not support it, no sample exits early and the
report says what is missing. The images are those that the run of the model held out for validation. config.json gets
the threshold and, as threshold_profile, how it was chosen; results.json and README.md of the run follow, measured on
test.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg

from erde_hub.calibration import (
    ThresholdChoice,
    check_calibration_data,
    choose_threshold,
    get_calibrator,
    list_calibrators,
)
from erde_hub.calibration.objective import (
    Objective,
    check_has_threshold,
    read_costs,
    read_method,
    read_milliseconds,
    read_objective,
)
from erde_hub.config import EarlyExitConfig
from erde_hub.data.loader import Split
from erde_hub.data.streaming import StreamSplit
from erde_hub.errors import ConfigError
from erde_hub.evaluation import (
    ExitRecords,
    accuracy_at_cost,
    build_results,
    calibrate_records,
    load_results,
    route_records,
    slice_metrics,
)
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.policies import LearnedPolicy, create_policy, get_policy, list_policies
from erde_hub.prediction_sets import ConformalClassifier
from erde_hub.prediction_sets.base import check_alpha
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import TrainedDataArguments
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.default_threshold import CONFIDENCE
from erde_hub.scripts.common.exit_times import known_exit_times, measure_exits
from erde_hub.training import DistillationArguments, create_accelerator, run_on_main


@dataclass
class CalibrationArguments:
    """The target of the threshold, and how it is chosen."""

    model: str = HfArg(help="folder of a checkpoint; its config.json is rewritten")
    max_accuracy_drop: float | None = HfArg(
        default=None, help="accuracy that may be lost against the full model, a fraction: 0.01 is a point"
    )
    max_disagreement: float | None = HfArg(
        default=None, help="share of images whose answer may differ from the full model's"
    )
    max_brier_increase: float | None = HfArg(
        default=None, help="how much the Brier score (0 to 2) may exceed the full model's"
    )
    max_selective_risk: float | None = HfArg(
        default=None, help="share of wrong answers among the images that exit early, with --per_exit at every exit"
    )
    max_mean_macs: float | None = HfArg(default=None, help="budget: mean multiply-accumulates per image, e.g. 2e6")
    max_mean_milliseconds: float | None = HfArg(
        default=None, help="budget: mean time per image in ms, as latency.py measured it, or else is measured now"
    )
    exit_milliseconds: list[float] | None = HfArg(
        default=None,
        help="time in ms of an image that exits at each exit, the last one included; default: what latency.py measured"
        " on this machine with torch and one thread",
    )
    confidence: float | None = HfArg(
        default=None,
        help="probability with which a bound holds on other images; budgets and the methods crc and search have"
        f" none; default: {CONFIDENCE}",
    )
    method: Literal["auto", "ltt", "exact", "ucb", "crc", "search"] = HfArg(
        default="auto",
        help="auto: ltt or, with many images, exact; crc: on average over calibration sets; search: the best on"
        " these images, without a guarantee",
    )
    per_exit: bool = HfArg(default=False, help="one threshold per exit in place of a shared one")
    calibrator: str = HfArg(
        default="keep",
        help=f"fit one first: {', '.join(list_calibrators())}; keep: the stored one; none: take it off",
    )
    policy: str = HfArg(
        default="keep",
        help=f"policy to store, fitted first if it is learned: {', '.join(list_policies())}; eenet is trained"
        " for the budget, or for half of the full cost where a bound is requested",
    )
    fit_share: float = HfArg(
        default=0.4,
        help="share of the images that calibrator and learned policy are fitted on; the threshold gets the rest",
    )
    set_alpha: float | None = HfArg(
        default=None,
        help="also store prediction sets with this error rate for the answers at the new threshold; they are fitted on"
        " --fit_share of the images, by the exit that each takes, and the threshold gets the rest",
    )
    split: Literal["validation", "test"] = HfArg(
        default="validation", help="images to choose on; numbers of the same images prove nothing"
    )
    allow_missing_classes: bool = HfArg(
        default=False, help="go on where a class has no image among those that are fitted on"
    )
    group_column: list[str] | None = HfArg(
        default=None,
        help="look at every value of a column of the data set, or combination of values of several, and say which of"
        " these slices do not support the guarantee by themselves; label: per class",
    )
    dry_run: bool = HfArg(default=False, help="print the report and write nothing")
    batch_size: int = HfArg(default=256, help="images per forward pass and process")
    num_workers: int = HfArg(default=0, help="processes that load large images")
    cpu_threads: int = HfArg(default=0, help="CPU threads per process, 0: cores / processes")


def main() -> None:
    """Loads, measures, chooses, writes."""
    sections = {"what is requested": CalibrationArguments, "data": TrainedDataArguments}
    requested, data_args, _ = parse_arguments(sections, __doc__)
    folder = Path(requested.model).expanduser()
    if requested.max_mean_milliseconds is not None and requested.exit_milliseconds is None and folder.is_dir():
        requested.exit_milliseconds = exit_milliseconds(folder)
    options = target_options(requested)
    objective = check_requested(requested, options)
    args = DistillationArguments(
        batch_size=requested.batch_size, num_workers=requested.num_workers, cpu_threads=requested.cpu_threads
    )
    accelerator = create_accelerator(args)
    recipe.configure_logging(accelerator.is_main_process)
    if not requested.dry_run and not folder.is_dir():
        raise ConfigError(
            f"--model {requested.model!r} is no folder: only a checkpoint on this machine can be rewritten;"
            " download it, or add --dry_run"
        )
    model = recipe.load_model(requested.model)
    read_costs(model.exit_table().cumulative_macs, requested.exit_milliseconds, objective)
    data = recipe.load_data_of(
        requested.model,
        data_args,
        recipe.preprocessing_of(model, requested.model),
        requested.split,
        accelerator.is_main_process,
    )
    recipe.check_measurable(model, data)
    accelerator.print(recipe.describe_data(data, requested.model if data_args.dataset is None else None))
    run = recipe.Run(accelerator, data, args, asdict(requested) | asdict(data_args))
    laplace = requested.calibrator in list_calibrators() and get_calibrator(requested.calibrator).cls.uses_features
    records = recipe.collect(run, model, requested.split, args.batch_size, features=laplace or None)
    trained_on = recipe.rows_trained_on(requested.model, records, getattr(data, requested.split))
    records = check_calibration_data(records, trained_on, allow_missing_classes=requested.allow_missing_classes)
    before = recipe.rows_fitted_on(requested.model, records, getattr(data, requested.split))
    keep = keeps_fitted(requested, model)
    if before is None and keep:
        accelerator.print(
            f"Warning: it is not known which samples calibrator or policy of {requested.model} were fitted on."
            " A guarantee holds only on other samples."
        )
    records, fitted_on = fit_parts(requested, model, records, before)
    for_sets = None
    if requested.set_alpha is not None:
        for_sets, records = split_at_random(records, requested.fit_share)
    choice = choose_threshold(records, model.policy, **options, allow_missing_classes=requested.allow_missing_classes)
    groups = recipe.groups_of(records, data, requested.group_column, requested.model, data_args)
    if groups is not None and choice.confidence is not None:
        slices = slice_metrics(records, *groups, model.policy, choice.threshold, choice.to_dict())
        choice = replace(choice, unsupported_slices=[row["slice"] for row in slices if row["promise"] != "holds"])
    if requested.calibrator != "keep" and model.calibrator is not None and model.calibrator.report:
        accelerator.print(model.calibrator.report)
    accelerator.print(f"\n{choice}\n")
    sets = None
    if for_sets is not None:
        taken = route_records(for_sets, model.policy, choice.threshold)[0]
        sets = ConformalClassifier.fit(for_sets, requested.set_alpha, randomized=False, exit_index=taken)
        accelerator.print(describe_sets(sets, for_sets, taken))
    if requested.dry_run:
        return
    choice.store(model)
    if sets is not None:
        model.set_prediction_sets(sets)
    split = getattr(data, requested.split)
    run_on_main(accelerator, lambda: save(folder, model, keep, split, fitted_on))
    if (folder / "results.json").is_file():
        test = recipe.collect(run, model, "test", args.batch_size)
        of_test = recipe.groups_of(test, data, requested.group_column, requested.model, data_args)
        run_on_main(accelerator, lambda: update_report(folder, model, choice, test, records, data.test, of_test))
    accelerator.print(f"written into {folder}")


def exit_milliseconds(folder: Path) -> list[float]:
    """Returns the time of each exit: what the report has of this machine, or else as measured now."""
    report = folder / "results.json"
    known = known_exit_times(load_results(report) if report.is_file() else None)
    if known is None:
        print("measuring the time of each exit, with torch and one thread")
        known = measure_exits(recipe.load_model(str(folder)), ["torch"], [1])["settings"][0]["exit_milliseconds"]
    print(f"time of each exit: {', '.join(f'{time:.2f}' for time in known)} ms")
    return known


def check_requested(requested: CalibrationArguments, options: dict[str, Any]) -> Objective:
    """Checks what needs neither model nor data, and returns the objective."""
    if requested.calibrator not in ("keep", "none"):
        get_calibrator(requested.calibrator)
    if requested.policy != "keep":
        check_has_threshold(get_policy(requested.policy).cls)
    if requested.set_alpha is not None:
        check_alpha(requested.set_alpha)
    if not 0 < requested.fit_share < 1:
        raise ConfigError(f"--fit_share must be between 0 and 1, got {requested.fit_share}")
    targets = {key: value for key, value in options.items() if key.startswith("max_")}
    given = [f"--{key}" for key, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"give exactly one of --{', --'.join(targets)} (--max_accuracy_drop 0.01, say), got"
            f" {' and '.join(given) or 'none'}"
        )
    objective = read_objective({key[4:]: value for key, value in targets.items()})
    read_milliseconds(requested.exit_milliseconds, objective)
    read_method(options["method"], options["confidence"], objective)
    return objective


def keeps_fitted(requested: CalibrationArguments, model: EarlyExitWrapper) -> bool:
    """Tells whether the model keeps a calibrator or a policy that was fitted before."""
    keeps_policy = requested.policy == "keep" and isinstance(model.policy, LearnedPolicy)
    return keeps_policy or (requested.calibrator == "keep" and model.calibrator is not None)


def fit_parts(
    requested: CalibrationArguments, model: EarlyExitWrapper, records: ExitRecords, before: torch.Tensor | None
) -> tuple[ExitRecords, torch.Tensor]:
    """Fits calibrator and policy as requested.

    Args:
        requested: Says what is fitted, on which share, and what is kept.
        model: Gets both.
        records: Of all samples.
        before: Indices of those that parts of the model were fitted on earlier; None if that is not known.

    Returns:
        The records that are left for the threshold, calibrated; and the indices of the samples that the parts which the
        model has now were fitted on, which are none of them.
    """
    fits_calibrator = requested.calibrator not in ("keep", "none")
    learned = requested.policy != "keep" and issubclass(get_policy(requested.policy).cls, LearnedPolicy)
    checks = {"allow_missing_classes": requested.allow_missing_classes}
    fitted_on = before if before is not None and keeps_fitted(requested, model) else records.index[:0]
    rest = records.select(~torch.isin(records.index, fitted_on))
    if fits_calibrator or learned:
        fitting, rest = split_at_random(rest, requested.fit_share)
        fitted_on = torch.cat([fitted_on, fitting.index])
    if requested.calibrator == "none":
        model.set_calibrator(None)
    elif fits_calibrator:
        model.set_calibrator(get_calibrator(requested.calibrator).cls.fit(fitting, **checks))
    if model.calibrator is not None:
        rest = calibrate_records(rest, model.calibrator)
        fitting = calibrate_records(fitting, model.calibrator) if learned else records
    if learned:
        cls = get_policy(requested.policy).cls
        budget = policy_budget(requested) if cls.uses_budget else {}  # type: ignore[attr-defined]
        model.set_policy(cls.fit(fitting, **budget, **checks))  # type: ignore[attr-defined]
    elif requested.policy != "keep":
        model.set_policy(create_policy(requested.policy))
    return rest, fitted_on


def split_at_random(records: ExitRecords, share: float) -> tuple[ExitRecords, ExitRecords]:
    """Returns a share of the records, and the rest."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    cut = int(share * len(records))
    return records.select(order[:cut]), records.select(order[cut:])


def describe_sets(sets: ConformalClassifier, records: ExitRecords, taken: torch.Tensor) -> str:
    """Says what prediction sets were fitted on."""
    counts = torch.bincount(taken, minlength=records.num_exits).tolist()
    few = [name for name, q in zip(records.exit_names, sets.quantiles, strict=True) if math.isinf(q)]
    named = ", ".join(f"{name} {count}" for name, count in zip(records.exit_names, counts, strict=True))
    full = f" Too few for {', '.join(few)}: the sets there hold all classes." if few else ""
    return f"prediction sets with error rate {sets.alpha:g}, images that took each exit: {named}.{full}"


def policy_budget(requested: CalibrationArguments) -> dict[str, Any]:
    """Returns the budget that a policy is trained for, in MACs or milliseconds; without one it takes its own."""
    budget = requested.max_mean_macs if requested.max_mean_milliseconds is None else requested.max_mean_milliseconds
    return {"budget": budget, "costs": requested.exit_milliseconds}


def target_options(requested: CalibrationArguments) -> dict[str, Any]:
    """Returns the arguments of ``choose_threshold``; a bound gets a confidence where none is given and it can."""
    budget = requested.max_mean_macs is not None or requested.max_mean_milliseconds is not None
    without = budget or requested.method in ("crc", "search")
    options: dict[str, Any] = {
        name: getattr(requested, name)
        for name in (
            "max_accuracy_drop",
            "max_disagreement",
            "max_brier_increase",
            "max_selective_risk",
            "max_mean_macs",
            "max_mean_milliseconds",
            "exit_milliseconds",
            "per_exit",
        )
    }
    options["method"] = None if requested.method == "auto" else requested.method
    options["confidence"] = CONFIDENCE if requested.confidence is None and not without else requested.confidence
    return options


def save(
    folder: Path, model: EarlyExitWrapper, keep: bool, split: Split | StreamSplit, fitted_on: torch.Tensor
) -> None:
    """Saves threshold, policy and calibrator, and the list of the samples that they were fitted on.

    The order is safe if the process is killed in between: the list grows before the parts change and shrinks after it,
    so that no sample counts as unused that a stored part was fitted on; and the profile of the earlier threshold is
    removed before the weights for which it was measured are replaced.

    Args:
        folder: Of the checkpoint.
        model: With its new parts and threshold.
        keep: Whether a calibrator or policy is kept that was fitted before.
        split: Where the samples come from.
        fitted_on: Indices of the samples that the parts were fitted on.
    """
    recipe.extend_fitted_on(split, fitted_on, folder)
    if model.calibrator is not None or list(model.policy.buffers()):
        before = EarlyExitConfig.from_pretrained(folder)
        before.threshold_profile = None
        before.save_pretrained(folder)
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
    recipe.save_fitted_on(split, fitted_on, folder, keep)


def update_report(
    folder: Path,
    model: EarlyExitWrapper,
    choice: ThresholdChoice,
    test: ExitRecords,
    chosen_on: ExitRecords,
    split: Split | StreamSplit,
    groups: tuple[torch.Tensor, list[str]] | None = None,
) -> None:
    """Measures the report of the run anew for the new threshold, and draws its figures again.

    Args:
        folder: Of the checkpoint.
        model: With its new threshold.
        choice: Of the threshold.
        test: What the report is about.
        chosen_on: Records of the choice, as the model sees them; prediction sets of the report are fitted on them
            unless they are test images.
        split: Of ``test``; its images are shown where the run showed them.
        groups: Of ``test``, and their names; None leaves slices out.
    """
    results = load_results(folder / "results.json")
    held_out = chosen_on if chosen_on.info.get("split") != "test" else None
    measured = build_results(test, model, results["dataset"], results["args"], held_out=held_out, groups=groups)
    results.pop("slices", None)  # of the earlier threshold
    matched = [row for row in results.get("matched_cost", []) if row["of"] != "student"]
    for key in ("per_exit", "sweep", "fine_sweep", "operating_point", "metrics", "matched_cost", "warnings"):
        results[key] = measured[key]
    rows = [*results["fine_sweep"], *results["sweep"]]
    results["matched_cost"] += [row | {"accuracy": accuracy_at_cost(rows, row["macs"])} for row in matched]
    if groups is not None:
        results["slices"] = measured["slices"]
    for key in ("threshold", "policy", "policy_kwargs", "calibrator"):
        results["student"][key] = measured["student"][key]
    results["threshold_choice"] = {"rule": choice.rule, **choice.to_dict()}
    if drawn := results.get("figures"):
        images = split if "contact_sheet.png" in drawn else None
        results["figures"] = recipe.draw_figures(test, model, images, folder, measured.get("slices"))
    recipe.write_report(results, folder, card=(folder / "README.md").is_file())


if __name__ == "__main__":
    run_script(main)
