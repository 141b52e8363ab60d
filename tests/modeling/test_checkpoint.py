"""What is saved loads: the same tensors, the same outputs, through every door; and what is damaged says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.utils import logging as transformers_logging

from erde_hub import EarlyExitConfig, EarlyExitWrapper
from erde_hub.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    ExitNotReachedError,
    ExitPointError,
    InputTypeError,
    RebuildError,
    ThresholdError,
)
from tests.fakes.networks import CLASSES, FAMILIES, Plain, images, spread, wrap

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def model():
    return wrap("resnet", id2label=["ant", "bee", "cat", "dog", "eel"], threshold=[1.2, 1.3, 1.4])


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        mark = file.metadata()
    weights = {key: value.clone() for key, value in load_file(path).items()} | changes
    save_file({k: v for k, v in weights.items() if v is not None}, path, mark)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def assert_same_model(a: EarlyExitWrapper, b: EarlyExitWrapper, x: torch.Tensor) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    buffers = dict(b.named_buffers())  # those that no checkpoint holds, too
    assert [key for key, value in a.named_buffers() if not torch.equal(value, buffers[key])] == []
    with torch.no_grad():
        for call in ({"threshold": 1.2}, {"threshold": 0}):
            one, two = a(x, **call), b(x, **call)
            assert torch.equal(one.logits, two.logits)
            assert torch.equal(one.exit_index, two.exit_index)
        for one, two in zip(
            a(x, output_all_exits=True).exit_logits, b(x, output_all_exits=True).exit_logits, strict=True
        ):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_outputs_come_back_bit_for_bit(name, tmp_path):
    model = wrap(name)
    if name == "plain":
        model.backbone.scale.fill_(0.7)
    model.save_pretrained(tmp_path)
    assert "model.safetensors" in {path.name for path in tmp_path.iterdir()}
    family, living = FAMILIES[name], {}
    if family.make is not None:
        living = {"backbone": family.make()}
        if name == "plain":
            living["backbone"].scale.fill_(0.7)  # what no checkpoint holds is the module's own business
    again = EarlyExitWrapper.from_pretrained(tmp_path, **living)
    assert not any(module.training for module in again.modules())
    assert again.exit_names == model.exit_names
    assert_same_model(model, again, images(name, 3))


def test_mixer_comes_back_bit_for_bit(tmp_path):
    backbone = timm.create_model("mixer_s32_224", num_classes=CLASSES, img_size=64)
    model = spread(EarlyExitWrapper(backbone, exits=["blocks.1"], backbone_kwargs={"img_size": 64})).eval()
    model.save_pretrained(tmp_path)
    assert_same_model(model, EarlyExitWrapper.from_pretrained(tmp_path), torch.randn(2, 3, 64, 64))


def test_saving_leaves_the_model_as_it_was(model, tmp_path):
    before = model(images("resnet")).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(model(images("resnet")).logits, before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("where", ["erde_hub.modeling.checkpoint.save_file", "erde_hub.config.write_text"])
def test_a_full_disk_is_named_and_the_checkpoint_before_survives(model, damaged, monkeypatch, error, where):
    def full(*args, **kwargs):
        raise error

    before = {path.name: path.read_bytes() for path in damaged.iterdir()}
    other = wrap("resnet").eval()
    other.threshold = 0.125
    monkeypatch.setattr(where, full)
    with pytest.raises(CheckpointWriteError, match=f"{damaged.name}.*No space left") as caught:
        other.save_pretrained(damaged)
    assert isinstance(caught.value, ValueError)
    assert {path.name: path.read_bytes() for path in damaged.iterdir()} == before


def test_a_disk_that_is_really_full(tmp_path):
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        model = wrap("plain")
        model.save_pretrained(tmp_path / "a")
        before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
        with (tmp_path / "filler").open("wb", buffering=0) as filler:
            while shutil.disk_usage(tmp_path).free:
                filler.write(bytes(4096))
        model.threshold = 0.125
        for folder in ("a", "b"):
            with pytest.raises(CheckpointWriteError, match="No space left"):
                model.save_pretrained(tmp_path / folder)
        assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
        assert not (tmp_path / "b").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_shards_and_one_file_replace_each_other(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 1
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors"}
    other = wrap("resnet").eval()
    other.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_model(other, EarlyExitWrapper.from_pretrained(tmp_path), images("resnet", 2))


def test_the_files(saved):
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    config = json.loads((saved / "config.json").read_text())
    for key in ("format_version", "library", "architecture", "backbone_kwargs", "exits", "head", "policy", "threshold"):
        assert key in config
    assert config["input_size"] == [3, 16, 16]
    assert config["id2label"]["4"] == "eel"
    assert "backbone" not in config
    assert config["model_type"] == "early_exit"
    assert config["erde_hub_version"]


def test_the_loaded_model_does_not_hang_on_its_file(model, damaged):
    loaded = EarlyExitWrapper.from_pretrained(damaged)
    size = (damaged / "model.safetensors").stat().st_size
    with (damaged / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    assert_same_model(model, loaded, images("resnet", 2))


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_model(model, EarlyExitWrapper.from_pretrained(tmp_path), images("resnet", 2))


def test_a_compiled_backbone_is_saved_as_itself(tmp_path):
    model = wrap("resnet")
    model.backbone = torch.compile(model.backbone, backend="eager")
    model.save_pretrained(tmp_path)
    assert_same_model(wrap("resnet"), EarlyExitWrapper.from_pretrained(tmp_path), images("resnet", 2))


# Doors


def test_the_auto_classes(model, saved):
    x = images("resnet", 3)
    assert type(AutoConfig.from_pretrained(saved)) is EarlyExitConfig
    loaded = AutoModelForImageClassification.from_pretrained(saved)
    assert type(loaded) is EarlyExitWrapper
    assert_same_model(model, loaded, x)
    fresh = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(saved))
    assert fresh.exit_names == model.exit_names
    processor = AutoImageProcessor.from_pretrained(saved)
    assert list(processor.image_mean) == model.config.preprocessing["mean"]
    assert AutoModelForImageClassification.from_pretrained(saved, threshold=0.25).threshold == 0.25


def test_pipelines(model, saved):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    from_folder = pipeline("image-classification", model=str(saved))(picture, top_k=2)
    from_object = pipeline("image-classification", model=model, image_processor=model.image_processor())
    assert from_object([picture, picture], batch_size=2, top_k=2) == [from_folder, from_folder]
    with torch.no_grad():
        probs = model(model.image_processor()(picture, return_tensors="pt").pixel_values).logits[0].softmax(-1)
    assert from_folder[0]["label"] == model.config.id2label[int(probs.argmax())]
    assert from_folder[0]["score"] == pytest.approx(float(probs.max()), abs=1e-6)


def test_no_bar_is_drawn_for_weights_that_are_there(saved, capfd):
    transformers_logging.enable_progress_bar()
    EarlyExitWrapper.from_pretrained(saved)
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()


def test_overrides(saved):
    assert EarlyExitWrapper.from_pretrained(saved).threshold == [1.2, 1.3, 1.4]
    assert EarlyExitWrapper.from_pretrained(saved, threshold=0.3).threshold == 0.3
    assert EarlyExitWrapper.from_pretrained(saved, threshold=[0.1, 0.2, 0.3]).threshold == [0.1, 0.2, 0.3]
    changed = EarlyExitWrapper.from_pretrained(saved, policy="patience", threshold=2)
    assert type(changed.policy).__name__ == "PatiencePolicy"
    for bad, words in ((float("nan"), "nan"), ([0.1], "got 1 thresholds for 3"), (-1, r"-1\.0")):
        with pytest.raises(ThresholdError, match=words):
            EarlyExitWrapper.from_pretrained(saved, threshold=bad)
    with pytest.raises(ConfigError, match="no argument 'treshold'; did you mean 'threshold'"):
        EarlyExitWrapper.from_pretrained(saved, treshold=0.3)


def test_low_precision(saved):
    loaded = EarlyExitWrapper.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(images("resnet", 2).bfloat16()).logits.dtype == torch.bfloat16
    assert loaded.exit_table() == EarlyExitWrapper.from_pretrained(saved).exit_table()


def test_other_classes_on_purpose(saved):
    torch.manual_seed(0)
    loaded, info = EarlyExitWrapper.from_pretrained(
        saved, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert loaded(images("resnet", 2)).logits.shape == (2, 3)
    assert {entry[0] for entry in info["mismatched_keys"]} == {
        f"{part}.{leaf}"
        for part in ("backbone.fc", "heads.0.fc", "heads.1.fc", "heads.2.fc")
        for leaf in ("weight", "bias")
    }
    weight = loaded.heads[0].fc.weight
    assert torch.isfinite(weight).all()
    assert 0 < float(weight.detach().std()) < 1, "a layer that no weights were loaded for must be initialised"
    assert torch.equal(loaded.backbone.conv1.weight, EarlyExitWrapper.from_pretrained(saved).backbone.conv1.weight)


def test_two_classes(tmp_path):
    model = EarlyExitWrapper(
        timm.create_model("resnet8_cifar", num_classes=2, width=4), exits=["layer1"], backbone_kwargs={"width": 4}
    )
    model.save_pretrained(tmp_path)
    assert EarlyExitWrapper.from_pretrained(tmp_path).config.num_labels == 2


# Plain modules


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    wrap("plain").save_pretrained(folder)
    return folder


def test_a_plain_module_needs_its_backbone(plain):
    with pytest.raises(CheckpointError, match=r"'Plain' is a plain nn\.Module.*backbone=module"):
        EarlyExitWrapper.from_pretrained(plain)
    with pytest.raises(CheckpointError, match="backbone=module"):
        EarlyExitWrapper(AutoConfig.from_pretrained(plain))
    with pytest.raises(InputTypeError, match="backbone must be an nn"):
        EarlyExitWrapper.from_pretrained(plain, backbone="Plain")
    with pytest.raises(ExitPointError, match="Linear has no stage 'stem'"):
        EarlyExitWrapper.from_pretrained(plain, backbone=nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"mismatched keys.*backbone\.fc"):
        EarlyExitWrapper.from_pretrained(plain, backbone=Plain(classes=7))
    assert not (plain / "preprocessor_config.json").exists()


def test_a_plain_module_keeps_what_the_checkpoint_does_not_hold(plain):
    for loader in (EarlyExitWrapper, AutoModelForImageClassification):
        backbone = Plain()
        backbone.scale.fill_(3.0)
        loaded = loader.from_pretrained(plain, backbone=backbone)
        assert loaded.backbone is backbone
        assert loaded.backbone.scale.tolist() == [3.0]
        assert torch.equal(loaded.backbone.fc.weight, wrap("plain").backbone.fc.weight)


# Damage


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads.0.fc.weight": None}, r"missing keys: 1, first 'heads\.0\.fc\.weight'"),
        ({"backbone.conv1.weight": None}, r"missing keys: 1, first 'backbone\.conv1\.weight'"),
        ({"heads.9.fc.weight": torch.zeros(2)}, r"unexpected keys: 1, first 'heads\.9\.fc\.weight'"),
        ({"heads.0.fc.weight": torch.zeros(3, 4)}, r"mismatched keys: 1, .*heads\.0\.fc\.weight.*3, 4.*5, 32"),
    ],
)
def test_weights_that_do_not_match(damaged, changes, words):
    edit_weights(damaged, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        EarlyExitWrapper.from_pretrained(damaged)
    assert isinstance(caught.value, ValueError)
    if "mismatched" not in words:
        with pytest.raises(CheckpointError, match=words):
            EarlyExitWrapper.from_pretrained(damaged, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_kwargs": {"width": 16}},
        {"head": "linear"},
        {"architecture": "resnet18_cifar"},
        {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    ],
)
def test_a_config_that_was_edited(damaged, changes):
    edit_config(damaged, **changes)
    with pytest.raises(CheckpointError, match="do not match its config"):
        EarlyExitWrapper.from_pretrained(damaged)


class Scaled(nn.Module):
    """Keeps a buffer in float32 whatever the type of its weights is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.register_buffer("scale", torch.linspace(0.1, 1.3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x).mean((2, 3))
        return self.fc((features * self.scale).to(self.fc.weight.dtype))


def mixed(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to(dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float().running_mean.uniform_(-0.5, 0.5)
        elif isinstance(module, Scaled):
            module.scale = buffers["scale"]
    return network.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("given", "load"),
    [
        (None, EarlyExitWrapper),
        (None, AutoModelForImageClassification),
        (torch.float32, EarlyExitWrapper),
        (torch.bfloat16, EarlyExitWrapper),
        ("mixed", EarlyExitWrapper),
    ],
)
def test_each_tensor_keeps_the_type_that_it_was_saved_in(dtype, given, load, tmp_path):
    own = given is not None
    network = Scaled() if own else timm.create_model("resnet8_cifar", num_classes=4, width=4)
    kwargs = {"input_size": (3, 16, 16)} if own else {"backbone_kwargs": {"width": 4}}
    model = EarlyExitWrapper(mixed(network, dtype), exits=["body" if own else "layer1"], **kwargs).eval()
    model.save_pretrained(tmp_path)
    backbone = mixed(Scaled(), dtype) if given == "mixed" else Scaled().to(given) if own else None
    again = load.from_pretrained(tmp_path, **({"backbone": backbone} if own else {})).eval()
    loaded = again.state_dict()
    assert {k: v.dtype for k, v in loaded.items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
    x = torch.randn(4, 3, 16, 16, dtype=dtype)
    for threshold in (0, 10):
        assert torch.equal(again(x, threshold=threshold).logits, model(x, threshold=threshold).logits)
    other = load.from_pretrained(tmp_path, dtype=torch.float32, **({"backbone": Scaled()} if own else {}))
    assert {v.dtype for v in other.state_dict().values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats(damaged, dtype):
    edit_weights(damaged, **{"backbone.conv1.weight": torch.ones(8, 3, 3, 3).to(dtype)})
    with pytest.raises(CheckpointError, match=r"1 weights of .* are stored as .*, first 'backbone\.conv1\.weight'"):
        EarlyExitWrapper.from_pretrained(damaged)


def test_weights_of_other_floats_load(damaged):
    edit_weights(damaged, **{"backbone.fc.bias": torch.ones(CLASSES).half()})
    assert torch.equal(EarlyExitWrapper.from_pretrained(damaged).backbone.fc.bias, torch.ones(CLASSES))


def test_a_size_of_images_that_contradicts_the_costs_is_told(saved, damaged, caplog):
    config = json.loads((damaged / "config.json").read_text())
    edit_config(damaged, preprocessing={**config["preprocessing"], "size": [64, 64]})
    EarlyExitWrapper.from_pretrained(damaged)
    assert "makes images of [64, 64] pixels, costs are counted for input_size=[3, 16, 16]" in caplog.text
    caplog.clear()
    EarlyExitWrapper.from_pretrained(saved)
    assert not caplog.text


@pytest.mark.parametrize(
    ("buffer", "words"),
    [
        (torch.zeros(2, dtype=torch.complex128), r"'backbone\.more' is of type torch\.complex128.*torch\.complex64"),
        (torch.eye(3).to_sparse(), r"'more' is a sparse tensor.*to_dense"),
    ],
)
def test_buffers_that_no_file_holds(buffer, words, tmp_path):
    network = Scaled()
    network.register_buffer("more", buffer)
    with pytest.raises(RebuildError, match=words):
        EarlyExitWrapper(network, exits=["body"], input_size=(3, 16, 16)).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("load", [EarlyExitWrapper, AutoModelForImageClassification])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int8"}, "dtype=torch.int8 is no floating-point type"),
        ({"exit_hooks": "no"}, "exit_hooks must be true or false, got 'no'"),
        ({"output_hidden_states": True}, "output_hidden_states must be false"),
        ({"output_attentions": True}, "output_attentions must be false"),
    ],
)
def test_a_stored_config_that_asks_for_what_there_is_not(damaged, changes, words, load):
    edit_config(damaged, **changes)
    with pytest.raises(ConfigError, match=words):
        load.from_pretrained(damaged)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "dtype", ["bogus", "nn", "Tensor", "int8", torch.int32, 3, [torch.float16], {"": torch.float16}]
)
def test_a_type_that_weights_cannot_have(saved, name, dtype):
    with pytest.raises(ConfigError, match=r"dtype=.* is no floating-point type"):
        EarlyExitWrapper.from_pretrained(saved, **{name: dtype})


@pytest.mark.parametrize("size", ["5 parsecs", "", None, [1]])
def test_a_size_of_shards_that_is_none(model, tmp_path, size):
    with pytest.raises(ConfigError, match=r"max_shard_size=.* is no number of bytes"):
        model.save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "keep", "words"),
    [("model.safetensors", keep, r"damaged.*cut short") for keep in (0, 4, 60, -100)]
    + [("config.json", keep, r"config\.json of .*damaged") for keep in (0, 200)],
)
def test_a_truncated_file(damaged, name, keep, words):
    path = damaged / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=words):
        EarlyExitWrapper.from_pretrained(damaged)


