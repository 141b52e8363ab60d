"""Losses over exits: what trains a teacher, and what a student with exits learns from one."""

from __future__ import annotations

from typing import Any

from erde_hub._registry import Entry, Registry

from .base import ExitBatch, ExitLoss, LossResult, Term
from .ce import CELoss, ce_loss
from .erde import ERDELoss, erde_loss
from .exit_weights import exit_weights_preset, list_exit_weights_presets
from .kd import KDLoss, kd_loss
from .teacher_exits import map_teacher_exits

__all__ = [
    "CELoss",
    "ERDELoss",
    "ExitBatch",
    "ExitLoss",
    "KDLoss",
    "LossResult",
    "Term",
    "ce_loss",
    "create_loss",
    "erde_loss",
    "exit_weights_preset",
    "get_loss",
    "kd_loss",
    "list_exit_weights_presets",
    "list_losses",
    "map_teacher_exits",
    "register_loss",
]

_LOSSES: Registry[ExitLoss] = Registry("loss")
register_loss = _LOSSES.register

register_loss("ce", CELoss, "cross-entropy at every exit, without a teacher", "arXiv 1709.01686")
register_loss("kd", KDLoss, "Hinton's distillation on all samples at every exit", "arXiv 1503.02531")
register_loss(
    "erde", ERDELoss, "distils where the teacher is right, raises entropy where it is wrong", "arXiv 2510.04856"
)


def create_loss(name: str, **kwargs: Any) -> ExitLoss:
    """Builds a loss by name; an unknown name or argument raises :class:`erde_hub.errors.ConfigError`."""
    return _LOSSES.create(name, **kwargs)


def get_loss(name: str) -> Entry[ExitLoss]:
    """Returns the table entry of that name: class, summary, reference."""
    return _LOSSES.get(name)


def list_losses() -> list[str]:
    """Returns the names of all losses."""
    return _LOSSES.names()
