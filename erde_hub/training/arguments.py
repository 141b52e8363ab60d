"""Everything a training run is told, as one dataclass that is also the command line of the recipes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

import timm.scheduler
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from timm.optim import get_optimizer_info, list_optimizers

from erde_hub.data.augment import get_augmentation
from erde_hub.errors import ConfigError, InputTypeError, nearest, unknown_argument, unknown_name

T = TypeVar("T")

PRECISIONS = ("no", "bf16", "fp16")

#: Fields that may differ when a run is resumed: none of them changes what is computed. The number of threads changes
#: the order of sums, and so the last bits.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "resume",
        "overwrite_output_dir",
        "checkpoint_steps",
        "keep_checkpoints",
        "logging_steps",
        "report_to",
        "progress_bar",
        "cpu_threads",
        "num_workers",
    }
)

#: Fields that say where and how this one process runs; they are left out of what is published.
_PRIVATE = frozenset({"output_dir", "resume", "overwrite_output_dir", "progress_bar"})

#: What other trainers call some of the fields, for messages.
OTHER_NAMES = {
    "amp": "mixed_precision",
    "bf16": "mixed_precision",
    "clip_grad": "max_grad_norm",
    "dataloader_num_workers": "num_workers",
    "fp16": "mixed_precision",
    "label_smoothing_factor": "label_smoothing",
    "learning_rate": "lr",
    "lr_scheduler_type": "scheduler",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "opt": "optimizer",
    "optim": "optimizer",
    "per_device_train_batch_size": "batch_size",
    "save_steps": "checkpoint_steps",
    "save_total_limit": "keep_checkpoints",
    "sched": "scheduler",
    "smoothing": "label_smoothing",
    "warmup_ratio": "warmup",
}


def list_schedulers() -> list[str]:
    """Returns the names that ``scheduler`` takes: ``onecycle`` first, then those of the installed timm."""
    names = ["onecycle", "constant", "cosine", "multistep", "poly", "step", "tanh"]
    return names + (["rsqrt", "wsd"] if hasattr(timm.scheduler, "WSDLRScheduler") else [])


def nearest_argument(name: str, allowed: Collection[str]) -> str:
    """Returns ``"; did you mean 'lr'?"`` for the argument that is meant, by another trainer's name or by spelling."""
    known = OTHER_NAMES.get(name)
    return f"; did you mean {known!r}?" if known in allowed else nearest(name, allowed)


