"""A run and its phases: data, checks, training that resumes, recorded exits."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from erde_hub.data.base import LabelledData
from erde_hub.data.groups import read_groups
from erde_hub.data.images import BatchLoader, load_image_data
from erde_hub.data.splits import StoredSplit
from erde_hub.data.texts import load_text_data
from erde_hub.data.tokens import BLOCK_SIZE, TokenData, load_token_data
from erde_hub.errors import ConfigError, DataError, ResultsError
from erde_hub.evaluation import ExitRecords, collect_exit_records, load_results
from erde_hub.losses import ExitLoss
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.preprocessing import check_preprocessing
from erde_hub.training._checks import check_data, check_models
from erde_hub.training._launch import run_on_main
from erde_hub.training.arguments import DistillationArguments
from erde_hub.training.distiller import Distiller, TrainResult
from erde_hub.training.run_folder import find_checkpoint, has_begun, warn_from_start

from .arguments import DataArguments
from .language_models import TokenExits, token_batches
from .messages import resume_command
from .resuming import check_finished
from .run_data import SPLIT_FILE, data_of_run, run_file


class Interrupted(Exception):  # noqa: N818 - not an error: a user stopped it
    """A signal ended the training, and a checkpoint was written; the message says how to go on.

    Args:
        message: One line for the terminal.
        stopped_by: :attr:`~erde_hub.training.TrainResult.stopped_by`.
    """

    def __init__(self, message: str, stopped_by: str | None = None) -> None:
        super().__init__(message)
        self.stopped_by = stopped_by

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells count: 130 for SIGINT; that of SIGTERM where no signal came here."""
        known = signal.Signals.__members__
        return 128 + known.get(str(self.stopped_by), signal.SIGTERM)


@dataclass
class Run:
    """What every phase of a script needs: processes, data, arguments.

    Attributes:
        accelerator: Of this process; teacher and student share it.
        data: All three splits.
        args: Training arguments; ``output_dir`` is the folder of the run.
        settings: All arguments, for ``results.json``.
        started: When it began, on the clock of :func:`time.perf_counter`.
        earlier: Seconds that earlier processes spent on what this one continues or takes over.
    """

    accelerator: Accelerator
    data: LabelledData
    args: DistillationArguments
    settings: dict[str, Any]
    started: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    @property
    def seconds(self) -> float:
        """Wall time of everything so far: data, trainings, measurements, those of earlier processes included."""
        return self.earlier + time.perf_counter() - self.started


def load_data(
    args: DataArguments,
    preprocessing: Mapping[str, Any] | None = None,
    split_file: str | Path | None = None,
    progress: bool = True,
) -> LabelledData:
    """Loads the data that the arguments name: texts where there is a tokenizer, images otherwise.

    Args:
        args: What the user requested.
        preprocessing: Of weights that exist already (a teacher's, timm's), as
            :func:`~erde_hub.scripts.common.existing_preprocessing` returns it; the data are then brought into that
            form. ``--image_size`` and ``--max_length`` win over its size.
        split_file: Held-out rows of an earlier run.
        progress: Show progress bars.

    Raises:
        DataError, LabelError, ConfigError: See :func:`~erde_hub.data.images.load_image_data` and
            :func:`~erde_hub.data.texts.load_text_data`; also an argument for data of the other kind.
    """
    texts = bool(preprocessing) and "tokenizer" in dict(preprocessing or {})
    if preprocessing is not None and "block_size" in preprocessing:
        given = preprocessing["tokenizer"]
        return load_token_data(
            args.dataset,
            given,
            block_size=args.block_size or preprocessing["block_size"] or BLOCK_SIZE,
            vocab_size=None if given else args.tokenizer_size,
            text_column=args.text_column,
            config_name=args.dataset_config,
            cache_dir=args.cache_dir,
            max_train_samples=args.max_train_samples,
            max_eval_samples=args.max_eval_samples,
        )
    for name in ("block_size", "tokenizer_size"):
        if getattr(args, name, None):
            raise ConfigError(f"{name}={getattr(args, name)!r} is for language models: leave it out")
    for name in ("image_column", "image_size", "streaming") if texts else ("text_column", "max_length"):
        if getattr(args, name):
            raise ConfigError(
                f"{name}={getattr(args, name)!r} is not for {'texts' if texts else 'images'}, which the network reads:"
                " leave it out, or choose another network"
            )
    if texts and preprocessing is not None:
        return load_text_data(
            args.dataset,
            preprocessing["tokenizer"],
            text_column=args.text_column,
            label_column=args.label_column,
            config_name=args.dataset_config,
            max_length=args.max_length or preprocessing.get("max_length"),
            cache_dir=args.cache_dir,
            max_train_samples=args.max_train_samples,
            max_eval_samples=args.max_eval_samples,
            split_file=split_file,
            progress=progress,
        )
    overrides: dict[str, Any] = {}
    if preprocessing:
        overrides = check_preprocessing(dict(preprocessing))
        overrides["input_size"] = (3, *overrides.pop("size"))
    if args.image_size is not None:
        overrides["input_size"] = args.image_size
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
        check_images=args.check_images,
        progress=progress,
        **overrides,
    )


