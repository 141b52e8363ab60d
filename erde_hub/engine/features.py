"""Parts of a model that are fitted on records after training: its calibrator and its policy, and how they see a pass.

What an exit's last linear layer reads is shown to a calibrator by a hook on that layer. As with exits, all state
belongs to the pass: the hook finds it through a context variable and does nothing outside a wrapper's call.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from erde_hub.calibration import Calibrator, calibrator_name
from erde_hub.errors import ConfigError, InputTypeError, ShapeError
from erde_hub.policies import ExitPolicy, IntervalWidthPolicy, check_answers, policy_name
from erde_hub.tasks import refuse_regression

if TYPE_CHECKING:
    from erde_hub.modeling.wrapper import EarlyExitWrapper

_captured: contextvars.ContextVar[dict[int, Tensor] | None] = contextvars.ContextVar("erde_hub_features", default=None)


class FeatureHook:
    """Hook before an exit's last linear layer; a plain object that copies and pickles with the layer."""

    def __init__(self, exit_index: int) -> None:
        self.exit_index = exit_index

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Stores what the layer reads, if a pass wants it."""
        features = _captured.get()
        if features is not None:
            features[self.exit_index] = args[0].detach()


class CalibratedExits:
    """A calibrator during one pass: its state, for the samples that are still there.

    Args:
        calibrator: Fitted.
    """

    def __init__(self, calibrator: Calibrator) -> None:
        self.calibrator = calibrator
        self.features: dict[int, Tensor] = {}
        self.state: list[Tensor] = []

    def watching(self) -> AbstractContextManager[None]:
        """Collects features while the backbone runs."""
        return _collecting(self.features)

    def __call__(self, exit_index: int, logits: Tensor) -> Tensor:
        """Calibrates the logits of the samples that are still there."""
        return self.calibrator(exit_index, logits, self.features.pop(exit_index, None), self.state)

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the samples."""
        self.state = [values.index_select(0, rows) for values in self.state]


@contextlib.contextmanager
def _collecting(features: dict[int, Tensor]) -> Iterator[None]:
    token = _captured.set(features)
    try:
        yield
    finally:
        _captured.reset(token)


def watching(policy: ExitPolicy, calibration: CalibratedExits | None) -> AbstractContextManager[None] | None:
    """Returns what collects features during a routed pass, None where nobody reads them."""
    if calibration is not None:
        return calibration.watching()
    return _collecting({}) if policy.uses_features else None


def read_evidence(policy: ExitPolicy, exit_index: int) -> Tensor:
    """Returns what a policy that reads features makes of those that an exit has just read."""
    features = _captured.get()
    if features is None or exit_index not in features:
        raise ConfigError(
            f"{type(policy).__name__} saw nothing of what exit {exit_index} reads: give it to the model with"
            " model.set_policy(...)"
        )
    return policy.evidence(exit_index, features.pop(exit_index))


def last_linears(model: Any) -> dict[str, nn.Linear]:
    """Finds the last linear layer of each exit, by exit name.

    Raises:
        ConfigError: An exit ends in none.
    """
    layers: dict[str, nn.Linear] = {}
    classifier = getattr(model.backbone, "get_classifier", lambda: None)()  # timm; elsewhere the last one is meant
    last = classifier if isinstance(classifier, nn.Linear) else model.backbone
    for name, module in zip(model.exit_names, (*model.heads, last), strict=True):
        linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ConfigError(f"features are wanted, but exit {name!r} ends in no linear layer")
        layers[name] = linear[-1]
    return layers


def watch_features(model: EarlyExitWrapper) -> None:
    """Puts hooks on the last linear layers where calibrator or policy read features, and takes earlier ones off."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, FeatureHook)]:
            del module._forward_pre_hooks[key]
    if model.policy.uses_features or (model.calibrator is not None and model.calibrator.uses_features):
        for index, layer in enumerate(last_linears(model).values()):
            layer.register_forward_pre_hook(FeatureHook(index))


def set_calibrator(model: EarlyExitWrapper, calibrator: Calibrator | None) -> None:
    """See :meth:`EarlyExitWrapper.set_calibrator`."""
    if calibrator is None:
        model.calibrator, model.config.calibrator, model.config.calibrator_kwargs = None, None, {}
    else:
        name = calibrator_name(calibrator) if isinstance(calibrator, Calibrator) else None
        if name is None:
            raise InputTypeError(
                f"a calibrator of the table is needed (erde_hub.calibration.list_calibrators()), got"
                f" {type(calibrator).__name__}: register a class of your own with register_calibrator"
            )
        if model.config.task != "classification":
            raise ConfigError(f"calibrators are for classification, this model's task is {model.config.task!r}")
        refuse_regression(model.config.problem_type, type(calibrator).__name__)
        calibrator.check_exits(model.num_exits)
        model.config.calibrator, model.config.calibrator_kwargs = name, calibrator.settings()
        model.calibrator = calibrator.to(model.device).eval()
    model.config.threshold_profile = None  # chosen on other probabilities
    watch_features(model)


def set_policy(model: EarlyExitWrapper, policy: ExitPolicy, threshold: Any = None) -> None:
    """See :meth:`EarlyExitWrapper.set_policy`."""
    if not isinstance(policy, ExitPolicy):
        raise InputTypeError(f"a policy is needed, got {type(policy).__name__}: create_policy(name) makes one")
    check_policy(model, policy)
    name = policy_name(policy)
    value = policy.default_threshold if threshold is None else threshold
    policy.check_threshold(value, len(model.heads))
    model.policy = policy.to(model.device)
    model.policy.train(model.training)
    model.config.policy, model.config.policy_kwargs = name, policy.settings()
    watch_features(model)
    model.threshold = value


def check_policy(model: EarlyExitWrapper, policy: ExitPolicy) -> None:
    """Checks that a policy is one for the model's answers, classes or real numbers, and for its exits.

    Raises:
        UnknownNameError: A class that is not in the table, which no checkpoint could name.
        ConfigError: A policy for the other kind of answers.
        ShapeError: Fitted for other exits.
    """
    check_answers(model.config.problem_type, policy)
    if isinstance(policy, IntervalWidthPolicy):
        sizes = [layer.in_features for layer in last_linears(model).values()]
        if (policy.feature_sizes, policy.num_targets) != (sizes, model.config.num_labels):
            raise ShapeError(
                f"{type(policy).__name__} was fitted for features {policy.feature_sizes} and {policy.num_targets}"
                f" targets, the exits have {sizes} and {model.config.num_labels}: fit it on records of this model"
            )
