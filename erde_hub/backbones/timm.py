"""timm models."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import timm
import torch
from timm.models import convnext, efficientnet, mobilenetv3, nasnet, pnasnet, resnet, tnt, vision_transformer
from timm.models._manipulate import checkpoint, checkpoint_seq
from timm.models.xception import Xception
from timm.models.xception_aligned import XceptionAligned
from torch import Tensor, nn

from erde_hub.engine.batch_sync import BatchSyncHook
from erde_hub.engine.hooks import parse_exit
from erde_hub.engine.rows import tensors
from erde_hub.engine.stages import Stage
from erde_hub.errors import ConfigError, ExitPointError, InputTypeError, nearest, unknown_name
from erde_hub.heads import FeatureSpec

from .base import BackboneAdapter, find_feature, spec_of
from .layouts import FeatureFormats, find_format
from .rebuild import check_same_network
from .timm_staged import carried_stages, carries, stage_names
from .tracing import StageCall, Trace

if TYPE_CHECKING:
    from erde_hub.config import EarlyExitConfig

#: Creation arguments that would fetch or read something, or that the config holds elsewhere.
_REFUSED_KWARGS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"}
    | {"features_only", "out_indices", "pretrained_strict", "scriptable", "exportable", "no_jit"}
)

#: Networks whose cells read two cells before them.
_CELLS = (nasnet.NASNetALarge, pnasnet.PNASNet5Large)
#: Networks whose ``feature_info`` names layers inside a cell or a residual block, and the names of what encloses them.
_ENCLOSING: dict[type[nn.Module], str] = {
    nasnet.NASNetALarge: r"(reduction_)?cell_\w+",
    pnasnet.PNASNet5Large: r"cell_\w+",
    Xception: r"block\d+",
    XceptionAligned: r"blocks\.\d+",
}
#: What timm calls the modules between the last stage and a classifier that is no part of a head.
_POOLING = ("global_pool", "attn_pool", "fc_norm", "head_drop")

#: The largest numbers that a creation argument may hold, and that one may hold that counts layers: vocabularies and
#: contexts are large, a network of ten thousand layers is a mistake or an attack.
MAX_SIZE, MAX_LAYERS = 10_000_000, 1_000
MAX_TEXT = 1_000


class TimmAdapter(BackboneAdapter):
    """Reads names, widths and layouts from ``feature_info`` and the model's own attributes."""

    library: ClassVar[str] = "timm"

    def matches(self, module: nn.Module) -> bool:
        """Tells by the ``pretrained_cfg`` that timm's builder leaves on every model."""
        cfg = getattr(module, "pretrained_cfg", None)
        return isinstance(cfg, dict) and "architecture" in cfg and timm.is_model(cfg["architecture"])

    def describe(self, module: nn.Module) -> dict[str, Any]:
        """Architecture, input size and preprocessing from ``pretrained_cfg`` and the model."""
        cfg: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
        if (
            not callable(getattr(module, "forward_head", None))
            and hasattr(module, "feature_info")
            and not hasattr(module, "num_classes")
        ):
            raise InputTypeError(
                f"{type(module).__name__} extracts features and does not classify: create it without features_only"
            )
        size = list(cfg.get("input_size", (3, 224, 224)))
        if isinstance(getattr(module, "in_chans", None), int):
            size[0] = module.in_chans
        size[1:] = _created_for(module) or size[1:]
        return {
            "architecture": cfg["architecture"],
            "input_size": size,
            "preprocessing": {
                "mean": [float(v) for v in cfg.get("mean", (0.5, 0.5, 0.5))],
                "std": [float(v) for v in cfg.get("std", (0.5, 0.5, 0.5))],
                "interpolation": cfg.get("interpolation") or "bicubic",
                "crop_pct": float(cfg.get("crop_pct") or 1.0),
                "size": size[1:],
                **({"crop_mode": "squash"} if cfg.get("crop_mode") == "squash" else {}),
            },
        }

    def build(self, config: EarlyExitConfig) -> nn.Module:
        """Builds a registered architecture; anything that points elsewhere, or fetches, is refused.

        Raises:
            ConfigError: ``architecture`` is no registered timm name, or ``backbone_kwargs`` holds what is not allowed.
        """
        architecture = self.check_architecture(config.architecture)
        check_backbone_kwargs(config.backbone_kwargs or {})
        try:
            return timm.create_model(
                architecture, pretrained=False, num_classes=config.num_labels, **(config.backbone_kwargs or {})
            )
        except (
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
            RuntimeError,
            AssertionError,
        ) as error:
            raise ConfigError(
                f"backbone_kwargs={config.backbone_kwargs!r} do not fit {architecture}:"
                f" {error}{nearest_argument(error, architecture)}"
            ) from error

    def check_architecture(self, name: Any) -> str:
        """Returns a registered timm name, or raises :class:`ConfigError` for anything that points elsewhere."""
        if not isinstance(name, str) or ":" in name or "/" in name:
            raise ConfigError(f"architecture must be a registered timm name such as 'resnet18', got {name!r}")
        if not timm.is_model(name):
            raise unknown_name("architecture (timm model)", name, timm.list_models())
        return name

    def check_rebuild(self, module: nn.Module, config: EarlyExitConfig) -> nn.Module:
        """Rebuilds from the config and compares; see :func:`~erde_hub.backbones.rebuild.check_same_network`.

        Raises:
            RebuildError: Other weights or another answer; the message names ``backbone_kwargs``.
        """
        size = (1, *(config.input_size or ()))
        return check_same_network(
            module,
            self.build(config),
            lambda generator: torch.randn(size, generator=generator),
            self.logits,
            str(config.architecture),
            f"; pass the arguments that {config.architecture} was created with as backbone_kwargs={{...}} (now"
            f" {config.backbone_kwargs!r}), so that the checkpoint can be loaded",
            self.classifier_names(module),
        )

    def candidates(self, module: nn.Module, traced: Trace) -> list[str]:
        """``feature_info``'s modules where they exist, else the children of the trunk's sequences."""
        names = {n for n in _feature_info(module) if n in traced.calls}
        if carries(module):
            names = set(stage_names(module))
        elif pattern := next((p for cls, p in _ENCLOSING.items() if isinstance(module, cls)), None):
            names = {n for n in traced.calls if re.fullmatch(pattern, n)}
        elif len(names) < 2:
            names = set(_trunk_blocks(module, traced))
        return [n for n in traced.calls if n in names]

    def feature_spec(
        self, module: nn.Module, name: str, call: StageCall, traced: Trace, formats: FeatureFormats
    ) -> FeatureSpec:
        """Layout from the model's ``output_fmt`` and ``feature_info``; a contradiction is an error, not a guess.

        Raises:
            ExitPointError: The channels that ``feature_info`` declares are on no axis where the layout puts them.
        """
        feature, leaf, batched = find_feature(call.output, traced.batch, grouped=isinstance(module, tnt.TNT))
        if carries(module) and leaf is None:
            leaf, batched = 0, (0,)  # the first of what goes from stage to stage
        declared = _feature_info(module).get(name)
        layout = formats.of(name, feature.ndim) or _layout(module, name, feature, leaf, traced)
        pool, prefix = _token_pool(module, feature, traced) if layout == "NLC" else ("avg", 0)
        spec = spec_of(feature, layout, pool=pool, prefix_tokens=prefix, output_index=leaf, batch_outputs=batched)
        if (leaf is None or carries(module)) and declared not in (None, spec.width):
            raise ExitPointError(
                f"exit {name!r}: feature_info declares {declared} channels, but the output has shape"
                f" {tuple(feature.shape)} in layout {layout}"
            )
        return spec

    def declared_spec(self, module: nn.Module, name: str) -> FeatureSpec:
        """``feature_info`` for the families whose layout is known by their class."""
        declared = _feature_info(module).get(name)
        layout = next((fmt for cls, (fmt, _) in _STAGED.items() if isinstance(module, cls)), None)
        if declared is None or layout is None:
            return super().declared_spec(module, name)
        pool, prefix = _token_pool(module) if layout == "NLC" else ("avg", 0)
        return FeatureSpec(declared, layout, (), pool, prefix)

    def classifier_names(self, module: nn.Module) -> list[str]:
        """What ``pretrained_cfg`` calls the classifier."""
        names = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
        return [names] if isinstance(names, str) else list(names)

    def pooling_names(self, module: nn.Module) -> list[str]:
        """All of the head that holds the classifier; where it stands alone, what timm calls the modules before it."""
        tops = {name.partition(".")[0] for name in self.classifier_names(module) if "." in name}
        inside = [name for name, _ in module.named_modules() if name.partition(".")[0] in tops]
        return [*inside, *(name for name in _POOLING if name in module._modules)]

    def add_sync_hooks(self, module: nn.Module, exits: Sequence[str]) -> list[Any]:
        """NASNet's cells read the outputs of the two cells before them, the first of which may be of a larger batch."""
        if not isinstance(module, _CELLS):
            return []
        sync_hooks = []
        for name, child in module.named_children():
            if "cell" in name:
                sync_hooks.append(BatchSyncHook(dict.fromkeys(("x", "x_prev", "x_left", "x_right"), 4)))
                child.register_forward_pre_hook(sync_hooks[-1], with_kwargs=True)
        return sync_hooks

    def stages(self, module: nn.Module, exits: Sequence[str], checkpointed: bool) -> list[Stage] | None:
        """Staged forward of the families in :data:`_STAGED`, expanded where an exit lies inside a Sequential."""
        if carries(module):
            return carried_stages(module, exits)
        for cls, (_, parts) in _STAGED.items():
            same = all(getattr(type(module), f) is getattr(cls, f) for f in ("forward", "forward_features"))
            if isinstance(module, cls) and same:
                return staged_stages(module, parts(module), exits, checkpointed)
        return None

    def needs_stages(self, module: nn.Module) -> bool:
        """Families that keep the number of samples, or the size of the map, aside while they run."""
        return carries(module)

    def logits(self, output: Any) -> Tensor:
        """Distilled transformers return two sets of logits in training; their mean is what they answer in eval mode."""
        if isinstance(output, tuple) and len(output) == 2 and all(isinstance(o, Tensor) for o in output):
            return (output[0] + output[1]) / 2
        return super().logits(output)

    def init_non_persistent_buffers(self, module: nn.Module) -> None:
        """Calls timm's own initialisation of buffers that no checkpoint holds."""
        fill: Any = getattr(module, "init_non_persistent_buffers", None)
        if callable(fill):
            fill()

    def set_gradient_checkpointing(self, module: nn.Module, enable: bool) -> bool:
        """Passes it on to timm; models without it raise an assertion there."""
        switch: Any = getattr(module, "set_grad_checkpointing", None)
        if not callable(switch):
            return False
        try:
            switch(enable)
        except AssertionError:
            return False
        return True


