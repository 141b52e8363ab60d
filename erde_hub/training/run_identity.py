"""What a resumed run must share with the run that it continues."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from erde_hub.errors import ConfigError
from erde_hub.fingerprint import model_fingerprint
from erde_hub.modeling.pretrained import EarlyExitPreTrainedModel

from .arguments import DistillationArguments

if TYPE_CHECKING:
    from accelerate import Accelerator

    from erde_hub.data.base import LabelledData
    from erde_hub.losses import ExitLoss

#: Fields of a config that say which network is trained.
_NETWORK = ("architecture", "backbone_kwargs", "problem_type", "exits", "head", "head_kwargs")


def describe_run(
    args: DistillationArguments,
    accelerator: Accelerator,
    loss: ExitLoss,
    data: LabelledData,
    student: nn.Module,
    teacher: nn.Module | None,
) -> dict[str, Any]:
    """Returns the settings, loss, data and networks of a run, as plain data."""
    resolved = {"mixed_precision": accelerator.mixed_precision, "augment": args.augment or data.augment}
    return {
        "args": args.resume_dict() | resolved,
        "processes": accelerator.num_processes,
        "loss": f"{type(loss).__name__}({loss.extra_repr()})",
        "data": data.fingerprint,
        "teacher": None if teacher is None else model_fingerprint(teacher),
        "student": _describe_network(student),
    }


def _describe_network(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments that a network was made with; for a module without a config, its class."""
    if not isinstance(model, EarlyExitPreTrainedModel):
        return {"class": type(model).__name__}
    made = {name: getattr(model.config, name) for name in _NETWORK}
    return json.loads(json.dumps(made))  # as it is read back


def check_same_run(stored: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> None:
    """Compares what a checkpoint was trained with against what it is to be continued with.

    Raises:
        ConfigError: They differ; the message names the first setting, both values, and what to do.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(DistillationArguments)}
    for name, value in now["args"].items():
        before = stored["args"].get(name, defaults.get(name))
        if before != value:
            raise ConfigError(
                f"--resume with {name}={value!r}, but {checkpoint} was written with {name}={before!r}: continue with"
                f" --{name} {before}, or start a new run in another output_dir"
            )
    made, now_made = stored["student"], now["student"]
    for name in sorted(made.keys() | now_made.keys()):
        if made.get(name) != now_made.get(name):
            raise ConfigError(
                f"--resume with {name}={now_made.get(name)!r} of the network, but {checkpoint} was written with"
                f" {made.get(name)!r}: restore it or start a new run in another output_dir"
            )
    texts = {
        "processes": "number of processes",
        "loss": "loss",
        "data": "data (fingerprint)",
        "teacher": "teacher (hash of its weights)",
    }
    for name, text in texts.items():
        if stored[name] != now[name]:
            raise ConfigError(
                f"--resume with another {text}: {checkpoint} was written with {stored[name]}, now it is {now[name]};"
                " restore it or start a new run in another output_dir"
            )
