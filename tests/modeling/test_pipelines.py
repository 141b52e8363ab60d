"""Pipelines of models with exits take a threshold and tell the exit; those of other models are transformers' own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, pipeline
from transformers.pipelines import PIPELINE_REGISTRY, ImageClassificationPipeline, TextClassificationPipeline

from erde_hub.errors import NotSupportedError, ThresholdError
from erde_hub.modeling.pipelines import EarlyExitTextClassificationPipeline, register_pipelines
from tests.fakes import networks
from tests.fakes.texts import make_tokenizer
from tests.fakes.transformers_models import text, wrap

NEVER, ALWAYS = 0.0, 9.0


@pytest.fixture(scope="module", params=["text-classification", "image-classification"])
def served(request, tmp_path_factory):
    """Task, model, the pipeline's further arguments, five inputs, and the model's own inputs for them."""
    if request.param == "text-classification":
        model, tokenizer = wrap("bert"), make_tokenizer()
        given = ["good", "bad film", "a very long plot", "not good", "the short film"]
        return (
            request.param,
            model,
            {"tokenizer": tokenizer},
            given,
            tokenizer(given, padding=True, return_tensors="pt"),
        )
    model = networks.wrap("resnet")
    processor = model.image_processor()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    given = [Image.fromarray(p) for p in pixels]
    return request.param, model, {"image_processor": processor}, given, processor(given, return_tensors="pt")


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_threshold_decides_and_the_exit_is_told(served, batch_size):
    task, model, more, given, inputs = served
    with torch.no_grad():
        scores = model(**inputs, output_all_exits=True).exit_logits[0].softmax(-1)
        middle = float(torch.special.entr(scores).sum(-1).quantile(0.4))
        expected = model(**inputs, threshold=middle)
    assert len(set(expected.exit_index.tolist())) > 1
    classify = pipeline(task, model=model, threshold=middle, **more)
    answers = classify(given, batch_size=batch_size, top_k=1)
    assert [a[0]["exit_index"] for a in answers] == expected.exit_index.tolist()
    assert [a[0]["label"] for a in answers] == [model.config.id2label[i] for i in expected.logits.argmax(-1).tolist()]
    assert [a[0]["score"] for a in answers] == pytest.approx(expected.logits.softmax(-1).amax(-1).tolist(), abs=1e-5)
    for threshold, taken in ((NEVER, model.num_exits - 1), (ALWAYS, 0)):
        assert {a["exit_index"] for a in classify(given[0], threshold=threshold, top_k=3)} == {taken}
    assert classify(given, top_k=1, batch_size=batch_size) == answers, "a call's threshold is for that call"


def test_a_threshold_that_the_policy_does_not_take(served):
    task, model, more, given, _ = served
    with pytest.raises(ThresholdError, match="-1"):
        pipeline(task, model=model, threshold=-1, **more)
    with pytest.raises(ThresholdError, match="got 1 thresholds"):
        pipeline(task, model=model, **more)(given, threshold=[0.3])
    static = model.truncate(0)
    with pytest.raises(NotSupportedError, match=r"threshold=0.3: TruncatedModel answers at one exit"):
        pipeline(task, model=static, threshold=0.3, **more)
    assert "exit_index" not in pipeline(task, model=static, **more)(given[0], top_k=1)[0]


def test_the_plain_answer_of_texts_keeps_its_form():
    classify = pipeline("sentiment-analysis", model=wrap("bert"), tokenizer=make_tokenizer())
    (answer,) = classify("a good film")
    assert set(answer) == {"label", "score", "exit_index"}
    assert copy.copy(classify)("a good film") == [answer]


def test_a_model_with_adapters():
    adapted = get_peft_model(wrap("bert"), LoraConfig(target_modules=["query"], modules_to_save=["heads"]))
    classify = pipeline("text-classification", model=adapted.eval(), tokenizer=make_tokenizer(), threshold=ALWAYS)
    assert classify("good")[0]["exit_index"] == 0


def test_zero_shot_refuses_what_transformers_ignores():
    model, tokenizer = wrap("bert", id2label=["a", "b", "entailment", "c", "d"]), make_tokenizer()
    classify = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    assert set(classify("good film", ["good", "bad"])) == {"sequence", "labels", "scores"}
    with pytest.raises(NotSupportedError, match=r"set pipe\.model\.threshold"):
        classify("good film", ["good", "bad"], threshold=0.3)


def test_other_models_get_the_pipelines_of_transformers():
    classify = pipeline("text-classification", model=text("bert"), tokenizer=make_tokenizer())
    assert type(classify) is TextClassificationPipeline
    assert set(classify("good")[0]) == {"label", "score"}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    processor = networks.wrap("resnet").image_processor()
    other = pipeline("image-classification", model=ResNetForImageClassification(config), image_processor=processor)
    assert type(other) is ImageClassificationPipeline


def test_a_users_own_pipeline_of_the_task_stays(monkeypatch):
    class Mine(TextClassificationPipeline):
        pass

    entry = PIPELINE_REGISTRY.supported_tasks["text-classification"]
    assert entry["impl"] is EarlyExitTextClassificationPipeline
    monkeypatch.setitem(entry, "impl", Mine)
    register_pipelines()
    assert entry["impl"] is Mine
