"""MACs are counted, not estimated: against the literature, against hand counts, and on both devices."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import nn

from erde_hub import EarlyExitWrapper, list_exit_points
from erde_hub.backbones.tracing import flop_counter, trace, weightless_copy
from erde_hub.errors import ConfigError, ExitPointError
from erde_hub.modeling.exit_table import ExitRow
from tests.fakes.networks import CLASSES, FAMILIES, build, images, wrap

# methods.md, section 2: MMACs after each stage and in total, convolutions and classifier only
CIFAR = {
    "resnet50_cifar": ([219.87, 555.42, 1033.57], 1297.83),
    "resnet18_cifar": ([152.76, 286.98, 421.20], 555.42),
    "resnet10_cifar": ([77.27, 135.99, 194.71], 253.43),
    "resnet8_cifar": ([77.27, 135.99], 194.71),
}


@functools.cache
def cifar(name: str) -> EarlyExitWrapper:
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=10)
    return EarlyExitWrapper(backbone, exits=["layer1", "layer2", "layer3"][: len(CIFAR[name][0])])


@pytest.mark.parametrize("name", CIFAR)
def test_cumulative_macs_agree_with_the_literature(name):
    stages, total = CIFAR[name]
    model, heads = cifar(name), 0
    for row, width, expected in zip(model.exit_table(), [64, 128, 256], [*stages], strict=False):
        heads += 4 * row.width * 10
        assert row.width == width * (4 if "50" in name else 1)
        assert (row.cumulative_macs - heads) / 1e6 == pytest.approx(expected, abs=0.006)
    assert (model.exit_table()[-1].cumulative_macs - heads) / 1e6 == pytest.approx(total, abs=0.006)


def test_fused_attention_is_counted():
    vit = timm.create_model("vit_tiny_patch16_224")
    assert trace(vit, (torch.empty(1, 3, 224, 224),)).total_macs / 1e6 == pytest.approx(1253, abs=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_meta_device_and_the_cpu_agree(name):
    model = wrap(name)
    counter = flop_counter()
    with torch.no_grad(), counter:
        model(images(name, 3), output_all_exits=True)
    assert model.exit_table()[-1].cumulative_macs == counter.get_total_flops() // 2 // 3


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "plain"])
def test_what_a_routed_pass_costs_is_what_the_table_says(name):
    model, x = wrap(name), images(name, 3)
    for exit_index, row in enumerate(model.exit_table()):
        thresholds = [1e-30] * 3
        if exit_index < 3:
            thresholds[exit_index] = 100.0
        counter = flop_counter()
        with torch.no_grad(), counter:
            assert model(x, threshold=thresholds).exit_index.tolist() == [exit_index] * 3
        assert counter.get_total_flops() // 2 // 3 == row.cumulative_macs


def test_heads_are_included():
    table = wrap("resnet", head="fc").exit_table()
    bare = {p.name: p.macs for p in list_exit_points(build("resnet"), input_size=(3, 16, 16))}
    heads = 0
    for row in table[:-1]:
        heads += 4 * row.width * CLASSES
        assert row.cumulative_macs == bare[row.exit] + heads
    linear = wrap("resnet", head="linear").exit_table()
    assert linear[0].macs == bare["layer1"] + linear[0].width * CLASSES
    assert [row.head for row in table] == ["fc", "fc", "fc", None]
    assert [row.width for row in table] == [8, 16, 32, None]


def test_rows_add_up():
    for name in ("resnet", "vit", "plain"):
        model = wrap(name)
        table = model.exit_table()
        assert [row.exit for row in table] == model.exit_names
        assert all(type(row) is ExitRow for row in table)
        for field in ("macs", "params"):
            own = [getattr(row, field) for row in table]
            cumulative = [getattr(row, f"cumulative_{field}") for row in table]
            assert cumulative == [sum(own[: i + 1]) for i in range(4)]
            assert all(type(value) is int and value > 0 for value in own)
        assert table.cumulative_macs == [row.cumulative_macs for row in table]
        assert table[-1].cumulative_params == sum(p.numel() for p in model.parameters())
    model = wrap("resnet")
    parts = [model.backbone.conv1, model.backbone.bn1, model.backbone.layer1, model.heads[0]]
    assert model.exit_table()[0].params == sum(p.numel() for part in parts for p in part.parameters())


def test_it_prints_as_a_table():
    table = wrap("resnet").exit_table()
    lines = str(table).splitlines()
    assert lines[0].split()[:4] == ["exit", "width", "head", "own"]
    assert [line.split()[0] for line in lines[2:]] == ["layer1", "layer2", "layer3", "classifier"]
    assert lines[-1].split()[1:3] == ["-", "-"]
    assert "100.0%" in lines[-1]
    assert repr(table) == str(table)


def test_precision_and_mode_do_not_matter():
    expected = wrap("vit").exit_table()
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.train(), lambda m: m.to("meta"), nn.Module.double):
        model = wrap("vit")
        change(model)
        assert model.exit_table() == expected
    model = wrap("vit")
    model.activation_checkpointing_enable()
    assert model.exit_table() == expected
    assert model.is_activation_checkpointing


def test_counting_leaves_the_model_alone():
    model = wrap("resnet").train()
    model.backbone.bn1.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    model.exit_table()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_costs_are_kept_per_input_size():
    model = wrap("resnet")
    small, large = model.exit_table(), model.exit_table((3, 32, 32))
    assert model.exit_table() is small
    assert model.exit_table([3, 32, 32]) is large
    heads = [sum(4 * row.width * CLASSES for row in small[: i + 1]) for i in range(3)]
    for i in range(3):
        assert large[i].cumulative_macs - heads[i] == 4 * (small[i].cumulative_macs - heads[i])
    for bad in ((1, 16, 16), (3, 16)):
        with pytest.raises(ExitPointError, match=r"does not run on inputs of shape \("):
            model.exit_table(bad)
    with pytest.raises(ConfigError, match="positive integers"):
        model.exit_table(32)


def test_reused_modules_and_tuples_get_the_right_number():
    class Reuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.act, self.fc = nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)
            self.rnn = nn.LSTM(6, 6, batch_first=True)

        def forward(self, x):
            x = self.act(self.mix(self.act(self.mix(x))))
            x, _ = self.rnn(x)
            return self.fc(x[:, -1])

    model = EarlyExitWrapper(Reuse(), exits=["mix@1", "rnn"], head="linear", input_size=(5, 6))
    mix, rnn, head = 5 * 36, 5 * 8 * 36, 18
    assert [row.macs for row in model.exit_table()] == [2 * mix + head, rnn + head, 18]


def test_attention_counts_its_last_projection():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    backbone = nn.Sequential(nn.Linear(4, 8), layer, nn.Flatten(), nn.Linear(40, 3))
    table = EarlyExitWrapper(backbone, exits=["1"], head="linear", input_size=(5, 4)).exit_table()
    attention = 5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert table[0].macs == 5 * 4 * 8 + attention + 2 * 5 * 8 * 16 + 8 * 3
    touched = [*backbone[0].parameters(), *layer.parameters()]
    assert table[0].params == sum(p.numel() for p in touched) + 8 * 3 + 3


def test_a_weightless_copy_has_no_memory_and_shares_nothing():
    model = wrap("swin")
    clone, device = weightless_copy(model)
    assert device.type == "meta"
    assert all(t.is_meta for t in [*clone.parameters(), *clone.buffers()])
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert {id(m) for m in clone.modules()} & {id(m) for m in model.modules()} == set()
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    clone, _ = weightless_copy(tied)
    assert clone[1].weight is clone[0].weight


def test_a_forward_that_makes_its_own_tensors_is_traced():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.mix(x) + torch.arange(4.0))

    model = EarlyExitWrapper(Table(), exits=["mix"], input_size=(4,)).eval()
    assert model.exit_table()[-1].cumulative_macs == 16 + 12 + 12
    assert model(torch.randn(2, 4), threshold=100.0).exit_index.tolist() == [0, 0]
