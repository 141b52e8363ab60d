"""What is saved loads, whatever the network shares between its layers, and goes on being shared."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from erde_hub import EarlyExitWrapper
from erde_hub.errors import CheckpointError, RebuildError
from erde_hub.heads import LinearHead
from erde_hub.modeling import heads_only
from erde_hub.modeling.truncated import TruncatedModel
from tests.fakes.networks import Plain


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


class Net(nn.Module):
    """Four layers; what they share is set by those that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.norm, self.c, self.d):
            x = layer(x).sin()
        return self.fc(x)


class OneParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.b.weight
        self.d.weight, self.d.bias = self.b.weight, self.a.bias


class OneModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c = self.b
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.again(x))


class Overlapping(Net):
    """Parameters that are views of one tensor, two of them of the same part."""

    def __init__(self) -> None:
        super().__init__()
        packed = torch.randn(18, 6)
        self.a.weight, self.b.weight = nn.Parameter(packed[:6]), nn.Parameter(packed[6:12])
        self.c.weight, self.d.weight = nn.Parameter(packed[6:12]), nn.Parameter(packed[9:15])


class Whole(Net):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(12, 6))
        self.a.weight, self.b.weight = nn.Parameter(self.packed.data[:6]), nn.Parameter(self.packed.data[6:])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.packed.mean())


class InAList(Net):
    """Calls a weight that no second name leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(F.linear(x, self.others[0])), torch.eye(4))


class OneBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(6)
        self.a.register_buffer("table", table)
        self.b.register_buffer("table", table)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.a.table * self.b.table + self.table)


class Transposed(Net):
    """transformers' own way of tying would pad the bias to the rows of a weight that has other axes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(6, 3, 1), nn.ConvTranspose1d(3, 6, 1)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.down(self.up(x[:, :, None]))[:, :, 0])


