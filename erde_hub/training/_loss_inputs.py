"""What a loss reads beside logits and labels: the number of each sample, and the features that exits read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erde_hub.losses import ExitLoss, FeatureTerm, ReadoutWeight

from .features import ExitFeatures
from .readout import ReadoutRounds

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .distiller import Distiller

logger = logging.getLogger(__name__)


class LossInputs:
    """Hands a loss what it asks for, and looks after parameters that it has.

    Args:
        loss: What trains.
        student: The student; a loss that compares features needs its early exits.
        teacher: The teacher, if there is one.
        teacher_exits: For each student exit the teacher exit that it learns from.
        train: The training split, for weights that are looked up.
        seed: Of the loss's own weights: the same in every process.

    Raises:
        ConfigError: The loss reads features and one of the two has no exits of ours; it keeps a weight per sample and
            the training set is a stream.
    """

    def __init__(
        self,
        loss: ExitLoss,
        student: nn.Module,
        teacher: nn.Module | None,
        teacher_exits: Sequence[int] | None,
        train: Any,
        seed: int,
    ) -> None:
        self.loss = loss
        self.rounds = [
            ReadoutRounds(weight, student, train) for weight in loss.sample_weights if isinstance(weight, ReadoutWeight)
        ]
        self.taps: list[ExitFeatures] = []
        if not loss.reads_features or teacher is None or teacher_exits is None:
            return
        self.taps = [ExitFeatures(student), ExitFeatures(teacher)]
        teacher_widths = [self.taps[1].widths[exit_] for exit_ in teacher_exits]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for term in loss.extra_terms:
                if isinstance(term, FeatureTerm):
                    term.build(self.taps[0].widths, teacher_widths)

    def check_epochs(self, epochs: int) -> None:
        """Says so where a training is too short for weights of samples to be renewed."""
        if self.rounds and epochs < 2:
            logger.warning(
                "'dedier' renews its weights between epochs, and this training has one epoch: all weights stay 1"
            )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps features as long as this lasts."""
        with ExitStack() as stack:
            for tap in self.taps:
                stack.enter_context(tap.watching())
            yield

    def of(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the further arguments of the loss for the batch that both networks have just seen."""
        given: dict[str, Any] = {"index": batch.get("index")} if self.loss.reads_index else {}
        if self.taps:
            given["student_features"], given["teacher_features"] = (tap.take() for tap in self.taps)
        return given

    def end_epoch(self, distiller: Distiller, record: dict[str, Any]) -> None:
        """Lets weights of samples be renewed; what came of it goes into the entry of the history."""
        for rounds in self.rounds:
            summary = rounds.end_epoch(distiller)
            if summary is not None:
                record["readout"] = summary

    def parameters(self) -> list[nn.Parameter]:
        """Returns what the loss itself learns."""
        return [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    def average_gradients(self, accelerator: Accelerator) -> None:
        """Averages the gradients of the loss's own parameters over the processes, as DDP does for the student's."""
        if accelerator.num_processes > 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