def load_data_of(
    model: str,
    args: DataArguments,
    preprocessing: Mapping[str, Any] | None = None,
    split: str = "test",
    progress: bool = True,
) -> LabelledData:
    """Loads data for a model that was trained before, with the rows that its run held out if it was trained on these.

    Args:
        model: Folder or Hub repository of the model.
        args: What the user requested; without a data set it is the one that the model's run was trained on.
        preprocessing: See :func:`load_data`.
        split: The split that must hold no row the model was trained on.
        progress: Show progress bars.

    Raises:
        DataError: The model's run held rows out by their number, which streamed data do not have; no data set is named
            and the run's has changed since; and see :func:`~erde_hub.data.images.load_image_data`.
        ConfigError: No data set is named, and the run does not say which it was, or it was a folder.
        LabelError: See :func:`~erde_hub.data.images.load_image_data`.
    """
    args, trained_on = data_of_run(model, args)
    data = load_data(args, preprocessing, progress=progress)
    if trained_on is not None and not data.streamed and data.fingerprint != trained_on:
        raise DataError(
            f"{data.name!r} is not what {model!r} was trained on (fingerprint {data.fingerprint}, its report says"
            f" {trained_on}): it has changed since; give --dataset {args.dataset} to use it all the same"
        )
    path = run_file(model, SPLIT_FILE)
    if path is None:
        return data
    stored = StoredSplit.read(path)
    if not stored.belongs_to(data.fingerprint, data.prefix_hash, data.streamed):
        return data
    if data.streamed and not stored.streamed:
        if stored.info[split]["rule"] == data.split_info[split]["rule"] == "given":
            return data  # the data bring this split themselves, whatever became of the others
        raise DataError(
            f"the run of {model!r} loaded {data.name!r} and held out rows of {split} by their number, which streamed"
            " rows do not have: leave --streaming out"
        )
    return load_data(args, preprocessing, path, progress=False)


def groups_of(
    records: ExitRecords, data: LabelledData, columns: Sequence[str] | None, model: str, args: DataArguments
) -> tuple[Tensor, list[str]] | None:
    """Returns the group of each sample of the records and the names of the groups; None without ``--group_column``."""
    if not columns:
        return None
    args, _ = data_of_run(model, args)
    split = records.info.get("split", "test")
    where = str(args.dataset), args.dataset_config, args.cache_dir
    return read_groups(data, split, columns, records.index, *where)


def finished(folder: Path) -> dict[str, Any] | None:
    """Returns the results of a run whose report is complete; it is the last file that a run writes."""
    if not all((folder / name).is_file() for name in ("results.json", "config.json", "model.safetensors")):
        return None
    try:
        return load_results(folder / "results.json")
    except ResultsError:
        return None


