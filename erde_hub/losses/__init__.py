"""Losses over exits: what trains a teacher, and what a student with exits learns from one."""

from __future__ import annotations

from typing import Any, Literal

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install
from erde_hub._registry import Registry

from .additions import Addition, ExtraTerm, SampleWeight
from .base import ExitLoss
from .batch import ExitBatch, LossResult, Term
from .ce import CELoss, ce_loss
from .dedier import DEDIERLoss, ReadoutWeight, dedier_loss, readout_weights
from .dkd import DKDLoss, dkd_loss
from .ea_kd import EAKDLoss, EntropyWeight, ea_kd_loss
from .egad import EGADLoss, egad_loss, next_token_labels
from .erde import ERDELoss, erde_loss
from .exit_weights import exit_weights_preset, list_exit_weights_presets
from .feature import FeatureKDLoss, FeatureTerm, feature_kd_loss
from .kd import KDLoss, kd_loss
from .mse import MSELoss, mse_loss
from .self_distillation import SelfDistillationLoss, SelfDistillationTerm, self_distillation_loss
from .teacher_exits import map_teacher_exits

__all__ = [
    "Addition",
    "CELoss",
    "DEDIERLoss",
    "DKDLoss",
    "EAKDLoss",
    "EGADLoss",
    "ERDELoss",
    "EntropyWeight",
    "ExitBatch",
    "ExitLoss",
    "ExtraTerm",
    "FeatureKDLoss",
    "FeatureTerm",
    "KDLoss",
    "LossKey",
    "LossResult",
    "MSELoss",
    "ReadoutWeight",
    "SampleWeight",
    "SelfDistillationLoss",
    "SelfDistillationTerm",
    "Term",
    "ce_loss",
    "create_addition",
    "create_loss",
    "dedier_loss",
    "dkd_loss",
    "ea_kd_loss",
    "egad_loss",
    "erde_loss",
    "exit_weights_preset",
    "feature_kd_loss",
    "get_addition",
    "get_loss",
    "kd_loss",
    "list_additions",
    "list_exit_weights_presets",
    "list_losses",
    "map_teacher_exits",
    "mse_loss",
    "next_token_labels",
    "readout_weights",
    "register_addition",
    "register_loss",
    "self_distillation_loss",
]

#: Keys of the table, so that editors complete ``loss=``; any other text is the key of a loss that you registered.
LossKey = Literal["ce", "kd", "erde", "ea_kd", "dedier", "dkd", "feature_kd", "self", "egad", "mse"] | str

_LOSSES: Registry[ExitLoss] = Registry("loss")
register_loss = _LOSSES.register
get_loss = _LOSSES.get
list_losses = _LOSSES.names


def create_loss(name: LossKey, *args: Any, **kwargs: Any) -> ExitLoss:
    """Builds a loss of the table.

    Raises:
        UnknownNameError: No such loss.
        ConfigError: An argument that it does not take.
    """
    return _LOSSES.create(name, *args, **kwargs)


register_loss("ce", CELoss, "cross-entropy at every exit, without a teacher", "arXiv 1709.01686")
register_loss("kd", KDLoss, "Hinton's distillation on all samples at every exit", "arXiv 1503.02531")
register_loss(
    "erde", ERDELoss, "distils where the teacher is right, raises entropy where it is wrong", "arXiv 2510.04856"
)
register_loss(
    "ea_kd",
    EAKDLoss,
    "distillation with weights per sample from the entropies of teacher and student",
    "arXiv 2311.13621",
)
register_loss(
    "dedier",
    DEDIERLoss,
    "distillation with more weight on what an early read-out gets confidently wrong",
    "arXiv 2310.18590",
)
register_loss(
    "dkd", DKDLoss, "distillation with separate terms for the target class and the other classes", "arXiv 2203.08679"
)
register_loss("feature_kd", FeatureKDLoss, "distillation of logits and of features", "arXiv 1412.6550")
register_loss("self", SelfDistillationLoss, "earlier exits learn from the last one, no teacher", "arXiv 1905.08094")
register_loss(
    "egad",
    EGADLoss,
    "token by token for causal language models, led by the teacher's entropy (experimental)",
    "arXiv 2605.01732",
)
register_loss("mse", MSELoss, "squared error at every exit of a regression, without a teacher", "arXiv 2311.05931")

_ADDITIONS: Registry[Addition] = Registry("addition")
register_addition = _ADDITIONS.register
create_addition = _ADDITIONS.create
get_addition = _ADDITIONS.get

register_addition("ea_kd", EntropyWeight, "weighs samples by the entropies of teacher and student", "arXiv 2311.13621")
register_addition(
    "dedier", ReadoutWeight, "weighs up what an early read-out gets wrong with confidence", "arXiv 2310.18590"
)
register_addition("feature", FeatureTerm, "distance between features of student and teacher", "arXiv 1412.6550")
register_addition("self", SelfDistillationTerm, "earlier exits learn from the student's last one", "arXiv 1905.08094")


def list_additions(kind: type[Addition] = Addition) -> list[str]:
    """Returns the names of all that can join a loss, or of one kind (:class:`SampleWeight`, :class:`ExtraTerm`)."""
    return [entry.name for entry in _ADDITIONS.entries() if issubclass(entry.cls, kind)]
