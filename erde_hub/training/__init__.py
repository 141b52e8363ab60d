"""Training: data, arguments, and one loop for teachers, students and static students."""

from __future__ import annotations

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install

from ._launch import create_accelerator, run_on_main
from ._setup import adopt_data
from .arguments import DistillationArguments
from .distiller import Distiller, DistillerCallback, TrainResult
from .features import ExitFeatures
from .run_folder import open_run_folder
from .trainer import EarlyExitTrainer, all_exits_loss

__all__ = [
    "DistillationArguments",
    "Distiller",
    "DistillerCallback",
    "EarlyExitTrainer",
    "ExitFeatures",
    "TrainResult",
    "adopt_data",
    "all_exits_loss",
    "create_accelerator",
    "open_run_folder",
    "run_on_main",
]