def test_pickles_are_not_read(damaged):
    torch.save(load_file(damaged / "model.safetensors"), damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights that can be read, model\.safetensors"):
        EarlyExitWrapper.from_pretrained(damaged)


def test_a_config_from_the_future_is_refused_before_weights_are_read(damaged):
    edit_config(damaged, format_version=99)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="format_version is 99"):
        EarlyExitWrapper.from_pretrained(damaged)


def test_exits_of_an_edited_config_at_other_stages(damaged):
    edit_config(damaged, exits=["layer1", "layer2", "layer4"])
    with pytest.raises(
        CheckpointError, match=r"CifarResNet do not match .* 'layer4' 32 channels \(NCHW\), the stage has 64"
    ):
        EarlyExitWrapper.from_pretrained(damaged)


def test_an_exit_of_an_edited_config_at_the_classifier(damaged):
    edit_config(damaged, exits=["layer1", "layer2", "fc"])
    with pytest.raises(CheckpointError, match="exit 'fc' of the config is the classifier of CifarResNet"):
        EarlyExitWrapper.from_pretrained(damaged)


def test_exits_of_an_edited_config_in_another_order(tmp_path):
    model = wrap("vit")
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, exits=model.config.exits[::-1])  # all stages are of one width
    loaded = EarlyExitWrapper.from_pretrained(tmp_path)
    for call in ({"threshold": 1e-30}, {"output_all_exits": True}):
        with pytest.raises(ExitNotReachedError, match="exit 2 was reached where exit 0 was due"):
            loaded(images("vit", 2), **call)


