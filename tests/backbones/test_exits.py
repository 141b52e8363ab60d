"""Where exits can sit: what is listed, what is chosen, and what is refused with the right name."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
import torchvision
from torch import nn

from erde_hub import EarlyExitWrapper, list_exit_points
from erde_hub.backbones import find_adapter, get_adapter, list_libraries
from erde_hub.backbones.base import ExitPoint, ExitPoints, spread_exits
from erde_hub.errors import ExitPointError, UnknownNameError
from erde_hub.heads import FeatureSpec
from tests.fakes.networks import FAMILIES, Plain, build, sequential


@functools.cache
def backbone(name: str) -> nn.Module:
    return build(name)


def exits_of(name: str, exits) -> list[str]:
    family = FAMILIES[name]
    return EarlyExitWrapper(
        backbone(name), exits=exits, backbone_kwargs=family.kwargs, input_size=family.input_size
    ).exit_names[:-1]


# list_exit_points


@pytest.mark.parametrize("name", FAMILIES)
def test_listed_points_are_true(name):
    family, module = FAMILIES[name], backbone(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    points = list_exit_points(module, input_size=family.input_size)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert [p.macs for p in points] == sorted(p.macs for p in points)
    assert all(0 <= p.share <= 1 for p in points)
    seen = {}
    handles = [
        module.get_submodule(p.name).register_forward_hook(lambda _m, _a, out, key=p.name: seen.update({key: out}))
        for p in points
    ]
    module.eval()(torch.randn(2, *family.input_size))
    for handle in handles:
        handle.remove()
    assert list(seen) == [p.name for p in points]
    axis = {"NCHW": 1, "NHWC": 3, "NLC": 2, "NC": 1}
    for point in points:
        assert seen[point.name].shape[axis[point.format]] == point.width == point.spec.width


def test_points_of_a_resnet_print_as_a_table():
    points = list_exit_points(timm.create_model("resnet18"))
    assert [p.name for p in points] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert [p.width for p in points] == [64, 64, 128, 256, 512]
    assert {p.format for p in points} == {"NCHW"}
    lines = str(points).splitlines()
    assert lines[0].split() == ["name", "width", "format", "size", "MMACs", "share"]
    assert lines[4].split()[:4] == ["layer2", "128", "NCHW", "28x28"]
    assert repr(points) == str(points)


@pytest.mark.parametrize(
    ("architecture", "widths", "layout"),
    [
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768], "NHWC"),
        ("volo_d1_224", [192, 384, 384, 384], "NHWC"),
    ],
)
def test_channels_last_models_are_read_along_the_right_axis(architecture, widths, layout):
    with torch.device("meta"):
        module = timm.create_model(architecture)
    points = list_exit_points(module)
    assert [p.format for p in points] == [layout] * len(points)
    assert [p.width for p in points] == widths


def test_a_list_of_maps_is_read_from_its_first():
    with torch.device("meta"):
        points = list_exit_points(timm.create_model("hrnet_w18_small"))
    assert points
    assert all(p.spec.output_index == 0 and len(p.spec.batch_outputs) > 1 for p in points)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "cait_xxs24_224"])
def test_tokens_are_pooled_as_the_backbone_pools_them(architecture):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    module = timm.create_model(architecture, num_classes=3, **kwargs)
    exits = ["patch_embed", "blocks.1"]
    specs = [head.spec for head in EarlyExitWrapper(module, exits=exits, backbone_kwargs=kwargs).heads]
    late = ("avg", 0) if architecture.startswith("cait") else ("token", 1)  # cait's class token joins behind the blocks
    assert [(s.format, s.pool, s.prefix_tokens) for s in specs] == [("NLC", "avg", 0), ("NLC", *late)]


@pytest.mark.parametrize(
    ("architecture", "kwargs", "side"),
    [
        ("coat_tiny", {}, 224),  # embeds maps again, of 28 pixels and fewer
        ("coat_lite_tiny", {"img_size": 64}, 64),
        ("visformer_tiny", {}, 224),  # the first embedding lies behind a convolution
        ("crossvit_9_240", {}, 240),
        ("vit_tiny_patch16_224", {"img_size": 32}, 32),
        ("swin_tiny_patch4_window7_224", {"img_size": 56}, 56),
        ("resnet18", {}, 224),
    ],
)
@pytest.mark.parametrize("noted", [True, False])
def test_the_size_that_a_model_was_created_for(architecture, kwargs, side, noted):
    with torch.device("meta"):
        module = timm.create_model(architecture, **kwargs)
    if not noted:  # as earlier versions of timm leave it
        vars(module).pop("_traits", None)
    assert find_adapter(module).describe(module)["input_size"] == [3, side, side]


def test_a_network_that_embeds_its_maps_again_needs_no_size():
    with torch.device("meta"):
        coat = timm.create_model("coat_lite_tiny", num_classes=3)
    assert len(EarlyExitWrapper(coat, exits="auto").exit_names) > 1


@pytest.mark.long
@pytest.mark.timeout(1200)  # over a thousand networks
def test_sizes_of_all_of_timm():
    tried = 0
    for name in timm.list_models():
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if cfg is None:
            continue
        with torch.device("meta"):
            module = timm.create_model(name)
        if hasattr(module, "num_classes"):
            assert find_adapter(module).describe(module)["input_size"] == list(cfg.input_size), name
            tried += 1
    assert tried > 1000


def test_average_pooled_tokens_leave_the_class_token_out():
    kwargs = {**FAMILIES["vit"].kwargs, "global_pool": "avg"}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    spec = EarlyExitWrapper(module, exits=["blocks.1"], backbone_kwargs=kwargs).heads[0].spec
    assert (spec.pool, spec.prefix_tokens) == ("avg", 1)


def test_what_list_exit_points_refuses():
    with pytest.raises(ExitPointError, match=r"Plain does not say what it takes: pass input_size"):
        list_exit_points(Plain())
    with pytest.raises(ExitPointError, match=r"does not run on inputs of shape \(5, 16, 16\)"):
        list_exit_points(Plain(), input_size=(5, 16, 16))
    assert list_exit_points(Plain(), example_inputs=torch.randn(1, 3, 16, 16)) == list_exit_points(
        Plain(), input_size=(3, 16, 16)
    )


def test_the_table_of_adapters():
    assert list_libraries() == ["timm", "transformers", "torch"]
    assert find_adapter(backbone("resnet")).library == "timm"
    assert find_adapter(Plain()).library == "torch"
    assert get_adapter("torch").library == "torch"
    with pytest.raises(UnknownNameError, match="unknown library 'tim'; did you mean 'timm'"):
        get_adapter("tim")


# Names


@pytest.mark.parametrize(
    ("name", "exits", "words"),
    [
        ("resnet", ["layr1"], r"CifarResNet has no stage 'layr1'; did you mean 'layer1'\? \(exit points: act1, layer1"),
        ("plain", ["trunk.c"], r"no stage 'trunk\.c'; did you mean 'trunk\.[ab]'"),
        ("resnet", [""], "no stage ''"),
        ("resnet", ["layer2", "layer1"], r"got \['layer2', 'layer1'\], the order is \['layer1', 'layer2'\]"),
        ("resnet", ["layer1", "layer1.0"], r"the order is \['layer1\.0', 'layer1'\]"),
        ("resnet", ["layer1", "layer1"], "names 'layer1' twice"),
        ("resnet", ["layer1", "layer1@0"], "names 'layer1@0' twice"),
        ("resnet", ["layer1", "fc"], "'fc' is at or behind the classifier"),
        ("vit", ["head"], "'head' is at or behind the classifier"),
        ("resnet", ["global_pool"], "'global_pool' is at or behind the classifier, its pooling included"),
        ("vit", ["fc_norm"], "'fc_norm' is at or behind the classifier"),
        ("convnext", ["head.global_pool"], "'head.global_pool' is at or behind the classifier"),
        ("plain", ["fc"], "'fc' is at or behind the classifier"),
        ("resnet", [3], "must hold module names, got 3"),
        ("resnet", [], "exits is empty"),
        ("resnet", "layer1", r"for one exit: \['layer1'\]"),
        ("resnet", "atuo", r"got 'atuo'; did you mean 'auto'\?"),
        ("resnet", None, "got None"),
        ("resnet", {"layer1"}, "a list of names, a number or 'auto'"),
        ("resnet", 1.5, r"got 1\.5"),
        ("resnet", True, "got True"),
        ("resnet", 0, "exits=0: this backbone has 5 places, ask for 1 to 5"),
        ("resnet", -1, "exits=-1"),
        ("resnet", 99, "exits=99: this backbone has 5 places"),
        ("resnet", ["layer1@1"], "'layer1' is called 1 times, so the last call is layer1@0"),
        ("resnet", ["layer1@x"], "part after '@'"),
        ("resnet", ["layer1.0.conv1"], r"\['layer1\.0\.conv1'\].*inside a residual block.*name the enclosing block"),
        ("regnet", ["s2.b1.conv1"], "inside a residual block"),
        ("swin", ["layers.1.blocks.0.attn"], "residual block"),
        ("vit", ["blocks.1.mlp.fc1"], "residual block"),
        ("resnet", ["bn1"], "'bn1' is overwritten in place by the layer behind it"),
    ],
)
def test_places_that_are_refused(name, exits, words):
    with pytest.raises(ExitPointError, match=words) as caught:
        exits_of(name, exits)
    assert isinstance(caught.value, ValueError)


def test_a_module_that_is_never_called_or_called_often():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.spare = nn.ReLU(), nn.Linear(2, 2)
            self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.act(self.b(self.act(self.a(x)))))

    with pytest.raises(ExitPointError, match="'spare' is never called"):
        EarlyExitWrapper(Odd(), exits=["spare"], input_size=(4,))
    with pytest.raises(ExitPointError, match=r"'act' is called 2 times.*\(act@0, act@1\)"):
        EarlyExitWrapper(Odd(), exits=["act"], input_size=(4,))
    with pytest.raises(ExitPointError, match="the last call is act@1"):
        EarlyExitWrapper(Odd(), exits=["act@2"], input_size=(4,))
    with pytest.raises(ExitPointError, match=r"the order is \['act@0', 'act@1'\]"):
        EarlyExitWrapper(Odd(), exits=["act@1", "act@0"], input_size=(4,))
    assert [p.name for p in list_exit_points(Odd(), input_size=(4,))] == ["a", "b"]


def test_one_module_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.again, self.entry = self.block, self.stem

        def forward(self, x):
            return self.fc(self.again(self.block(self.entry(x))))

    with pytest.raises(ExitPointError, match=r"'again' is the same module as 'block'.*2 times.*\(block@0, block@1\)"):
        EarlyExitWrapper(Twice(), exits=["again"], input_size=(4,))
    with pytest.raises(ExitPointError, match=r"'entry' is the same module as 'stem'.*name it so \(stem\)"):
        EarlyExitWrapper(Twice(), exits=["entry"], input_size=(4,))
    assert EarlyExitWrapper(Twice(), exits=["stem", "block@0"], input_size=(4,)).exit_names[:2] == ["stem", "block@0"]


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("resnet", ("act1", "layer1.0", "layer4")),
        ("resnet", ("layer1@0",)),
        ("convnext", ("stem", "stages.1.blocks.0", "stages.1", "norm_pre")),
        ("vit", ("patch_embed", "blocks.1", "norm")),
        ("regnet", ("stem", "s1.b1", "s4")),
        ("plain", ("stem.conv", "trunk.b")),
        ("sequential", ("0", "1.0", "1", "2", "3")),
    ],
)
def test_places_beside_the_usual_ones(name, exits):
    assert exits_of(name, exits) == list(exits)


# Numbers and "auto"


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "plain", "sequential"])
def test_a_number_spreads_exits_evenly_over_the_computation(name):
    points = list_exit_points(backbone(name), input_size=FAMILIES[name].input_size)
    shares = {p.name: p.share for p in points}
    for number in (1, 2, len(points)):
        chosen = exits_of(name, number)
        assert len(chosen) == number
        assert chosen == [p.name for p in points if p.name in chosen]
        best = min(abs(share - 1 / (number + 1)) for share in shares.values())
        if number == 1:
            assert abs(shares[chosen[0]] - 0.5) == pytest.approx(best)


def test_evenly_means_near_to_the_even_shares():
    module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **FAMILIES["vit"].kwargs | {"depth": 12})
    kwargs = FAMILIES["vit"].kwargs | {"depth": 12}
    model = EarlyExitWrapper(module, exits=3, backbone_kwargs=kwargs)
    assert model.exit_names == ["blocks.2", "blocks.5", "blocks.8", "classifier"]


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "plain", "sequential"])
def test_auto_avoids_places_that_are_useless(name):
    shares = {p.name: p.share for p in list_exit_points(backbone(name), input_size=FAMILIES[name].input_size)}
    chosen = exits_of(name, "auto")
    assert 1 <= len(chosen) <= 3
    assert all(0.08 <= shares[exit_name] <= 0.92 for exit_name in chosen)


@pytest.mark.parametrize(
    ("shares", "exits", "expected"),
    [
        ([10, 30, 64, 65], "auto", [10, 30, 64]),
        ([30, 64, 65], "auto", [30, 64]),
        ([64, 64, 65], "auto", [64]),
        ([10, 64, 64, 66, 90], 3, [10, 64, 90]),
        ([30, 64, 65], 3, [30, 64, 65]),
        (list(range(10, 90, 2)), 3, [24, 50, 74]),
        (list(range(10, 90, 2)), 40, list(range(10, 90, 2))),
    ],
)
def test_places_of_nearly_one_cost_are_not_chosen_together(shares, exits, expected):
    spec = FeatureSpec(8, "NC")
    points = ExitPoints(ExitPoint(str(i), 8, "NC", share, share / 100, spec) for i, share in enumerate(shares))
    picked, reason = spread_exits(points, exits)
    assert [point.macs for point in picked] == expected
    assert reason.startswith(f"{len(expected)} of {len(shares)} places")


def test_no_place_at_all():
    with pytest.raises(ExitPointError, match="no place for an exit"):
        EarlyExitWrapper(nn.Sequential(nn.Linear(4, 3)), exits="auto", input_size=(4,))
    small_classifier = nn.Sequential(nn.Linear(400, 9), nn.Linear(9, 3))
    with pytest.raises(ExitPointError, match=r"saves computation \(the best, '0', is at 99%.*exits=\['module"):
        EarlyExitWrapper(small_classifier, exits="auto", input_size=(400,))
    assert EarlyExitWrapper(small_classifier, exits=["0"], input_size=(400,)).exit_names == ["0", "classifier"]


class Inside(nn.Module):
    """A network without its classifier, in a module of one's own."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.fc = trunk, nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.trunk(x))


