"""Exit policies: when is a sample sure enough to leave."""

from __future__ import annotations

from typing import Any

from erde_hub._registry import Entry, Registry

from .base import ExitPolicy, LearnedPolicy, plain_threshold
from .confidence import ConfidencePolicy, MarginPolicy
from .constant import AlwaysPolicy, NeverPolicy
from .eefp import EEFPPolicy
from .eenet import EENetPolicy
from .entropy import EntropyPolicy
from .patience import PatiencePolicy
from .set_size import SetSizePolicy

__all__ = [
    "AlwaysPolicy",
    "ConfidencePolicy",
    "EEFPPolicy",
    "EENetPolicy",
    "EntropyPolicy",
    "ExitPolicy",
    "LearnedPolicy",
    "MarginPolicy",
    "NeverPolicy",
    "PatiencePolicy",
    "SetSizePolicy",
    "create_policy",
    "get_policy",
    "list_policies",
    "plain_threshold",
    "policy_name",
    "register_policy",
]

_POLICIES: Registry[ExitPolicy] = Registry("policy")
register_policy = _POLICIES.register

register_policy("entropy", EntropyPolicy, "softmax entropy below the threshold (nats)", "arXiv 1709.01686, 2510.04856")
register_policy("confidence", ConfidencePolicy, "largest probability at or above the threshold", "arXiv 1703.09844")
register_policy("margin", MarginPolicy, "best minus second probability at or above the threshold")
register_policy("patience", PatiencePolicy, "k consecutive exits agree with the one before", "arXiv 2006.04152")
register_policy("eefp", EEFPPolicy, "fitted gate: right here, or wrong for ever", "arXiv 2508.21495")
register_policy("eenet", EENetPolicy, "fitted scores under a budget", "arXiv 2301.07099")
register_policy(
    "set_size", SetSizePolicy, "fewer classes than the threshold in the conformal sets so far", "arXiv 2006.02544"
)
register_policy("never", NeverPolicy, "runs to the last exit")
register_policy("always", AlwaysPolicy, "leaves at the first exit")


def create_policy(name: str, **kwargs: Any) -> ExitPolicy:
    """Builds a policy by name; an unknown name or argument raises :class:`erde_hub.errors.ConfigError`."""
    return _POLICIES.create(name, **kwargs)


def get_policy(name: str) -> Entry[ExitPolicy]:
    """Returns the table entry of that name: class, summary, reference."""
    return _POLICIES.get(name)


def policy_name(policy: ExitPolicy) -> str:
    """Returns the name of a policy in the table; the class name for one that is not in it."""
    names = [entry.name for entry in _POLICIES.entries() if entry.cls is type(policy)]
    return names[0] if names else type(policy).__name__


def list_policies() -> list[str]:
    """Returns the names of all policies."""
    return _POLICIES.names()
