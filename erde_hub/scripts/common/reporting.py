"""The report of a trained model: its threshold, its checkpoint, and the files that describe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from erde_hub._files import replacing, write_text
from erde_hub.data.loader import ImageSplit, Split
from erde_hub.data.streaming import StreamSplit
from erde_hub.data.texts import TextData
from erde_hub.data.tokens import TokenData
from erde_hub.evaluation import (
    ExitRecords,
    build_results,
    calibrate_records,
    plot_frontier,
    plot_sets,
    save_results,
    set_curves,
    write_sweep_csv,
)
from erde_hub.evaluation.diagnostics import (
    plot_contact_sheet,
    plot_fractions,
    plot_reliability,
    plot_scores,
    plot_slices,
)
from erde_hub.hub import render_model_card
from erde_hub.losses import ExitLoss
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.records import MIN_SAMPLES
from erde_hub.training._launch import run_on_main
from erde_hub.training.arguments import DistillationArguments
from erde_hub.training.distiller import TrainResult

from .encoders import published_base
from .phases import Run, collect
from .run_data import SPLIT_FILE, save_trained_on

#: Logits of the samples that the figure of prediction sets is drawn from.
MOST_LOGITS = 20_000_000


def report(
    run: Run,
    folder: Path,
    model: EarlyExitWrapper,
    loss: tuple[str, ExitLoss],
    result: TrainResult,
    records: Mapping[str, ExitRecords],
    choice: Mapping[str, Any],
    *,
    teacher: EarlyExitWrapper | None = None,
    static: Mapping[str, Any] | None = None,
    args: DistillationArguments | None = None,
    latency: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint of a trained model and everything that describes it.

    What is reported comes from test, also of the teacher; prediction sets are fitted on validation. ``results.json`` is
    written last, so that a report that was cut off is made again.

    Args:
        run: Data, arguments, processes.
        folder: Where the files go.
        model: The trained model, with its threshold.
        loss: Its key and the object.
        result: Of the training.
        records: Of ``validation`` and ``test``.
        choice: How the threshold was chosen.
        teacher: Measured on the same test samples.
        static: Part ``static_student`` of the results, see :func:`train_static_student`.
        args: Training arguments of this model; those of the run if None.
        latency: How long each exit takes, see :func:`~erde_hub.scripts.common.exit_times.measure_exits`.

    Raises:
        CheckpointWriteError: A file cannot be written.
    """
    args = args or run.args
    teacher_records = None if teacher is None else collect(run, teacher, "test")

    def write() -> dict[str, Any]:
        results = build_results(
            records["test"],
            model,
            run.data,
            run.settings,
            held_out=None if isinstance(run.data, TokenData) else records["validation"],
            teacher=teacher,
            teacher_records=teacher_records,
            teacher_exits=result.teacher_exits,
            loss={"name": loss[0], **loss[1].settings(), **loss[1].added()},
            training=_training_facts(result, args, run.accelerator) | {"run_seconds": run.seconds},
        )
        results["threshold_choice"] = dict(choice)
        base = published_base(model)
        if base is not None:
            results["student"]["base_model"] = base
        if latency is not None:
            results["latency"] = dict(latency)
        if static is not None:
            results["static_student"] = dict(static)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        if isinstance(run.data, (TextData, TokenData)) and run.data.tokenizer is not None:
            run.data.tokenizer.save_pretrained(folder)
        if run.data.plan is not None:
            run.data.save_split(folder / SPLIT_FILE)
        save_trained_on(run.data, folder)
        # Images of a data set that only the user has must not be published with the checkpoint.
        public = run.data.name == "digits" or "/" in results["dataset"]["name"]
        results["figures"] = draw_figures(records["test"], model, run.data.test if public else None, folder)
        write_report(results, folder)
        return results

    return run_on_main(run.accelerator, write)


