"""Exit policies: when is a sample confident enough to exit."""

from __future__ import annotations

from typing import Any, Literal

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install
from erde_hub._registry import Registry
from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.tasks import REGRESSION, refuse_regression

from .base import ExitPolicy, LearnedPolicy, check_no_early_exit, plain_threshold
from .confidence import ConfidencePolicy, MarginPolicy
from .constant import AlwaysPolicy, NeverPolicy
from .eefp import EEFPPolicy
from .eenet import EENetPolicy
from .entropy import EntropyPolicy
from .interval_width import IntervalWidthPolicy
from .patience import PatiencePolicy
from .set_size import SetSizePolicy

__all__ = [
    "AlwaysPolicy",
    "ConfidencePolicy",
    "EEFPPolicy",
    "EENetPolicy",
    "EntropyPolicy",
    "ExitPolicy",
    "IntervalWidthPolicy",
    "LearnedPolicy",
    "MarginPolicy",
    "NeverPolicy",
    "PatiencePolicy",
    "PolicyKey",
    "SetSizePolicy",
    "as_policy",
    "check_answers",
    "check_no_early_exit",
    "create_policy",
    "get_policy",
    "get_regression_policy",
    "list_policies",
    "list_regression_policies",
    "plain_threshold",
    "policy_for",
    "policy_name",
    "register_policy",
    "register_regression_policy",
]

#: Keys of the table, so that editors complete ``policy=``; any other text is the key of a policy that you registered.
PolicyKey = Literal["entropy", "confidence", "margin", "patience", "eefp", "eenet", "set_size", "never", "always"] | str

_POLICIES: Registry[ExitPolicy] = Registry("policy")
register_policy = _POLICIES.register
get_policy = _POLICIES.get
list_policies = _POLICIES.names


def create_policy(name: PolicyKey, *args: Any, **kwargs: Any) -> ExitPolicy:
    """Builds a policy of the table.

    Raises:
        UnknownNameError: No such policy.
        ConfigError: An argument that it does not take.
    """
    return _POLICIES.create(name, *args, **kwargs)


register_policy("entropy", EntropyPolicy, "softmax entropy below the threshold (nats)", "arXiv 1709.01686, 2510.04856")
register_policy("confidence", ConfidencePolicy, "largest probability at or above the threshold", "arXiv 1703.09844")
register_policy("margin", MarginPolicy, "best minus second probability at or above the threshold")
register_policy(
    "patience", PatiencePolicy, "k consecutive exits repeat the answer of the exit before", "arXiv 2006.04152"
)
register_policy("eefp", EEFPPolicy, "fitted gate: right here, or wrong at every later exit too", "arXiv 2508.21495")
register_policy("eenet", EENetPolicy, "fitted scores under a budget", "arXiv 2301.07099")
register_policy(
    "set_size",
    SetSizePolicy,
    "fewer classes than the threshold in the intersection of the conformal sets so far",
    "arXiv 2006.02544",
)
register_policy("never", NeverPolicy, "runs to the last exit")
register_policy("always", AlwaysPolicy, "takes the first exit")


_REGRESSION_POLICIES: Registry[ExitPolicy] = Registry("regression policy")
register_regression_policy = _REGRESSION_POLICIES.register
get_regression_policy = _REGRESSION_POLICIES.get
list_regression_policies = _REGRESSION_POLICIES.names

register_regression_policy("never", NeverPolicy, "runs to the last exit")
register_regression_policy(
    "set_size", IntervalWidthPolicy, "nested interval narrower than the threshold", "arXiv 2311.05931"
)


def as_policy(policy: PolicyKey | ExitPolicy) -> ExitPolicy:
    """Returns a policy as it is, and builds one that is named by its key in the table.

    Raises:
        UnknownNameError: There is no policy of that name.
        InputTypeError: Neither a name nor a policy.
    """
    if isinstance(policy, ExitPolicy):
        return policy
    if isinstance(policy, str):
        return create_policy(policy)
    made = f"; write {policy.__name__}()" if isinstance(policy, type) else ""
    raise InputTypeError(f"policy must be a name, such as 'entropy', or an ExitPolicy, got {policy!r:.80}{made}")


def policy_for(problem_type: str | None, name: str, **kwargs: Any) -> ExitPolicy:
    """Builds a policy for a model of classes, or of real numbers, by its name in the table for these.

    Raises:
        ConfigError: An unknown name or argument, or a policy that reads class probabilities for a regression.
    """
    if problem_type != REGRESSION:
        return create_policy(name, **kwargs)
    _refuse_probabilities(name)
    return _REGRESSION_POLICIES.create(name, **kwargs)


def check_answers(problem_type: str | None, policy: ExitPolicy) -> None:
    """Checks that a policy is in the table for what a model predicts, classes or real numbers.

    Raises:
        UnknownNameError: A class that is in no table, which no checkpoint could name.
        ConfigError: A policy for the other kind.
    """
    name, regression = policy_name(policy), problem_type == REGRESSION
    if regression:
        _refuse_probabilities(name)
    expected = (get_regression_policy if regression else get_policy)(name).cls
    if expected is not type(policy):
        outputs = "real numbers" if regression else "classes"
        raise ConfigError(
            f"{type(policy).__name__} is not for models that predict {outputs}: fit {expected.__name__} instead"
        )


def _refuse_probabilities(name: str) -> None:
    allowed = list_regression_policies()
    if name not in allowed and name in list_policies():
        refuse_regression(REGRESSION, f"policy {name!r}", f"use {' or '.join(map(repr, allowed))}")


def policy_name(policy: ExitPolicy) -> str:
    """Returns the name of a policy in its table; the class name for one that is in none."""
    entries = (*_POLICIES.entries(), *_REGRESSION_POLICIES.entries())
    return next((entry.name for entry in entries if entry.cls is type(policy)), type(policy).__name__)
