"""Training: data, arguments, and one loop for teachers, students and static students."""

from __future__ import annotations

from ._launch import create_accelerator, run_on_main
from .arguments import DistillationArguments
from .distiller import Distiller, DistillerCallback, TrainResult
from .run_folder import open_run_folder

__all__ = [
    "DistillationArguments",
    "Distiller",
    "DistillerCallback",
    "TrainResult",
    "create_accelerator",
    "open_run_folder",
    "run_on_main",
]
