"""Do learned policies improve the trade-off? Measures it on records of a run.

    python recipes/evaluate.py --model runs/digits-1 --split validation --save_records --output_dir runs/validation
    python recipes/evaluate.py --model runs/digits-1 --split test --save_records --output_dir runs/test
    python recipes/studies/compare_policies.py --validation runs/validation/records.safetensors \
        --test runs/test/records.safetensors --output policies.json

Learned policies, calibrators and thresholds are fitted on validation records, all numbers are of test records: area
under the curve of accuracy against cost, its difference to the entropy policy on the same images with a bootstrap
interval, and accuracy at shares of the full cost. Writes JSON and prints a table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers.hf_argparser import HfArg

from erde_hub import __version__
from erde_hub.calibration import MIECalibrator, TemperatureCalibrator
from erde_hub.errors import ConfigError
from erde_hub.evaluation import (
    ExitRecords,
    accuracy_at_cost,
    area_difference,
    calibrate_records,
    curve_area,
    fine_thresholds,
    lowest_cost,
    sweep_thresholds,
)
from erde_hub.evaluation.drift import check_same_model
from erde_hub.evaluation.formatting import percent
from erde_hub.evaluation.ranking import auroc, mean_of_defined
from erde_hub.evaluation.report import COST_FRACTIONS
from erde_hub.evaluation.sweep import exit_scores
from erde_hub.policies import EEFPPolicy, EENetPolicy, ExitPolicy, SetSizePolicy, create_policy
from erde_hub.policies.eefp import should_exit
from erde_hub.prediction_sets import AVCSClassifier, ConformalClassifier, set_metrics
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results


@dataclass
class ComparisonArguments:
    """Which records are compared."""

    validation: str = HfArg(help="records that policies and thresholds are fitted on")
    test: str = HfArg(help="records that are reported")
    output: str = HfArg(help="JSON file of the results")
    low: float = HfArg(default=0.4, help="lower end of the cost range, as a share of the full cost")
    high: float = HfArg(default=0.9, help="upper end of the cost range, as a share of the full cost")
    alpha: float = HfArg(default=0.1, help="error rate of prediction sets")
    resamples: int = HfArg(default=500, help="bootstrap samples")
    seed: int = HfArg(default=0, help="of bootstrap and fits")


def main() -> None:
    """Fits, measures, writes."""
    args, _ = parse_arguments({"what is compared": ComparisonArguments}, __doc__)
    validation, test = ExitRecords.load(args.validation), ExitRecords.load(args.test)
    check_same_model(validation, test)
    if validation.info.get("split") == "test":
        raise ConfigError("--validation holds records of the test split: what is fitted there proves nothing there")
    curve_area(test, "entropy", args.low, args.high, resamples=0)  # refuses a range before anything is fitted
    rows = [compare(name, *parts, validation, test, args) for name, parts in variants(validation, test, args).items()]
    results = {
        "erde_hub": __version__,
        "dataset": test.info.get("dataset", ""),
        "fingerprint": test.fingerprint,
        "samples": {"validation": len(validation), "test": len(test)},
        "range": [args.low, args.high],
        "alpha": args.alpha,
        "resamples": args.resamples,
        "seed": args.seed,
        "policies": rows,
        "sets": [set_row(name, sets, test) for name, sets in prediction_sets(validation, test, args).items()],
    }
    write_results(args.output, results)
    print(f"{'':26}{'area':>8}{'- entropy':>11}{'95 % interval':>20}{'EEFP':>7}   accuracy at 50 / 75 % cost")
    for row in rows:
        if row["area"] is None:
            print(f"{row['policy']:26} reaches no cost below {args.high:g} of the full one")
            continue
        low, high = row["difference_interval"]
        at = " / ".join("-" if v is None else percent(v) for v in row["accuracy_at"][1:])
        score = "-" if row["eefp"] is None else f"{row['eefp']:.3f}"
        print(
            f"{row['policy']:26}{100 * row['area']:8.2f}{100 * row['difference']:+11.2f}"
            f"{f'{100 * low:+.2f} to {100 * high:+.2f}':>20}{score:>7}   {at}"
        )


def variants(
    validation: ExitRecords, test: ExitRecords, args: ComparisonArguments
) -> dict[str, tuple[ExitPolicy, ExitRecords]]:
    """Policies with the test records that they see, fitted on validation."""
    temperature, mie = TemperatureCalibrator.fit(validation), MIECalibrator.fit(validation)
    found: dict[str, tuple[ExitPolicy, ExitRecords]] = {
        name: (create_policy(name), test) for name in ("entropy", "confidence", "margin", "patience")
    }
    found["eefp (learned)"] = EEFPPolicy.fit(validation, seed=args.seed), test
    for share in (0.5, 0.7):
        macs = share * validation.cumulative_macs[-1]
        if macs >= validation.cumulative_macs[0]:
            found[f"eenet (learned, {share:g})"] = EENetPolicy.fit(validation, macs, seed=args.seed), test
    found["set_size"] = SetSizePolicy.fit(validation), test
    found["entropy, temperature"] = create_policy("entropy"), calibrate_records(test, temperature)
    found["entropy, mie"] = create_policy("entropy"), calibrate_records(test, mie)
    found["eefp (learned), mie"] = (
        EEFPPolicy.fit(calibrate_records(validation, mie), seed=args.seed),
        calibrate_records(test, mie),
    )
    return found


def prediction_sets(validation: ExitRecords, test: ExitRecords, args: ComparisonArguments) -> dict[str, Tensor]:
    """Sets of every exit on test images, tuned on validation images."""
    nested = AVCSClassifier.fit(validation, args.alpha, seed=args.seed)
    found = {"AVCS": nested.sets(test.logits)}
    for method in ("aps", "raps"):
        conformal = ConformalClassifier.fit(validation, args.alpha, method, seed=args.seed)  # type: ignore[arg-type]
        found[method.upper()] = conformal.sets(test.logits)
    return found


def set_row(name: str, sets: Tensor, test: ExitRecords) -> dict[str, Any]:
    """Returns size, coverage and nestedness of sets per exit."""
    return {"sets": name, **asdict(set_metrics(sets, test.labels))}


def compare(
    name: str,
    policy: ExitPolicy,
    records: ExitRecords,
    validation: ExitRecords,
    test: ExitRecords,
    args: ComparisonArguments,
) -> dict[str, Any]:
    """Returns the numbers of one policy."""
    # Of what the policy and its yardsticks cannot reach nothing is compared.
    yardsticks = (lowest_cost(test, other) for other in ("entropy", "margin"))
    low = max(args.low, lowest_cost(records, policy), *yardsticks)
    options: dict[str, Any] = {"low": low, "high": args.high, "resamples": args.resamples, "seed": args.seed}
    area, difference, margin = None, None, None
    if low < args.high:
        area = curve_area(records, policy, **options)
        difference = area_difference(records, policy, test, "entropy", **options)
        margin = area_difference(records, policy, test, "margin", **options)
    rows = sweep_thresholds(records, fine_thresholds(records, policy), policy)
    targets = should_exit(records.logits.argmax(-1) == records.labels)
    scores = exit_scores(records, policy) * (1 if policy.leaves_above else -1)
    ranking = mean_of_defined([auroc(score, target) for score, target in zip(scores, targets, strict=True)])
    full = records.cumulative_macs[-1]
    return {
        "policy": name,
        "range": [low, args.high],
        "area": area and area.area,
        "interval": area and list(area.interval),
        "difference": difference and difference.area,
        "difference_interval": difference and list(difference.interval),
        "to_margin": margin and margin.area,
        "to_margin_interval": margin and list(margin.interval),
        "eefp": ranking,
        "accuracy_at": [accuracy_at_cost(rows, share * full) for share in COST_FRACTIONS],
    }


if __name__ == "__main__":
    run_script(main)