def _refuse_unknown(cls: type[T]) -> type[T]:
    """Makes a dataclass raise a typed error that names the nearest argument in place of a bare TypeError."""
    init = cls.__init__
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                raise unknown_argument(cls.__name__, name, names, nearest_argument(name, names))
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_refuse_unknown
@dataclass
class DistillationArguments:
    """Arguments of the :class:`~erde_hub.training.Distiller`; every field is a flag of the training recipes.

    Raises:
        ConfigError: A value is out of range, a name is not in its table, or two settings contradict each other.
        InputTypeError: A value has the wrong type.
    """

    epochs: int = field(default=10, metadata={"help": "passes over the training split"})
    batch_size: int = field(
        default=128,
        metadata={"help": "samples per forward pass and process; two processes of 64 train like one of 128"},
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "forward passes per optimizer step; the step then sees that many batches"}
    )
    max_steps: int = field(
        default=0, metadata={"help": "optimizer steps after which training and its schedule end, 0: all epochs"}
    )
    lr: float = field(
        default=0.2, metadata={"help": "highest learning rate of the schedule; not scaled by batch size or processes"}
    )
    optimizer: str = field(
        default="sgd",
        metadata={
            "help": "a name of timm's create_optimizer_v2 ('sgd' is SGD with Nesterov momentum; 'adamw', 'lamb', ...)"
        },
    )
    momentum: float = field(default=0.9, metadata={"help": "momentum of optimizers that have one, 0 to 1"})
    weight_decay: float = field(
        default=5e-4, metadata={"help": "weight decay; biases and norm layers get none, as in timm"}
    )
    scheduler: str = field(
        default="onecycle",
        metadata={"help": "'onecycle', or a name of timm's create_scheduler_v2: " + ", ".join(list_schedulers()[1:])},
    )
    warmup: float = field(
        default=0.3, metadata={"help": "fraction of all updates, 0 to 1, during which the learning rate rises"}
    )
    warmup_lr: float = field(default=1e-5, metadata={"help": "learning rate of the first step of timm's schedulers"})
    min_lr: float = field(default=0.0, metadata={"help": "lowest learning rate of timm's schedulers that decay to one"})
    decay_rate: float = field(
        default=0.1, metadata={"help": "factor per decay of 'step' and 'multistep'; power of 'poly'"}
    )
    decay_epochs: float = field(default=30.0, metadata={"help": "epochs between two decays of 'step'"})
    decay_milestones: list[float] = field(
        default_factory=lambda: [0.5, 0.75], metadata={"help": "fractions of all updates at which 'multistep' decays"}
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "gradients are scaled down to at most this Euclidean norm, 0: never"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "probability mass, 0 to 1, spread over the classes in the loss's cross-entropy"}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "moving average of the weights, 0 to 1 (0: off), with timm's warm-up; validated and handed out"
            " instead of the trained weights"
        },
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, bf16 or fp16 (GPU only); default: what accelerate launch was told, otherwise no"},
    )
    channels_last: bool = field(
        default=False,
        metadata={"help": "store images and convolutions as NHWC, which most CPUs and GPUs compute faster"},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass: less memory, more time"}
    )
    layer_dropout: float = field(
        default=0.0,
        metadata={
            "help": "language models: probability, 0 to 1, that a text skips the last layer; it grows from 0 at the"
            " first layer, as in LayerSkip (arXiv 2404.16710)"
        },
    )
    rotate_exits: int = field(
        default=0,
        metadata={
            "help": "train every n-th early exit and the last one at a step, in turn, as in LayerSkip; 0: all of them"
        },
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "train the exits only; the backbone's norm layers stay in eval mode"}
    )
    augment: str | None = field(
        default=None,
        metadata={
            "help": "augmentation of the training images, 'none' or e.g. crop_flip; default: what suits the data"
        },
    )
    num_workers: int = field(
        default=0, metadata={"help": "processes that load large images; small ones are decoded once into memory"}
    )
    seed: int = field(default=0, metadata={"help": "seed of order, augmentation, dropout and of new weights"})
    cpu_threads: int = field(
        default=0, metadata={"help": "CPU threads per process, 0: cores of this machine / its processes"}
    )
    find_unused_parameters: bool = field(
        default=False, metadata={"help": "several processes: the backbone has weights that no exit's output depends on"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the run: checkpoints while it trains, results at the end"}
    )
    checkpoint_steps: int = field(
        default=0, metadata={"help": "optimizer steps between two checkpoints, 0: at the end of each epoch only"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of the newest checkpoints are kept"})
    resume: bool = field(default=False, metadata={"help": "continue the newest complete checkpoint of the run"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "start anew in an output_dir that already holds a run, deleting that run"}
    )
    report_to: str | None = field(
        default=None,
        metadata={"help": "a tracker that Accelerate knows (tensorboard, wandb, trackio, ...); default: none"},
    )
    logging_steps: int = field(default=10, metadata={"help": "optimizer steps between two lines in the tracker"})
    progress_bar: bool = field(default=True, metadata={"help": "show a progress bar on the main process"})

    def __post_init__(self) -> None:
        """Checks every field alone, then those that depend on each other."""
        self._check_types()
        self._check_ranges()
        self._check_names()
        if self.resume and self.overwrite_output_dir:
            raise ConfigError("resume and overwrite_output_dir contradict each other: choose one")
        if self.scheduler == "multistep" and not self.decay_milestones:
            raise ConfigError("scheduler 'multistep' needs decay_milestones, e.g. 0.5 0.75")

    def public_dict(self) -> dict[str, Any]:
        """Returns the settings that may be published: no path, nothing of this machine."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _PRIVATE}

    def resume_dict(self) -> dict[str, Any]:
        """Returns the settings that a resumed run must share with the run that it continues."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in FREE_ON_RESUME}

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                setattr(self, name, float(value))
            elif kind == list[float]:
                if not isinstance(value, (list, tuple)) or not all(_is_number(v) for v in value):
                    raise InputTypeError(f"{name} must be a list of numbers, got {value!r}")
                setattr(self, name, [float(v) for v in value])
            elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
                raise InputTypeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")

    def _check_ranges(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "logging_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "cpu_threads", "checkpoint_steps", "num_workers", "rotate_exits"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in [0, 2**32), got {self.seed}")
        for name in ("weight_decay", "warmup_lr", "min_lr", "decay_rate", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be finite and 0 or more, got {getattr(self, name)}")
        for name in ("lr", "decay_epochs"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        for name in ("momentum", "warmup", "label_smoothing", "ema_decay", "layer_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if any(not 0 < fraction < 1 for fraction in self.decay_milestones):
            raise ConfigError(f"decay_milestones are fractions of all updates in (0, 1), got {self.decay_milestones}")
        if self.output_dir is not None and not self.output_dir.strip():
            raise ConfigError("output_dir is empty; leave it out to train without checkpoints")

    def _check_names(self) -> None:
        get_augmentation(self.augment)
        if self.mixed_precision is not None and self.mixed_precision not in PRECISIONS:
            raise unknown_name("mixed_precision", self.mixed_precision, PRECISIONS)
        if self.scheduler not in list_schedulers():
            raise unknown_name("scheduler", self.scheduler, list_schedulers())
        optimizers = list_optimizers()
        name = self.optimizer.lower().removeprefix("lookahead_")
        if name not in optimizers:
            raise unknown_name("optimizer", self.optimizer, optimizers)
        if get_optimizer_info(name).second_order:
            raise ConfigError(f"optimizer {self.optimizer!r} needs second derivatives, which the loop does not compute")
        if self.report_to is not None and self.report_to not in ("all", *map(str, LOGGER_TYPE_TO_CLASS)):
            raise unknown_name("report_to", self.report_to, ["all", *map(str, LOGGER_TYPE_TO_CLASS)])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
