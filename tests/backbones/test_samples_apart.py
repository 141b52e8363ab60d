"""A sample's answer must not depend on who else is in the batch: networks that mix samples are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ExitPointError
from tests.fakes.networks import Call, Plain

SIZE = (3, 16, 16)


class ZeroGate(nn.Module):
    """Mixes samples once it is trained: fresh weights hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * x.mean(0)


class RefineTwo(nn.Module):
    """Gives the two hardest samples of a batch another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hardest = x.flatten(1).norm(dim=1).topk(min(2, len(x))).indices
        return x.index_add(0, hardest, self.layer(x[hardest]))


def _ghost_norm(x: Tensor) -> Tensor:
    return torch.cat([part - part.mean(0) for part in x.chunk(2)]) if len(x) > 3 else x


MIXING: dict[str, Callable[[], nn.Module]] = {
    "batch norm without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "mean": lambda: Call(lambda x: x - x.mean(0)),
    "softmax over the batch": lambda: Call(lambda x: x * x.softmax(0)),
    "running sum": lambda: Call(lambda x: x.cumsum(0)),
    "first sample": lambda: Call(lambda x: x - 0.5 * x[:1]),
    "last sample": lambda: Call(lambda x: x - 0.5 * x[-1:]),
    "neighbour": lambda: Call(lambda x: x + x.flip(0)),
    "third sample": lambda: Call(lambda x: x - x[2:3] if len(x) > 2 else x),
    "neighbour in sorted order": lambda: Call(lambda x: x + 0.5 * x[x.flatten(1).sum(1).argsort()]),
    "two hardest": RefineTwo,
    "ghost norm": lambda: Call(_ghost_norm),
    "large batches": lambda: Call(lambda x: x - x.mean(0) if len(x) > 4 else x),
    "once it is trained": ZeroGate,
}  # fmt: skip


def _staged(mixing: nn.Module, first: bool = False) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
    layers.insert(1 if first else 2, mixing)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _hooked(mixing: nn.Module) -> nn.Module:
    module = Plain()
    module.trunk["b"] = nn.Sequential(mixing, module.trunk["b"])
    return module


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize(("make", "exits"), [(_staged, ["0"]), (_staged, ["0", "1"]), (_hooked, ["trunk.a"])])
def test_mixing_behind_an_exit_is_found(make, exits, name):
    torch.manual_seed(0)
    with pytest.raises(ExitPointError, match="something behind these exits reads the whole batch"):
        EarlyExitWrapper(make(MIXING[name]()), exits=exits, input_size=SIZE)


def test_mixing_before_the_first_exit_is_the_networks_own_affair():
    torch.manual_seed(0)
    net = _staged(MIXING["mean"](), first=True).eval()
    model = EarlyExitWrapper(net, exits=["2"], input_size=SIZE).eval()
    x = torch.randn(5, *SIZE)
    with torch.no_grad():
        out = model(x, threshold=1.3)
        every = model(x, output_all_exits=True).exit_logits
    for row, index in enumerate(out.exit_index.tolist()):
        torch.testing.assert_close(out.logits[row], every[index][row])


def test_the_last_sample_left_has_no_company():
    norm = nn.BatchNorm1d(8, track_running_stats=False)  # fails on a batch of one
    net = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 4))
    with pytest.raises(ExitPointError, match=r"reads the whole batch.*ValueError"):
        EarlyExitWrapper(net, exits=["0"], input_size=(6,))


def test_networks_that_draw_random_numbers_are_not_taken_for_it():
    torch.manual_seed(0)
    net = _staged(Call(lambda x: x + torch.randn_like(x)))
    assert EarlyExitWrapper(net, exits=["0"], input_size=SIZE)


@pytest.mark.parametrize("rows", [1, 3])
def test_examples_of_the_users_own_are_used(rows):
    """Token ids that a random input would not be."""
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), Call(lambda x: x.mean(1)), nn.Linear(8, 4))
    ids = torch.arange(rows * 5).reshape(rows, 5) % 9
    assert not EarlyExitWrapper(net, exits=["1"], example_inputs=ids).config.exit_hooks
    net[2] = Call(lambda x: x.mean(1) - x.mean((0, 1)))
    with pytest.raises(ExitPointError, match="reads the whole batch"):
        EarlyExitWrapper(net, exits=["1"], example_inputs=ids)
