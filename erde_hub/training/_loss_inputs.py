"""What a loss reads in addition to logits and labels: the number of each sample, and the features of the exits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erde_hub.losses import EGADLoss, ExitLoss, FeatureTerm

from .exit_states import ExitStates
from .features import ExitFeatures
from .readout import ReadoutRounds

logger = logging.getLogger(__name__)


class LossInputs:
    """Collects the arguments of a loss, and renews and synchronises what the loss itself learns.

    Args:
        loss: The loss.
        student: The student; a loss that compares features needs its early exits.
        teacher: The teacher, if there is one.
        teacher_exits: For each student exit the teacher exit that it learns from.
        seed: Of the loss's own weights, which are the same in every process.
        rounds: What renews weights per training sample.

    Raises:
        ConfigError: The loss reads features and one of the models has no early exits of this library.
    """

    def __init__(
        self,
        loss: ExitLoss,
        student: nn.Module,
        teacher: nn.Module | None,
        teacher_exits: Sequence[int] | None,
        seed: int,
        rounds: Sequence[ReadoutRounds] = (),
    ) -> None:
        self.loss, self.rounds = loss, rounds
        self.features: list[ExitFeatures] = []
        if isinstance(loss, EGADLoss):  # it compares states that it is given anyway
            if loss.reads_features and teacher is not None and teacher_exits is not None:
                widths = ExitStates(teacher).widths
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    loss.build(ExitStates(student).widths, [widths[exit_] for exit_ in teacher_exits])
            return
        if not loss.reads_features or teacher is None or teacher_exits is None:
            return
        self.features = [ExitFeatures(student), ExitFeatures(teacher)]
        teacher_widths = [self.features[1].widths[exit_] for exit_ in teacher_exits]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for term in loss.extra_terms:
                if isinstance(term, FeatureTerm):
                    term.build(self.features[0].widths, teacher_widths)

    def check_epochs(self, epochs: int) -> None:
        """Warns where a training is too short for weights of samples to be renewed."""
        if self.rounds and epochs < 2:
            logger.warning(
                "'dedier' renews its weights between epochs, and this training has one epoch: all weights stay 1"
            )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Captures features as long as this lasts."""
        with ExitStack() as stack:
            for features in self.features:
                stack.enter_context(features.watching())
            yield

    def of(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the keyword arguments of the loss for the batch that both networks have just seen."""
        given: dict[str, Any] = {"index": batch.get("index")} if self.loss.reads_index else {}
        if self.features:
            given["student_features"], given["teacher_features"] = (features.take() for features in self.features)
        return given

    def end_epoch(self, student: nn.Module, epoch: int, epochs: int) -> dict[str, Any]:
        """Renews the weights of samples that are due; returns what belongs into the history."""
        found: dict[str, Any] = {}
        for rounds in self.rounds:
            summary = rounds.end_epoch(student, epoch, epochs)
            if summary is not None:
                found["readout"] = summary
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Returns the trained parameters of the loss."""
        return [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    def average_gradients(self, accelerator: Accelerator) -> None:
        """Averages the gradients of the loss's own parameters over the processes, as DDP does for the student's."""
        if accelerator.num_processes > 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
