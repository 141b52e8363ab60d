"""Any other nn.Module that maps one batch of inputs to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from erde_hub.engine.hooks import parse_exit
from erde_hub.engine.stages import Stage
from erde_hub.errors import CheckpointError
from erde_hub.heads import FeatureSpec

from .base import BackboneAdapter, find_feature, spec_of
from .layouts import FeatureFormats, find_format
from .timm import staged_stages
from .tracing import StageCall, Trace

if TYPE_CHECKING:
    from erde_hub.config import EarlyExitConfig


class PlainAdapter(BackboneAdapter):
    """Knows what every module has: children that are called, and features whose layout shows when it is run."""

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
        """Children of the module, of its Sequentials, lists and dicts, and of what holds most of the computation."""
        names: list[str] = []

        def walk(prefix: str, parent: nn.Module) -> None:
            for name, child in parent.named_children():
                path = f"{prefix}{name}"
                calls = traced.calls.get(path, [])
                names.extend([path] if calls else [])
                holder = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
                large = len(calls) == 1 and calls[0].macs - calls[0].macs_before > traced.total_macs / 2
                if (holder and type(parent) is not nn.Sequential) or large:
                    walk(path + ".", child)

        walk("", module)
        return names

    def feature_spec(
        self, module: nn.Module, name: str, call: StageCall, traced: Trace, formats: FeatureFormats
    ) -> FeatureSpec:
        """Layout as the user says it, else as it can be found out.

        Raises:
            ExitPointError: See :func:`~erde_hub.backbones.layouts.find_format`.
        """
        feature, index, batched = find_feature(call.output, traced.batch)
        path, number = parse_exit(name)
        layout = formats.of(name, feature.ndim)
        if layout is None:
            layout = find_format(module, path, feature, (number or 0, index or 0), traced)
        return spec_of(feature, layout, output_index=index, batch_outputs=batched)

    def logits(self, output: Any) -> Tensor:
        """The output, or its ``logits`` where auxiliary ones come with them (GoogLeNet and Inception in training)."""
        return super().logits(getattr(output, "logits", output))

    def stages(self, module: nn.Module, exits: Sequence[str], checkpointed: bool) -> list[Stage] | None:
        """A Sequential is its own staged forward, modules that stand in it twice included."""
        if type(module) is not nn.Sequential:
            return None
        return staged_stages(module, list(module._modules), exits, False)
