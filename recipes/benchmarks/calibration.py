"""What functions of records cost, and what the Laplace approximation adds to a forward pass."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper, __version__
from erde_hub.calibration import LaplaceCalibrator, MIECalibrator, TemperatureCalibrator, choose_threshold
from erde_hub.errors import ConfigError, unknown_name
from erde_hub.evaluation import (
    ExitRecords,
    calibrate_records,
    compare_records,
    curve_area,
    fine_thresholds,
    per_exit_metrics,
    sweep_thresholds,
)
from erde_hub.policies import EEFPPolicy, EENetPolicy, SetSizePolicy
from erde_hub.prediction_sets import AVCSClassifier, ConformalClassifier, set_metrics
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.patterns import make_logits
from erde_hub.scripts.common.results_files import write_results

PARTS = ("functions", "laplace")


@dataclass
class CalibrationBenchmark:
    """How much is measured, and where the numbers go."""

    samples: int = HfArg(default=50_000, help="samples of the made-up records")
    exits: int = HfArg(default=4, help="exits of the made-up records, the last one included")
    classes: int = HfArg(default=100, help="classes of the made-up records")
    width: int = HfArg(default=128, help="width of the features of each exit")
    batch_size: int = HfArg(default=256, help="images per forward pass, for the Laplace approximation")
    draws: int = HfArg(default=50, help="draws of the Laplace approximation")
    rounds: int = HfArg(default=9, help="rounds; in each, network and calibrator take turns")
    cpu_threads: int = HfArg(default=1, help="CPU threads")
    parts: list[str] = HfArg(
        default_factory=lambda: list(PARTS),
        help=f"what is measured: {', '.join(PARTS)}; the rest of the output file stays as it is",
    )
    output: str | None = HfArg(default=None, help="JSON file for the numbers")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("samples", "exits", "classes", "width", "batch_size", "draws", "rounds", "cpu_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for part in self.parts:
            if part not in PARTS:
                raise unknown_name("part", part, PARTS)
        if self.exits < 2 or self.classes < 2:
            raise ConfigError(f"exits and classes must be at least 2, got {self.exits} and {self.classes}")


def main() -> None:
    """Times every function of records once, and the Laplace approximation beside a ResNet-10."""
    args, _ = parse_arguments({"benchmark": CalibrationBenchmark}, __doc__ or "")
    torch.set_num_threads(args.cpu_threads)
    known = Path(args.output) if args.output else None
    results: dict[str, Any] = json.loads(known.read_text(encoding="utf-8")) if known and known.is_file() else {}
    results |= {"erde_hub": __version__, "torch": torch.__version__, "threads": args.cpu_threads}
    if "functions" in args.parts:
        results |= {"samples": args.samples, "exits": args.exits, "classes": args.classes}
        results["functions"] = functions(args)
    if "laplace" in args.parts:
        results["laplace"] = [laplace(args, classes) for classes in dict.fromkeys((10, args.classes))]
        for row in results["laplace"]:
            print(
                f"Laplace, {row['draws']} draws, batch of {row['batch_size']}, {row['classes']} classes:"
                f" {1000 * row['calibrator_seconds']:.1f} ms for all {row['exits']} exits beside"
                f" {1000 * row['forward_seconds']:.0f} ms of {row['network']}, {100 * row['share']:.1f} %"
            )
    write_results(args.output, results)


def make_records(args: CalibrationBenchmark) -> ExitRecords:
    """Made-up records with features, from which the logits are not computed: only shapes matter here."""
    logits, labels = make_logits(args.samples, args.exits, args.classes)
    generator = torch.Generator().manual_seed(1)
    return ExitRecords(
        logits=logits,
        labels=labels,
        index=torch.arange(args.samples),
        exit_names=[f"stage{e}" for e in range(args.exits)],
        cumulative_macs=[1_000_000 * (e + 2) for e in range(args.exits)],
        class_names=[str(k) for k in range(args.classes)],
        features=[torch.randn(args.samples, args.width, generator=generator) for _ in range(args.exits)],
        info={"split": "validation"},
    )


def functions(args: CalibrationBenchmark) -> list[dict[str, Any]]:
    """Times each function once, on records that are made up."""
    records = make_records(args)
    rows: list[dict[str, Any]] = []

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = function()
        rows.append({"function": name, "seconds": time.perf_counter() - start})
        print(f"{name:44}{rows[-1]['seconds']:9.2f} s", flush=True)
        return value

    def choose(**options: Any) -> Any:
        return choose_threshold(records, "entropy", max_accuracy_drop=0.01, **options)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.safetensors"
        timed("ExitRecords.save", lambda: records.save(path))
        timed("ExitRecords.load", lambda: ExitRecords.load(path))
    timed("per_exit_metrics", lambda: per_exit_metrics(records))
    timed("sweep_thresholds, default steps", lambda: sweep_thresholds(records))
    timed("sweep_thresholds, 100 thresholds", lambda: sweep_thresholds(records, fine_thresholds(records)))
    timed("curve_area, 500 resamples", lambda: curve_area(records))
    for calibrator in (TemperatureCalibrator, MIECalibrator, LaplaceCalibrator):
        name = calibrator.__name__
        fitted = timed(f"{name}.fit", lambda calibrator=calibrator: calibrator.fit(records))
        timed(f"calibrate_records, {name}", lambda fitted=fitted: calibrate_records(records, fitted))
    timed("EEFPPolicy.fit", lambda: EEFPPolicy.fit(records))
    timed("SetSizePolicy.fit", lambda: SetSizePolicy.fit(records))
    timed("choose_threshold, search", choose)
    timed("choose_threshold, search, per exit", lambda: choose(per_exit=True))
    for method in ("ltt", "exact", "ucb", "crc"):
        sure = {} if method == "crc" else {"confidence": 0.9}
        for kind, per_exit in (("", False), (", per exit", True)):
            timed(
                f"choose_threshold, {method}{kind}",
                lambda method=method, sure=sure, per_exit=per_exit: choose(method=method, per_exit=per_exit, **sure),
            )
    conformal = timed("ConformalClassifier.fit", lambda: ConformalClassifier.fit(records))
    sets = timed("ConformalClassifier.sets", lambda: conformal.sets(records.logits))
    timed("set_metrics", lambda: set_metrics(sets, records.labels))
    nested = timed("AVCSClassifier.fit", lambda: AVCSClassifier.fit(records))
    timed("AVCSClassifier.sets", lambda: nested.sets(records.logits))
    timed("EENetPolicy.fit", lambda: EENetPolicy.fit(records))
    timed("compare_records", lambda: compare_records(records, records, "entropy", 0.5, 0.01))
    return rows


def laplace(args: CalibrationBenchmark, classes: int) -> dict[str, Any]:
    """Times the calibrator of all exits and the network that it would serve, in turns; medians."""
    backbone = timm.create_model("resnet10_cifar", num_classes=classes)
    model = EarlyExitWrapper(backbone, exits=["layer1", "layer2", "layer3"], head="linear").eval()
    images = torch.randn(args.batch_size, 3, 32, 32)
    with torch.no_grad():
        logits = model(images, output_all_exits=True).exit_logits
    widths = [64 * 2**e for e in range(len(logits))]
    features = [torch.randn(args.batch_size, width) for width in widths]
    calibrator = LaplaceCalibrator(len(logits), classes, widths, draws=args.draws)

    def calibrate() -> None:
        state: list[torch.Tensor] = []
        for e, (own, feature) in enumerate(zip(logits, features, strict=True)):
            calibrator(e, own, feature, state)

    times: dict[str, list[float]] = {"forward": [], "calibrator": []}
    with torch.no_grad():
        for turn in range(args.rounds + 2):
            for name, function in (
                ("forward", lambda: model(images, output_all_exits=True)),
                ("calibrator", calibrate),
            ):
                start = time.perf_counter()
                function()
                if turn >= 2:  # the first two warm up
                    times[name].append(time.perf_counter() - start)
    forward, calibrator_seconds = (statistics.median(values) for values in times.values())
    return {
        "network": "resnet10_cifar",
        "exits": len(logits),
        "classes": classes,
        "batch_size": args.batch_size,
        "draws": args.draws,
        "rounds": args.rounds,
        "forward_seconds": forward,
        "calibrator_seconds": calibrator_seconds,
        "share": calibrator_seconds / forward,
    }


if __name__ == "__main__":
    run_script(main)
