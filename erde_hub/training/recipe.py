"""The steps that recipes are made of: data, networks, training that resumes, and the report a run leaves behind.

A run is a folder. Its files say how far it came, so every step asks the folder first: a finished network is loaded, an
unfinished training is resumed, a report that is missing or half written is made again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from erde_hub.backbones.base import example_inputs, format_table
from erde_hub.cost import trace
from erde_hub.errors import CheckpointError, ConfigError, ErdeError, ResultsError, nearest
from erde_hub.evaluation import (
    ExitRecords,
    build_results,
    collect_exit_records,
    describe_model,
    exit_scores,
    fine_thresholds,
    load_results,
    per_exit_metrics,
    plot_frontier,
    save_results,
    step_thresholds,
    write_sweep_csv,
)
from erde_hub.evaluation._files import write_text
from erde_hub.evaluation.formatting import mmacs, percent, threshold_label
from erde_hub.evaluation.sweep import exit_indices
from erde_hub.hub import render_model_card
from erde_hub.losses import ExitLoss, create_loss
from erde_hub.modeling import EarlyExitWrapper
from erde_hub.policies import ExitPolicy

from ._checks import check_data, check_loss, check_models
from ._launch import run_on_main
from .arguments import DistillationArguments
from .data import BatchLoader, ImageData, load_image_data
from .distiller import Distiller, TrainResult
from .recipe_arguments import (
    DataArguments,
    ExitArguments,
    StudentArguments,
    TeacherArguments,
    exit_places,
    plain_weights,
    teacher_training_arguments,
)
from .run_folder import find_checkpoint

logger = logging.getLogger(__name__)

SPLIT_FILE = "split.json"

#: The threshold stored by default loses at most this much accuracy, as a fraction, against the full model.
MAX_ACCURACY_DROP = 0.01
THRESHOLD_RULE = (
    "the last threshold, from nobody leaving to everybody, before the loss of accuracy against the full model plus its"
    f" standard error exceeds {100 * MAX_ACCURACY_DROP:g} point"
)


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """A signal ended the training, and a checkpoint was written; the message says how to go on."""


@dataclass
class Run:
    """What every step of a recipe needs: who computes, on which data, told what.

    Attributes:
        accelerator: Of this process; teacher and student share it.
        data: All three splits.
        args: Training arguments; ``output_dir`` is the folder of the run.
        settings: Everything the recipe was told, for ``results.json``.
    """

    accelerator: Accelerator
    data: ImageData
    args: DistillationArguments
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))


def load_data(
    args: DataArguments,
    preprocessing: Mapping[str, Any] | None = None,
    split_file: str | Path | None = None,
    progress: bool = True,
) -> ImageData:
    """Loads the data that the arguments name.

    Args:
        args: What the user asked for.
        preprocessing: ``mean, std, size, interpolation, crop_pct`` of weights that exist already (a teacher's, timm's);
            the data are then brought into that form. ``--image_size`` wins over its size.
        split_file: Held-out rows of an earlier run.
        progress: Show progress bars.

    Raises:
        DataError, LabelError, ConfigError: See :func:`~erde_hub.training.data.load_image_data`.
    """
    wishes: dict[str, Any] = {}
    if preprocessing:
        wishes = {key: preprocessing[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        wishes["input_size"] = (3, *preprocessing["size"])
    if args.image_size is not None:
        wishes["input_size"] = args.image_size
    return load_image_data(
        args.dataset,
        image_column=args.image_column,
        label_column=args.label_column,
        config_name=args.dataset_config,
        streaming=args.streaming,
        cache_dir=args.cache_dir,
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
        split_file=split_file,
        progress=progress,
        **wishes,
    )


def pretrained_preprocessing(architecture: str) -> dict[str, Any]:
    """Returns how images have to be prepared for the weights that timm has for a network.

    Raises:
        ConfigError: timm has no such network.
    """
    check_architecture(architecture)
    cfg = timm.get_pretrained_cfg(architecture)
    if cfg is None:
        raise ConfigError(f"timm has no weights for {architecture!r}: train it from scratch, without pretrained")
    return {
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "size": list(cfg.input_size[1:]),
        "interpolation": cfg.interpolation,
        "crop_pct": cfg.crop_pct,
    }


def existing_preprocessing(
    teacher: EarlyExitWrapper | None, teacher_args: TeacherArguments, student_args: StudentArguments | None = None
) -> dict[str, Any] | None:
    """Returns the preprocessing of the weights that training starts from; None where everything starts from scratch."""
    if teacher is not None:
        return teacher.config.preprocessing
    if teacher_args.teacher_pretrained:
        return pretrained_preprocessing(teacher_args.teacher_architecture)
    if student_args is not None and student_args.student_pretrained:
        return pretrained_preprocessing(student_args.student_architecture)
    return None


def check_architecture(name: str) -> None:
    """Raises :class:`ConfigError` with the nearest name if timm knows no such network."""
    if not timm.is_model(name.split(".")[0]):
        hint = nearest(name, timm.list_models())
        raise ConfigError(f"timm has no model {name!r}{hint}; timm.list_models('*resnet*') lists names")


def build_model(
    architecture: str,
    data: ImageData,
    exits: ExitArguments,
    *,
    places: list[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    seed: int = 0,
) -> EarlyExitWrapper:
    """Builds a timm network for the classes of the data and gives it exits.

    Args:
        architecture: timm name; ``resnet10_cifar`` and its siblings among them.
        data: For the number and names of the classes and the preprocessing.
        exits: Head, policy, threshold.
        places: Where the exits sit; those of ``exits`` if None.
        kwargs: Further creation arguments of the network.
        pretrained: Start from timm's weights.
        seed: Of new weights.

    Raises:
        ConfigError: No such network, an argument that it does not take, or weights that cannot be had.
        ExitPointError, ThresholdError: See :class:`~erde_hub.EarlyExitWrapper`.
    """
    check_architecture(architecture)
    kwargs = dict(kwargs or {})
    reserved = {"num_classes", "pretrained", "checkpoint_path"} & kwargs.keys()
    if reserved:
        raise ConfigError(f"{min(reserved)!r} cannot be a creation argument of {architecture!r}: the recipe sets it")
    torch.manual_seed(seed)
    try:
        backbone = timm.create_model(architecture, pretrained=pretrained, num_classes=data.num_classes, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{architecture!r} cannot be created with {kwargs}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the weights of {architecture!r} cannot be had: {reason}; without them: pretrained false"
        ) from error
    model = EarlyExitWrapper(
        backbone,
        exits=exit_places(places or exits.exits),
        head=exits.head,
        head_kwargs=exits.head_kwargs,
        policy=exits.policy,
        policy_kwargs=exits.policy_kwargs,
        threshold=exits.stored_threshold(),
        input_size=data.input_size,
        backbone_kwargs=kwargs,
        id2label=data.class_names,
    )
    model.set_preprocessing(
        mean=data.mean, std=data.std, size=data.input_size[1:], interpolation=data.interpolation, crop_pct=data.crop_pct
    )
    return model


def load_model(name: str, **overrides: Any) -> EarlyExitWrapper:
    """Loads a checkpoint from a folder or the Hub.

    Args:
        name: Folder or Hub repository.
        **overrides: Fields of the config to change, ``threshold`` for example.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name!r} holds no checkpoint: a finished run leaves config.json and model.safetensors in its folder"
        )
    try:
        return EarlyExitWrapper.from_pretrained(str(folder) if folder.is_dir() else name, **overrides)
    except (OSError, ValueError) as error:
        if isinstance(error, ErdeError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name!r} cannot be loaded as an early-exit model: {reason}") from error