def nearest_argument(error: Exception, architecture: str) -> str:
    """Returns :func:`~erde_hub.errors.nearest` for a misspelt creation argument that ``error`` speaks of, or ""."""
    found = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return ""
    entrypoint = timm.models.model_entrypoint(architecture.partition(".")[0])
    module = vars(sys.modules[entrypoint.__module__])
    owner = module.get(found[1])
    takers = [entrypoint]
    if isinstance(owner, type):
        takers += [cls for cls in module.values() if isinstance(cls, type) and issubclass(cls, owner)]
    return nearest(found[2], [name for taker in takers for name in inspect.signature(taker).parameters])


def check_backbone_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuses creation arguments that a stored config must not hold.

    Raises:
        ConfigError: An argument that fetches or reads files, or a value that JSON cannot store.
    """
    for key in kwargs:
        if key in _REFUSED_KWARGS:
            raise ConfigError(f"backbone_kwargs must not hold {key!r}: it is set elsewhere, or would fetch weights")
    check_storable(kwargs)


def check_storable(kwargs: dict[str, Any]) -> None:
    """Refuses values that JSON cannot store, that point elsewhere or are absurd, with :class:`ConfigError`."""
    for key, value in kwargs.items():
        if not isinstance(key, str):
            raise ConfigError(f"backbone_kwargs must be named arguments, got {key!r}")
        leaves = list(_leaves(value))
        sizes = [abs(leaf) for leaf in leaves if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]
        limit = MAX_LAYERS if re.search(r"depth|layers?$|blocks", key) else MAX_SIZE
        # of depths per stage the sum counts; a list of layers may name the last ones of a deep network
        if (sum(sizes) if re.search(r"depth|blocks", key) else max(sizes, default=0)) > limit:
            raise ConfigError(f"backbone_kwargs[{key!r}]={value!r:.100} is absurd: sizes go up to {limit}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"backbone_kwargs[{key!r}]={value!r} cannot be stored in config.json: use numbers, strings, lists"
            ) from error
        for text in (leaf for leaf in leaves if isinstance(leaf, str)):
            if len(text) > MAX_TEXT:
                raise ConfigError(f"backbone_kwargs[{key!r}] holds a text of {len(text):,} characters")
            if "://" in text or text.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
                raise ConfigError(f"backbone_kwargs[{key!r}]={value!r} points elsewhere, which a config must not")


def _leaves(value: Any) -> Iterator[Any]:
    """Yields what lists and dicts hold, at any depth."""
    if isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _leaves(entry)
    else:
        yield value


def _created_for(module: nn.Module) -> list[int] | None:
    """Height and width that the model was created for, where it tells: timm's own note, else its patch embedding."""
    embedding = next((c for c in module.children() if next(c.parameters(), None) is not None), None)
    sizes = [  # of the first layer alone: later embeddings take maps of features, of other sizes
        getattr(module, "_traits", {}).get("img_size"),
        getattr(module, "img_size", None),
        getattr(embedding, "img_size", None),
    ]
    return next(([int(s) for s in size] for size in sizes if isinstance(size, tuple)), None)


