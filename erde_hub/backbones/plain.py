"""Any other nn.Module that maps one batch of inputs to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from erde_hub.engine.stages import Stage
from erde_hub.errors import CheckpointError, ExitPointError
from erde_hub.heads import FeatureSpec

from .base import BackboneAdapter, find_feature
from .timm import staged_stages
from .tracing import StageCall, Trace

if TYPE_CHECKING:
    from erde_hub.config import EarlyExitConfig


class PlainAdapter(BackboneAdapter):
    """Follows torch's own convention for layouts: 4-D is NCHW, 3-D is tokens (N, L, C), 2-D is a vector."""

    library: ClassVar[str] = "torch"

    def matches(self, module: nn.Module) -> bool:
        """Takes everything that is left."""
        return True

    def describe(self, module: nn.Module) -> dict[str, Any]:
        """The class name, for the reader of the config."""
        return {"architecture": type(module).__qualname__, "input_size": None, "preprocessing": None}

    def build(self, config: EarlyExitConfig) -> nn.Module:
        """A plain module cannot be built from a config.

        Raises:
            CheckpointError: Always; the message says how to load it.
        """
        raise CheckpointError(
            f"the backbone {config.architecture!r} is a plain nn.Module, which a config cannot rebuild: build it"
            " yourself and call EarlyExitWrapper.from_pretrained(path, backbone=module)"
        )

    def candidates(self, module: nn.Module, traced: Trace) -> list[str]:
        """Children of the module, and of its Sequentials, lists and dicts, that are called once."""
        names: list[str] = []

        def walk(prefix: str, parent: nn.Module) -> None:
            for name, child in parent.named_children():
                path = f"{prefix}{name}"
                if path in traced.calls:
                    names.append(path)
                if (
                    isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
                    and type(parent) is not nn.Sequential
                ):
                    walk(path + ".", child)

        walk("", module)
        return names

    def feature_spec(self, module: nn.Module, name: str, call: StageCall, traced: Trace) -> FeatureSpec:
        """Layout by the number of axes.

        Raises:
            ExitPointError: The output has none of the known numbers of axes.
        """
        feature, leaf, batched = find_feature(call.output, traced.batch)
        shape = tuple(int(s) for s in feature.shape)
        if feature.ndim == 4:
            return FeatureSpec(shape[1], "NCHW", shape[2:], output_index=leaf, batch_outputs=batched)
        if feature.ndim == 3:
            return FeatureSpec(shape[2], "NLC", shape[1:2], output_index=leaf, batch_outputs=batched)
        if feature.ndim == 2:
            return FeatureSpec(shape[1], "NC", output_index=leaf, batch_outputs=batched)
        raise ExitPointError(f"exit {name!r}: an output of shape {shape} is neither a map, tokens nor a vector")

    def stages(self, module: nn.Module, exits: Sequence[str], checkpointed: bool) -> list[Stage] | None:
        """A Sequential is its own staged forward, modules that stand in it twice included."""
        if type(module) is not nn.Sequential:
            return None
        return staged_stages(module, list(module._modules), exits, False)
