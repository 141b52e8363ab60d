"""Hooks that pass the inputs of the exits' last linear layers to calibrators and policies.

As with exits, all state belongs to the pass: a hook finds it through a context variable and does nothing outside one.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from erde_hub.calibration import Calibrator
from erde_hub.errors import ConfigError
from erde_hub.policies import ExitPolicy

_captured: contextvars.ContextVar[dict[int, Tensor] | None] = contextvars.ContextVar("erde_hub_features", default=None)


class FeatureHook:
    """Pre-forward hook on an exit's last linear layer; a plain object that copies and pickles with the layer."""

    def __init__(self, exit_index: int) -> None:
        self.exit_index = exit_index

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Stores what the layer reads, if a pass captures features."""
        features = _captured.get()
        if features is not None:
            features[self.exit_index] = args[0].detach()


class CalibratedExits:
    """A calibrator during one pass: its state, for the active samples.

    Args:
        calibrator: Fitted.
    """

    def __init__(self, calibrator: Calibrator) -> None:
        self.calibrator = calibrator
        self.features: dict[int, Tensor] = {}
        self.state: list[Tensor] = []

    def __call__(self, exit_index: int, logits: Tensor) -> Tensor:
        """Calibrates the logits of the active samples."""
        return self.calibrator(exit_index, logits, self.features.pop(exit_index, None), self.state)

    def keep(self, rows: Tensor) -> None:
        """Keeps some of the samples."""
        self.state = [values.index_select(0, rows) for values in self.state]


@contextlib.contextmanager
def capture_features(features: dict[int, Tensor]) -> Iterator[None]:
    """Collects the inputs of the exits' last linear layers, by the index of the exit, while the context is open."""
    token = _captured.set(features)
    try:
        yield
    finally:
        _captured.reset(token)


def read_density_terms(policy: ExitPolicy, exit_index: int) -> Tensor:
    """Returns what a policy that reads features makes of those that an exit has just read."""
    features = _captured.get()
    if features is None or exit_index not in features:
        raise ConfigError(
            f"{type(policy).__name__} saw nothing of what exit {exit_index} reads: give it to the model with"
            " model.set_policy(...)"
        )
    return policy.density_terms(exit_index, features.pop(exit_index))


@contextlib.contextmanager
def capture_inputs(layers: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Tensor]]:
    """Collects what layers are called with, each under its key, while the context is open; the latest call counts."""
    seen: dict[Any, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for key, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
            stack.callback(handle.remove)
        yield seen


def last_linears(model: Any) -> dict[str, nn.Linear]:
    """Finds the last linear layer of each exit, by exit name: of the backbone the one that gives its logits.

    Raises:
        ConfigError: An exit ends in none.
    """
    layers: dict[str, nn.Linear] = {}
    for name, head in model.exits_and_heads():
        if head is None:
            layers[name] = model.runner.classifier_layer(model.config.input_size)
            continue
        linear = last_linear(head)
        if linear is None:
            raise ConfigError(f"features are wanted, but exit {name!r} ends in no linear layer")
        layers[name] = linear
    return layers


def last_linear(head: nn.Module) -> nn.Linear | None:
    """Returns the last linear layer of a head, None where it has none."""
    return next((m for m in reversed([*head.modules()]) if isinstance(m, nn.Linear)), None)


def place_feature_hooks(model: Any) -> None:
    """Puts hooks on the last linear layers where calibrator or policy read features, and takes earlier ones off."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, FeatureHook)]:
            del module._forward_pre_hooks[key]
    if model.policy.uses_features or (model.calibrator is not None and model.calibrator.uses_features):
        for index, layer in enumerate(last_linears(model).values()):
            layer.register_forward_pre_hook(FeatureHook(index))
