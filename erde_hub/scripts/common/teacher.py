"""The networks that are trained in addition to a student: its teacher, and its own network without exits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from erde_hub._files import write_text
from erde_hub.backbones import find_adapter
from erde_hub.backbones.base import example_inputs
from erde_hub.backbones.tracing import trace
from erde_hub.data.base import LabelledData
from erde_hub.evaluation import describe_model, per_exit_metrics
from erde_hub.evaluation.report import published_arguments
from erde_hub.losses import ExitLoss, create_loss
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.training._launch import run_on_main
from erde_hub.training.arguments import DistillationArguments
from erde_hub.training.run_folder import STATIC_STUDENT

from .arguments import ExitArguments, TeacherArguments, changed_arguments, plain_weights
from .default_threshold import GIVEN_THRESHOLD, store_default_threshold
from .networks import build_model, load_model
from .phases import Run, collect, finished_before, train_network
from .reporting import report
from .resuming import check_finished


@dataclass
class TeacherPlan:
    """A teacher that is to be trained: network, loss, arguments."""

    model: EarlyExitWrapper
    loss: ExitLoss
    args: DistillationArguments
    exits: ExitArguments

    @classmethod
    def build(
        cls, teacher_args: TeacherArguments, exits: ExitArguments, data: LabelledData, args: DistillationArguments
    ) -> TeacherPlan:
        """Builds network and loss; :func:`check_trainable` finds out whether they go together with the data.

        Raises:
            ConfigError, ExitPointError, ThresholdError: Whatever does not go together.
        """
        own = changed_arguments("teacher_training", args, teacher_args.teacher_training)
        model = build_model(
            teacher_args.teacher_architecture,
            data,
            exits,
            places=teacher_args.teacher_exit_points,
            kwargs=teacher_args.teacher_kwargs,
            pretrained=teacher_args.teacher_pretrained,
            seed=own.seed,
        )
        weights = plain_weights(teacher_args.teacher_exit_weights)
        loss = create_loss("ce", exit_weights="uniform" if weights is None else weights)
        return cls(model, loss, own, exits)

    def train(self, run: Run, folder: Path) -> tuple[EarlyExitWrapper, dict[str, Any]]:
        """Trains the teacher and reports on it, or loads it where the run has done so before."""
        done = finished_before(run, folder, "teacher")
        if done is not None:
            times = done.get("training") or {}
            run.earlier += times.get("run_seconds") or times.get("seconds") or 0.0
            return load_model(str(folder)), done
        result = train_network(run, folder, self.model, self.loss, args=self.args, role="teacher")
        records = {split: collect(run, self.model, split) for split in ("validation", "test")}
        choice: Mapping[str, Any] = GIVEN_THRESHOLD
        if self.exits.threshold is None:
            choice = store_default_threshold(self.model, records["validation"])
        results = report(run, folder, self.model, ("ce", self.loss), result, records, choice, args=self.args)
        return self.model, results


def train_static_student(run: Run, model: EarlyExitWrapper) -> dict[str, Any]:
    """Trains a network by its last exit alone, with cross-entropy and no teacher, and describes it.

    It is what the student would be without early exits: accuracy and cost are those of the bare backbone.
    """
    folder = run.folder / "static"
    description = folder / STATIC_STUDENT
    if run.args.resume and description.is_file():
        stored = json.loads(description.read_text(encoding="utf-8"))
        check_finished(stored, run.settings, run.data, "static student")
        run.earlier += stored["seconds"]
        return {key: value for key, value in stored.items() if key not in _FOR_RESUME}
    loss = create_loss("ce", exit_weights=[*([0.0] * (model.num_exits - 1)), 1.0])
    result = train_network(run, folder, model, loss, role="static student")
    last = per_exit_metrics(collect(run, model, "test"))[-1]
    backbone: nn.Module = model.backbone
    described = describe_model(model) | {
        "exits": [],
        "accuracy": last["accuracy"],
        "macs": trace(
            backbone, example_inputs(run.data.input_size, find_adapter(backbone).example_dtype(backbone))
        ).total_macs,
        "params": sum(p.numel() for p in backbone.parameters()),
        "ece": last["ece"],
        "nll": last["nll"],
        "loss": "ce",
        "seconds": result.seconds,
    }
    requested = {"args": published_arguments(run.settings), "dataset": {"fingerprint": run.data.fingerprint}}
    run_on_main(run.accelerator, lambda: write_text(description, json.dumps(described | requested)))
    return described


#: What the file of a static student holds in addition to its description.
_FOR_RESUME = ("args", "dataset")
