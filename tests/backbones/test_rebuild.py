"""What cannot be rebuilt from the config is found when wrapping, not when a stranger loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import convert_splitbn_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, RebuildError
from tests.fakes.memory import PeakMemory
from tests.fakes.networks import FAMILIES

_SWIN = FAMILIES["swin"].kwargs
_VIT = FAMILIES["vit"].kwargs
_CONVNEXT = FAMILIES["convnext"].kwargs


@pytest.mark.parametrize(
    ("architecture", "base", "more"),
    [
        ("resnet10_cifar", {"width": 4}, {"global_pool": "max"}),
        ("resnet10_cifar", {"width": 4}, {"act_layer": "gelu"}),
        ("resnet10_cifar", {"width": 4}, {"output_stride": 8}),
        ("resnet10_cifar", {"width": 4}, {"in_chans": 1}),
        ("resnet10_cifar", {}, {"width": 4}),
        # fresh networks hide these behind a zero or a layer scale of 1e-6
        ("convnext_atto", _CONVNEXT, {"act_layer": "relu"}),
        ("vit_tiny_patch16_224", {**_VIT, "init_values": 1e-5}, {"act_layer": "relu"}),
        ("vit_tiny_patch16_224", _VIT, {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {k: v for k, v in _VIT.items() if k != "img_size"}, {"img_size": 32}),
        ("swin_tiny_patch4_window7_224", {k: v for k, v in _SWIN.items() if k != "depths"}, {"depths": [1, 1, 2, 1]}),
        ("efficientnet_lite0", {}, {"pad_type": "same"}),
    ],
)
def test_a_missing_argument_is_found_and_named(architecture, base, more):
    torch.manual_seed(0)
    module = timm.create_model(architecture, num_classes=3, **base, **more)
    with pytest.raises(RebuildError, match="backbone_kwargs") as caught:
        EarlyExitWrapper(module, exits=1, backbone_kwargs=base)
    assert architecture in str(caught.value)
    assert isinstance(caught.value, ValueError)
    model = EarlyExitWrapper(module, exits=1, backbone_kwargs={**base, **more})
    assert model.config.backbone_kwargs == {**base, **more}
    again = EarlyExitWrapper(model.config)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, *model.config.input_size)
    with torch.no_grad():
        assert torch.equal(again.eval()(x, threshold=0).logits, model.eval()(x, threshold=0).logits)


def test_a_wrong_argument_is_found():
    module = timm.create_model("resnet8_cifar", num_classes=3, width=4)
    with pytest.raises(RebuildError, match=r"now \{'width': 8\}"):
        EarlyExitWrapper(module, exits=1, backbone_kwargs={"width": 8})
    with pytest.raises(ConfigError, match=r"do not fit resnet8_cifar.*; did you mean 'width'"):
        EarlyExitWrapper(module, exits=1, backbone_kwargs={"widht": 4})


def test_a_model_that_was_changed_by_hand_is_found():
    module = timm.create_model("resnet8_cifar", num_classes=3, width=4)
    module.layer1[0].act1 = nn.GELU()
    with pytest.raises(RebuildError, match="another output"):
        EarlyExitWrapper(module, exits=1, backbone_kwargs={"width": 4})


@pytest.mark.parametrize(
    ("kwargs", "place"),
    [({"drop_rate": 0.2}, "head_drop"), ({"drop_path_rate": 0.3}, "drop_prob"), ({"attn_drop_rate": 0.1}, "attn_drop")],
)
def test_what_changes_training_alone_is_found(kwargs, place):
    module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **_VIT, **kwargs)
    with pytest.raises(RebuildError, match=rf"dropout or stochastic depth of 0\.0 where.*{place}.*train differently"):
        EarlyExitWrapper(module, exits=1, backbone_kwargs=_VIT)
    assert EarlyExitWrapper(module, exits=1, backbone_kwargs={**_VIT, **kwargs}).config.backbone_kwargs[
        next(iter(kwargs))
    ]


def test_what_undoes_a_change_helps():
    """As the messages on spectral norm and on split batch norms say."""
    module = CHANGED["spectral norm"][0]()
    nn.utils.remove_spectral_norm(module.layer1[0].conv1, "weight")
    EarlyExitWrapper(module, exits=1)
    module = timm.create_model("resnet10t", num_classes=3)
    assert not module.load_state_dict(CHANGED["split norms"][0]().state_dict(), strict=False).missing_keys


def test_another_number_of_classes_is_no_argument():
    module = timm.create_model("resnet8_cifar", width=4)
    module.reset_classifier(7)
    model = EarlyExitWrapper(module, exits=1, backbone_kwargs={"width": 4})
    assert model.config.num_labels == 7
    assert model.config.backbone_kwargs == {"width": 4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_meta_backbones(dtype):
    module = timm.create_model("resnet8_cifar", num_classes=3, width=4).to(dtype)
    EarlyExitWrapper(module, exits=1, backbone_kwargs={"width": 4})
    with torch.device("meta"):
        module = timm.create_model("resnet8_cifar", num_classes=3, width=4)
    assert EarlyExitWrapper(module, exits=1, backbone_kwargs={"width": 4}).device.type == "meta"


def test_weights_that_the_config_would_share_are_found():
    """Loading, and transformers' own set-up of the wrapper, would put one in the place of the other."""
    config = GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=40)
    module = GPT2LMHeadModel(config)
    module.lm_head.weight = nn.Parameter(module.lm_head.weight + 1)
    own = module.lm_head.weight
    with pytest.raises(RebuildError, match=r"shares other weights .*'lm_head\.weight', 'transformer\.wte\.weight'"):
        EarlyExitWrapper(module, exits=1)
    assert module.lm_head.weight is own