def stored_split(model: str, data: ImageData) -> str | None:
    """Returns the file with the held-out rows of the run that trained a model, if it was trained on these data."""
    if data.plan is None:
        return None
    try:
        path = cached_file(
            model,
            SPLIT_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None
    if path is None:
        return None
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    return path if stored.get("fingerprint") == data.fingerprint else None


def finished(folder: Path) -> dict[str, Any] | None:
    """Returns the results of a run whose report is complete; it is the last file that a run writes."""
    if not all((folder / name).is_file() for name in ("results.json", "config.json", "model.safetensors")):
        return None
    try:
        return load_results(folder / "results.json")
    except ResultsError:
        return None


def train_network(
    run: Run,
    folder: Path,
    model: EarlyExitWrapper,
    loss: ExitLoss,
    teacher: nn.Module | None = None,
    args: DistillationArguments | None = None,
) -> TrainResult:
    """Trains a model in a folder that belongs to the run, from its newest checkpoint if the run is resumed.

    Raises:
        Interrupted: A signal came; what was trained is saved.
    """
    args = args or run.args
    checkpoint = run_on_main(run.accelerator, lambda: find_checkpoint(folder)) if args.resume else None
    own = dataclasses.replace(
        args, output_dir=str(folder), resume=checkpoint is not None, overwrite_output_dir=checkpoint is None
    )
    result = Distiller(model, run.data, own, loss, teacher=teacher, accelerator=run.accelerator).train()
    if result.status == "interrupted":
        raise Interrupted(f"stopped at step {result.step} of {result.total_steps}; --resume continues")
    return result


def collect(run: Run, model: EarlyExitWrapper, split: str, batch_size: int = 256) -> ExitRecords:
    """Runs every exit over a split, shared among the processes, in float32."""
    loader = BatchLoader(
        getattr(run.data, split),
        batch_size,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        channels_last=run.args.channels_last,
        num_workers=run.args.num_workers,
    )
    info = {"dataset": run.data.name, "fingerprint": run.data.fingerprint, "split": split}
    model.to(run.accelerator.device)
    return collect_exit_records(model, loader, progress=False, accelerator=run.accelerator, info=info)


def choose_default_threshold(records: ExitRecords, policy: ExitPolicy, max_drop: float = MAX_ACCURACY_DROP) -> float:
    """Returns the threshold that a checkpoint stores where the user names none.

    Thresholds are tried from the dearest (nobody leaves) to the cheapest. The last one is taken before the loss of
    accuracy against the full model, plus its standard error over the samples, exceeds ``max_drop``. The standard error
    and stopping at the first that fails keep luck on a small split out; it remains a rule of thumb without a guarantee.

    Args:
        records: Of the validation split; never of the data that are reported.
        policy: The policy that will route.
        max_drop: Accuracy that may be lost, as a fraction.
    """
    early = records.num_exits - 1
    if not policy.uses_threshold or not early:
        return policy.default_threshold
    scores, right = exit_scores(records, policy), records.logits.argmax(-1) == records.labels
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    candidates = []
    for threshold in {*step_thresholds(policy, early), *fine_thresholds(records, policy)}:
        index = exit_indices(scores, policy, policy.check_threshold(threshold, early))
        lost = right[-1].double() - right.gather(0, index.unsqueeze(0))[0].double()
        bound = lost.mean() + lost.std(unbiased=False) / len(lost) ** 0.5
        candidates.append((macs[index].mean().item(), bound.item(), threshold))
    candidates.sort(reverse=True)
    chosen = candidates[0][2]
    for _, bound, threshold in candidates:
        if bound > max_drop:
            break
        chosen = threshold
    return float(chosen)


def report(
    run: Run,
    folder: Path,
    model: EarlyExitWrapper,
    exits: ExitArguments,
    loss: tuple[str, ExitLoss],
    result: TrainResult,
    *,
    teacher: EarlyExitWrapper | None = None,
    static: Mapping[str, Any] | None = None,
    args: DistillationArguments | None = None,
) -> dict[str, Any]:
    """Measures a trained model, stores its threshold, and writes the checkpoint and everything that describes it.

    The threshold is chosen on validation, everything that is reported comes from test. ``results.json`` is written
    last, so that a report that was cut off is made again.

    Args:
        run: Data, arguments, processes.
        folder: Where the files go.
        model: The trained model.
        exits: The threshold that the user asked for, if any.
        loss: Its key and the object.
        result: Of the training.
        teacher: Measured on the same test images.
        static: Part ``static_student`` of the results, see :func:`train_static_student`.
        args: Training arguments of this model; those of the run if None.

    Raises:
        CheckpointWriteError: A file cannot be written.
    """
    args = args or run.args
    choice: dict[str, Any] = {"rule": "given by the user"}
    if exits.threshold is None:
        validation = collect(run, model, "validation")
        model.threshold = choose_default_threshold(validation, model.policy)
        choice = {"rule": THRESHOLD_RULE, "split": "validation", "samples": validation.num_samples}
    records = collect(run, model, "test")
    teacher_records = None if teacher is None else collect(run, teacher, "test")

    def write() -> dict[str, Any]:
        results = build_results(
            records,
            model,
            run.data,
            run.settings,
            teacher=teacher,
            teacher_records=teacher_records,
            teacher_exits=result.teacher_exits,
            loss={"name": loss[0], **loss[1].settings()},
            training=_training_facts(result, args, run.accelerator),
        )
        results["threshold_choice"] = choice
        if static is not None:
            results["static_student"] = dict(static)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        if run.data.plan is not None:
            run.data.save_split(folder / SPLIT_FILE)
        write_report(results, folder)
        return results

    return run_on_main(run.accelerator, write)


def write_report(results: Mapping[str, Any], folder: Path, card: bool = True) -> None:
    """Writes sweep.csv, frontier.png, README.md (the model card) and, last, results.json.

    Raises:
        CheckpointWriteError: A file cannot be written.
    """
    rows = [*results["sweep"], *results.get("fine_sweep", [])]
    write_sweep_csv(rows, folder / "sweep.csv", [row["exit"] for row in results["per_exit"]])
    plot_frontier(results, folder / "frontier.png")
    if card:
        write_text(folder / "README.md", render_model_card(results))
    save_results(results, folder / "results.json")


@dataclass
class TeacherPlan:
    """A teacher that is to be trained, with everything checked: network, loss, arguments."""

    model: EarlyExitWrapper
    loss: ExitLoss
    args: DistillationArguments
    exits: ExitArguments

    @classmethod
    def build(
        cls, teacher_args: TeacherArguments, exits: ExitArguments, data: ImageData, args: DistillationArguments
    ) -> TeacherPlan:
        """Builds network and loss.

        Raises:
            ConfigError, ExitPointError, ThresholdError: Whatever does not go together.
        """
        own = teacher_training_arguments(args, teacher_args.teacher_training)
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
        check_together(model, None, data, loss, own)
        return cls(model, loss, own, exits)

    def train(self, run: Run, folder: Path) -> tuple[EarlyExitWrapper, dict[str, Any]]:
        """Trains the teacher and reports on it, or loads it where the run has done so before."""
        done = run_on_main(run.accelerator, lambda: finished(folder)) if run.args.resume else None
        if done is not None:
            return load_model(str(folder)), done
        result = train_network(run, folder, self.model, self.loss, args=self.args)
        results = report(run, folder, self.model, self.exits, ("ce", self.loss), result, args=self.args)
        return self.model, results


def build_student(
    student_args: StudentArguments, exits: ExitArguments, data: ImageData, args: DistillationArguments
) -> EarlyExitWrapper:
    """Builds the student; see :func:`build_model`."""
    return build_model(
        student_args.student_architecture,
        data,
        exits,
        kwargs=student_args.student_kwargs,
        pretrained=student_args.student_pretrained,
        seed=args.seed,
    )


def check_together(
    student: EarlyExitWrapper,
    teacher: EarlyExitWrapper | None,
    data: ImageData,
    loss: ExitLoss,
    args: DistillationArguments,
) -> None:
    """Finds out before any time is spent whether networks, data and loss go together.

    Raises:
        ConfigError: They do not; the message says which.
    """
    check_models(student, teacher, data)
    check_loss(loss, student, teacher, args)
    check_data(data)


def check_trainable(
    accelerator: Accelerator,
    student: EarlyExitWrapper,
    teacher: EarlyExitWrapper | None,
    data: ImageData,
    loss: ExitLoss,
    args: DistillationArguments,
) -> None:
    """Builds the Distiller that is going to train, so that whatever it refuses is refused before any time is spent.

    Raises:
        ConfigError: Networks, data, loss and settings do not go together; the message says which.
    """
    own = dataclasses.replace(args, output_dir=None, resume=False, overwrite_output_dir=False)
    Distiller(student, data, own, loss, teacher=teacher, accelerator=accelerator)


def train_static_student(run: Run, model: EarlyExitWrapper) -> dict[str, Any]:
    """Trains a network by its last exit alone, with cross-entropy and no teacher, and describes it.

    It is what the student would be without early exits: accuracy and cost are those of the bare backbone.
    """
    folder = run.folder / "static"
    description = folder / "static_student.json"
    if run.args.resume and description.is_file():
        return json.loads(description.read_text(encoding="utf-8"))
    loss = create_loss("ce", exit_weights=[*([0.0] * (model.num_exits - 1)), 1.0])
    result = train_network(run, folder, model, loss)
    last = per_exit_metrics(collect(run, model, "test"))[-1]
    backbone: nn.Module = model.backbone
    described = describe_model(model) | {
        "exits": [],
        "accuracy": last["accuracy"],
        "macs": trace(backbone, example_inputs(run.data.input_size, torch.float32)).total_macs,
        "params": sum(p.numel() for p in backbone.parameters()),
        "ece": last["ece"],
        "nll": last["nll"],
        "loss": "ce",
        "seconds": result.seconds,
    }
    run_on_main(run.accelerator, lambda: write_text(description, json.dumps(described)))
    return described


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
            few = "; few, so that more may be lost on other images than there" if how["samples"] < 1000 else ""
            tables.append(f"* stored threshold, chosen on {how['samples']:,} {how['split']} images{few}")
        elif point is not None:
            tables.append("* stored threshold")
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


def describe_network(role: str, model: EarlyExitWrapper) -> str:
    """One line that says what is about to be trained."""
    config, table = model.config, model.exit_table()
    kwargs = "".join(f", {key}={value}" for key, value in (config.backbone_kwargs or {}).items())
    costs = ", ".join(f"{row.exit} {mmacs(row.cumulative_macs)}" for row in table)
    return f"{role}: {config.architecture}{kwargs}; MMACs up to each exit: {costs}"


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


def _training_facts(result: TrainResult, args: DistillationArguments, accelerator: Accelerator) -> dict[str, Any]:
    last: Sequence[dict[str, Any]] = result.history[-1:]
    return {
        "epochs": last[0]["epoch"] if last else None,
        "steps": result.step,
        "batch_size": args.batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "cpu_threads": torch.get_num_threads(),
        "seconds": result.seconds,
    }
