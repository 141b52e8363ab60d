"""A model cut off behind an exit gives that exit's logits bit for bit, and is saved, loaded, exported and compiled."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from support_models import transformers_model
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline

from erde_hub import EarlyExitConfig, EarlyExitWrapper, TruncatedConfig, TruncatedModel
from erde_hub.errors import CheckpointError, ConfigError, ExitNotReachedError, ExitPointError, InputTypeError
from erde_hub.modeling.truncated import RemovedModule
from tests.fakes.networks import CLASSES, FAMILIES, StructureNet, all_logits, build, images, spread, wrap


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


#: Deep networks of maps, as resnet and convnext are shallow ones.
DEEP = ("efficientnet", "mobilenetv3", "regnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in DEEP else name for name in FAMILIES]
)
def test_every_exit_of_every_family(name):
    model, x = wrap(name), images(name, 3)
    before = copy.deepcopy(model.state_dict())
    logits = all_logits(model, x)
    sizes = []
    for k, exit_name in enumerate(model.exit_names):
        static = model.truncate(k)
        assert static.exit_name == exit_name
        assert not static.training
        with torch.no_grad():
            assert torch.equal(static(x).logits, logits[k])
        sizes.append(numbers(static))
    assert sizes[0] < sizes[1] < sizes[2]
    table = model.exit_table()
    assert all(size <= row.cumulative_params for size, row in zip(sizes[:3], table, strict=False))
    assert sizes[3] == numbers(model.backbone)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, x), logits, strict=True))


@pytest.mark.parametrize("name", ["resnet", "vit", "plain"])
def test_exit_table(name):
    model = wrap(name)
    table = model.exit_table()
    for k, whole in enumerate(table):
        static = model.truncate(k)
        (row,) = static.exit_table()
        assert (row.exit, row.width, row.head) == (whole.exit, whole.width, whole.head)
        assert row.params == row.cumulative_params == numbers(static)
        assert row.macs == row.cumulative_macs
        # The heads of the exits before are missing.
        heads = sum(numbers(head) for head in model.heads[:k])
        assert row.params == whole.cumulative_params - heads
        assert (row.macs == whole.cumulative_macs) if k == 0 else (0.8 < row.macs / whole.cumulative_macs < 1)


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "plain"])
def test_saved_and_loaded(name, tmp_path):
    model, x = wrap(name, id2label=[f"class {i}" for i in range(CLASSES)]), images(name, 3)
    logits = all_logits(model, x)
    own = {} if FAMILIES[name].architecture else {"backbone": build(name)}
    for k in (1, 3):
        folder = tmp_path / str(k)
        model.truncate(k).save_pretrained(folder)
        stored = json.loads((folder / "config.json").read_text())
        assert stored["model_type"] == "early_exit_truncated"
        loaded = AutoModelForImageClassification.from_pretrained(folder, **own)
        assert isinstance(loaded, TruncatedModel)
        assert loaded.config.id2label[1] == "class 1"
        with torch.no_grad():
            assert torch.equal(loaded(x).logits, logits[k])
        assert numbers(loaded) == numbers(model.truncate(k))


def test_a_plain_backbone_is_asked_for_and_left_alone(tmp_path):
    model = wrap("plain")
    model.truncate("stem").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="backbone=module"):
        TruncatedModel.from_pretrained(tmp_path)
    backbone = build("plain")
    loaded = TruncatedModel.from_pretrained(tmp_path, backbone=backbone)
    assert not any(isinstance(m, RemovedModule) for m in backbone.modules())
    assert backbone.trunk["a"].conv.weight is not None
    assert float(loaded.backbone.scale) == 1.5, "a buffer that no checkpoint holds"


def test_the_pipeline_takes_it(tmp_path):
    from PIL import Image  # noqa: PLC0415

    wrap("convnext").truncate(0).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), top_k=2)
    assert len(classify(Image.new("RGB", (40, 40)))) == 2


def test_a_text_model(tmp_path):
    torch.manual_seed(0)
    model = spread(EarlyExitWrapper(transformers_model("Bert"), exits=2)).eval()
    ids = torch.randint(5, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    texts = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        logits = model(**texts, output_all_exits=True).exit_logits
        for k in range(3):
            model.truncate(k).save_pretrained(tmp_path / str(k))
            loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(k))
            assert torch.equal(loaded(**texts).logits, logits[k])
    assert numbers(model.truncate(0)) < numbers(model.truncate(1)) < numbers(model)


@pytest.mark.parametrize("name", ["resnet", "plain"])
def test_torch_export_with_any_batch(name):
    model = wrap(name)
    static = model.truncate(1)
    program = torch.export.export(static, (images(name, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = images(name, 5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x).logits, all_logits(model, x)[1], rtol=1e-5, atol=1e-5)
    assert len(program.state_dict) == len(static.state_dict())


@pytest.mark.parametrize("name", ["plain"])
def test_torch_onnx_export(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = wrap(name), images(name, 2)
    torch.onnx.export(model.truncate(0), (x,), tmp_path / "static.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "static.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), all_logits(model, x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "whole"), [("resnet", True), ("plain", False)])
def test_torch_compile(name, whole):
    """Staged families in one graph; the exception that ends other backbones is left to Python."""
    model, x = wrap(name), images(name, 2)
    static = torch.compile(model.truncate(1), backend="eager", fullgraph=whole)
    try:
        with torch.no_grad():
            assert torch.equal(static(x).logits, all_logits(model, x)[1])
    finally:
        torch._dynamo.reset()


def test_copies_pickles_training_and_labels():
    model, x = wrap("resnet"), images("resnet", 3)
    static = model.truncate("layer2")
    expected = all_logits(model, x)[1]
    for copied in (copy.deepcopy(static), pickle.loads(pickle.dumps(static))):
        with torch.no_grad():
            assert torch.equal(copied(x).logits, expected)
    labels = torch.tensor([0, 1, 2])
    out = static.train()(x, labels=labels)
    assert torch.equal(out.loss, nn.functional.cross_entropy(out.logits, labels))
    out.loss.backward()
    assert all(p.grad is not None for p in static.parameters())
    assert all(p.grad is None for p in model.parameters()), "its weights are its own"
    assert model.train().truncate(0).training
    assert len(static(x, labels=labels, return_dict=False)) == 2


def test_structures_between_stages():
    torch.manual_seed(0)
    model = spread(EarlyExitWrapper(StructureNet("tuple"), exits=["a", "b"], input_size=(3, 8, 8))).eval()
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(model.truncate("a")(x).logits, all_logits(model, x)[0])


class Borrowing(nn.Module):
    """Reads a weight of its last layer before the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.tail = nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x):
        x = self.a(x * self.tail.weight.mean())
        return self.fc(self.tail(self.b(x)).mean((2, 3)))