def draw_figures(
    records: ExitRecords,
    model: EarlyExitWrapper,
    split: Split | StreamSplit | None,
    folder: Path,
    slices: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """Draws reliability, scores, exit fractions, slices and, of a split of images, what exits early and late.

    Args:
        records: Of the split, raw.
        model: Whose exits.
        split: For the contact sheet and the sample of the card's widget; None draws none.
        folder: Where the files go.
        slices: Of the results; None draws none.

    Returns:
        The names of the files.

    Raises:
        CheckpointWriteError: A file cannot be written.
    """
    shown = records if model.calibrator is None else calibrate_records(records, model.calibrator)
    plot_reliability(shown, folder / "reliability.png")
    drawn = ["reliability.png"]
    if shown.num_exits > 1 and model.policy.uses_threshold:
        plot_scores(shown, model.policy, model.threshold, folder / "scores.png")
        plot_fractions(shown, model.policy, folder / "shares.png")
        drawn += ["scores.png", "shares.png"]
    if slices:
        plot_slices(slices, folder / "slices.png")
        drawn.append("slices.png")
    if shown.num_exits > 1 and isinstance(split, ImageSplit):
        place = {int(index): position for position, index in enumerate(split.indices)}

        def images(index: list[int]) -> list[Any]:
            return split.images([place[i] for i in index])

        plot_contact_sheet(shown, model.policy, model.threshold, images, folder / "contact_sheet.png")
        with replacing(folder / "sample.png") as temporary:
            split.images([0])[0].save(temporary, "png")
        drawn += ["contact_sheet.png", "sample.png"]
    return drawn


def draw_sets(held_out: ExitRecords, records: ExitRecords, model: EarlyExitWrapper, folder: Path) -> list[str]:
    """Draws prediction sets over their error rate, fitted on held-out records; of too few there is no figure.

    Of many samples with many classes some are used: sets are fitted and measured sixteen times.

    Returns:
        The names of the files.
    """
    if held_out.num_samples < MIN_SAMPLES:
        return []
    most = max(MOST_LOGITS // held_out.logits[:, 0].numel(), MIN_SAMPLES)
    held_out, records = (one.select(torch.arange(len(one))[:: -(-len(one) // most)]) for one in (held_out, records))
    rows = set_curves(held_out, records, methods=["avcs"])  # of raw logits
    if model.calibrator is not None:
        held_out, records = (calibrate_records(one, model.calibrator) for one in (held_out, records))
    plot_sets(set_curves(held_out, records, methods=["conformal"]) + rows, folder / "sets.png")
    return ["sets.png"]


def write_report(results: Mapping[str, Any], folder: Path, card: bool = True) -> None:
    """Writes sweep.csv, frontier.png, README.md (the model card) and, last, results.json; with times frontier_ms.png.

    Raises:
        CheckpointWriteError: A file cannot be written.
    """
    rows = [*results["sweep"], *results.get("fine_sweep", [])]
    write_sweep_csv(rows, folder / "sweep.csv", [row["exit"] for row in results["per_exit"]])
    plot_frontier(results, folder / "frontier.png")
    if results.get("latency"):
        plot_frontier(results, folder / "frontier_ms.png", in_time=True)
        results = {**results, "figures": list(dict.fromkeys([*results.get("figures", []), "frontier_ms.png"]))}
    if card:
        write_text(folder / "README.md", render_model_card(results))
    save_results(results, folder / "results.json")


def _training_facts(result: TrainResult, args: DistillationArguments, accelerator: Accelerator) -> dict[str, Any]:
    last: Sequence[dict[str, Any]] = result.history[-1:]
    terms = last[0].get("train", {}).get("terms", {}) if last else {}  # training heads on stored features has none
    return {
        **({"teacher_correct": terms["teacher_right"]} if "teacher_right" in terms else {}),
        "epochs": last[0]["epoch"] if last else None,
        "steps": result.step,
        "batch_size": args.batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "cpu_threads": torch.get_num_threads(),
        "seconds": result.seconds,
    }