def _feature_info(module: nn.Module) -> dict[str, int]:
    info = getattr(module, "feature_info", None)
    rows = getattr(info, "info", info) or []
    return {row["module"]: int(row["num_chs"]) for row in rows if row.get("module")}


def _trunk_blocks(module: nn.Module, traced: Trace) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child) > 1:
            yield from (f"{name}.{i}" for i in range(len(child)) if f"{name}.{i}" in traced.calls)


def _layout(module: nn.Module, name: str, feature: Tensor, output_index: int | None, traced: Trace) -> str:
    if feature.ndim in (2, 3):
        return {2: "NC", 3: "NLC"}[feature.ndim]
    if feature.ndim == 4 and getattr(module, "output_fmt", None) in ("NHWC", "NCHW"):
        return str(module.output_fmt)
    votes = {"NCHW": 0, "NHWC": 0}
    for stage, width in _feature_info(module).items():
        for call in traced.calls.get(stage, [])[:1]:
            for made in tensors(call.output)[:1]:
                if made.ndim == feature.ndim == 4:
                    votes["NCHW"] += made.shape[1] == width
                    votes["NHWC"] += made.shape[3] == width
    if votes["NCHW"] == votes["NHWC"]:
        path, number = parse_exit(name)
        return find_format(module, path, feature, (number or 0, output_index or 0), traced)
    return max(votes, key=votes.__getitem__)


