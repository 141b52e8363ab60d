"""The training loop: teacher, distilled student and static student, on one process or many.

Read :meth:`Distiller.train` first: prepare, forward, backward, clip, step, moving average, log, checkpoint. Everything
that the processes share goes through Accelerate, so the same lines run on a CPU, on GPUs, and under FSDP or DeepSpeed
(the last two are written for, and not tested).
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from erde_hub.data.loader import network_inputs
from erde_hub.data.tokens import TokenData
from erde_hub.errors import CheckpointWriteError, ConfigError, NonFiniteLossError
from erde_hub.evaluation.signatures import FEW, collapse_signature, teacher_signature, untrained_signature
from erde_hub.losses import CELoss, EGADLoss, ExitLoss, LossKey, LossResult, create_loss, next_token_labels
from erde_hub.tasks import REGRESSION

from ._checks import all_exits, check_data, check_finite, check_kinds, check_loss, check_models, exit_names, has_targets
from ._launch import (
    LOGS,
    StopRequest,
    create_accelerator,
    gather,
    is_sharded,
    lost_process_named,
    run_on_main,
    share_buffers,
)
from ._loss_inputs import LossInputs
from ._meter import Totals, describe_non_finite
from ._progress import flatten, progress_bar, show
from ._setup import adopt_data, count_steps, create_loader, create_optimizer, place_models, teacher_normalization
from .arguments import DistillationArguments
from .checkpointing import CHECKPOINTS, load_checkpoint, save_checkpoint
from .exit_states import ExitStates
from .layerskip import check_layers, enabled_exits, layer_dropout
from .readout import readout_rounds
from .run_folder import check_run_folder, warn_from_start
from .run_identity import describe_run
from .schedules import create_schedule
from .state import TrainingState

if TYPE_CHECKING:
    from erde_hub.data.base import LabelledData

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """Result of a training.

    Attributes:
        status: ``"completed"``, or ``"interrupted"`` by a signal: a checkpoint was written, and the weights are not
            final.
        step: Optimizer steps done, of ``total_steps``.
        history: One entry per epoch: loss, terms and accuracy per exit in training, accuracy and NLL per exit on the
            validation split, learning rate, seconds.
        teacher_exits: For each student exit the index of the teacher exit it learnt from; None without a teacher.
        checkpoint: Newest checkpoint, None without an ``output_dir``.
        seconds: Time spent, earlier processes of a resumed run included.
        stopped_by: What interrupted the training: a signal's name, or words.
    """

    status: Literal["completed", "interrupted"]
    step: int
    total_steps: int
    exit_names: list[str]
    history: list[dict[str, Any]] = field(default_factory=list)
    teacher_exits: list[int] | None = None
    checkpoint: Path | None = None
    seconds: float = 0.0
    stopped_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the path, as plain data for ``results.json``."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "checkpoint"}


class DistillerCallback:
    """Hooks into the loop, for what neither a loss nor an argument covers. Both do nothing here."""

    def on_step_end(self, distiller: Distiller) -> None:
        """Called after every optimizer step, on every process."""

    def on_epoch_end(self, distiller: Distiller, record: dict[str, Any]) -> None:
        """Called after the validation of every epoch with the new entry of the history, on every process."""


class Distiller:
    """Trains a model with exits from labels, and from a teacher if there is one.

    The student is trained in place and left in eval mode, with the averaged weights if ``ema_decay`` is set. Its config
    takes the preprocessing and the class names of the data. The teacher runs in eval mode, without gradients,
    unwrapped, in the same precision and on the same augmented batch, normalised with its own mean and std.
    The global random generators are seeded at the start (dropout draws from them).

    With several processes, each takes its contiguous part of a global batch (two of 64 see exactly what one of 128
    sees), and DDP averages the gradients. Batch-norm statistics are torch DDP's: every process normalises by its own
    part, and the running statistics that are validated and saved are those of rank 0.

    Args:
        student: An :class:`~erde_hub.EarlyExitWrapper`, or any module that maps images, or texts, to logits (one exit).
        data: Training and validation split (:func:`~erde_hub.data.images.load_image_data`,
            :func:`~erde_hub.data.texts.load_text_data`, for causal language models
            :func:`~erde_hub.data.tokens.load_token_data`).
        args: Everything else.
        loss: A loss or its key; ``"ce"`` with ``teacher=None`` trains a teacher or a static student, ``"mse"`` a model
            with ``problem_type="regression"`` on data whose labels are floats.
        teacher: The model that the loss learns from.
        accelerator: For scripts that train twice (:func:`~erde_hub.training.create_accelerator`); built if None.
        callbacks: Called in order.

    Raises:
        InputTypeError: Student or teacher is no module, or data, args or loss are something else than the above.
        ConfigError: Loss and teacher do not go together, teacher and student have different classes, the data do not
            fill one step, or a setting is not supported by the model, the device or the launcher.
        LabelError: A label outside the classes.
        RunExistsError: ``output_dir`` already holds a run.
        CheckpointWriteError: ``output_dir`` cannot be written.
        LaunchError: The launcher started processes that do not know each other.
    """

    def __init__(
        self,
        student: nn.Module,
        data: LabelledData,
        args: DistillationArguments,
        loss: ExitLoss | LossKey = "erde",
        teacher: nn.Module | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[DistillerCallback] = (),
    ) -> None:
        check_kinds(data, args, loss)
        self.student, self.teacher, self.data, self.args, self.callbacks = student, teacher, data, args, callbacks
        self.loss = create_loss(loss) if isinstance(loss, str) else loss
        self.augment = args.augment or data.augment
        self.exit_names = exit_names(student)
        self.accelerator = accelerator = accelerator or create_accelerator(args)
        if args.mixed_precision not in (None, accelerator.mixed_precision):
            raise ConfigError(
                f"mixed_precision is {args.mixed_precision!r}, the accelerator was built with"
                f" {accelerator.mixed_precision!r}"
            )
        check_models(student, teacher, data)
        check_data(data)
        if args.layer_dropout:
            check_layers(student)
        self.teacher_exits = check_loss(
            self.loss, student, teacher, args.label_smoothing, has_targets(data), tokens=isinstance(data, TokenData)
        )
        self.tokens = isinstance(data, TokenData)
        self.student_states = ExitStates(student)
        self.teacher_states = None if teacher is None else ExitStates(teacher)
        rounds = readout_rounds(self.loss, student, data, args, accelerator)
        self.loss_inputs = LossInputs(self.loss, student, teacher, self.teacher_exits, args.seed, rounds)
        place_models(student, teacher, self.loss, args, accelerator.device)
        adopt_data(student, data)
        self.teacher_normalization = teacher_normalization(teacher, data.preprocessing)
        self.train_loader = create_loader(data.train, args, accelerator, train=True, augment=self.augment)
        self.steps_per_epoch, self.total_steps, self.epochs = count_steps(
            self.train_loader.num_batches, data.name, args
        )
        own = self.loss_inputs.parameters()
        self.sharded = is_sharded(accelerator)
        if self.tokens and self.sharded:
            raise ConfigError("language models are not trained under FSDP and DeepSpeed: use several processes")
        if own and self.sharded:
            raise ConfigError(f"{type(self.loss).__name__} has parameters, which FSDP and DeepSpeed do not share")
        self.optimizer: Any = create_optimizer(student, own, args)
        self.scheduler = create_schedule(args, self.optimizer, self.total_steps, self.steps_per_epoch)
        self.average: ModelEmaV3 | None = None
        self.state = TrainingState()
        self.position, self.history, self.meter = self.state.position, self.state.history, self.state.meter
        self.checkpoint: Path | None = None
        if args.output_dir is not None:
            self.run_identity = describe_run(args, accelerator, self.loss, data, student, teacher)
            run_on_main(accelerator, self._claim_output_dir)
        elif args.resume:
            raise ConfigError("resume needs the output_dir of the run to continue")

    def train(self) -> TrainResult:
        """Trains until the last step, or until somebody asks to stop, and returns what came of it.

        Raises:
            NonFiniteLossError: The loss became NaN or infinite; the message names step, term and exit.
            CheckpointWriteError: A checkpoint could not be written; the one before is intact.
            ConfigError: The run to resume was started with other settings, data or teacher.
            LaunchError: Another process of the run has ended.
        """
        with lost_process_named():
            return self._train()

    def _train(self) -> TrainResult:
        args, accelerator, position = self.args, self.accelerator, self.position
        self.loss_inputs.check_epochs(self.epochs)
        with self._prepared() as student, self._hooks(), StopRequest() as stop, self._bar() as bar:
            started = time.perf_counter() - position.seconds
            while position.step < self.total_steps and position.epoch < self.epochs:
                self.loss.set_epoch(position.epoch + 1, self.epochs)
                self.train_loader.set_epoch(position.epoch, first_batch=position.batch)
                student.train()
                for batch in islice(self.train_loader, self._batches_left()):
                    with accelerator.accumulate(student):
                        result, logits = self.training_step(student, batch)
                        self.meter.add(position.step + 1, result, logits, batch["labels"])
                        if accelerator.sync_gradients:
                            stopping = self._check_step(bool(stop))
                            if args.max_grad_norm:
                                accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm)
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                    position.batch += 1
                    if not accelerator.sync_gradients:
                        continue

                    position.step += 1
                    position.seconds = time.perf_counter() - started
                    self.scheduler.step_update(position.step)
                    if self.average is not None:
                        self.average.update(self.student, step=position.step)
                    self._log_step(bar)
                    for callback in self.callbacks:
                        callback.on_step_end(self)
                    if stopping and position.step < self.total_steps:
                        self._save()
                        bar.close()  # so that the next message starts on a new line
                        return self._result("interrupted", stop.reason)
                    if args.checkpoint_steps and position.step % args.checkpoint_steps == 0 and self._batches_left():
                        self._save()
                self._finish_epoch()
                position.seconds = time.perf_counter() - started
                self._save()
            stopping = self._check_step(bool(stop), now=True)  # asked for after the last step: in its validation, say
            if self.average is not None:
                self.student.load_state_dict(self.average.module.state_dict())
                self.average = None
        self.student.eval()
        if stopping and self.checkpoint is not None:
            return self._result("interrupted", stop.reason)
        return self._result("completed")

    def training_step(self, student: nn.Module, batch: dict[str, Tensor]) -> tuple[LossResult, Sequence[Tensor]]:
        """Runs forward and backward on one batch and returns the loss and the student's logits per exit.

        The logits of tokens are not kept: none are returned for a language model.
        """
        if self.args.rotate_exits:
            self.loss.enable_exits(enabled_exits(self.position.step, len(self.exit_names), self.args.rotate_exits))
        if self.tokens:
            return self._token_step(student, batch), ()
        accelerator = self.accelerator
        inputs = network_inputs(batch, accelerator.device)
        labels = batch["labels"] = batch["labels"].to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            teacher_logits = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = all_exits(self.teacher, self._teacher_inputs(inputs))
            logits = all_exits(student, inputs)
        result = self.loss(logits, teacher_logits, labels, **self.loss_inputs.of(batch))
        accelerator.backward(result.loss)
        if accelerator.sync_gradients:
            self.loss_inputs.average_gradients(accelerator)
        return result, logits

    def _token_step(self, student: nn.Module, batch: dict[str, Tensor]) -> LossResult:
        """The same for a causal language model, whose loss computes logits a few tokens at a time."""
        accelerator = self.accelerator
        inputs = network_inputs(batch, accelerator.device)
        labels = next_token_labels(batch["labels"].to(accelerator.device)).flatten()
        if isinstance(self.loss, EGADLoss):
            self.loss.set_progress(self.position.step / max(1, self.total_steps - 1))
        with accelerator.autocast():
            teacher = None
            if self.teacher is not None and self.teacher_states is not None:
                with torch.no_grad():
                    teacher = self.teacher_states.run(self.teacher, inputs)
            result = self.loss.over_tokens(self.student_states.run(student, inputs), teacher, labels)
        accelerator.backward(result.loss)
        if accelerator.sync_gradients:
            self.loss_inputs.average_gradients(accelerator)
        return result

    def _teacher_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.teacher_normalization is None:
            return inputs
        return {**inputs, "pixel_values": self.teacher_normalization(inputs["pixel_values"])}

    @torch.no_grad()
    def evaluate(self, split: Any = None) -> dict[str, Any]:
        """Returns accuracy and mean NLL per exit on a split (the validation split), of the averaged weights if any.

        Of a regression: the mean absolute and the mean squared error, ``mae`` and ``mse``. Of a language model also
        ``perplexity``, exp of the mean NLL per token.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        model: nn.Module = self.student if self.average is None else self.average.module
        if self.sharded:
            model = self._wrapped
        else:
            share_buffers(model, accelerator)
        model.eval()
        precision = torch.float32 if device.type == "mps" else torch.float64
        split = self.data.validation if split is None else split
        sums = torch.zeros(3, len(self.exit_names), dtype=precision, device=device)
        for batch in create_loader(split, self.args, accelerator, train=False):
            labels = batch["labels"].to(device)
            if not len(labels):  # the last global batch may have fewer rows than there are processes
                continue
            if self.tokens:
                sums += self._evaluate_tokens(model, network_inputs(batch, device), labels)
                continue
            with accelerator.autocast():
                logits = torch.stack(list(all_exits(model, network_inputs(batch, device)))).float()
            if self.loss.task == REGRESSION:
                errors = logits - labels.view_as(logits[0])
                sums[0] += errors.abs().mean(-1).sum(1)
                sums[1] += errors.square().mean(-1).sum(1)
            else:
                sums[0] += (logits.argmax(-1) == labels).sum(1)
                sums[1] += F.cross_entropy(
                    logits.permute(1, 2, 0), labels[:, None].expand(-1, len(logits)), reduction="none"
                ).sum(0)
            sums[2] += len(labels)
        first, second, count = accelerator.reduce(sums, "sum")
        names = ("mae", "mse") if self.loss.task == REGRESSION else ("accuracy", "nll")
        found = {names[0]: (first / count).tolist(), names[1]: (second / count).tolist()}
        return found | ({"perplexity": (second / count).exp().tolist()} if self.tokens else {})

    def _evaluate_tokens(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Returns correct tokens, sum of the NLL and number of tokens, (3, E)."""
        with self.accelerator.autocast():
            logits = ExitStates(model).run(model, inputs)
            result = CELoss().eval().over_tokens(logits, None, next_token_labels(labels).flatten())
        count = torch.full_like(result.exit_terms["ce"], result.tokens or 0)
        return torch.stack([torch.as_tensor(result.correct), result.exit_terms["ce"] * count, count])

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """What is hooked into the models while they are trained."""
        with self.loss_inputs.watching(), layer_dropout(self.student, self.args.layer_dropout):
            yield

    def _bar(self) -> tqdm[Any]:
        shown = self.args.progress_bar and self.accelerator.is_main_process
        return progress_bar(self.position, self.total_steps, self.epochs, shown)

    def _batches_left(self) -> int:
        """Batches that are still to come in this epoch."""
        accumulation, position = self.args.gradient_accumulation_steps, self.position
        in_epoch = self.steps_per_epoch * accumulation - position.batch
        return min(in_epoch, (self.total_steps - position.step) * accumulation)

    def _claim_output_dir(self) -> None:
        args, folder = self.args, Path(str(self.args.output_dir))
        check_run_folder(folder, resume=args.resume, overwrite=args.overwrite_output_dir)
        if args.overwrite_output_dir:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        try:  # before the first checkpoint: a run that is killed by then can be told from a folder that holds none
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointWriteError(f"output_dir {str(folder)!r} cannot be written: {error}") from error

    @contextmanager
    def _prepared(self) -> Iterator[nn.Module]:
        """Hands student and optimizer to Accelerate, starts or resumes, and gives the student back as it was."""
        args, accelerator, optimizer = self.args, self.accelerator, self.optimizer
        if args.ema_decay and self.sharded:
            raise ConfigError("ema_decay is not supported under FSDP and DeepSpeed: set it to 0")
        if args.ema_decay:
            self.average = ModelEmaV3(self.student, decay=args.ema_decay, use_warmup=True)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch_size
        accelerator.gradient_accumulation_steps, accelerator.step = args.gradient_accumulation_steps, 0
        own_forward = self.student.__dict__.get("forward")
        try:
            self._wrapped, self.optimizer = accelerator.prepare(self.student, optimizer)
            if args.report_to:
                accelerator.project_configuration.logging_dir = str(Path(args.output_dir or ".") / LOGS)
                accelerator.init_trackers("erde_hub", config=flatten(args.public_dict()))
            set_seed(args.seed, device_specific=True)
            if args.resume:
                self._resume(str(args.output_dir))
            yield self._wrapped
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers = []
            # For mixed precision Accelerate patches `forward`, and its unwrapping leaves a bound method in the module
            accelerator.unwrap_model(self.student, keep_fp32_wrapper=False)
            self.student.__dict__.pop("forward", None)
            if own_forward is not None:
                self.student.forward = own_forward
            self.optimizer = optimizer
            accelerator.free_memory()

    def _modules_to_save(self) -> dict[str, nn.Module]:
        """Returns what a checkpoint holds in addition to student, optimizer and scaler."""
        modules: dict[str, nn.Module] = {} if self.average is None else {"average": self.average.module}
        return modules | ({"loss": self.loss} if self.loss.state_dict() else {})

    def _resume(self, output_dir: str) -> None:
        root = Path(output_dir) / CHECKPOINTS
        self.checkpoint = load_checkpoint(
            self.accelerator, root, self.state, self._modules_to_save(), self.run_identity
        )
        if self.checkpoint is None and self.accelerator.is_main_process:
            warn_from_start(output_dir)

    def _log_step(self, bar: tqdm[Any]) -> None:
        step = self.position.step
        if step % self.args.logging_steps == 0 or step == self.total_steps:
            values = self.meter.collect().average()
            show(bar, f"epoch {self.position.epoch + 1}/{self.epochs}", values)
            self._track({"train": values, "lr": self.optimizer.param_groups[0]["lr"]})
        bar.update()

    def _track(self, values: dict[str, Any]) -> None:
        if self.accelerator.trackers:
            self.accelerator.log(flatten(values, self.exit_names), step=self.position.step)

    def _finish_epoch(self) -> None:
        """Validates, writes the epoch into the history and moves the position to the next one."""
        self._check_step(now=True)
        self.student.zero_grad()  # a stream may end within a step, whose gradients no checkpoint would hold
        self.meter.collect()
        totals = Totals()
        for part in gather(self.accelerator, self.meter.epoch):
            totals.add(part)
        record = {
            "epoch": self.position.epoch + 1,
            "step": self.position.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train": totals.average(),
            "validation": self.evaluate(),
            "seconds": self.position.seconds,
        }
        student = self._wrapped if self.sharded else self.student
        record |= self.loss_inputs.end_epoch(student, self.position.epoch, self.epochs)
        self.history.append(record)
        if self.accelerator.is_main_process:
            for signature in filter(None, self._signatures(record)):
                logger.warning(signature)
        self._track({"validation": record["validation"], "epoch": record["epoch"]})
        for callback in self.callbacks:
            callback.on_epoch_end(self, record)
        self.meter.restart()
        self.position.epoch += 1
        self.position.batch = self.accelerator.step = 0

    def _signatures(self, record: dict[str, Any]) -> Iterator[str | None]:
        """What says after the first epoch that the teacher cannot teach, and after the last that an exit has failed."""
        correct = record["train"]["terms"].get("teacher_right")
        if self.position.epoch == 0 and correct is not None and not self.tokens:
            yield teacher_signature(correct)
        if self.data.streamed or self.tokens or has_targets(self.data):
            return
        labels, accuracies = self.data.validation.labels, record["validation"]["accuracy"]
        if len(labels) < FEW:
            return
        largest = labels.bincount().max().item() / len(labels)
        if self.position.epoch == 0 and self.args.freeze_backbone:
            yield untrained_signature(accuracies[-1], largest)
        if self.position.step == self.total_steps:
            for name, accuracy in zip(self.exit_names[:-1], accuracies, strict=False):
                yield collapse_signature(name, accuracy, largest)

    def _save(self) -> None:
        args = self.args
        if args.output_dir is None:
            return
        self._check_step(now=True)
        self.meter.collect()
        if not self.sharded:
            run_on_main(self.accelerator, lambda: check_finite(self.student, self.position.step))
        root = Path(args.output_dir) / CHECKPOINTS
        self.checkpoint = save_checkpoint(
            self.accelerator, root, self.state, self._modules_to_save(), self.run_identity, args.keep_checkpoints
        )

    def _check_step(self, stop: bool = False, now: bool = False) -> bool:
        """Raises before a step that would spoil the weights; tells whether any process was asked to stop after it.

        All processes must leave the loop at the same step, so they agree here. A GPU is asked for its losses at the
        logging cadence and before a checkpoint only, since asking waits for it.
        """
        accelerator, step = self.accelerator, self.position.step + 1
        due = now or accelerator.device.type == "cpu" or step == self.total_steps or step % self.args.logging_steps == 0
        several = accelerator.num_processes > 1
        if not due:
            return stop and not several
        bad = self.meter.first_bad_batch()
        message = describe_non_finite(*bad, self.exit_names) if bad else None
        if several:
            flags = torch.tensor([float(stop), float(bad is not None)], device=accelerator.device)
            stop, any_bad = (accelerator.reduce(flags, "sum") > 0).tolist()
            if any_bad:
                message = next(text for text in gather(accelerator, message) if text)
        if message is not None:
            kept = f"; the last good checkpoint is {self.checkpoint.name}" if self.checkpoint else ""
            raise NonFiniteLossError(f"{message}{kept}. Try a lower lr, max_grad_norm, or mixed_precision 'no'")
        return stop

    def _result(self, status: Literal["completed", "interrupted"], stopped_by: str | None = None) -> TrainResult:
        if stopped_by and self.accelerator.is_main_process:
            kept = f"saved as {self.checkpoint}" if self.checkpoint else "not saved: no output_dir"
            logger.warning("stopped at step %d (%s), %s", self.position.step, stopped_by, kept)
        return TrainResult(
            status=status,
            step=self.position.step,
            total_steps=self.total_steps,
            exit_names=self.exit_names,
            history=self.history,
            teacher_exits=self.teacher_exits,
            checkpoint=self.checkpoint,
            seconds=self.position.seconds,
            stopped_by=stopped_by,
        )
