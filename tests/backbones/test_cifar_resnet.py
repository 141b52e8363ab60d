"""The CIFAR ResNets: cost, structure, and what timm offers for its own models."""

from __future__ import annotations

import importlib
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import erde_hub.backbones.cifar_resnet
from erde_hub.errors import ConfigError

# methods.md, section 2: cumulative MMACs after the stages, total MMACs, millions of parameters, at width 64
TABLE = {
    "resnet50_cifar": ([219.87, 555.42, 1033.57, 1297.81], 1297.83, 23.52),
    "resnet18_cifar": ([152.76, 286.98, 421.20, 555.42], 555.42, 11.17),
    "resnet10_cifar": ([77.27, 135.99, 194.71, 253.43], 253.43, 4.90),
    "resnet8_cifar": ([77.27, 135.99, 194.71], 194.71, 1.23),
}
NAMES = list(TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_cost_agrees_with_the_table(name):
    stages, total, params = TABLE[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    counts = {module: sum(by_operator.values()) / 2e6 for module, by_operator in counter.get_flop_counts().items()}
    cumulative, found = counts["CifarResNet.conv1"], []
    for info in model.feature_info[1:]:
        cumulative += counts[f"CifarResNet.{info['module']}"]
        found.append(round(cumulative, 2))
    assert found == stages
    assert round(counter.get_total_flops() / 2e6, 2) == total
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == params


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [8, 64])
def test_feature_info_tells_the_truth(name, width):
    model = timm.create_model(name, num_classes=10, width=width).eval()
    seen = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda m, i, out, key=info["module"]: seen.__setitem__(key, out.shape))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    expected = {i["module"]: (2, i["num_chs"], 32 // i["reduction"], 32 // i["reduction"]) for i in model.feature_info}
    assert {key: tuple(shape) for key, shape in seen.items()} == expected
    assert model.feature_info[0]["num_chs"] == width
    assert [i["reduction"] for i in model.feature_info] == [1, 1, 2, 4, 8][: len(model.feature_info)]


@pytest.mark.parametrize("name", NAMES)
def test_rebuilds_from_its_architecture_and_arguments(name):
    model = timm.create_model(name, num_classes=7, width=8).eval()
    assert model.pretrained_cfg["architecture"] == name
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    again = timm.create_model(model.pretrained_cfg["architecture"], num_classes=model.num_classes, width=8).eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


@pytest.mark.parametrize("name", ["resnet8_cifar", "resnet10_cifar"])
def test_parts_make_the_whole_with_and_without_checkpointing(name):
    model = timm.create_model(name, width=8)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for module in model.modules():  # the last norm of a block starts at zero, which would hide the block
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0.7)
    model.eval()
    whole = model(images)
    assert torch.equal(model.forward_head(model.forward_features(images)), whole)
    last, parts = model.forward_intermediates(images)
    assert [tuple(p.shape[1:]) for p in parts] == [
        (i["num_chs"], 32 // i["reduction"], 32 // i["reduction"]) for i in model.feature_info
    ]
    assert torch.equal(last, parts[-1])
    assert torch.equal(model.forward_head(last), whole)
    model.set_grad_checkpointing()
    assert torch.equal(model(images), whole)
    model.train()
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("name", "stages"), [("resnet8_cifar", 3), ("resnet18_cifar", 4)])
def test_features_only_and_pruning_count_the_stages_there_are(name, stages):
    images = torch.randn(1, 3, 32, 32)
    features = timm.create_model(name, width=8, features_only=True)(images)
    assert [f.shape[1] for f in features] == [8] + [8 * 2**i for i in range(stages)]

    model = timm.create_model(name, width=8)
    assert model.prune_intermediate_layers(stages - 1, prune_head=False) == list(range(2, stages + 1))
    assert model.fc.out_features == 10  # nothing was cut, so the head fits still
    assert model.prune_intermediate_layers([1]) == [1]
    assert model.forward_features(images).shape == (1, 8, 32, 32)


def test_state_dict_has_timms_names():
    def names(model):
        return set(model.state_dict())

    assert names(timm.create_model("resnet18_cifar", width=8)) == names(timm.create_model("resnet18"))
    assert names(timm.create_model("resnet50_cifar", width=8)) == names(timm.create_model("resnet50"))
    eight = names(timm.create_model("resnet8_cifar", width=8))
    assert not any(key.startswith("layer4") for key in eight)
    assert any(key.startswith("layer3") for key in eight)


def test_timms_arguments_pass_through():
    model = timm.create_model(
        "resnet10_cifar", width=8, drop_rate=0.3, drop_path_rate=0.1, zero_init_last=False, in_chans=1, num_classes=0
    )
    assert model.drop_rate == 0.3
    assert model.layer4[0].drop_path is not None
    assert model.layer1[0].bn2.weight.eq(1).all()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 64)
    assert timm.create_model("resnet10_cifar", width=8).layer1[0].bn2.weight.eq(0).all()
    model.reset_classifier(5)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_the_stem_is_initialised_like_timms_other_convolutions():
    torch.manual_seed(0)
    stem = timm.create_model("resnet10_cifar", width=64).conv1.weight
    assert stem.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("width", [0, -2, 7, 1, 16.0, "16", True])
def test_bad_width(width):
    with pytest.raises(ConfigError, match=r"width=.* is not allowed: give an even integer") as caught:
        timm.create_model("resnet10_cifar", width=width)
    assert repr(width) in str(caught.value)


def test_arguments_that_width_decides_are_refused():
    with pytest.raises(ConfigError, match=r"stem_width=32 cannot be set: it follows from width=16"):
        timm.create_model("resnet10_cifar", width=16, stem_width=32)


@pytest.fixture
def module_as_it_was():
    """Its classes are put back, as models of other tests are of these."""
    module = erde_hub.backbones.cifar_resnet
    names = dict(vars(module))
    yield
    vars(module).update(names)


@pytest.mark.usefixtures("module_as_it_was")
def test_importing_again_is_silent_and_a_stolen_name_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(erde_hub.backbones.cifar_resnet)
    assert timm.create_model("resnet8_cifar", width=8).num_classes == 10

    def resnet8_cifar():
        raise AssertionError

    with pytest.warns(UserWarning, match="Overwriting resnet8_cifar"):
        timm.models.register_model(resnet8_cifar)
    try:
        with pytest.warns(UserWarning, match="Overwriting resnet8_cifar"):
            importlib.reload(erde_hub.backbones.cifar_resnet)
    finally:
        importlib.reload(erde_hub.backbones.cifar_resnet)
    assert timm.create_model("resnet8_cifar", width=8).num_classes == 10