class Recurrent(Net):
    """Keeps a list of its weights beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(6, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(self.first(x[:, None])[0])[0][:, 0])


class HeadIsEmbedding(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc.weight = nn.Parameter(self.a.weight.data[:4])


WAYS = [
    Net, OneParameter, OneModule, Overlapping, Whole, InAList, OneBuffer, Transposed, Recurrent, HeadIsEmbedding
]  # fmt: skip


def _trained(net: nn.Module, x: Tensor) -> EarlyExitWrapper:
    model = EarlyExitWrapper(net, exits=["a", "b@0" if isinstance(net, OneModule) else "b"], input_size=(6,))
    _step(model, x)
    return model.eval()


def _step(model: Any, x: Tensor) -> None:
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(x, labels=torch.arange(len(x)) % 4).loss.backward()
    optimizer.step()
    model.eval()


def _answers(model: Any, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        if isinstance(model, TruncatedModel):
            return (model(x).logits,)
        return (*model(x, output_all_exits=True).exit_logits, model(x, threshold=0).logits)


@pytest.mark.parametrize("shards", [None, 200])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_sharing(way, shards, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = _trained(way(), x)
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    torch.manual_seed(1)
    own = way()
    kept = dict(own.named_parameters(remove_duplicate=False))
    again = EarlyExitWrapper.from_pretrained(tmp_path, backbone=own)
    assert all(torch.equal(a, b) for a, b in zip(_answers(again, x), _answers(model, x), strict=True))
    assert all(parameter is kept[name] for name, parameter in own.named_parameters(remove_duplicate=False))
    again.save_pretrained(tmp_path / "again")
    for found in (model, again):  # what was one is trained as one
        _step(found, x)
    for ours, theirs in zip(_answers(again, x), _answers(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_number_that_stands_for_many_is_replaced(tmp_path):
    """An expanded tensor, which torch neither writes to nor trains."""
    nets = [Net(), Net()]
    for net in nets:
        net.a.bias = nn.Parameter(torch.randn(1).expand(6))
    model, x = EarlyExitWrapper(nets[0], exits=["a", "b"], input_size=(6,)).eval(), torch.randn(8, 6)
    model.save_pretrained(tmp_path)
    again = EarlyExitWrapper.from_pretrained(tmp_path, backbone=nets[1])
    assert all(torch.equal(a, b) for a, b in zip(_answers(again, x), _answers(model, x), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("exit_name", [0, "classifier"])
def test_truncated_models(way, exit_name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = _trained(way(), x)
    static = model.truncate(exit_name)
    static.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = TruncatedModel.from_pretrained(tmp_path, backbone=way())
    assert torch.equal(_answers(again, x)[0], _answers(static, x)[0])


def test_a_module_removed_under_both_of_its_names(tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 1)
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 1), conv, nn.Tanh(), conv, nn.Flatten(), nn.Linear(256, 3))  # noqa: E731
    x = torch.randn(2, 3, 8, 8)
    static = EarlyExitWrapper(make(), exits=["0"], input_size=(3, 8, 8)).eval().truncate(0)
    assert not any("1." in name or "3." in name for name, _ in static.backbone.named_parameters())
    static.save_pretrained(tmp_path)
    again = TruncatedModel.from_pretrained(tmp_path, backbone=make())
    assert torch.equal(again(x).logits, static(x).logits)


def test_a_head_that_is_the_classifier(tmp_path, caplog):
    """The config of a timm model cannot say it: both are saved, which is told."""
    module = timm.create_model("resnet8_cifar", num_classes=4, width=4)
    model = EarlyExitWrapper(module, exits=["layer2", "layer3"], head="linear", backbone_kwargs={"width": 4}).eval()
    assert isinstance(model.heads[1], LinearHead)
    model.heads[1].fc.weight = model.backbone.fc.weight
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path)
    assert "heads.1.fc.weight shares its tensor" in caplog.text
    again = EarlyExitWrapper.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(_answers(again, x), _answers(model, x), strict=True))


def test_heads_that_are_one(tmp_path):
    module = Plain()
    model = EarlyExitWrapper(module, exits=["trunk.a", "trunk.b"], input_size=(3, 16, 16)).eval()
    model.heads[1] = model.heads[0]
    model.save_pretrained(tmp_path)
    again = EarlyExitWrapper.from_pretrained(tmp_path, backbone=Plain())
    x = torch.randn(2, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(_answers(again, x), _answers(model, x), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_language_models(tied, tmp_path):
    size = {"vocab_size": 99, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
    model = EarlyExitWrapper(GPT2LMHeadModel(GPT2Config(**size, tie_word_embeddings=tied)), exits=1).eval()
    model.save_pretrained(tmp_path)
    assert ("backbone.lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    again = EarlyExitWrapper.from_pretrained(tmp_path)
    assert (again.backbone.lm_head.weight is again.backbone.transformer.wte.weight) is tied
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert EarlyExitWrapper.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("way", [OneParameter, OneModule, OneBuffer, Recurrent])
def test_heads_alone(way, tmp_path, monkeypatch):
    """The published file holds each shared weight under one name, as safetensors writes it."""
    torch.manual_seed(0)
    net = way()
    save_model(net, str(tmp_path / "published.safetensors"))
    monkeypatch.setattr(heads_only, "fetch", lambda *_: (tmp_path / "published.safetensors", "0" * 64))
    model = EarlyExitWrapper(net, exits=["a"], input_size=(6,)).eval()
    model.save_pretrained(tmp_path / "heads", heads_only=True, backbone_weights={"repo_id": "org/name"})
    again = EarlyExitWrapper.from_pretrained(tmp_path / "heads", backbone=way())
    x = torch.randn(3, 6)
    if way is OneBuffer:  # what no checkpoint holds comes with the module
        again.backbone.table = net.table
    assert all(torch.equal(a, b) for a, b in zip(_answers(again, x), _answers(model, x), strict=True))


def test_a_shared_module_that_was_replaced_is_told_when_it_is_saved(tmp_path):
    model = EarlyExitWrapper(OneModule(), exits=["a"], input_size=(6,))
    model.backbone.c = copy.deepcopy(model.backbone.b)
    with pytest.raises(RebuildError, match=r"'b' and 'c' of this OneModule were one module"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("by", [0, 1])
def test_a_shared_weight_that_was_replaced_is_told_when_it_is_saved(by, tmp_path):
    model = EarlyExitWrapper(OneParameter(), exits=["a"], input_size=(6,))
    model.backbone.c.weight = nn.Parameter(model.backbone.c.weight + by)
    with pytest.raises(RebuildError, match=r"'b\.weight' and 'c\.weight' of this OneParameter were one weight"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_weights_that_are_not_one_do_not_load_into_one(tmp_path):
    network = OneParameter()
    network.c.weight = nn.Parameter(network.c.weight + 1)
    EarlyExitWrapper(network, exits=["a"], input_size=(6,)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"different values for 'b\.weight' and 'c\.weight'"):
        EarlyExitWrapper.from_pretrained(tmp_path, backbone=OneParameter())


def test_files_that_hold_a_shared_weight_twice_load(tmp_path):
    model = EarlyExitWrapper(OneParameter(), exits=["a"], input_size=(6,)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(whole, path, {"format": "pt", "save_id": model.config.save_id})
    again = EarlyExitWrapper.from_pretrained(tmp_path, backbone=OneParameter())
    assert again.backbone.c.weight is again.backbone.b.weight
    assert torch.equal(again.backbone.c.weight, model.backbone.b.weight)


def test_compiled_and_copied_models(tmp_path):
    model = EarlyExitWrapper(OneModule(), exits=["a"], input_size=(6,)).eval()
    copied = copy.deepcopy(model)
    model.backbone = torch.compile(model.backbone, backend="eager")
    x = torch.randn(3, 6)
    for name, found in {"compiled": model, "copied": copied}.items():
        found.save_pretrained(tmp_path / name)
        again = EarlyExitWrapper.from_pretrained(tmp_path / name, backbone=OneModule())
        assert torch.equal(again(x, threshold=0).logits, copied(x, threshold=0).logits)


def test_weights_in_another_type(tmp_path):
    model = EarlyExitWrapper(OneParameter(), exits=["a"], input_size=(6,)).eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = EarlyExitWrapper.from_pretrained(tmp_path, backbone=OneParameter(), dtype=torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert torch.equal(again(x, threshold=0).logits, model(x, threshold=0).logits)
    assert again.backbone.c.weight is again.backbone.b.weight


def test_nothing_is_warned_of(tmp_path, caplog):
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        EarlyExitWrapper(OneParameter(), exits=["a"], input_size=(6,)).save_pretrained(tmp_path)
        EarlyExitWrapper.from_pretrained(tmp_path, backbone=OneParameter())
    assert "shares" not in caplog.text