def test_auto_inside_two_modules_takes_no_two_places_of_nearly_one_cost():
    with torch.device("meta"):
        swin = torchvision.models.SwinTransformer([4, 4], 32, [1, 1, 3, 1], [1, 2, 4, 8], [4, 4], num_classes=3)
        model = EarlyExitWrapper(Inside(Inside(swin, 3), 4), exits="auto", input_size=(3, 64, 64))
    assert model.exit_names[:-1] == [f"trunk.trunk.features.{i}" for i in (1, 3, 5)]


def test_stages_are_found_inside_a_network_that_is_part_of_another():
    trunk = timm.create_model("resnet18", num_classes=0)
    with torch.device("meta"):
        vit = torchvision.models.vit_b_16(weights=None, num_classes=5)
    for net, prefix in ((Inside(trunk, 512), "trunk.layer"), (Inside(Inside(trunk, 512), 4), "trunk.trunk.layer")):
        names = EarlyExitWrapper(net, input_size=(3, 64, 64)).exit_names[:-1]
        assert len(names) == 3
        assert all(name.startswith(prefix) for name in names)
    wrapped = EarlyExitWrapper(vit, input_size=(3, 224, 224))
    assert wrapped.exit_names[:-1] == [f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8)]


def test_a_sequence_is_offered_and_not_its_last_layer_too():
    with torch.device("meta"):
        points = list_exit_points(torchvision.models.resnet18(weights=None), input_size=(3, 64, 64))
    assert [p.name for p in points if "layer1" in p.name] == ["layer1.0", "layer1"]


def test_sequentials_run_staged_and_subclasses_by_hooks():
    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 2

    assert EarlyExitWrapper(sequential(), exits=["0"], input_size=(3, 16, 16)).runner.stages()
    assert EarlyExitWrapper(Own(*sequential()), exits=["0"], input_size=(3, 16, 16)).runner.stages() is None
