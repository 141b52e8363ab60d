"""Stages run one by one give what the network's own forward gives; where they do not, exits sit on hooks."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper
from erde_hub.backbones import timm as timm_backbones
from erde_hub.backbones.timm import staged_stages
from erde_hub.errors import ExitPointError
from tests.fakes.networks import FAMILIES, STAGED, build
from tests.fakes.transformers_models import vision

SIZE = (3, 16, 16)


def _conv(inputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, 8, 3, padding=1)


def _end() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]


def activation_twice() -> nn.Sequential:
    act = nn.ReLU()
    return nn.Sequential(_conv(3), act, _conv(), act, *_end())


def block_twice() -> nn.Sequential:
    block = nn.Sequential(_conv(), nn.BatchNorm2d(8), nn.Tanh())
    return nn.Sequential(_conv(3), block, nn.MaxPool2d(2), block, *_end())


def inside_a_sequential() -> nn.Sequential:
    conv = _conv()
    return nn.Sequential(_conv(3), nn.Sequential(conv, nn.Tanh(), conv, nn.Tanh(), conv), *_end())


def one_after_the_other() -> nn.Sequential:
    conv = _conv()
    return nn.Sequential(_conv(3), conv, conv, conv, *_end())


def in_place_twice() -> nn.Sequential:
    act = nn.ReLU(inplace=True)
    return nn.Sequential(_conv(3), nn.BatchNorm2d(8), act, _conv(), act, *_end())


class EndsInRepeats(nn.Module):
    """Driven by hooks; what ends its block is called in the middle of it as well."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.Tanh()
        self.block = nn.Sequential(_conv(3), act, _conv(), act)
        self.end = nn.Sequential(*_end())

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.block(x))