def test_other_users_can_read_the_weights_where_the_umask_lets_them(tmp_path):
    wrap("plain").save_pretrained(tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("name", ["/nonexistent/run", "./run", "~/run", "a/b/c", Path("run")])
def test_a_path_that_is_not_there_is_no_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder '.*(run|a/b/c)'"):
        EarlyExitWrapper.from_pretrained(name)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: m.backbone.reset_classifier(7), RebuildError, r"first 'backbone\.fc\.weight'.*then wrap it"),
        (lambda m: setattr(m.backbone, "act1", nn.GELU()), RebuildError, "gives another output"),
        (lambda m: setattr(m.config, "head", "linear"), RebuildError, r"first 'heads\.0\."),
        (lambda m: setattr(m.config, "threshold", -3.0), ThresholdError, r"threshold -3\.0"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(change, error, words, tmp_path):
    model = wrap("resnet")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    change(model)
    with pytest.raises(error, match=words):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_model_is_not_saved(tmp_path):
    quantised = torch.ao.quantization.quantize_dynamic(wrap("resnet"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(RebuildError, match=r"was quantised\. Save the model before"):
        quantised.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_changes_that_do_not_matter_are_saved(tmp_path):
    model = wrap("resnet")
    model.freeze_backbone()
    model.backbone.act1 = nn.ReLU(inplace=False)
    nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    model.half().save_pretrained(tmp_path)
    assert EarlyExitWrapper.from_pretrained(tmp_path).config.exits == model.config.exits


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        EarlyExitWrapper.from_pretrained(tmp_path)


# Checkpoints of earlier versions


def test_a_checkpoint_of_format_version_1_loads():
    folder = Path(__file__).parents[1] / "checkpoints" / "version_1"
    assert json.loads((folder / "config.json").read_text())["format_version"] == 1
    loaded = EarlyExitWrapper.from_pretrained(folder)
    assert loaded.exit_names == ["layer1", "layer2", "classifier"]
    assert loaded.threshold == [0.9, 1.05]
    scale = torch.tensor([0.2, 1, 2, 4]).view(-1, 1, 1, 1)
    x = torch.linspace(-2, 2, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32).sin() * scale
    stored = json.loads((folder / "exit_logits.json").read_text())
    with torch.no_grad():
        for ours, theirs in zip(loaded(x, output_all_exits=True).exit_logits, stored, strict=True):
            torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-4, atol=1e-5)


def test_weights_that_are_shared_are_saved_once(tmp_path):
    class Twice(Plain):
        def __init__(self):
            super().__init__()
            self.trunk["c"] = self.trunk["b"]

    backbone = Twice()
    model = EarlyExitWrapper(backbone, exits=["trunk.a"], input_size=(3, 16, 16))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert sum("trunk.b.conv.weight" in key or "trunk.c.conv.weight" in key for key in keys) == 1
    again = EarlyExitWrapper.from_pretrained(tmp_path, backbone=Twice())
    assert torch.equal(again.backbone.trunk["c"].conv.weight, backbone.trunk["b"].conv.weight)
