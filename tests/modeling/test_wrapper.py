"""The wrapper as a user meets it: what it takes, what it returns, what it refuses, and what it leaves alone."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from erde_hub import EarlyExitConfig, EarlyExitOutput, EarlyExitWrapper
from erde_hub.errors import (
    ConfigError,
    ErdeError,
    ExitPointError,
    InputTypeError,
    LabelError,
    RebuildError,
    ShapeError,
    ThresholdError,
    UnknownNameError,
)
from erde_hub.policies import create_policy
from tests.fakes.networks import CLASSES, FAMILIES, Plain, build, images, no_randomness, wrap

KWARGS = FAMILIES["resnet"].kwargs


@functools.cache
def shared_model() -> EarlyExitWrapper:
    return wrap("resnet")


def resnet(**changes) -> EarlyExitWrapper:
    return EarlyExitWrapper(build("resnet"), **{"exits": ["layer1", "layer2"], "backbone_kwargs": KWARGS, **changes})


# Wrapping leaves the backbone alone


@pytest.mark.parametrize("name", FAMILIES)
def test_wrapping_changes_no_weight_no_buffer_no_mode_and_no_output(name):
    backbone = build(name).train()
    modules = list(backbone.modules())
    modules[len(modules) // 2].eval()  # somebody froze a layer
    next(backbone.parameters()).requires_grad_(False)
    x = images(name, 3)
    before = {key: value.clone() for key, value in [*backbone.named_parameters(), *backbone.named_buffers()]}
    modes = [module.training for module in modules]
    wants_gradient = [p.requires_grad for p in backbone.parameters()]
    with torch.no_grad():
        answer = copy.deepcopy(backbone).eval()(x)

    family = FAMILIES[name]
    model = EarlyExitWrapper(backbone, exits=family.exits, backbone_kwargs=family.kwargs, input_size=family.input_size)

    assert model.backbone is backbone
    after = dict([*backbone.named_parameters(), *backbone.named_buffers()])
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    assert [module.training for module in modules] == modes
    assert [p.requires_grad for p in backbone.parameters()] == wants_gradient
    assert all(p.requires_grad for p in model.heads.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.equal(backbone(x), answer)
        assert torch.equal(model(x, threshold=0).logits, answer)
        assert torch.equal(model(x, output_all_exits=True).logits, answer)


def test_wrapping_follows_the_mode_of_the_backbone():
    for training in (True, False):
        model = EarlyExitWrapper(build("resnet").train(training), exits=["layer1"], backbone_kwargs=KWARGS)
        assert [m.training for m in (model, model.heads, model.policy)] == [training] * 3


def test_wrapping_keeps_activation_checkpointing_as_it_was():
    for enabled in (True, False):
        backbone = build("resnet")
        backbone.set_grad_checkpointing(enabled)
        assert (
            EarlyExitWrapper(backbone, exits=["layer1"], backbone_kwargs=KWARGS).is_activation_checkpointing is enabled
        )


def test_hooks_that_change_the_answer_are_respected():
    for place in ("", "1"):
        backbone = build("sequential").eval()
        backbone.get_submodule(place).register_forward_pre_hook(lambda _m, args: (args[0] * 0 + 1,))
        model = EarlyExitWrapper(backbone, exits=["0", "1.0"], input_size=(3, 16, 16)).eval()
        x = images("sequential", 2)
        for call in ({"threshold": 0}, {"output_all_exits": True}, {"threshold": 1e-30}):
            assert torch.equal(model(x, **call).logits, backbone(x))
    backbone = build("resnet")
    backbone.register_forward_pre_hook(lambda _m, args: (args[0] * 0 + 1,))
    with pytest.raises(RebuildError):  # no config could bring the hook back
        EarlyExitWrapper(backbone, exits=["layer1"], backbone_kwargs=KWARGS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_heads_come_in_the_dtype_of_the_backbone(dtype):
    model = EarlyExitWrapper(build("resnet").to(dtype), exits=["layer1"], backbone_kwargs=KWARGS).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = model(images("resnet", 2).to(dtype), threshold=1.0)
    assert out.logits.dtype == dtype


# What it returns


def test_routed_output():
    model = shared_model()
    out = model(images("resnet", 4))
    assert type(out) is EarlyExitOutput
    assert set(out) == {"logits", "exit_index"}
    assert out.logits.shape == (4, CLASSES)
    assert out.exit_index.shape == (4,)
    logits, index = model(images("resnet", 4), return_dict=False)
    assert torch.equal(logits, out.logits)
    assert torch.equal(index, out.exit_index)


def test_output_of_all_exits():
    model = shared_model()
    out = model(images("resnet", 4), output_all_exits=True)
    assert set(out) == {"logits", "exit_logits"}
    assert out.exit_index is None
    assert isinstance(out.exit_logits, tuple)
    assert [z.shape for z in out.exit_logits] == [(4, CLASSES)] * 4
    assert out.logits is out.exit_logits[-1]


def test_train_mode_runs_every_exit_and_sums_the_losses():
    x, labels = images("resnet", 4), torch.tensor([0, 1, 2, 4])
    for weights in (None, [0.25, 0.5, 0.0, 2.0]):
        model = no_randomness(wrap("resnet", exit_weights=weights)).train()
        out = model(x, labels=labels)
        assert set(out) == {"loss", "logits", "exit_logits"}
        expected = sum(w * F.cross_entropy(z, labels) for w, z in zip(weights or [1] * 4, out.exit_logits, strict=True))
        torch.testing.assert_close(out.loss, expected)
        out.loss.backward()
        assert all(p.grad is not None for p in model.heads.parameters())
    assert model(x).loss is None


def test_the_distilled_transformer_trains():
    model = no_randomness(wrap("deit")).train()
    model.backbone.set_distilled_training(True)
    out = model(images("deit", 4), labels=torch.arange(4))
    assert torch.isfinite(out.loss)
    assert [z.shape for z in out.exit_logits] == [(4, CLASSES)] * 4


def test_routing_moves_no_statistics():
    model, x = wrap("resnet"), images("resnet", 4)
    before = {key: value.clone() for key, value in model.named_buffers()}
    first, second = model(x, threshold=1.0), model(x, threshold=1.0)
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())


def test_what_a_model_says_of_itself():
    model = shared_model()
    assert model.exit_names == ["layer1", "layer2", "layer3", "classifier"]
    assert model.num_exits == model.config.num_exits == 4
    assert model.config.architecture == "resnet10_cifar"
    assert model.config.library == "timm"
    assert model.config.input_size == [3, 16, 16]
    assert model.config.num_labels == CLASSES
    assert model.config.exit_weights is None
    assert model.main_input_name == "pixel_values"


# Thresholds


def test_the_threshold_is_stored_and_checked():
    model = resnet()
    assert model.threshold == model.config.threshold == 0.5
    model.threshold = [0.2, 0.3]
    assert model.config.threshold == [0.2, 0.3]
    model.threshold = np.float32(0.25)
    assert model.threshold == 0.25
    assert type(model.threshold) is float
    model.threshold = torch.tensor([1.0, 2.0])
    assert model.threshold == [1.0, 2.0]
    for bad, words in (
        (float("nan"), "nan is not allowed"), (-1, r"-1\.0 is not allowed"), ([0.1], "got 1 thresholds for 2"),
        (None, "got None"), ("a", "got 'a'"), (True, "got True"), ([None, 1], r"\[None, 1\]"), (10**400, "got 1000"),
    ):  # fmt: skip
        with pytest.raises(ThresholdError, match=words) as caught:
            model.threshold = bad
        assert isinstance(caught.value, ValueError)
    assert model.threshold == [1.0, 2.0], "a refused threshold must not stick"


def test_a_threshold_for_one_call_is_not_stored():
    model, x = resnet(threshold=0.0).eval(), images("resnet", 2)
    assert model(x, threshold=100.0).exit_index.tolist() == [0, 0]
    assert model(x).exit_index.tolist() == [2, 2]
    assert model.threshold == 0.0
    model.threshold = 100
    assert model(x).exit_index.tolist() == [0, 0]
    for bad in (float("nan"), -0.1, [0.1, 0.2, 0.3], "x"):
        with pytest.raises(ThresholdError):
            model(x, threshold=bad)


def test_a_threshold_that_was_good_is_remembered_as_it_was():
    model, x = resnet(threshold=0.0).eval(), images("resnet", 2)
    values = [1.0, 100.0]
    model(x, threshold=values)
    values[1] = math.nan
    for bad in (values, [True, 100.0], [1.0]):
        with pytest.raises(ThresholdError):
            model(x, threshold=bad)
    assert model(x, threshold=[0, 100.5]).exit_index.tolist() == [1, 1]
    model.set_policy(create_policy("patience"))
    with pytest.raises(ThresholdError):
        model(x, threshold=[0, 100.5])


def test_one_number_for_all_is_not_a_list_of_one():
    model, x = resnet(threshold=0.5).eval(), images("resnet", 2)
    model(x)
    with pytest.raises(ThresholdError, match="got 1 thresholds for 2"):
        model(x, threshold=[0.5])
    with pytest.raises(ThresholdError, match="got 1 thresholds for 2"):
        model.threshold = [0.5]


def test_the_policys_own_default_threshold():
    assert resnet(policy="confidence").threshold == 0.9
    assert resnet(policy="patience").threshold == 1.0


# Config and label maps


def test_a_config_alone_builds_the_same_model():
    model = shared_model()
    again = EarlyExitWrapper(copy.deepcopy(model.config))
    again.load_state_dict(model.state_dict())
    x = images("resnet", 4)
    assert torch.equal(again.eval()(x, threshold=1.0).logits, model(x, threshold=1.0).logits)
    assert again.exit_names == model.exit_names


@pytest.mark.parametrize(
    ("architecture", "exits", "width", "layout", "kwargs"),
    [
        ("resnet18", ["layer1", "layer2"], 64, "NCHW", {}),
        ("convnext_atto", ["stages.0", "stages.2"], 40, "NCHW", {}),
        ("vit_tiny_patch16_224", ["blocks.3", "blocks.7"], 192, "NLC", {}),
        ("efficientnet_lite0", ["blocks.1", "blocks.2"], 24, "NCHW", {}),
    ],
)
def test_a_config_written_by_hand(architecture, exits, width, layout, kwargs):
    config = EarlyExitConfig(architecture=architecture, num_labels=7, exits=exits, backbone_kwargs=kwargs)
    with torch.device("meta"):
        model = EarlyExitWrapper(config)
    assert (model.heads[0].spec.width, model.heads[0].spec.format) == (width, layout)
    living = EarlyExitWrapper(timm.create_model(architecture, num_classes=7), exits=exits)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in living.state_dict().items()}
    assert model.heads[0].spec.pool == living.heads[0].spec.pool
    assert model.heads[0].spec.prefix_tokens == living.heads[0].spec.prefix_tokens


def test_a_hand_written_config_routes():
    config = EarlyExitConfig(architecture="resnet8_cifar", num_labels=7, exits=["layer1"], backbone_kwargs={"width": 4})
    out = EarlyExitWrapper(config).eval()(torch.randn(2, 3, 16, 16), threshold=10.0)
    assert out.exit_index.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architecture": "resnet81"}, UnknownNameError, "'resnet81'; did you mean 'resnet18'"),
        ({"architecture": None}, ConfigError, "registered timm name"),
        ({"architecture": "hf-hub:timm/resnet18"}, ConfigError, "'hf-hub:timm/resnet18'"),
        ({"library": "tim"}, UnknownNameError, "unknown library 'tim'; did you mean 'timm'"),
        ({"exits": ["layr1"]}, ExitPointError, "no stage 'layr1'; did you mean 'layer1'"),
        ({"exits": ["layer1.0"]}, ExitPointError, "what exit 'layer1.0' reads"),
        ({"exits": ["layer2", "layer1"]}, ExitPointError, r"the order is \['layer1', 'layer2'\]"),
        ({"architecture": "regnetx_002", "exits": ["s1"]}, ExitPointError, "wrap the living model once"),
        ({"backbone_kwargs": {"widht": 8}}, ConfigError, "'widht': 8.* do not fit resnet18"),
        ({"backbone_kwargs": {"stem_widht": 8}}, ConfigError, "do not fit resnet18.*; did you mean 'stem_width'"),
        ({"backbone_kwargs": {"pretrained": True}}, ConfigError, "must not hold 'pretrained'"),
        ({"backbone_kwargs": {"checkpoint_path": "x"}}, ConfigError, "must not hold 'checkpoint_path'"),
        ({"backbone_kwargs": {"act_layer": nn.ReLU}}, ConfigError, "cannot be stored"),
        ({"backbone_kwargs": {"act_layer": "https://x"}}, ConfigError, "points elsewhere"),
        ({"head_kwargs": {"drpout": 0.1}}, ConfigError, "no argument 'drpout'; did you mean 'dropout'"),
        ({"head_kwargs": {"dropout": 1.5}}, ConfigError, "got 1.5"),
        ({"library": "torch"}, ErdeError, "backbone=module"),
    ],
)
def test_a_config_that_cannot_be_built(changes, error, words):
    config = EarlyExitConfig(**{"architecture": "resnet18", "num_labels": 7, "exits": ["layer1"], **changes})
    with pytest.raises(error, match=words) as caught:
        EarlyExitWrapper(config)
    assert isinstance(caught.value, ValueError)


def test_a_miss_among_a_thousand_names_stays_readable():
    with pytest.raises(UnknownNameError) as caught:
        EarlyExitWrapper(EarlyExitConfig(architecture="resnet81", num_labels=7, exits=["layer1"]))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "names",
    [
        [*"abcde"],
        [*np.array([*"abcde"])],
        dict(enumerate("abcde")),
        dict(zip("01234", "abcde", strict=True)),
        dict(zip(np.arange(5), "abcde", strict=True)),
    ],
)
def test_class_names(names):
    config = resnet(id2label=names).config
    json.loads(config.to_json_string())
    assert config.id2label == {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}


@pytest.mark.parametrize("names", [["a", "b"], {0: "a"}, dict.fromkeys("vwxyz", "a"), "abcde", list("abcdef"), 5])
def test_class_names_that_do_not_fit(names):
    with pytest.raises(LabelError, match="5 classes"):
        resnet(id2label=names)


# Arguments


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(ConfigError, match="no argument 'treshold'; did you mean 'threshold'"):
        resnet(treshold=0.5)
    with pytest.raises(ConfigError, match="no argument 'backbone_args'; did you mean 'backbone_kwargs'"):
        resnet(backbone_args={})
    with pytest.raises(UnknownNameError, match="unknown head 'fcc'; did you mean 'fc'"):
        resnet(head="fcc")
    with pytest.raises(UnknownNameError, match="unknown policy 'entropie'; did you mean 'entropy'"):
        resnet(policy="entropie")
    with pytest.raises(ConfigError, match="policy 'entropy' has no argument 'patience'"):
        resnet(policy_kwargs={"patience": 3})
    with pytest.raises(ConfigError, match=r"exit_weights has 2 entries, .* for 3 exits"):
        resnet(exit_weights=[1, 1])
    with pytest.raises(ConfigError, match="goes with a config"):
        resnet(backbone=nn.Identity())


def test_a_refused_wrap_leaves_the_backbone_without_hooks():
    backbone = build("plain")
    for bad in ({"exits": ["stm"]}, {"exits": ["stem"], "head": "fcc"}, {"exits": ["stem"], "threshold": -1}):
        with pytest.raises(ErdeError):
            EarlyExitWrapper(backbone, input_size=(3, 16, 16), **bad)
    residual = build("regnet")
    with pytest.raises(ExitPointError, match="residual"):
        EarlyExitWrapper(residual, exits=["s2.b1.conv1"], input_size=(3, 32, 32))
    assert not any(module._forward_hooks for net in (backbone, residual) for module in net.modules())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: None, "got NoneType"),
        (lambda: "resnet18", "got str"),
        (lambda: timm.create_model("resnet8_cifar", num_classes=0, width=4), "num_classes=0"),
        (lambda: timm.create_model("resnet18", features_only=True), "features_only"),
        (lambda: timm.create_model("resnet8_cifar", num_classes=1, width=4), "at least 2 classes"),
        (lambda: torch.compile(build("plain"), backend="eager"), "compiled module"),
        (lambda: torch.nn.DataParallel(build("plain")), r"DataParallel.*EarlyExitWrapper\(model.module, ...\)"),
        (lambda: torch.jit.ScriptModule(), "TorchScript"),
        (lambda: torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 3)), "lazy layers.*call it once"),
        (lambda: shared_model(), "EarlyExitWrapper is no classifier or language model of transformers"),
    ],
)
def test_what_is_no_classifier_is_refused(make, words):
    with pytest.raises(InputTypeError, match=words) as caught:
        EarlyExitWrapper(make(), exits=["layer1"])
    assert isinstance(caught.value, TypeError)


def test_tensors_on_several_devices_are_refused():
    for place in ("weight", "running_mean"):
        backbone = build("regnet")
        norm = next(module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
        moved = getattr(norm, place).detach().to("meta")
        setattr(norm, place, torch.nn.Parameter(moved) if place == "weight" else moved)
        with pytest.raises(InputTypeError, match=r"several devices \(cpu, meta\).*\.to\(device\)"):
            EarlyExitWrapper(backbone, exits=["s2"], input_size=(3, 32, 32))


def test_a_class_count_that_lies_is_refused():
    backbone = Plain()
    backbone.num_classes = 10
    with pytest.raises(
        InputTypeError, match=rf"says num_classes=10 but returns {CLASSES} logits.*set model\.num_classes = {CLASSES}"
    ):
        EarlyExitWrapper(backbone, exits=["stem"], input_size=(3, 16, 16))


def test_plain_modules_must_say_what_they_take():
    with pytest.raises(ExitPointError, match=r"pass input_size=\(C, H, W\), or example_inputs="):
        EarlyExitWrapper(Plain(), exits=["stem"])
    by_size = EarlyExitWrapper(Plain(), exits=["stem"], input_size=(3, 16, 16))
    by_example = EarlyExitWrapper(Plain(), exits=["stem"], example_inputs=torch.randn(2, 3, 16, 16))
    assert by_size.config.input_size == by_example.config.input_size == [3, 16, 16]
    assert by_size.exit_table() == by_example.exit_table()
    for bad in (32, (3, 0, 16), (3, 16.0, 16), "333"):
        with pytest.raises(ConfigError, match="positive integers"):
            EarlyExitWrapper(Plain(), exits=["stem"], input_size=bad)
    for bad in ((), [torch.tensor(1.0)], "x", [None]):
        with pytest.raises(InputTypeError, match="example_inputs"):
            EarlyExitWrapper(Plain(), exits=["stem"], example_inputs=bad)
    with pytest.raises(ExitPointError, match=r"does not run on inputs of shape \(1, 16, 16\)"):
        EarlyExitWrapper(Plain(), exits=["stem"], input_size=(1, 16, 16))


def test_integer_inputs():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, ids):
            return self.fc(self.mix(self.table(ids)).mean(1))

    model = EarlyExitWrapper(Words(), exits=["mix"], example_inputs=torch.zeros(1, 7, dtype=torch.int64)).eval()
    assert model(torch.zeros(4, 7, dtype=torch.int64), threshold=10.0).exit_index.tolist() == [0] * 4
    assert model.heads[0].spec.format == "NLC"


def test_auto_says_why(caplog):
    transformers_logging.enable_propagation()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        with caplog.at_level(logging.INFO):
            model = resnet(exits="auto")
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.disable_propagation()
    assert "exits='auto'" in caplog.text
    assert all(name in caplog.text for name in model.exit_names[:-1])


# Inputs of a call


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (None, InputTypeError, "got NoneType"),
        ([[1.0]], InputTypeError, "got list"),
        (torch.randn(3, 16, 16), ShapeError, r"4 axes, \(N, 3, 16, 16\), got shape \(3, 16, 16\)"),
        (torch.randn(2, 1, 16, 16), ShapeError, r"3 channels, got shape \(2, 1, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), InputTypeError, "floats, got torch.uint8"),
    ],
)
def test_bad_inputs(bad, error, words):
    for call in ({}, {"output_all_exits": True}):
        with pytest.raises(error, match=words):
            shared_model()(bad, **call)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.tensor([0, 5]), LabelError, "label 5 of row 1 is outside .* 0 to 4"),
        (torch.tensor([-1, 1]), LabelError, "label -1 of row 0 is outside"),
        (torch.tensor([0, 1, 2]), ShapeError, r"shape \(2,\), one per sample, got \(3,\)"),
        (torch.tensor([[0], [1]]), ShapeError, r"got \(2, 1\)"),
        (torch.tensor([0.0, 1.0]), InputTypeError, "got torch.float32"),
        ([0, 1], InputTypeError, "got list"),
    ],
)
def test_bad_labels(bad, error, words):
    for call in ({}, {"output_all_exits": True}):
        with pytest.raises(error, match=words):
            shared_model()(images("resnet", 2), labels=bad, **call)


def test_arguments_that_the_backbone_does_not_take():
    with pytest.raises(InputTypeError, match="CifarResNet with exits takes no argument 'pixel_mask'"):
        shared_model()(images("resnet", 2), pixel_mask=None)
    with pytest.raises(InputTypeError, match=r"'treshold'; did you mean 'threshold'\?"):
        shared_model()(images("resnet", 2), treshold=0.5)
    with pytest.raises(InputTypeError, match=r"'threshold' \(it takes: pixel_values, labels, return_dict\)"):
        shared_model().truncate(0)(images("resnet", 2), threshold=0.5)


# Preprocessing


def test_preprocessing_comes_from_timm_and_follows_the_input_size():
    model = resnet(input_size=(3, 24, 24))
    assert model.config.preprocessing["size"] == [24, 24]
    assert model.config.preprocessing["mean"] == [0.4914, 0.4822, 0.4465]
    processor = model.image_processor()
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 24, 24)
    assert model.eval()(pixels).logits.shape == (1, CLASSES)


def test_preprocessing_set_by_hand_is_what_the_processor_does():
    model = EarlyExitWrapper(Plain(), exits=["stem"], input_size=(3, 16, 16))
    with pytest.raises(ConfigError, match="set it with model"):
        model.image_processor()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    model.set_preprocessing(mean=mean, std=std, size=(16, 16))
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = model.image_processor()(image, return_tensors="pt").pixel_values[0]
    expected = (torch.tensor(image).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"std": (0, 1, 1)}, {"mean": (0.5,)}, {"size": (16,)}, {"size": (0, 16)}, {"crop_pct": 0}, {"crop_pct": 1.5},
     {"interpolation": "cubic"}],
)  # fmt: skip
def test_preprocessing_that_makes_no_sense(changes):
    values = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": (16, 16), **changes}
    with pytest.raises(ConfigError):
        resnet().set_preprocessing(**values)


def test_weights_for_other_channels_bring_no_preprocessing():
    backbone = timm.create_model("resnet8_cifar", num_classes=3, width=4, in_chans=1)
    model = EarlyExitWrapper(backbone, exits=["layer1"], backbone_kwargs={"width": 4, "in_chans": 1})
    assert model.config.input_size == [1, 32, 32]
    assert model.config.preprocessing is None


# Training switches


def test_a_frozen_backbone_stays_frozen():
    model, x = wrap("resnet"), images("resnet", 4)
    model.freeze_backbone()
    model.train()
    assert model.training
    assert model.heads.training
    assert not any(module.training for module in model.backbone.modules())
    buffers = {key: value.clone() for key, value in model.backbone.named_buffers()}
    model(x, labels=torch.arange(4)).loss.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
    assert all(torch.equal(buffers[key], value) for key, value in model.backbone.named_buffers())
    assert not copy.deepcopy(model).train().backbone.training


def test_an_unfrozen_backbone_trains():
    model = wrap("resnet").train()
    before = {key: value.clone() for key, value in model.backbone.named_buffers()}
    model(images("resnet", 4), labels=torch.arange(4)).loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert any(not torch.equal(before[key], value) for key, value in model.backbone.named_buffers())


def test_another_backbone_put_in_place_is_an_error():
    model = wrap("resnet")
    model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))
    with pytest.raises(ExitPointError, match="not the backbone that was wrapped"):
        model(images("resnet", 2), threshold=1.0)


def test_wrapping_under_inference_mode():
    with torch.inference_mode():
        model = EarlyExitWrapper(Plain(), exits=["stem"], input_size=(3, 16, 16)).eval()
        assert model(images("plain", 2), threshold=100.0).exit_index.tolist() == [0, 0]
        assert len(model.exit_table()) == 2
