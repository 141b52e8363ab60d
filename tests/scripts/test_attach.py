"""attach.py: networks from files, folders and names get exits; what the exits read is computed once."""

import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from erde_hub import EarlyExitWrapper
from erde_hub.errors import CheckpointError, ConfigError
from erde_hub.scripts import attach
from erde_hub.scripts.attach import remove_oldest
from erde_hub.scripts.common.own_network import fit_classifier, inputs_of, open_network
from tests.fakes.texts import columns, make_tokenizer, write_encoder, write_texts
from tests.fakes.training import make_data, weights

FAST = ("--cache_dir", "cache", "--cpu_threads", 1, "--no_progress_bar", "--epochs", 2, "--measure_latency", "false")
DIGITS = ("--dataset", "digits", "--max_train_samples", 100, "--max_eval_samples", 60)


@pytest.fixture
def network(tmp_path):
    """A small network for ten classes, with its weights in every form."""
    torch.manual_seed(0)
    module = timm.create_model("resnet8_cifar", num_classes=10, width=4)
    state = module.state_dict()
    save_file(state, tmp_path / "my.safetensors")
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "my.pth")
    return module


@pytest.mark.parametrize("file", ["my.safetensors", "my.pth"])
def test_own_weights_come_as_they_are(network, tmp_path, file):
    opened = open_network("resnet8_cifar", str(tmp_path / file), {"width": 4})
    for key, tensor in network.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor)
    assert opened.num_classes == 10
    kept, new = fit_classifier(opened, "resnet8_cifar", make_data())
    assert (new, kept.num_classes) == (True, 3)


def _change(state, how):
    if how == "missing":
        del state["layer1.0.bn1.bias"]
    elif how == "unknown":
        state["layer9.weight"] = torch.zeros(1)
    elif how == "of another shape":
        state["conv1.weight"] = torch.zeros(8, 3, 3, 3)


@pytest.mark.parametrize(
    ("how", "listed"),
    [
        ("missing", r"\(1 missing: layer1\.0\.bn1\.bias\)"),
        ("unknown", r"\(1 unknown: layer9\.weight\)"),
        ("of another shape", r"\(1 of another shape: conv1\.weight\)"),
    ],
)
def test_weights_of_another_network_are_refused_with_a_list(network, tmp_path, how, listed):
    state = dict(network.state_dict())
    _change(state, how)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"other\.safetensors does not hold the weights of 'resnet8_cifar' {listed}"
    ):
        open_network("resnet8_cifar", str(tmp_path / "other.safetensors"), {"width": 4})


def test_what_cannot_be_opened_says_what_to_do(network, tmp_path):
    torch.save(network, tmp_path / "whole.pth")  # a pickle that would run code
    (tmp_path / "none").mkdir()
    cases = [
        (("resnet8_cifar", str(tmp_path / "whole.pth"), {"width": 4}), "save model.state_dict"),
        (("resnet8_cifar", str(tmp_path / "nowhere.pth"), {"width": 4}), "cannot be read as weights"),
        (("resnet8_cifra", None, {}), "did you mean 'resnet8_cifar'"),
        ((str(tmp_path / "none"), None, {}), "no config.json says which network it is"),
        ((str(tmp_path / "nowhere"), None, {}), "is no folder, and no config.json"),
    ]
    for arguments, words in cases:
        with pytest.raises((CheckpointError, ConfigError), match=words):
            open_network(*arguments)


def test_weights_that_cannot_be_had_name_what_attach_takes(monkeypatch):
    def unreachable(*_, pretrained=False, **__):
        raise OSError("offline")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(ConfigError, match="offline; give a file of them with --weights, or a folder with --model"):
        open_network("resnet18", None, {})


def test_a_folder_of_timm(network, tmp_path):
    stored = {"architecture": "resnet8_cifar", "num_classes": 10, "model_args": {"width": 4},
              "pretrained_cfg": {**network.pretrained_cfg, "mean": [0.1, 0.2, 0.3], "num_classes": 10}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "my.safetensors").rename(tmp_path / "model.safetensors")
    for source in (str(tmp_path), f"local-dir:{tmp_path}"):
        opened = open_network(source, None, {})
        assert torch.equal(opened.conv1.weight, network.conv1.weight)
        assert inputs_of(opened, source, {"crop_pct": 0.8})["mean"] == [0.1, 0.2, 0.3]
        assert inputs_of(opened, source, {"crop_pct": 0.8})["crop_pct"] == 0.8


