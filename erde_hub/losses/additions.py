"""What can join a loss: weights of its samples, and further terms.

A pair of methods needs no class of its own. ``create_loss("erde").add(create_addition("ea_kd"))`` is ERDE whose
divergence is weighed per sample as by EA-KD: ERDE's mask decides where its divergence applies, the weight how much a
sample counts there. Further terms have masks of their own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.tasks import refuse_regression

if TYPE_CHECKING:
    from .batch import ExitBatch, Term


class Extensible(Protocol):
    """What an addition asks of the loss that it joins; every :class:`~erde_hub.losses.ExitLoss` has it."""

    task: ClassVar[str]

    @property
    def reads_teacher(self) -> bool:
        """Whether calls take teacher logits."""

    def additions(self) -> list[Addition]:
        """Returns what has joined already."""

    def distillation_terms(self) -> tuple[str, ...]:
        """Returns the names of the terms that imitate the teacher."""


class Addition(nn.Module):
    """Joins a loss by :meth:`ExitLoss.add`. Subclasses store each constructor argument under its own name.

    An addition may have state in buffers and trained parameters; both travel with the loss, never with the student.
    """

    #: Key in the log and in the table.
    name: ClassVar[str]
    #: What it carries from batch to batch, in words for the table.
    state: ClassVar[str] = ""
    #: Reads the teacher's logits.
    needs_teacher: ClassVar[bool] = False
    #: Reads the stable index of each sample, once it has something to look up.
    needs_index: ClassVar[bool] = False
    #: Reads the features of exits.
    needs_features: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def check(self, loss: Extensible) -> None:
        """Refuses a loss that this cannot join.

        Raises:
            ConfigError: The message says why.
        """
        refuse_regression(loss.task, repr(self.name))
        if any(other.name == self.name for other in loss.additions()):
            raise ConfigError(f"{type(loss).__name__} has {self.name!r} already: twice would count it twice")
        if self.needs_teacher and not loss.reads_teacher:
            raise ConfigError(
                f"{self.name!r} reads the teacher's answers and {type(loss).__name__} has no teacher: choose a loss"
                " that learns from one, such as 'kd' or 'erde'"
            )

    def check_exits(self, num_exits: int) -> None:
        """Refuses a student with too few exits, where that matters.

        Raises:
            ConfigError: The message says how many are needed.
        """

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments by name, as plain data."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class SampleWeight(Addition):
    """One detached factor per sample (and exit) for the distillation terms of a loss.

    It multiplies what the loss names in :meth:`ExitLoss.distillation_terms`: terms that imitate the teacher. Terms on
    labels and on entropy stay as they are.
    """

    def weights(self, batch: ExitBatch) -> Tensor:
        """Returns the factors of one batch, (E, N) or (N,), finite and at least 0."""
        raise NotImplementedError

    def targets(self, loss: Extensible) -> tuple[str, ...]:
        """Returns the names of the terms that are multiplied."""
        return loss.distillation_terms()

    def check(self, loss: Extensible) -> None:
        """Refuses losses without a term that imitates the teacher."""
        if not loss.distillation_terms():
            raise ConfigError(
                f"{self.name!r} weighs the samples of a distillation term, and {type(loss).__name__} has none"
                " (its weight may be 0): choose a loss with one, such as 'kd' or 'erde' with kl_weight above 0"
            )
        super().check(loss)


class ExtraTerm(Addition):
    """Further terms of a loss."""

    def terms(self, batch: ExitBatch) -> list[Term]:
        """Returns the terms of one batch; their names differ from those of the loss."""
        raise NotImplementedError

    def distillation_terms(self) -> tuple[str, ...]:
        """Returns which of the terms imitate the teacher, so that a :class:`SampleWeight` applies to them."""
        return ()


def check_addition(addition: object) -> None:
    """Refuses what no loss could take in.

    Raises:
        InputTypeError: Neither a :class:`SampleWeight` nor an :class:`ExtraTerm`.
        ConfigError: Its class has no name.
    """
    if not isinstance(addition, (SampleWeight, ExtraTerm)):
        raise InputTypeError(f"add() takes weights of samples and further terms (create_addition), got {addition!r}")
    if not isinstance(getattr(addition, "name", None), str):
        kind = type(addition).__name__
        raise ConfigError(f'{kind} has no name: give the class one, its key in the log, as in name = "{kind.lower()}"')
