"""A config says everything that is needed to rebuild a model, and refuses everything else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from erde_hub import EarlyExitConfig, EarlyExitWrapper, heads
from erde_hub.config import FORMAT_VERSION
from erde_hub.errors import ConfigError, ExitPointError, ThresholdError, UnknownNameError

STORED = Path(__file__).parent / "checkpoints" / "config_v1.json"


def config(**changes) -> EarlyExitConfig:
    return EarlyExitConfig(**{"architecture": "resnet18", "num_labels": 10, "exits": ["layer1", "layer2"], **changes})


@pytest.fixture
def log(caplog):
    """What the library logs; transformers keeps its loggers from the root."""
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


def test_defaults():
    made = config()
    assert made.model_type == "early_exit"
    assert (made.format_version, made.library, made.head, made.policy) == (FORMAT_VERSION, "timm", "fc", "entropy")
    assert made.threshold == 0.5
    assert made.backbone_kwargs == made.head_kwargs == made.policy_kwargs == {}
    assert (made.num_labels, made.num_exits) == (10, 3)
    assert made.id2label[9] == "LABEL_9"
    assert not hasattr(made, "backbone"), "would break from_pretrained(path, backbone=module)"


def test_a_preset_of_exit_weights_is_stored_as_numbers():
    assert config(exits=["layer1", "layer2"], exit_weights="branchynet").exit_weights == [1.0, 1.0, 0.3]


def test_every_field_survives_json(tmp_path):
    made = config(
        backbone_kwargs={"output_stride": 16}, exits=("layer1", "layer2"), head="mlp", head_kwargs={"hidden": 7},
        policy="margin", threshold=(0.1, 0.2), exit_weights=(0.5, 0.5, 1), input_size=(3, 64, 64), erde_hub_version="0",
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is EarlyExitConfig
    fields = [name for name in EarlyExitConfig.__annotations__ if name != "model_type"]
    assert {name: getattr(again, name) for name in fields} == {name: getattr(made, name) for name in fields}
    assert again.threshold == [0.1, 0.2]
    assert again.exit_weights == [0.5, 0.5, 1.0]
    assert again.num_labels == 10


def test_a_config_can_be_copied_and_an_empty_one_exists():
    assert copy.deepcopy(config()).to_dict() == config().to_dict()
    assert EarlyExitConfig().exits is None  # transformers builds one to find the defaults


@pytest.mark.parametrize(
    ("key", "hint"),
    [("treshold", "threshold"), ("exit", "exits"), ("architectur", "architecture"), ("num_label", "num_labels")],
)
def test_a_typing_mistake_names_the_nearest_field(key, hint):
    with pytest.raises(ConfigError, match=f"no field '{key}'; did you mean '{hint}'"):
        config(**{key: 1})
    with pytest.raises(ValueError, match="fields: architecture, backbone_kwargs"):
        config(zzzz=1)


def test_an_unknown_key_in_a_stored_file_warns_and_names_its_writer(log):
    stored = json.loads(STORED.read_text())
    read = EarlyExitConfig.from_dict({**stored, "thresholdd": 3, "erde_hub_version": "7.1"})
    assert read.threshold == [0.7, 0.8]
    assert not hasattr(read, "thresholdd")
    assert "'thresholdd'; did you mean 'threshold'" in log.text
    assert "erde_hub 7.1" in log.text


def test_the_module_of_an_unknown_head_is_named_and_not_imported(monkeypatch, tmp_path):
    assert config().to_dict()["plugins"] is None
    monkeypatch.setattr(heads.get_head("linear").cls, "__module__", "my_heads")
    config(head="linear").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["plugins"] == {"linear": "my_heads"}
    (tmp_path / "my_heads.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored | {"head": "mine", "plugins": {"mine": "my_heads"}}))
    with pytest.raises(UnknownNameError, match="'mine' comes from the module 'my_heads', which is not imported"):
        EarlyExitConfig.from_pretrained(tmp_path)
    with pytest.raises(UnknownNameError, match=r"available: [a-z_, ]+\)$"):
        config(head="other", plugins={"mine": "my_heads"})


def test_reading_a_file_does_not_forgive_typing_mistakes_afterwards(log):
    EarlyExitConfig.from_dict({**json.loads(STORED.read_text()), "thresholdd": 3})
    with pytest.raises(ConfigError, match="thresholdd"):
        config(thresholdd=3)


def test_a_newer_format_is_refused():
    stored = {**json.loads(STORED.read_text()), "format_version": FORMAT_VERSION + 1}
    with pytest.raises(ConfigError, match=f"format_version is {FORMAT_VERSION + 1}.*pip install -U"):
        EarlyExitConfig.from_dict(stored)
    with pytest.raises(ConfigError, match="format_version must be an integer, got 'one'"):
        config(format_version="one")


def test_a_stored_config_of_version_1_keeps_loading():
    """The file was written by the first release; it must load, and mean the same, as long as version 1 is read."""
    stored = json.loads(STORED.read_text())
    read = EarlyExitConfig.from_dict(stored)
    for key in set(stored) - {"architectures", "dtype", "transformers_version", "id2label"}:
        assert getattr(read, key) == stored[key], key
    assert read.id2label == {0: "cat", 1: "dog", 2: "owl"}
    model = EarlyExitWrapper(read).eval()
    assert model.exit_names == ["layer1", "layer2", "classifier"]
    assert model.threshold == [0.7, 0.8]
    assert type(model.policy).__name__ == "ConfidencePolicy"
    assert model.heads[0].layers[-1].p == 0.25
    assert {name: tuple(p.shape) for name, p in model.heads.named_parameters()} == {
        "0.layers.0.weight": (4,), "0.layers.0.bias": (4,), "0.fc.weight": (3, 16), "0.fc.bias": (3,),
        "1.layers.0.weight": (8,), "1.layers.0.bias": (8,), "1.fc.weight": (3, 32), "1.fc.bias": (3,),
    }  # fmt: skip
    assert model(torch.randn(2, 3, 16, 16)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"exits": 3}, ExitPointError, "exits=3 needs the living model"),
        ({"exits": "auto"}, ExitPointError, "exits='auto' needs the living model"),
        ({"exits": []}, ExitPointError, r"list of module names, got \[\]"),
        ({"exits": ["layer1", 2]}, ExitPointError, r"got \['layer1', 2\]"),
        ({"exits": ["layer1", "layer1"]}, ExitPointError, "'layer1' twice"),
        ({"threshold": float("nan")}, ThresholdError, "threshold nan is not allowed for EntropyPolicy"),
        ({"threshold": -0.5}, ThresholdError, r"threshold -0\.5 is not allowed .* \[0, inf\]"),
        ({"threshold": [0.1]}, ThresholdError, "got 1 thresholds for 2 early exits"),
        ({"threshold": [0.1, 0.2, 0.3]}, ThresholdError, "got 3 thresholds for 2 early exits"),
        ({"threshold": "low"}, ThresholdError, "got 'low'"),
        ({"threshold": True}, ThresholdError, "got True"),
        ({"threshold": 0.5, "policy": "patience"}, ThresholdError, r"0\.5 is not allowed for PatiencePolicy"),
        ({"policy": "entropi"}, UnknownNameError, "unknown policy 'entropi'; did you mean 'entropy'"),
        ({"policy_kwargs": {"k": 1}}, ConfigError, "policy 'entropy' has no argument 'k'"),
        ({"head": "fcc"}, UnknownNameError, "unknown head 'fcc'; did you mean 'fc'"),
        ({"head": 3}, UnknownNameError, "unknown head 3"),
        ({"exit_weights": [1, 1]}, ConfigError, r"exit_weights has 2 entries, \[1\.0, 1\.0\], for 3 exits"),
        ({"exit_weights": [1, 1, -1]}, ConfigError, r"exit_weights\[2\] must be finite and at least 0, got -1"),
        ({"exit_weights": [0, 0, 0]}, ConfigError, r"\[0, 0, 0\] leave nothing to train"),
        ({"exit_weights": [1, float("inf"), 1]}, ConfigError, r"exit_weights\[1\] must be finite .* got inf"),
        ({"exit_weights": [1, "2", 1]}, ConfigError, r"exit_weights\[1\] must be a number, got '2'"),
        ({"exit_weights": 1.0}, ConfigError, "one number per exit or a preset .* got 1.0"),
        ({"exit_weights": "linaer"}, UnknownNameError, "'linaer'; did you mean 'linear'"),
        ({"input_size": [3, 32.5, 32]}, ConfigError, r"got \[3, 32\.5, 32\]"),
        ({"input_size": [3, -1, 32]}, ConfigError, "positive integers"),
        ({"input_size": 32}, ConfigError, "got 32"),
        ({"backbone_kwargs": [1]}, ConfigError, r"backbone_kwargs must be a dict of arguments, got \[1\]"),
        ({"backbone_kwargs": {"num_classes": 3}}, ConfigError, "num_classes"),
        ({"exit_features": [{"width": 64, "format": "NCHW"}]}, ConfigError, "1 entries for 2 exits"),
        ({"exit_features": [{"widht": 64}] * 2}, ConfigError, "unknown key 'widht'"),
        ({"exit_features": [{"width": 64}] * 2}, ConfigError, "lacks format"),
        ({"exit_features": [{"width": 64, "format": "CHW"}] * 2}, ConfigError, "'CHW' is unknown"),
        ({"exit_features": [{"width": 0, "format": "NCHW"}] * 2}, ConfigError, "positive integer, got 0"),
        ({"exit_features": ["layer1"] * 2}, ConfigError, "got 'layer1'"),
        ({"preprocessing": {"mean": [0.5]}}, ConfigError, "lacks std"),
        ({"preprocessing": {"men": [0.5]}}, ConfigError, "no 'men'; did you mean 'mean'"),
        ({"num_labels": 1}, ConfigError, "at least 2, got 1"),
        ({"num_labels": 0}, ConfigError, "got 0"),
        ({"num_labels": "ten"}, ConfigError, "got 'ten'"),
        ({"num_labels": None}, ConfigError, "how many classes"),
        ({"id2label": {0: "a", 1: "b"}}, ConfigError, "num_labels=10 contradicts id2label, which names 2 classes"),
        ({"id2label": {0: "a", 2: "b"}, "num_labels": None}, ConfigError, "classes 0 to n - 1"),
        ({"id2label": {0: "a", 1: None}, "num_labels": None}, ConfigError, "names in id2label must be texts"),
        ({"id2label": {0: "a", 1: 7}, "num_labels": None}, ConfigError, "names in id2label must be texts"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(changes, error, words):
    with pytest.raises(error, match=words) as caught:
        config(**changes)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (0.25, 0.25), (1, 1.0), (float("inf"), float("inf")), ([0.1, 0.2], [0.1, 0.2]), ((0.1, 0.2), [0.1, 0.2]),
        (np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (np.array([0.5, 1.0]), [0.5, 1.0]),
        (torch.tensor(0.5), 0.5), (torch.tensor([0.5, 1.0]), [0.5, 1.0]),
    ],
)  # fmt: skip
def test_thresholds_become_plain_numbers(tmp_path, given, kept):
    made = config(threshold=given)
    assert made.threshold == kept
    made.save_pretrained(tmp_path)
    assert EarlyExitConfig.from_pretrained(tmp_path).threshold == kept


def test_class_names_make_both_maps():
    made = config(num_labels=None, id2label={0: "cat", 1: "dog"})
    assert made.label2id == {"cat": 0, "dog": 1}
    assert made.num_labels == 2


def test_two_classes_survive_a_file(tmp_path):
    config(num_labels=2).save_pretrained(tmp_path)  # transformers leaves their names out of the file
    assert EarlyExitConfig.from_pretrained(tmp_path).num_labels == 2


def test_a_model_checks_its_config_again(tmp_path):
    made = config()
    made.threshold = float("nan")
    with pytest.raises(ThresholdError, match="nan"):
        EarlyExitWrapper(made)
    with pytest.raises(ExitPointError, match="names no exits"):
        EarlyExitWrapper(EarlyExitConfig())
    with pytest.raises(ConfigError, match="problem_type='multi_label_classification'"):
        config(problem_type="multi_label_classification")