def _token_pool(module: nn.Module, feature: Tensor | None = None, traced: Trace | None = None) -> tuple[str, int]:
    prefix = int(getattr(module, "num_prefix_tokens", 0) or 0)
    embedded = traced.calls.get("patch_embed") if traced else None
    if prefix and feature is not None and traced and embedded:
        patches = find_feature(embedded[0].output, traced.batch)[0]
        if patches.numel() == feature.numel():
            prefix = 0  # patches alone: the class token joins later, behind the embedding or near the end (cait)
    pool = getattr(module, "global_pool", "avg")
    if pool == "token" and prefix:
        return "token", prefix
    return (pool if pool in ("avg", "max", "avgmax") else "avg"), prefix


# Staged forwards: the top-level parts of each family's forward, in order. A name stands for the submodule.
_Part = str | Callable[[Tensor], Tensor]


def _resnet(m: Any) -> list[_Part]:
    stages = [name for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(m, name)]
    return ["conv1", "bn1", "act1", "maxpool", *stages, m.forward_head]


def _convnext(m: Any) -> list[_Part]:
    return ["stem", "stages", "norm_pre", m.forward_head]


def _efficientnet(m: Any) -> list[_Part]:
    return ["conv_stem", "bn1", "blocks", "conv_head", "bn2", m.forward_head]


