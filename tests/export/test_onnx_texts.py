"""Text classifiers in a file: against torch, for every family; a session that reads sentences; int8."""

import importlib.util
import json
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from support_models import transformers_model

from erde_hub import EarlyExitWrapper
from erde_hub.backbones.transformers import longest_text
from erde_hub.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    InputTypeError,
    MissingDependencyError,
    ShapeError,
)
from erde_hub.export import EarlyExitSession, check_onnx, export_onnx, flat
from tests.fakes.onnx_models import dynamic_parts, levels, safe_thresholds
from tests.fakes.texts import make_tokenizer
from tests.fakes.transformers_models import lively_texts

pytestmark = pytest.mark.slow  # tracing a text model takes seconds

FAMILIES = (
    *("Bert", "DistilBert", "Roberta", "XLMRoberta", "Camembert", "Albert", "DebertaV2", "Electra", "MPNet"),
    "ModernBert",
)
RUNTIMES = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is not None]


def padded(model, count=8, length=11, vocabulary=99):
    """Token ids of texts of several lengths, with their masks and, where the model has them, types."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, vocabulary, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, max(length - row % 6, 1) :] = 0
    ids[mask == 0] = model.backbone.config.pad_token_id or 0
    types = (torch.arange(length) > 4).long().expand(count, -1)
    has_types = (getattr(model.backbone.config, "type_vocab_size", 0) or 0) > 1
    return {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": types} if has_types else {})}


def assert_same(model, path, inputs, thresholds, runtime):
    check = check_onnx(model, path, inputs, [0.0, thresholds, 50.0], threads=1, runtime=runtime)
    assert check.same_exit == check.same_answer == 1
    assert check.max_difference < 1e-3


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_are_the_models(text_file, runtime):
    model, path = text_file
    inputs = padded(model, vocabulary=14)
    thresholds = safe_thresholds(model, inputs)
    assert len(model(**inputs, threshold=thresholds).exit_index.unique()) == 2, "the batch should split"
    assert_same(model, path, inputs, thresholds, runtime)
    for count, length in ((1, 5), (3, 1), (1, 1), (2, 40)):
        assert_same(model, path, padded(model, count, length, vocabulary=14), thresholds, runtime)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    torch.manual_seed(2)
    model = lively_texts(EarlyExitWrapper(transformers_model(family), exits=2).eval())
    inputs = padded(model)
    thresholds = safe_thresholds(model, inputs)
    assert len(model(**inputs, threshold=thresholds).exit_index.unique()) > 1
    path = export_onnx(model, tmp_path / "model.onnx")
    one = export_onnx(model, tmp_path / "one.onnx", batch_size=1)
    assert dynamic_parts(one) == []
    whole = padded(model, length=min(model.config.input_size[0], longest_text(model.backbone)))
    for runtime in RUNTIMES:
        assert_same(model, path, inputs, thresholds, runtime)
        assert_same(model, one, whole, safe_thresholds(model, whole), runtime)


def test_what_the_file_takes(text_file):
    _, path = text_file
    graph = onnx.load(path).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    texts = {name: ["batch", "length"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert shapes == {**texts, "threshold": [1], "logits": ["batch", 2], "exit_index": ["batch"]}
    info = EarlyExitSession(path).info
    assert (info.max_length, info.vocab_size, info.pad_token_id, info.input_names) == (40, 14, 0, (*texts,))
    assert "[CLS]" not in repr(info), "the tokenizer is long"


@pytest.mark.parametrize("name", ["Roberta", "MPNet", "Bert", "DebertaV2", "ModernBert", "DistilBert"])
def test_longest_text(name):
    backbone = transformers_model(name)
    longest = longest_text(backbone)
    assert longest == {"Roberta": 38, "MPNet": 38}.get(name, 40)  # two places are for padding
    ids = torch.full((1, longest), 7)
    backbone.eval()(input_ids=ids)
    if name not in ("ModernBert", "DebertaV2"):  # whose positions are relative, or computed
        with pytest.raises((IndexError, RuntimeError)):
            backbone(input_ids=torch.full((1, longest + 1), 7))


# Sentences


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_sentences(text_file, runtime):
    model, path = text_file
    session = EarlyExitSession(path, threads=1, runtime=runtime)
    tokenizer = make_tokenizer()
    texts = ["good film", "a very long and not short plot", "", "bad " * 60]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    for threshold in (0.0, 50.0):
        expected = model(**inputs, threshold=threshold)
        got = session(texts, threshold)
        assert got.exit_index.tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(got.logits, expected.logits.detach().numpy(), atol=1e-4)
        same = session(tokenizer(texts, padding=True, truncation=True, max_length=40), threshold)
        np.testing.assert_allclose(same.logits, got.logits, atol=1e-6)
    assert session([]).logits.shape == (0, 2)
    assert session.tokenize([("good film", "bad plot")])["input_ids"].tolist() == [[4, 6, 5, 7]]


def test_masks_and_types_may_be_left_out(text_file):
    model, path = text_file
    session = EarlyExitSession(path, threads=1)
    inputs = {name: value.numpy() for name, value in padded(model, 2, vocabulary=14).items()}
    whole = {"attention_mask": np.ones((2, 11), bool), "token_type_ids": np.zeros((2, 11), np.int32)}
    np.testing.assert_array_equal(
        session({"input_ids": inputs["input_ids"]}, 0.0).logits, session({**inputs, **whole}, 0.0).logits
    )


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a film", InputTypeError, "texts must be a list of strings, or a dict .* got str"),
        (np.zeros((1, 4)), InputTypeError, "got ndarray"),
        (["a", 3], InputTypeError, "pairs of strings, got int at 1"),
        ([("a", "b", "c")], InputTypeError, "got tuple at 0"),
        ({}, InputTypeError, "takes input_ids, attention_mask, token_type_ids, got none"),
        ({"attention_mask": np.ones((1, 4))}, InputTypeError, "got 'attention_mask'"),
        ({"input_ids": np.ones((1, 4), int), "position_ids": 1}, InputTypeError, "got 'input_ids', 'position_ids'"),
        ({"input_ids": np.ones((1, 4))}, InputTypeError, "input_ids must hold integers, got float64"),
        ({"input_ids": np.ones(4, int)}, ShapeError, r"input_ids must be \(N, L\) as input_ids, got \(4,\)"),
        (
            {"input_ids": np.ones((1, 4), int), "attention_mask": np.ones((1, 3), int)},
            ShapeError,
            r"attention_mask must be .* got \(1, 3\) next to \(1, 4\)",
        ),
        ({"input_ids": np.ones((1, 41), int)}, ShapeError, "1 to 40 tokens, got 41"),
        ({"input_ids": np.ones((1, 0), int)}, ShapeError, "1 to 40 tokens, got 0"),
        ({"input_ids": np.full((1, 4), 14)}, InputTypeError, "0 to 13, got 14 to 14"),
        ({"input_ids": np.full((1, 4), -1)}, InputTypeError, "0 to 13, got -1 to -1"),
    ],
)
def test_texts_that_it_refuses(text_file, texts, error, message):
    with pytest.raises(error, match=message):
        EarlyExitSession(text_file[1], threads=1)(texts)


@pytest.fixture
def known(text_model_and_flat, monkeypatch):
    """The classifier, whose exports start from its flat graph."""
    model, graph = text_model_and_flat
    monkeypatch.setattr(flat, "flat_model", lambda *_: ir.from_proto(onnx.load_from_string(graph)))
    return model


def test_tokenizers_of_every_kind(known, tmp_path):
    fast = make_tokenizer(padding_side="left")
    fast.model_max_length = 10**30
    fast.save_pretrained(tmp_path / "folder")
    small = make_tokenizer()
    small.model_max_length = 6
    for given, longest in ((fast.backend_tokenizer, 40), (tmp_path / "folder", 40), (small, 6), (fast, 40)):
        session = EarlyExitSession(export_onnx(known, tmp_path / "model.onnx", tokenizer=given), threads=1)
        ids = session.tokenize(["bad " * 60, "good"])["input_ids"]
        assert ids.shape == (2, longest)
        assert ids[1, -1 if given is fast else 0] != 0
    session = EarlyExitSession(export_onnx(known, tmp_path / "model.onnx"))
    with pytest.raises(ConfigError, match=r"model\.onnx holds no tokenizer.*export with tokenizer="):
        session(["good film"])


def test_tokenizers_that_are_refused(known, tiny_file, text_file, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    larger = make_tokenizer()
    larger.add_tokens(["new"])
    with pytest.raises(ConfigError, match="the tokenizer has 15 tokens, the model knows 14"):
        export_onnx(known, path, tokenizer=larger)
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json that can be read"):
        export_onnx(known, path, tokenizer=tmp_path)
    with pytest.raises(InputTypeError, match=r"tokenizer must be a fast tokenizer.* got int"):
        export_onnx(known, path, tokenizer=3)
    with pytest.raises(ConfigError, match="TinyNet reads images: leave tokenizer out"):
        export_onnx(tiny_file[0], path, tokenizer=make_tokenizer())
    assert not path.exists()
    file = onnx.load(text_file[1])
    (entry,) = (entry for entry in file.metadata_props if entry.key == "tokenizer")
    entry.value = json.dumps("{}")
    onnx.save(file, path)
    with pytest.raises(CheckpointError, match=r"tokenizer in model\.onnx is damaged"):
        EarlyExitSession(path)(["good"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="reading texts needs tokenizers: pip install tokenizers; or pass"):
        EarlyExitSession(text_file[1])(["good"])


def test_language_models_are_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = EarlyExitWrapper(transformers.LlamaForCausalLM(config), exits=["model.layers.0"])
    with pytest.raises(ExportError, match="LlamaForCausalLM is a language model"):
        export_onnx(model, tmp_path / "model.onnx")


# int8


def test_int8(known, tmp_path):
    data = [padded(known, vocabulary=14), padded(known, 4, 7, vocabulary=14)]
    path = export_onnx(known, tmp_path / "int8.onnx", calibration_data=data)
    for graph in levels(path):
        layers = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
        weighted = [node for node in layers if node.inputs[1].producer().op_type == "DequantizeLinear"]
        assert len(weighted) >= 7, "six layers of the encoder and a classifier"
        assert len(layers) - len(weighted) == 2, "products of attention stay in float"
    for runtime in RUNTIMES:
        check = check_onnx(known, path, data[0], [0.0, 50.0], threads=1, runtime=runtime)
        assert check.same_exit == 1
        assert 0 < check.relative_difference < 0.15


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([torch.zeros(2, 4)], InputTypeError, "batch 0 must be a dict of input_ids, attention_mask, token_type_ids"),
        ([{"labels": 1}], InputTypeError, "takes input_ids"),
        ([], DataError, "holds no text"),
        ([{"input_ids": torch.zeros(1, 50, dtype=torch.long)}], ShapeError, "1 to 40 tokens, got 50"),
    ],
)
def test_calibration_data_are_checked(known, tmp_path, data, error, message):
    with pytest.raises(error, match=message):
        export_onnx(known, tmp_path / "model.onnx", calibration_data=data)