def finished_before(run: Run, folder: Path, role: str = "student") -> dict[str, Any] | None:
    """Returns the results of a network that a resumed run finished before; None where there is something left to do.

    Raises:
        ConfigError: It was made with other settings or data than the run has now.
    """
    if not run.args.resume:
        return None

    def look() -> dict[str, Any] | None:
        results = finished(folder)
        if results is not None:
            check_finished(results, run.settings, run.data, role)
        return results

    return run_on_main(run.accelerator, look)


def check_measurable(model: EarlyExitWrapper, data: LabelledData) -> None:
    """Raises :class:`ConfigError` or :class:`LabelError` where a model and data do not go together."""
    check_models(model, None, data)
    check_data(data)


def check_trainable(
    accelerator: Accelerator,
    student: EarlyExitWrapper,
    teacher: EarlyExitWrapper | None,
    data: LabelledData,
    loss: ExitLoss,
    args: DistillationArguments,
) -> None:
    """Builds the Distiller that is going to train, so that whatever it refuses is refused before any time is spent.

    Raises:
        ConfigError: Networks, data, loss and settings do not go together; the message says which.
    """
    own = dataclasses.replace(args, output_dir=None, resume=False, overwrite_output_dir=False)
    Distiller(student, data, own, loss, teacher=teacher, accelerator=accelerator)


def train_network(
    run: Run,
    folder: Path,
    model: EarlyExitWrapper,
    loss: ExitLoss,
    teacher: nn.Module | None = None,
    args: DistillationArguments | None = None,
    role: str = "student",
) -> TrainResult:
    """Trains a model in a folder that belongs to the run, from its newest checkpoint if the run is resumed.

    Args:
        run: Data, arguments, processes.
        folder: Where the checkpoints go.
        model: Trained in place.
        loss: What it learns from.
        teacher: Whom it learns from.
        args: Training arguments of this model; those of the run if None.
        role: What messages call it.

    Raises:
        Interrupted: A signal came; what was trained is saved.
    """
    args, started = args or run.args, time.perf_counter()

    def find() -> Path | None:
        found = find_checkpoint(folder)
        if found is None and has_begun(folder):
            warn_from_start(folder)
        return found

    checkpoint = run_on_main(run.accelerator, find) if args.resume else None
    own = dataclasses.replace(
        args, output_dir=str(folder), resume=checkpoint is not None, overwrite_output_dir=checkpoint is None
    )
    result = Distiller(model, run.data, own, loss, teacher=teacher, accelerator=run.accelerator).train()
    if checkpoint is not None:
        run.earlier += max(0.0, result.seconds - (time.perf_counter() - started))
    if result.status == "interrupted":
        raise Interrupted(
            f"the training of the {role} is not finished ({result.step} of {result.total_steps} steps): continue with"
            f" {resume_command(run.folder)}",
            result.stopped_by,
        )
    return result


def collect(
    run: Run, model: EarlyExitWrapper, split: str, batch_size: int = 256, features: bool | None = None
) -> ExitRecords:
    """Runs every exit over a split, shared among the processes, in float32.

    Args:
        run: Data and processes.
        model: Whose exits.
        split: ``train``, ``validation`` or ``test``.
        batch_size: Samples per forward pass and process.
        features: Also record what the last layers read; None where the model's calibrator needs it.
    """
    if features is None:
        features = model.calibrator is not None and model.calibrator.uses_features
    loader = BatchLoader(
        getattr(run.data, split),
        batch_size,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        channels_last=run.args.channels_last,
        num_workers=run.args.num_workers,
    )
    info = {"dataset": run.data.name, "fingerprint": run.data.fingerprint, "split": split}
    source = run.data.split_info.get(split, {}).get("source")
    if source is not None:
        info["source"] = source
    model.to(run.accelerator.device)
    if isinstance(run.data, TokenData):
        loader.batch_size = min(8, batch_size)
        batches = token_batches(loader, run.data.vocab_size, model.num_exits)
        return collect_exit_records(TokenExits(model), batches, progress=False, accelerator=run.accelerator, info=info)
    seen = sys.stderr.isatty()  # a bar in a log file is noise
    return collect_exit_records(model, loader, features, progress=seen, accelerator=run.accelerator, info=info)
