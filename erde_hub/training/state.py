"""Where a training stands: its position, its history, and the sums of the current epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ._meter import StepMeter


@dataclass
class Position:
    """Where a training is. It is saved between two optimizer updates, so no gradient is half accumulated.

    Attributes:
        epoch: Epochs that are complete.
        batch: Batches of this process in the current epoch.
        step: Optimizer updates of the whole training.
        seconds: Time spent, earlier processes of a resumed run included.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0


@dataclass
class TrainingState:
    """What the loop changes from batch to batch, apart from weights and optimizer.

    Attributes:
        position: Where the training is.
        history: One entry per complete epoch (:class:`~erde_hub.training.TrainResult`).
        meter: Loss, terms and accuracy of the current epoch.
    """

    position: Position = field(default_factory=Position)
    history: list[dict[str, Any]] = field(default_factory=list)
    meter: StepMeter = field(default_factory=StepMeter)