def test_a_module_that_is_read_and_not_called_stays():
    torch.manual_seed(0)
    model = spread(EarlyExitWrapper(Borrowing(), exits=["a", "b"], input_size=(3, 8, 8))).eval()
    x = torch.randn(3, 3, 8, 8)
    static = model.truncate("a")
    assert list(static.config.removed_modules) == ["b", "fc"]
    assert torch.equal(static(x).logits, all_logits(model, x)[0])


def test_what_was_removed_is_not_run():
    with pytest.raises(ExitNotReachedError, match="'layer3' was removed"):
        wrap("resnet").truncate("layer2").backbone.layer3(torch.zeros(1))
    static = wrap("plain").truncate("stem")
    static.backbone.stem.forward = lambda x: x
    static.backbone.stem._forward_hooks.clear()
    with pytest.raises(ExitNotReachedError):
        static(images("plain", 1))


@pytest.mark.parametrize(
    ("exit_", "words"),
    [
        ("layer9", "no exit 'layer9'; did you mean 'layer"),
        (4, "got 4 .exits: 0 layer1"),
        (-1, "got -1"),
        (True, "got T"),
    ],
)
def test_exits_that_are_not_there(exit_, words):
    with pytest.raises(ExitPointError, match=words):
        wrap("resnet").truncate(exit_)


def test_wrong_configs_and_inputs():
    static = wrap("resnet").truncate(0)
    with pytest.raises(InputTypeError, match=r"model\.truncate"):
        TruncatedModel(EarlyExitConfig(architecture="resnet10_cifar", exits=["layer1"], num_labels=3))
    with pytest.raises(ConfigError, match="one exit"):
        TruncatedConfig(architecture="resnet10_cifar", exits=["layer1", "layer2"], num_labels=3)
    with pytest.raises(ConfigError, match="removed_modules"):
        TruncatedConfig(architecture="resnet10_cifar", exits=["layer1"], num_labels=3, removed_modules=[3])
    values = {**static.config.to_dict(), "removed_modules": ["layer9"]}
    with pytest.raises(ExitPointError, match="'layer9', which the config removes"):
        TruncatedModel(TruncatedConfig.from_dict(values))
    with pytest.raises(InputTypeError, match="'mask'"):
        static(images("resnet", 1), mask=1)
