"""A stored config is data from a stranger: whatever it says, loading works or ends with an error of ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import timm
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from erde_hub import EarlyExitWrapper
from erde_hub.backbones.transformers_preprocessing import known_preprocessing
from erde_hub.calibration import ThresholdChoice
from erde_hub.errors import CheckpointError, ConfigError, ErdeError
from erde_hub.modeling import heads_only
from erde_hub.prediction_sets import ConformalClassifier
from erde_hub.preprocessing import check_preprocessing
from tests.fakes import absurd_configs, transformers_models
from tests.fakes.memory import PeakMemory
from tests.fakes.networks import CLASSES, wrap
from tests.fakes.processes import CONTEXT

_NUMBERS = st.one_of(
    st.integers(-3, 5), st.sampled_from([0, -1, 2**31, 10**12, 10**30]), st.floats(allow_nan=True, allow_infinity=True)
)
_TEXT = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["resnet18", "hf-hub:org/name", "local-dir:/tmp", "../x", "os.system", "layer1@9", "layer1", "entropy"]
    ),
)
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXT)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXT, inner, max_size=3)),
    max_leaves=4,
)


@pytest.fixture(scope="module", params=["resnet", "bert"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "resnet":
        backbone = timm.create_model("resnet8_cifar", num_classes=CLASSES, width=4)
        model = EarlyExitWrapper(backbone, exits=["layer1", "layer2"], backbone_kwargs={"width": 4})
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        config = transformers.BertConfig(**sizes, vocab_size=30, max_position_embeddings=16, num_labels=CLASSES)
        model = EarlyExitWrapper(transformers.BertForSequenceClassification(config), exits=["bert.encoder.layer.0"])
    model.set_prediction_sets(ConformalClassifier([0.5] * model.num_exits, randomized=False))
    model.config.threshold_profile = ThresholdChoice(
        threshold=model.threshold, policy="entropy", target="accuracy_drop", bound=0.1, confidence=0.9, method="exact",
        per_exit=False, samples=100, tested=60, value=0.0, upper_bound=None, accuracy=0.9, full_accuracy=0.9,
        mean_macs=1.0, full_macs=2, saving=0.5, possible_saving=0.5, exit_share=[0.5, 0.5], never_exits=False,
    ).to_dict()  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quiet():
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    transformers.utils.logging.set_verbosity(level)


def _places(config: dict) -> list[tuple[str, ...]]:
    nested = ("backbone_kwargs", "preprocessing", "prediction_sets", "threshold_profile")
    inner = [(key, name) for key in nested for name in config.get(key) or {}]
    first = [("exit_features", "0", name) for name in (config.get("exit_features") or [{}])[0]]
    return [
        *((key,) for key in config),
        *inner,
        *first,
        ("backbone_weights",),
        ("auto_map",),
        ("head_kwargs", "hidden"),
    ]


def _changed(config: dict, place: tuple[str, ...], value: object) -> dict:
    changed = json.loads(json.dumps(config))
    target = changed
    for name in place[:-1]:
        if isinstance(target, list):
            target = target[int(name)]
        else:
            if not isinstance(target.get(name), (dict, list)):
                target[name] = {}
            target = target[name]
    target[place[-1]] = value
    return changed


@settings(max_examples=120)
@given(data=st.data())
def test_one_field_says_something_else(checkpoint, data):
    config = json.loads((checkpoint / "config.json").read_text())
    place = data.draw(st.sampled_from(_places(config)))
    value = data.draw(_VALUES)
    folder = checkpoint.with_name(checkpoint.name + "-changed")
    folder.mkdir(exist_ok=True)
    shutil.copy(checkpoint / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps(_changed(config, place, value)))
    before = set(sys.modules)
    with contextlib.suppress(ErdeError):
        profile = EarlyExitWrapper.from_pretrained(folder).config.threshold_profile
        assert profile is None or str(ThresholdChoice.from_dict(profile))
    assert not [name for name in set(sys.modules) - before if "transformers_modules" in name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone_kwargs": {"width": 20_000}}, "the stage has 20000"),
        ({"backbone_kwargs": {"width": 4000}, "exit_features": None}, "describes a network of"),
        ({"backbone_kwargs": {"width": 10**9}}, "is absurd"),
        ({"backbone_kwargs": {"depths": [1000, 1000]}}, "is absurd"),
        ({"architecture": "hf-hub:org/name"}, "registered timm name"),
        ({"architecture": "/etc/passwd"}, "registered timm name"),
        ({"backbone_kwargs": {"width": 4, "checkpoint_path": "/x"}}, "must not hold 'checkpoint_path'"),
        ({"num_labels": 10**9}, "num_labels|id2label|absurd"),
        ({"attn_implementation": "org/kernel"}, "attn_implementation"),
    ],
)
def test_what_would_be_costly_or_dangerous(changes, words, tmp_path):
    wrap("resnet").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((ConfigError, CheckpointError), match=words):
        EarlyExitWrapper.from_pretrained(tmp_path)


def test_a_heads_only_checkpoint_that_describes_a_large_backbone(monkeypatch, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    network = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=30))
    network.save_pretrained(tmp_path / "published")
    weights = tmp_path / "published" / "model.safetensors"
    monkeypatch.setattr(heads_only, "fetch", lambda *_: (weights, hashlib.sha256(weights.read_bytes()).hexdigest()))
    model = EarlyExitWrapper(network, exits=1)
    model.save_pretrained(tmp_path / "heads", heads_only=True, backbone_weights={"repo_id": "org/name"})
    EarlyExitWrapper.from_pretrained(tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    config["backbone_kwargs"]["vocab_size"] = 10**7
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config))
    with PeakMemory() as memory, pytest.raises(CheckpointError):
        EarlyExitWrapper.from_pretrained(tmp_path / "heads")
    assert memory.peak < 2**25


def _vit_from(folder: Path) -> transformers.ViTConfig:
    """The config of a model that was loaded from a folder."""
    config = transformers.ViTConfig(image_size=32)
    config._name_or_path = str(folder)
    return config


@pytest.fixture(scope="module")
def processor_of_a_vit(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder, json.loads((folder / "preprocessor_config.json").read_text())


@settings(max_examples=120)
@given(data=st.data())
def test_one_field_of_the_image_processor_says_something_else(processor_of_a_vit, data):
    """A wrapped model takes its preprocessing from it: one that a config can hold, or none."""
    folder, stored = processor_of_a_vit
    places = [*((key,) for key in stored), ("size", "height"), ("size", "shortest_edge")]
    more = [("crop_size",), ("crop_pct",), ("do_center_crop",), ("include_top",), ("auto_map",), ("rescale_offset",)]
    place = data.draw(st.sampled_from(places + more))
    (folder / "preprocessor_config.json").write_text(json.dumps(_changed(stored, place, data.draw(_VALUES))))
    found = known_preprocessing(_vit_from(folder))
    assert found is None or check_preprocessing(found) == found


@pytest.mark.parametrize("text", ["", "[1]", "3", "{", "[" * 5000, '{"image_processor_type": "Absent"}', "null"])
def test_an_image_processor_that_cannot_be_read(text, tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text(text)
    with caplog.at_level(logging.WARNING, "erde_hub"):
        assert known_preprocessing(_vit_from(tmp_path)) is None
    assert "preprocessor_config.json of" in caplog.text


def test_code_of_an_image_processor_is_not_run(tmp_path, monkeypatch):
    """Nobody is asked either: transformers would wait for an answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    (tmp_path / "config.json").write_text('{"model_type": "of_their_own"}')
    (tmp_path / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "code.Processor"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    assert known_preprocessing(_vit_from(tmp_path)) is None


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generates")
    EarlyExitWrapper(transformers_models.causal("gpt2"), exits=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "text", ['{"cache_implementation": 5}', '{"max_new_tokens": -1}', '{"watermarking_config": [1]}', "[1]", "null"]
)
def test_a_generation_config_that_cannot_be_used(text, language_model):
    (language_model / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config|could not be loaded"):
        EarlyExitWrapper.from_pretrained(language_model)


LONG = [pytest.param(name, "all", marks=pytest.mark.long) for name in ("resnet", "bert", "swin")]


@pytest.mark.parametrize(("name", "which"), [("resnet", "fields"), *LONG])
def test_no_stored_value_costs_much_or_ends_untyped(name, which, tmp_path):
    if name == "swin":
        sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
        config = transformers.SwinConfig(**sizes, window_size=4, num_labels=CLASSES)
        model = EarlyExitWrapper(transformers.SwinForImageClassification(config), exits=1)
    elif name == "bert":
        model = transformers_models.wrap(name)
    else:
        model = wrap(name)
    model.save_pretrained(tmp_path)
    process = CONTEXT.Process(target=absurd_configs.main, args=(tmp_path, which, tmp_path / "found"))
    process.start()
    process.join()
    assert process.exitcode == 0
    *wrong, total = (tmp_path / "found").read_text().splitlines()
    assert wrong == []
    assert int(total.split()[0]) > (500 if which == "all" else 10)