def _with(change: Callable[[nn.Module], Any], architecture: str = "resnet10t") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = timm.create_model(architecture, num_classes=3)
        return change(module) or module

    return make


def _new_head(module: nn.Module) -> None:
    module.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(module.num_features, 3))


def _fused(module: nn.Module) -> None:
    module.eval()
    module.conv1[0], module.conv1[1] = fuse_conv_bn_eval(module.conv1[0], module.conv1[1]), nn.Identity()


def _prune(module: nn.Module) -> None:
    prune.l1_unstructured(module.layer1[0].conv1, "weight", 0.3)


def _weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module.layer1[0].conv1)


def _spectral_norm(module: nn.Module) -> None:
    nn.utils.spectral_norm(module.layer1[0].conv1)


def _split_norms(module: nn.Module) -> nn.Module:
    return convert_splitbn_model(module, 2)


def _bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    module = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))
    module.classifier = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return module


def _freeze(module: nn.Module) -> None:
    timm.utils.freeze(module, ["layer1"], include_bn_running_stats=True)


CHANGED = {
    "head": (_with(_new_head), r"classifier 'fc' was replaced by hand.*model\.reset_classifier"),
    "frozen": (_with(_freeze), r"batch norm 'layer1\.0\.bn1' was frozen: timm\.utils\.unfreeze"),
    "pruned": (_with(_prune), r"'layer1\.0\.conv1' is pruned: torch\.nn\.utils\.prune\.remove\(module, 'weight'\)"),
    "spectral norm": (
        _with(_spectral_norm),
        r"'layer1\.0\.conv1' has spectral_norm: .*remove_spectral_norm\(module, 'we",
    ),
    "split norms": (_with(_split_norms), r"batch norm 'conv1\.1' was split .*as it was before.*strict=False"),
    "head of texts": (
        _bert,
        r"classifier 'classifier' was replaced by hand.*Sequential\(model\), example_inputs=input_ids",
    ),
    "weight norm": (_with(_weight_norm), r"weights of 'layer1\.0\.conv1'.*remove_parametrizations"),
    "fused": (_with(_fused), r"'conv1\.1' was fused.*wrap the network as it was before"),
    "reparameterised": (_with(timm.utils.model.reparameterize_model, "repvit_m0_9"), r"'stem\.conv1' was fused or"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_changed_by_hand_is_named_with_what_helps(name):
    make, words = CHANGED[name]
    with pytest.raises(RebuildError, match=words) as caught:
        EarlyExitWrapper(make(), exits=1)
    assert "pass the arguments" not in str(caught.value)
    assert "change its config" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place", "x"),
    [
        ("head", "0.layer2", torch.randn(2, 3, 64, 64)),
        ("fused", "0.layer2", torch.randn(2, 3, 64, 64)),
        ("head of texts", "0.bert.encoder.layer.0", torch.randint(0, 50, (2, 7))),
    ],
)
def test_inside_a_sequence_it_is_kept_as_it_is(name, place, x, tmp_path):
    make = CHANGED[name][0]
    model = EarlyExitWrapper(nn.Sequential(make()), exits=[place], example_inputs=x[:1]).eval()
    model.save_pretrained(tmp_path)
    loaded = EarlyExitWrapper.from_pretrained(tmp_path, backbone=nn.Sequential(make()))
    for ours, theirs in zip(*(m(x, output_all_exits=True).exit_logits for m in (model, loaded)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "size"), [(torchvision.models.googlenet, (3, 96, 96)), (torchvision.models.inception_v3, (3, 299, 299))]
)
def test_auxiliary_logits_are_left_aside(make, size):
    network = make(weights=None, init_weights=False, num_classes=3)
    model = EarlyExitWrapper(network, exits=1, input_size=size).train()
    output = model(torch.randn(2, *size), labels=torch.tensor([0, 1]))
    assert [logits.shape for logits in output.exit_logits] == [(2, 3)] * 2
    output.loss.backward()


def _large_layers() -> nn.Module:
    relu = nn.ReLU()  # twice in one module, so that its stages are compared with its own forward
    convs = [nn.Conv2d(3, 256, 4, stride=4), relu, nn.Conv2d(256, 512, 3, padding=1), relu]
    return nn.Sequential(
        *convs, nn.Conv2d(512, 512, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5)
    )


def _llama() -> nn.Module:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).bfloat16()


_WIDE_VIT = {**_VIT, "embed_dim": 384, "depth": 3}


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (_large_layers, {"input_size": (3, 16, 16)}),
        (lambda: timm.create_model("vit_tiny_patch16_224", **_WIDE_VIT), {"backbone_kwargs": _WIDE_VIT}),
        (lambda: timm.create_model("resnet10t"), {"input_size": (3, 32, 32)}),
        (_llama, {}),
    ],
    ids=["sequential", "vit", "resnet", "llama"],
)
def test_wrapping_takes_the_memory_of_one_more_copy(make, given):
    """In the model's own type. Its own weights are counted when they are first read."""
    backbone = make()
    with PeakMemory() as memory:
        EarlyExitWrapper(backbone, exits=1, **given)
    assert memory.peak < 2.1 * sum(p.numel() * p.element_size() for p in backbone.parameters())