def _mobilenetv3(m: Any) -> list[_Part]:
    return ["conv_stem", "bn1", "blocks", m.forward_head]


def _vision_transformer(m: Any) -> list[_Part]:
    return ["patch_embed", m._pos_embed, "patch_drop", "norm_pre", "blocks", "norm", m.forward_head]


_STAGED: dict[type[nn.Module], tuple[str, Callable[[Any], list[_Part]]]] = {
    resnet.ResNet: ("NCHW", _resnet),
    convnext.ConvNeXt: ("NCHW", _convnext),
    efficientnet.EfficientNet: ("NCHW", _efficientnet),
    mobilenetv3.MobileNetV3: ("NCHW", _mobilenetv3),
    vision_transformer.VisionTransformer: ("NLC", _vision_transformer),
}


#: Parts whose blocks timm recomputes when its activation checkpointing is on (convnext's stages see to it themselves).
_RECOMPUTED = frozenset({"layer1", "layer2", "layer3", "layer4", "blocks"})


def staged_stages(
    module: nn.Module, parts: Sequence[_Part], exits: Sequence[str], checkpointed: bool
) -> list[Stage] | None:
    """Expands parts into stages that end at every exit, or returns None where an exit lies inside a block.

    Args:
        module: The backbone.
        parts: Names of submodules, or callables, in the order of its forward.
        exits: Names of the early exits.
        checkpointed: Recompute the activations of the blocks in the backward pass, as timm does.
    """
    stages: list[Stage] = []
    found: list[int] = []
    checkpointed = checkpointed and bool(getattr(module, "grad_checkpointing", False))

    for part in parts:
        if not isinstance(part, str):
            stages.append(Stage(part))
            continue
        for name, run in _expanded(part, module.get_submodule(part), exits):
            if checkpointed and isinstance(run, nn.Module) and part.partition(".")[0] in _RECOMPUTED:
                run = _checkpointed(run)
            stages.append(Stage(run))
            if name in exits:
                stages[-1].exit_index = exits.index(name)
                found.append(exits.index(name))
    return stages if found == list(range(len(exits))) else None


def _expanded(name: str, child: nn.Module, exits: Sequence[str]) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yields a part, or the members of a Sequential that has exits inside, each with its name."""
    if type(child) is not nn.Sequential or not any(e.startswith(name + ".") for e in exits):
        yield name, child
        return
    for part, grandchild in child._modules.items():  # a module may stand there twice
        yield from _expanded(f"{name}.{part}", grandchild, exits)
    if name in exits:
        yield name, _identity


def _identity(x: Tensor) -> Tensor:
    return x


def _checkpointed(child: nn.Module) -> Callable[[Tensor], Tensor]:
    if type(child) is nn.Sequential:
        return lambda x: checkpoint_seq(child, x)
    return lambda x: checkpoint(child, x)
