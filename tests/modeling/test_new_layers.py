"""A frozen backbone is trained where it has no trained weights: the new layers of a classifier around a loaded one."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError
from erde_hub.modeling.attach import new_layers
from erde_hub.scripts.common.networks import create_network
from erde_hub.training import Distiller
from erde_hub.training.frozen import collect_head_inputs
from tests.fakes import transformers_models
from tests.fakes.training import make_args, make_data, network, weights

pytestmark = pytest.mark.usefixtures("quiet_transformers")

NEW = {
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "llama": {"score"},
    "vit": {"classifier"},
}


def loaded(kind, folder, whole=False, **kwargs):
    """A classifier around an encoder that was saved without one."""
    network = (transformers_models.vision if kind == "vit" else transformers_models.text)(kind)
    (network if whole else network.base_model).save_pretrained(folder)
    classes = network.config.num_labels if whole else 3
    return type(network).from_pretrained(folder, num_labels=classes, ignore_mismatched_sizes=True, **kwargs)


@pytest.mark.parametrize("kind", NEW)
def test_new_layers_are_trained_with_the_heads(kind, tmp_path, caplog):
    model = EarlyExitWrapper(loaded(kind, tmp_path), exits=1)
    with caplog.at_level(logging.WARNING, "erde_hub"):
        model.freeze_backbone()
    learns = {name.rpartition(".")[0] for name, weight in model.backbone.named_parameters() if weight.requires_grad}
    assert learns == NEW[kind]
    assert "no trained weights" in caplog.text
    assert not model.train().backbone.training
    model.save_pretrained(tmp_path / "saved")  # trained or not, they are its weights now
    again = EarlyExitWrapper.from_pretrained(tmp_path / "saved")
    again.freeze_backbone()
    assert not any(weight.requires_grad for weight in again.backbone.parameters())


def test_trained_layers_stay_as_they_are(tmp_path):
    assert not new_layers(transformers_models.text("bert")), "nothing was loaded, nothing is known"
    assert not new_layers(loaded("bert", tmp_path / "whole", whole=True))
    bert = loaded("bert", tmp_path / "encoder")
    assert set(new_layers(bert)) == NEW["bert"]
    bert.train()(**transformers_models.inputs("bert"), labels=torch.arange(8) % 3).loss.backward()
    torch.optim.SGD(bert.parameters(), 0.1).step()
    assert not new_layers(bert), "it has been trained meanwhile"


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_tied_to_the_embedding_was_loaded_with_it(tied, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **sizes)).save_pretrained(tmp_path)
    assert not new_layers(LlamaForCausalLM.from_pretrained(tmp_path))


def test_the_distiller_trains_them_and_nothing_else(tmp_path, caplog):
    data = make_data()
    model = EarlyExitWrapper(loaded("vit", tmp_path, image_size=8, patch_size=4), exits=1)
    model.set_preprocessing(**(data.preprocessing | {"mean": [0.1, 0.2, 0.3]}))
    before = weights(model)
    Distiller(model, data, make_args(freeze_backbone=True, max_steps=2), "ce").train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"heads", "backbone"}
    assert {name for name in changed if name.startswith("backbone")} == {
        f"backbone.classifier.{part}" for part in ("weight", "bias")
    }
    assert "the backbone is frozen and was made for images of mean" in caplog.text


def test_a_network_of_timm_that_gets_other_classes(tmp_path):
    timm.models.save_for_hf(
        timm.create_model("mobilenetv3_small_050", num_classes=4), tmp_path, model_config={"num_classes": 4}
    )
    source = f"local-dir:{tmp_path}"
    assert set(new_layers(create_network(source, {"num_classes": 3}, pretrained=True))) == {"classifier"}
    assert not new_layers(create_network(source, {"num_classes": 4}, pretrained=True))
    assert not new_layers(create_network("mobilenetv3_small_050", {"num_classes": 3}))


def test_what_changes_before_the_last_layer_cannot_be_learned_from_kept_features(tmp_path):
    model = EarlyExitWrapper(loaded("roberta", tmp_path), exits=1, head="linear")
    model.freeze_backbone()
    with pytest.raises(ConfigError, match=r"classifier\.dense of the backbone has no trained weights.*freeze_backbone"):
        collect_head_inputs(model, [], progress=False)


def test_a_classifier_that_nobody_knows_to_be_new_is_told_by_its_answers(caplog):
    model = network()
    torch.nn.init.zeros_(model.backbone.fc.weight)
    Distiller(model, make_data(rows=720), make_args(freeze_backbone=True, max_steps=2), "ce").train()
    assert "the backbone is frozen, and its own classifier is correct on" in caplog.text
    assert "not trained for these classes" in caplog.text
