"""Laplace and ensembles of exits on one checkpoint: does a better probability at every exit pay for what it costs?

    python recipes/studies/calibrated_exits.py --model runs/board/RUN/checkpoint --dataset path/to/cifar100 --output OUT

Calibrators are fitted on half of the validation images (Laplace takes its factors from training images), thresholds per
exit for each budget are chosen on the other half, test images are used once. The cost of the calibrator counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _study import DEVICE, load_images, start_log, write_result
from pretrained_board import upscale
from torch import Tensor

from erde_hub import EarlyExitWrapper, keep_freed_memory
from erde_hub.calibration import Calibrator, LaplaceCalibrator, MIECalibrator, choose_threshold
from erde_hub.evaluation import ExitRecords, calibrate_records, collect_exit_records, per_exit_metrics, sweep_thresholds

#: Fractions of the MACs of the network without calibrator.
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
KEYS = ("accuracy", "top5", "nll", "ece")


def main() -> None:
    """Collects records once, then compares the calibrators on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint, on images upscaled to --size")
    parser.add_argument("--dataset", required=True, help="folder or Hub name of CIFAR-10 or CIFAR-100")
    parser.add_argument("--output", type=Path, required=True, help="folder for records and the result file")
    parser.add_argument("--size", type=int, default=128, help="pixels to which images are upscaled")
    parser.add_argument("--factors", type=int, default=45_000, help="training images that Laplace's factors come from")
    parser.add_argument("--limit", type=int, help="number of training images, for a quick look")
    args = parser.parse_args()
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    start_log(args.output / "log.txt")
    model = EarlyExitWrapper.from_pretrained(args.model).eval().to(DEVICE)
    splits = load_images(args.dataset, args.output, args.limit)
    splits["train"] = tuple(part[: args.factors] for part in splits["train"])  # type: ignore[assignment]
    records = {
        name: collect(model, *split, args.size, args.output / f"{name}.safetensors") for name, split in splits.items()
    }
    half = len(records["validation"]) // 2
    fitting, choosing = (records["validation"].select(range(*ends)) for ends in ((0, half), (half, 2 * half)))
    options: dict[str, Any] = {"allow_missing_classes": True}  # half of the images may lack a class in a quick look
    calibrators: dict[str, Calibrator | None] = {
        "none": None,
        "laplace": LaplaceCalibrator.fit(fitting, records["train"], **options),
        "mie": MIECalibrator.fit(fitting, **options),
        "laplace + mie": LaplaceCalibrator.fit(fitting, records["train"], ensemble=True, **options),
    }
    full = records["test"].cumulative_macs[-1]
    measured = {name: measure(calibrator, choosing, records["test"], full) for name, calibrator in calibrators.items()}
    arguments = vars(args) | {"model": Path(args.model).name}
    write_result(args.output / "result.json", arguments, {"full_macs": full, "calibrators": measured})


def collect(model: EarlyExitWrapper, images: Tensor, labels: Tensor, size: int, file: Path) -> ExitRecords:
    """Returns logits and features of every exit; they are kept in a file."""

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(images), 100):
            rows = slice(start, start + 100)
            yield {"pixel_values": upscale(images[rows], size), "labels": labels[rows]}

    if not file.is_file():
        info = {"split": file.stem}
        collect_exit_records(model, batches(), features=True, info=info, progress=False).save(file)
    return ExitRecords.load(file)


def measure(calibrator: Calibrator | None, choosing: ExitRecords, test: ExitRecords, full: int) -> dict[str, Any]:
    """Every exit, and the thresholds per exit that are best within each budget, on test images."""
    if calibrator is not None:
        choosing, test = (calibrate_records(part, calibrator) for part in (choosing, test))
    points = []
    for share in BUDGETS:
        budget = share * full
        if budget < test.cumulative_macs[0]:
            continue
        choice = choose_threshold(
            choosing, "confidence", max_mean_macs=budget, per_exit=True, allow_missing_classes=True
        )
        (row,) = sweep_thresholds(test, [choice.threshold], "confidence")
        points.append({"budget": share, "mean_macs": row["mean_macs"], **{key: row[key] for key in KEYS}})
    exits = [{key: row[key] for key in ("exit", "macs", *KEYS)} for row in per_exit_metrics(test)]
    added = test.cumulative_macs[-1] - full
    return {"added_macs": added, "per_exit": exits, "points": points}


if __name__ == "__main__":
    main()