@pytest.mark.parametrize(
    ("make", "exits"),
    [
        (activation_twice, ["0"]),
        (activation_twice, ["0", "2"]),
        (activation_twice, ["1@0", "1@1"]),
        (activation_twice, 1),
        (block_twice, ["0", "2"]),
        (block_twice, ["1@0", "1@1"]),
        (block_twice, ["1.0@0", "1.0@1"]),
        (inside_a_sequential, ["0", "1"]),
        (inside_a_sequential, ["1.1"]),
        (inside_a_sequential, ["1.0@1", "1.3"]),
        (one_after_the_other, ["0"]),
        (one_after_the_other, ["1@1"]),
        (in_place_twice, ["0", "2@0"]),
        (EndsInRepeats, ["block"]),
    ],
)
def test_modules_that_are_called_again(make, exits):
    torch.manual_seed(0)
    net = make().eval()
    seen: dict[str, list[Tensor]] = {}
    watched = copy.deepcopy(net)
    for name, child in watched.named_modules():
        child.register_forward_hook(lambda _m, _a, out, name=name: seen.setdefault(name, []).append(out.clone()))
    x = torch.randn(6, *SIZE)
    with torch.no_grad():
        right = watched(x)
        model = EarlyExitWrapper(net, exits=exits, input_size=SIZE).eval()
        assert not model.config.exit_hooks
        every = model(x, output_all_exits=True).exit_logits
        assert torch.equal(every[-1], right)
        for name, head, logits in zip(model.exit_names, model.heads, every, strict=False):
            path, _, call = name.partition("@")
            assert torch.equal(logits, head(seen[path][int(call or 0)]))
        entropy = [-(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in every[:-1]]
        thresholds = [float(values.median()) for values in entropy]
        out = model(x, threshold=thresholds)
        assert len(out.exit_index.unique()) > 1
        for row, index in enumerate(out.exit_index.tolist()):
            torch.testing.assert_close(out.logits[row], every[index][row])
        torch.testing.assert_close(model(x[:1], threshold=1e-9).logits, right[:1])
        assert torch.equal(model.truncate(0)(x).logits, every[0])
    model.train()
    torch.manual_seed(2)
    loss = model(x, labels=torch.arange(6) % 4).exit_logits[-1].sum()
    torch.testing.assert_close(loss, watched.train()(x).sum())


def test_calls_of_a_repeated_module_are_named():
    with pytest.raises(ExitPointError, match=r"'1' is called 2 times .*1@0, 1@1"):
        EarlyExitWrapper(activation_twice(), exits=["1"], input_size=SIZE)
    with pytest.raises(ExitPointError, match=r"'3' is the same module as '1'.*1@0, 1@1"):
        EarlyExitWrapper(activation_twice(), exits=["3"], input_size=SIZE)


@pytest.mark.parametrize("name", STAGED)
def test_stages_of_known_families_agree(name):
    family = FAMILIES[name]
    model = EarlyExitWrapper(
        build(name), exits=family.exits, input_size=family.input_size, backbone_kwargs=family.kwargs
    )
    assert model.runner.stages() is not None
    assert not model.config.exit_hooks


@pytest.mark.parametrize("name", ["pvt", "pvt_v2"])
def test_stages_of_transformers_agree(name):
    model = EarlyExitWrapper(vision(name), exits=2)
    assert model.runner.stages() is not None


def _doubled(net: nn.Sequential) -> nn.Sequential:
    own = type(net).forward
    net.forward = types.MethodType(lambda self, x: 2 * own(self, x), net)
    return net


def test_a_forward_of_ones_own_is_driven_by_hooks(tmp_path):
    torch.manual_seed(0)
    net, x = _doubled(block_twice()).eval(), torch.randn(4, *SIZE)
    with torch.no_grad():
        right = net(x)
        model = EarlyExitWrapper(net, exits=["0"], input_size=SIZE).eval()
        assert model.config.exit_hooks
        for found in (model, copy.deepcopy(model)):
            torch.testing.assert_close(found(x, output_all_exits=True).logits, right)
            torch.testing.assert_close(found(x, threshold=1e-9).logits, right)
        model.save_pretrained(tmp_path)
        again = EarlyExitWrapper.from_pretrained(tmp_path, backbone=_doubled(block_twice()))
        torch.testing.assert_close(again(x, output_all_exits=True).logits, right)


def test_a_forward_that_neither_stages_nor_hooks_can_follow_is_refused():
    net = block_twice()
    own = type(net).forward
    net.forward = types.MethodType(lambda self, x: own(self, x) + x.mean((1, 2, 3))[:, None], net)
    with pytest.raises(ExitPointError, match="batch cannot shrink"):
        EarlyExitWrapper(net, exits=["0"], input_size=SIZE)


def test_hooks_on_the_network_need_one_that_can_shrink():
    """Twins keeps the number of samples aside: its stages can have exits, its own forward cannot."""
    module = timm.create_model("twins_svt_small", num_classes=3, img_size=64)
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ExitPointError, match="batch cannot shrink"):
        EarlyExitWrapper(module, exits=2, input_size=(3, 64, 64), backbone_kwargs={"img_size": 64})


def test_stages_that_are_known_wrongly_are_not_used(monkeypatch):
    """As if timm had changed the forward of a family: found on random weights, where a fresh norm would hide it."""
    layout, parts = timm_backbones._STAGED[timm.models.resnet.ResNet]
    wrong = lambda m: [part for part in parts(m) if part != "bn1"]  # noqa: E731
    monkeypatch.setitem(timm_backbones._STAGED, timm.models.resnet.ResNet, (layout, wrong))
    family = FAMILIES["resnet"]
    module = timm.create_model(family.architecture, num_classes=4, **family.kwargs).eval()
    x = torch.randn(2, *family.input_size)
    with torch.no_grad():
        right = module(x)
        model = EarlyExitWrapper(module, exits=2, input_size=family.input_size, backbone_kwargs=family.kwargs).eval()
        assert model.config.exit_hooks
        assert torch.equal(model(x, output_all_exits=True).logits, right)


def test_stages_keep_no_network_alive():
    """A cycle would: the copy that is compared at wrapping would be in memory until Python looks for cycles."""
    net = inside_a_sequential()
    last = weakref.ref(net[-1])
    gc.disable()
    try:
        staged_stages(net, list(net._modules), ["0", "1.1"], False)
        del net
        assert last() is None
    finally:
        gc.enable()
