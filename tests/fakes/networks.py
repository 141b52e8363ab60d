"""Small backbones of every kind that the engine drives, and a slow reference of routing written from its definition."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from erde_hub import EarlyExitWrapper
from tests.fakes.copies import copied

CLASSES = 5


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Plain(nn.Module):
    """A module of the user's own, nested, with a buffer that no checkpoint holds."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = Block(3, 4)
        self.trunk = nn.ModuleDict({"a": Block(4, 8), "b": Block(8, 8)})
        self.fc = nn.Linear(8, classes)
        self.register_buffer("scale", torch.tensor([1.5]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x * self.scale)
        for block in self.trunk.values():
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def sequential() -> nn.Sequential:
    return nn.Sequential(
        Block(3, 4),
        nn.Sequential(Block(4, 8), Block(8, 8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


@dataclass(frozen=True)
class Family:
    """One kind of backbone.

    Attributes:
        architecture: timm name, None for modules of our own.
        kwargs: What it is created with.
        exits: Three places, shallow to deep.
        size: Height and width of its inputs.
        staged: The engine has a staged forward for it.
        make: Builds a module of our own.
    """

    architecture: str | None
    kwargs: dict[str, Any]
    exits: tuple[str, str, str]
    size: int = 32
    staged: bool = False
    make: Callable[[], nn.Module] | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
_BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
_STAGES = ("stages.0", "stages.1", "stages.2")
FAMILIES = {
    "resnet": Family("resnet10_cifar", {"width": 8}, ("layer1", "layer2", "layer3"), 16, staged=True),
    "convnext": Family("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, _STAGES, staged=True),
    "vit": Family("vit_tiny_patch16_224", _VIT, _BLOCKS, staged=True),
    "deit": Family("deit_tiny_distilled_patch16_224", _VIT, _BLOCKS, staged=True),
    "efficientnet": Family("mnasnet_small", {}, ("blocks.0", "blocks.1", "blocks.3"), staged=True),
    "mobilenetv3": Family("lcnet_035", {}, ("blocks.0", "blocks.1", "blocks.3"), staged=True),
    "regnet": Family("regnetx_002", {}, ("s1", "s2", "s3")),
    "swin": Family(
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
        ("layers.0", "layers.1", "layers.2"),
    ),
    "beit": Family("beit_base_patch16_224", _VIT, _BLOCKS),
    "plain": Family(None, {}, ("stem", "trunk.a", "trunk.b"), 16, make=Plain),
    "sequential": Family(None, {}, ("0", "1.0", "1"), 16, staged=True, make=sequential),
}  # fmt: skip
STAGED = [name for name, family in FAMILIES.items() if family.staged]
TIMM = [name for name, family in FAMILIES.items() if family.architecture]


def build(name: str) -> nn.Module:
    """A backbone whose branches all show: fresh ones hide behind zeros and layer scales of 1e-6."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    if family.make is not None:
        module = family.make()
    else:
        module = timm.create_model(family.architecture, num_classes=CLASSES, **family.kwargs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if "running_var" in key:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point() and tensor.ndim < 2:
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
        if name in ("efficientnet", "mobilenetv3", "regnet"):  # random statistics make deep ones explode
            module.train()
            module(torch.randn(64, *family.input_size, generator=generator))
    return module


@copied
def wrap(name: str, **kwargs: Any) -> EarlyExitWrapper:
    """A wrapped backbone in eval mode whose exits disagree with each other."""
    family = FAMILIES[name]
    torch.manual_seed(2)
    model = EarlyExitWrapper(
        build(name),
        **{"exits": family.exits, "backbone_kwargs": family.kwargs, "input_size": family.input_size, **kwargs},
    )
    return spread(model).eval()


def resnet8(
    classes: int, width: int = 4, side: int = 32, exits: Sequence[str] = ("layer1", "layer2"), **kwargs: Any
) -> EarlyExitWrapper:
    """The smallest residual network of the library with exits, untrained, weights drawn from torch's generator."""
    backbone = timm.create_model("resnet8_cifar", num_classes=classes, width=width)
    return EarlyExitWrapper(
        backbone, exits=list(exits), input_size=(3, side, side), backbone_kwargs={"width": width}, **kwargs
    )


def spread(model: EarlyExitWrapper) -> EarlyExitWrapper:
    """Gives heads and classifier answers that range from sure to unsure."""
    generator = torch.Generator().manual_seed(3)
    linears = [module for module in model.heads.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 2 / linear.in_features**0.5)
    return model


def no_randomness(model: nn.Module) -> nn.Module:
    """Switches off dropout and stochastic depth."""
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def images(name: str, count: int = 8, seed: int = 4) -> Tensor:
    return torch.randn(count, *FAMILIES[name].input_size, generator=torch.Generator().manual_seed(seed))


def all_logits(model: EarlyExitWrapper, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(x, output_all_exits=True).exit_logits)


def score(policy: str, rows: Sequence[Tensor]) -> float:
    """Score of the last of the answers that one sample got so far, straight from the definitions."""
    probs = [[math.exp(v) for v in row.double().log_softmax(-1).tolist()] for row in rows]
    if any(math.isnan(p) for p in probs[-1]):
        return math.nan
    if policy == "entropy":
        return -sum(p * math.log(p) for p in probs[-1] if p > 0)
    if policy == "confidence":
        return max(probs[-1])
    if policy == "margin":
        best, second = sorted(probs[-1], reverse=True)[:2]
        return best - second
    if policy == "patience":
        answers = [row.index(max(row)) for row in probs]
        agreements = 0
        while agreements + 1 < len(answers) and answers[-2 - agreements] == answers[-1]:
            agreements += 1
        return agreements
    raise AssertionError(policy)


def leaves(policy: str, value: float, threshold: float) -> bool:
    return value < threshold if policy == "entropy" else value >= threshold


def route_reference(
    policy: str, logits: Sequence[Tensor], thresholds: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Routes recorded logits sample by sample.

    Returns:
        The logits and the exit of every sample, and whether no score on its way came within 1e-5 of a threshold.
    """
    taken, answers, clear = [], [], []
    for n in range(len(logits[0])):
        exit_index, far = len(logits) - 1, True
        for e, threshold in enumerate(thresholds):
            value = score(policy, [z[n] for z in logits[: e + 1]])
            far = far and not abs(value - threshold) < 1e-5
            if leaves(policy, value, threshold):
                exit_index = e
                break
        taken.append(exit_index)
        answers.append(logits[exit_index][n])
        clear.append(far)
    return torch.stack(answers), torch.tensor(taken), torch.tensor(clear)


def quantile_thresholds(model: EarlyExitWrapper, x: Tensor, share: float = 0.3, policy: str = "entropy") -> list[float]:
    """Thresholds midway between two scores, at which about ``share`` of the batch leaves each exit."""
    thresholds = []
    for logits in all_logits(model, x)[:-1]:
        values = sorted((score(policy, [row]) for row in logits), reverse=policy != "entropy")
        cut = min(max(round(share * len(values)), 1), len(values) - 1)
        thresholds.append((values[cut - 1] + values[cut]) / 2)
    return thresholds


# Ten-line modules whose stages hand on more than one tensor


@dataclass
class Pair:
    x: Tensor
    sums: Tensor
    table: Tensor


@dataclass
class PairOutput(ModelOutput):
    x: Tensor | None = None
    sums: Tensor | None = None


NamedPair = namedtuple("NamedPair", "x sums")


class StructureStage(nn.Module):
    """Carries a per-sample sum beside the map, and an 8x8 table that belongs to no sample."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, given: Any) -> Any:
        kind = self.kind
        if isinstance(given, Tensor):
            x, sums, table = given, given.sum((1, 2, 3)), torch.arange(8.0, device=given.device).expand(8, 8) / 10
        elif kind in ("tuple", "list"):
            x, (sums, table) = given
        elif kind in ("dict", "dataclass"):
            x, sums, table = (given[k] if kind == "dict" else getattr(given, k) for k in ("x", "sums", "table"))
        else:
            x, sums, table = given.x, given.sums, torch.zeros(8, 8)
        x = torch.relu(self.conv(x) + table) + 0.01 * sums[:, None, None, None]
        return {
            "tuple": lambda: (x, (sums, table)),
            "list": lambda: [x, [sums, table]],
            "dict": lambda: {"x": x, "sums": sums, "table": table, "kind": "any"},
            "dataclass": lambda: Pair(x, sums, table),
            "namedtuple": lambda: NamedPair(x, sums),
            "model_output": lambda: PairOutput(x=x, sums=sums),
        }[kind]()


class StructureNet(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = StructureStage(kind), StructureStage(kind)
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x))
        if not hasattr(out, "x"):
            out = out["x"] if isinstance(out, dict) else out[0]
        else:
            out = out.x
        return self.fc(out.mean((2, 3)))