@pytest.mark.slow
def test_a_run_leaves_a_whole_checkpoint_and_keeps_the_backbone(network, tmp_path, call, capsys):
    own = ("--model", "resnet8_cifar", "--weights", tmp_path / "my.pth", "--model_kwargs", "width=4", *DIGITS, *FAST)
    call(attach, *own, "--output_dir", "out", "--measure_latency")
    said = capsys.readouterr().out
    (times,) = json.loads((tmp_path / "out" / "results.json").read_text())["latency"]["settings"]
    assert (times["runtime"], times["threads"], len(times["exit_milliseconds"])) == ("torch", 1, 4)
    assert "one image per call; milliseconds" in said
    assert "torch, 1 thread" in (tmp_path / "out" / "README.md").read_text()
    assert "last layer: that of the weights, it stays as it is" in said
    model = EarlyExitWrapper.from_pretrained("out")
    for key, tensor in network.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], tensor), "the backbone stays as it is"
    assert model.config.threshold_profile is not None
    for name in ("results.json", "README.md", "sweep.csv", "frontier.png"):
        assert (tmp_path / "out" / name).is_file()
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    (kept,) = (tmp_path / "cache" / "features").iterdir()
    assert len(load_file(kept)["labels"]) == 100, "digits are not mirrored"
    call(attach, *own, "--output_dir", "again")
    assert "latency" not in json.loads((tmp_path / "again" / "results.json").read_text())
    assert "read from" in capsys.readouterr().out
    again = EarlyExitWrapper.from_pretrained("again")
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())

    call(attach, *own, "--model_kwargs", "act_layer=gelu", "--output_dir", "other")
    assert "read from" not in capsys.readouterr().out, "other features from the same weights"

    call(attach, *own, "--output_dir", "tuned", "--finetune", "--finetune_training", "epochs=1", "--augment", "none")
    tuned = EarlyExitWrapper.from_pretrained("tuned")
    assert not torch.equal(tuned.backbone.conv1.weight, network.conv1.weight)
    with pytest.raises(ConfigError, match="choose the head linear or mlp"):
        call(attach, *own, "--head", "fc", "--output_dir", "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ConfigError, match="has exits already"):
        call(attach, "--model", "out", *DIGITS)
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        call(attach, *own, "--finetune_training", "epoch=1")


@pytest.mark.slow
def test_a_folder_of_transformers_with_images(tmp_path, call):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes))
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    call(attach, "--model", "vit", *DIGITS, *FAST, "--output_dir", "out")
    model = EarlyExitWrapper.from_pretrained("out")
    assert model.config.num_labels == 10, "the last layer of three classes is replaced"
    assert model.config.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert torch.equal(model.backbone.vit.state_dict()["layernorm.weight"], vit.vit.state_dict()["layernorm.weight"])


@pytest.mark.slow
def test_a_folder_of_transformers_with_texts(tmp_path, call):
    encoder = write_encoder(tmp_path / "encoder", layers=3)
    texts = write_texts(tmp_path / "texts", {"train": columns(80), "validation": columns(60, first=200)})
    call(attach, "--model", encoder, "--dataset", texts, "--max_length", 12, *FAST, "--output_dir", "out")
    model = EarlyExitWrapper.from_pretrained("out")
    assert (model.main_input_name, model.config.num_labels) == ("input_ids", 2)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_every_layer_without_trained_weights_is_trained(kind, tmp_path, call, monkeypatch, capsys):
    """The classifiers of these have a layer before the last one, which a published encoder does not hold."""
    texts = write_texts(tmp_path / "texts", {"train": columns(80), "validation": columns(60, first=200)})
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 16}
    config = AutoConfig.for_model(kind, vocab_size=14, max_position_embeddings=64, pad_token_id=0, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    before, train = {}, attach.recipe.train_network

    def remember(run, folder, model, *args, **kwargs):
        before.update(weights(model.backbone))
        return train(run, folder, model, *args, **kwargs)

    monkeypatch.setattr(attach.recipe, "train_network", remember)
    call(attach, "--model", "encoder", "--dataset", texts, "--max_length", 12, *FAST, "--output_dir", "out")
    assert "2 new layers are trained" in capsys.readouterr().out
    model = EarlyExitWrapper.from_pretrained("out")
    changed = {key for key, tensor in model.backbone.state_dict().items() if not torch.equal(tensor, before[key])}
    new = {"roberta": ("classifier.dense", "classifier.out_proj"), "distilbert": ("pre_classifier", "classifier")}[kind]
    assert changed == {f"{layer}.{part}" for layer in new for part in ("weight", "bias")}


def test_features_that_were_used_longest_ago_make_room(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(bytes(10))
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "other.txt").write_bytes(bytes(100))
    remove_oldest(tmp_path, 30)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    remove_oldest(tmp_path, 20)
    assert not (tmp_path / "old.safetensors").exists()
    remove_oldest(tmp_path, 5)
    assert [file.name for file in tmp_path.iterdir()] == ["other.txt"]
