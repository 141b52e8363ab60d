"""Models whose exits disagree, and thresholds that lie away from every score."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import timm
import torch
from torch import Tensor

import erde_hub.backbones.cifar_resnet  # noqa: F401 - registers resnet*_cifar
from erde_hub import EarlyExitWrapper

#: Families that are exported on every run: architecture, size of the image, creation arguments, exits.
FAMILIES: dict[str, tuple[str, int, dict[str, Any], list[str] | int]] = {
    "resnet": ("resnet10_cifar", 32, {"width": 8}, ["layer1", "layer2", "layer3"]),
    "convnext": ("convnext_atto", 64, {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 2),
    "efficientnet": ("efficientnet_lite0", 64, {}, 2),
    "vit": ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 3, "embed_dim": 48}, ["blocks.0", "blocks.1"]),
    "swin": ("swin_tiny_patch4_window7_224", 56, {"img_size": 56, "embed_dim": 24, "depths": [1, 1, 1]}, 2),
    "mobilenetv4": ("mobilenetv4_conv_small_050", 64, {}, 2),
    "regnet": ("regnetx_002", 64, {}, 2),
}

#: One network of each further family, for the slow run.
MORE_FAMILIES: dict[str, tuple[str, int, dict[str, Any], list[str] | int]] = {
    "resnetv2": ("resnetv2_18", 64, {}, 2),
    "resnext": ("resnext26ts", 64, {}, 2),
    "regnety": ("regnety_002", 64, {}, 2),
    "convnextv2": ("convnextv2_atto", 64, {}, 2),
    "densenet": ("densenet121", 64, {}, 2),
    "efficientnet_se": ("efficientnet_b0", 64, {}, 2),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}, 2),
    "mobilenetv4_hybrid": ("mobilenetv4_hybrid_medium", 64, {}, ["blocks.0", "blocks.1"]),
    "ghostnet": ("ghostnet_050", 64, {}, 2),
    "repvit": ("repvit_m0_9", 64, {}, 2),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64}, 2),
    "beit": ("beit_base_patch16_224", 64, {"img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 3}, 2),
    "eva": ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 3}, 2),
    "hiera": ("hiera_tiny_224", 64, {"img_size": [64, 64], "embed_dim": 16, "stages": [1, 1, 1, 1]}, 2),
    "twins": ("twins_svt_small", 64, {}, 2),
    "swinv2": ("swinv2_tiny_window8_256", 64, {"img_size": 64}, 2),
    "pvt_v2": ("pvt_v2_b0", 64, {}, 2),
    "edgenext": ("edgenext_xx_small", 64, {}, 2),
    "fastvit": ("fastvit_t8", 64, {}, 2),
    "mobilevit": ("mobilevit_xxs", 64, {}, 2),
    "maxvit": ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}, 2),
    "coatnet": ("coatnet_nano_rw_224", 64, {"img_size": 64}, 2),
    "mixer": ("mixer_s32_224", 64, {"img_size": 64}, 2),
    "poolformer": ("poolformer_s12", 64, {}, 2),
    "levit": ("levit_128s", 64, {"img_size": 64}, 2),
    "hrnet": ("hrnet_w18_small", 64, {}, ["stage2", "stage3"]),
}


class TinyNet(torch.nn.Module):
    """Three stages and a classifier; what lies between the first two stages can be anything."""

    def __init__(self, between: torch.nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.stage1 = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3, 2, 1), torch.nn.ReLU())
        self.between = between or torch.nn.Identity()
        self.stage2 = torch.nn.Sequential(torch.nn.Conv2d(width, width, 3, 1, 1), torch.nn.ReLU())
        self.stage3 = torch.nn.Sequential(torch.nn.Conv2d(width, 2 * width, 3, 2, 1), torch.nn.ReLU())
        self.fc = torch.nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.between(self.stage1(x)))
        return self.fc(self.stage3(x).mean((2, 3)))


def tiny(exits: tuple[str, ...] = ("stage1", "stage2"), **kwargs: Any) -> EarlyExitWrapper:
    """The smallest model that shows everything; exported in a second or two."""
    torch.manual_seed(0)
    return _decisive(EarlyExitWrapper(TinyNet(), exits=list(exits), input_size=(3, 16, 16), **kwargs).eval())


def build(
    architecture: str,
    size: int,
    backbone_kwargs: dict[str, Any],
    exits: list[str] | int,
    classes: int = 10,
    **kwargs: Any,
) -> EarlyExitWrapper:
    """A small random model in eval mode whose early exits are sure of some inputs and unsure of others."""
    torch.manual_seed(0)
    backbone = timm.create_model(architecture, num_classes=classes, **backbone_kwargs)
    size_and_kwargs = {"input_size": (3, size, size), "backbone_kwargs": backbone_kwargs, **kwargs}
    return _decisive(EarlyExitWrapper(backbone, exits=exits, **size_and_kwargs).eval())


@torch.no_grad()
def _decisive(model: EarlyExitWrapper) -> EarlyExitWrapper:
    """Scales and shifts the early heads until their logits differ between samples, and only there, by about 2."""
    exit_logits = model(images(model, 5), output_all_exits=True).exit_logits
    for head, logits in zip(model.heads, exit_logits, strict=False):
        scale = 2 / logits.std(0).mean()
        head.fc.weight *= scale
        head.fc.bias.copy_(scale * (head.fc.bias - logits.mean(0)))
    return model


def images(model: EarlyExitWrapper, batch: int, seed: int = 1) -> Tensor:
    """Normalised inputs of very different kinds: noise of many sizes and scales."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.input_size
    coarse = torch.randn((batch, size[0], 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")
    return smooth * torch.linspace(0.5, 2, batch).view(-1, 1, 1, 1) + 0.3 * torch.randn(
        (batch, *size), generator=generator
    )


@torch.no_grad()
def safe_thresholds(model: EarlyExitWrapper, x: Tensor | dict[str, Tensor]) -> list[float]:
    """One threshold per early exit, away from every score, that splits those who come so far as evenly as it can."""
    thresholds = []
    exit_logits = model(**(x if isinstance(x, dict) else {"pixel_values": x}), output_all_exits=True).exit_logits
    alive = torch.ones(len(exit_logits[0]), dtype=torch.bool)
    for logits in exit_logits[:-1]:
        every = model.policy.score(logits.log_softmax(-1).unsqueeze(0))
        scores = torch.cat([every.new_zeros(1), every[alive].sort().values])
        between = ((scores[1:] + scores[:-1]) / 2).tolist()
        safe = [(abs(i - alive.sum() / 2), t) for i, t in enumerate(between) if (every - t).abs().min() > 5e-4]
        assert safe, "the samples are too alike to route"
        thresholds.append(min(safe)[1])
        alive &= ~model.policy(logits.log_softmax(-1).unsqueeze(0), thresholds[-1])
    return thresholds


@torch.no_grad()
def first_exits(model: EarlyExitWrapper, x: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """What routing must give, from the logits of all exits, sample by sample."""
    exit_logits = model(x, output_all_exits=True).exit_logits
    rows, index = [], []
    for i in range(len(x)):
        own = [logits[i : i + 1] for logits in exit_logits]
        leaving = [e for e, t in enumerate(thresholds) if model.policy(own[e].log_softmax(-1).unsqueeze(0), t).item()]
        index.append(leaving[0] if leaving else len(thresholds))
        rows.append(own[index[-1]])
    return torch.cat(rows), torch.tensor(index)


def levels(path):
    """The graphs from the outermost to the classifier's."""
    graph = ir.load(path).graph
    found = [graph]
    while branches := [node for node in graph if node.op_type == "If"]:
        (branch,) = branches
        graph = branch.attributes["else_branch"].as_graph()
        found.append(graph)
    return found


def read_in(graph):
    """Names of all values that the layers of a graph read, those of deeper branches aside."""
    layers = [node for node in graph if node.op_type != "If" or "all_have_left" not in node.name]
    inner = [node for layer in layers for node in (layer, *all_inner(layer))]
    return {value.name for node in inner for value in node.inputs if value is not None}


#: Operators that pick samples out of a batch, or run a number of times that values decide.
_ROWS = {"NonZero", "Compress", "Scatter", "ScatterElements", "ScatterND", "Loop", "Scan", "Unique"}


def dynamic_parts(path):
    """What a compiler that wants fixed shapes refuses: free or unknown axes, branches that differ, picked rows."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    faults = []

    def shape(value):
        dims = value.type.tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]

    def check(graph, outside):
        known = {value.name: shape(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        weights = outside | {tensor.name for tensor in graph.initializer}
        faults.extend(f"{name}: {dims}" for name, dims in known.items() if None in dims)
        for node in graph.node:
            faults.extend(f"{name}: no shape" for name in node.output if name and name not in known)
            if node.op_type in _ROWS:
                faults.append(f"{node.name}: {node.op_type}")
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            gathers = node.op_type == "GatherND" or (node.op_type == "Gather" and axis == 0)
            if gathers and not weights & {*node.input}:
                faults.append(f"{node.name}: picks rows")
            branches = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
            if len({str([shape(value) for value in branch.output]) for branch in branches}) > 1:
                faults.append(f"{node.name}: branches differ")
            for branch in branches:
                check(branch, weights)

    check(model.graph, set())
    return faults


def all_inner(node):
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [inner for graph in graphs for inner in ir.traversal.RecursiveGraphIterator(graph)]
