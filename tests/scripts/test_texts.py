"""Encoders of transformers as networks of the recipes: weights, layers, tokenizer, and what does not go together."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from erde_hub.data.texts import load_text_data
from erde_hub.errors import ConfigError
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import DataArguments, ExitArguments, StudentArguments, TeacherArguments
from erde_hub.scripts.common.encoders import create_encoder, is_encoder
from erde_hub.training import Distiller, create_accelerator
from tests.fakes.texts import columns, make_tokenizer, write_encoder, write_texts
from tests.fakes.training import make_args

LAYERS = ["bert.encoder.layer.0", "bert.encoder.layer.1"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def data(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "set", {"train": columns(64), "validation": columns(40, first=300)})
    return load_text_data(folder / "set", encoder, max_length=8, cache_dir=folder / "cache", progress=False)


def test_fewer_layers_are_the_first_ones_of_the_weights(encoder, data):
    student = recipe.build_model(
        encoder, data, ExitArguments(exits=LAYERS[:1]), kwargs={"num_hidden_layers": 2}, pretrained=True
    )
    assert student.exit_names == [LAYERS[0], "classifier"]
    assert student.config.backbone_kwargs["num_hidden_layers"] == 2
    assert student.config.input_size == [8]
    assert student.config.id2label == {0: "negative", 1: "positive"}
    stored = load_file(f"{encoder}/model.safetensors")
    for key, tensor in student.backbone.bert.state_dict().items():
        if key in stored:
            assert torch.equal(tensor, stored[key])
    fresh = recipe.build_model(encoder, data, ExitArguments(exits=LAYERS), seed=1)
    assert not torch.equal(fresh.backbone.bert.encoder.layer[0].output.dense.weight, stored["encoder.layer.0.output.dense.weight"])  # fmt: skip # noqa: E501


def test_what_is_no_network_for_texts(encoder, data, tmp_path):
    assert is_encoder(encoder)
    assert is_encoder("org/name")
    assert not is_encoder("resnet18")
    with pytest.raises(ConfigError, match="'resnet18' is no network for texts, which 'set' holds"):
        recipe.build_model("resnet18", data, ExitArguments())
    with pytest.raises(ConfigError, match=r"\(BertConfig\) has no 'num_layer'"):
        create_encoder(encoder, data, {"num_layer": 2}, pretrained=True)
    with pytest.raises(ConfigError, match=r"do not fit: .* tensors are missing or of another shape"):
        create_encoder(encoder, data, {"intermediate_size": 8}, pretrained=True)
    with pytest.raises(ConfigError, match=r"do not fit: .*encoder\.layer\.3"):
        create_encoder(encoder, data, {"num_hidden_layers": 4}, pretrained=True)
    with pytest.raises(ConfigError, match="no text classifier could be made of 'org/name'"):
        create_encoder("org/name", data, {}, pretrained=True)
    with pytest.raises(ConfigError, match="knows 9 tokens, the tokenizer of the data has 14"):
        create_encoder(write_encoder(tmp_path / "small", vocabulary=9), data, {}, pretrained=True)
    config = BertConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=4)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match="max_length=8 is more than the 4 tokens"):
        create_encoder(str(tmp_path / "short"), data, {}, pretrained=True)


def test_the_network_decides_whether_data_are_texts(encoder, tmp_path):
    folder = write_texts(tmp_path / "set", {"train": columns(40)})
    teacher_args = TeacherArguments(teacher_architecture=encoder)
    student_args = StudentArguments(student_architecture=encoder)
    preprocessing = recipe.existing_preprocessing(None, teacher_args, student_args)
    assert preprocessing == {"tokenizer": encoder, "max_length": None}
    assert recipe.existing_preprocessing(None, TeacherArguments(), student_args) == preprocessing
    args = DataArguments(dataset=folder, cache_dir=str(tmp_path / "cache"), max_length=9)
    assert recipe.load_data(args, preprocessing, progress=False).input_size == (9,)
    for name, value in {"image_column": "img", "image_size": 32, "streaming": True}.items():
        with pytest.raises(ConfigError, match=f"{name}={value!r} is not for texts"):
            recipe.load_data(DataArguments(dataset=folder, **{name: value}), preprocessing)
    for name, value in {"text_column": "sentence", "max_length": 9}.items():
        with pytest.raises(ConfigError, match=f"{name}={value!r} is not for images"):
            recipe.load_data(DataArguments(dataset=folder, **{name: value}))


def test_a_student_learns_from_texts_and_its_kind_is_checked(encoder, data):
    teacher = recipe.build_model(encoder, data, ExitArguments(exits=LAYERS), pretrained=True)
    kwargs = {"num_hidden_layers": 2}
    exits = ExitArguments(exits=LAYERS[:1], head_kwargs={"pool": "mean"})
    student = recipe.build_model(encoder, data, exits, kwargs=kwargs, pretrained=True)
    args = make_args(epochs=12, batch_size=16, lr=3e-3, optimizer="adamw")
    result = Distiller(student, data, args, "ce").train()
    assert result.status == "completed"
    assert max(result.history[-1]["validation"]["accuracy"]) == 1  # the first word tells the label
    distilled = recipe.build_model(encoder, data, exits, kwargs=kwargs, pretrained=True)
    result = Distiller(distilled, data, make_args(epochs=1), "erde", teacher=teacher).train()
    assert result.teacher_exits == [1, 2]
    with pytest.raises(ConfigError, match="augment='crop_flip' is for images"):
        Distiller(distilled, data, make_args(augment="crop_flip"), "ce")

    records = recipe.collect(recipe.Run(create_accelerator(args), data, args, {}), student, "test")
    assert records.index.tolist() == data.test.indices.tolist()
    tokens = make_tokenizer()([columns(40, first=300)["sentence"][i] for i in data.test.indices], max_length=8,
                              truncation=True, padding=True, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        every = student(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], output_all_exits=True)
    torch.testing.assert_close(records.logits[-1], every.logits, atol=1e-5, rtol=1e-4)
