"""Everything that a language model is refused for: a typed error that names the cause, before any work is lost."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaModel

from erde_hub import EarlyExitWrapper
from erde_hub.data import load_token_data, train_tokenizer
from erde_hub.errors import ConfigError, ExitPointError, InputTypeError, ShapeError, ThresholdError
from erde_hub.scripts.common.language_models import create_language_model
from erde_hub.training import DistillationArguments, Distiller
from tests.fakes.transformers_models import causal

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def prompt(length=9, count=1):
    return torch.arange(count * length).reshape(count, length) % 45 + 3


def wrapped(name="llama", exits=2, **kwargs):
    return EarlyExitWrapper(causal(name), exits=exits, **kwargs).eval()


known = functools.cache(wrapped)


@torch.no_grad()
def cache_of(backbone, count=1):
    cache = DynamicCache(config=backbone.config)
    backbone(prompt(count=count), cache=cache, use_cache=True)
    return cache


def with_cache(cache, **options):
    return known().generate(prompt(18), max_new_tokens=4, cache=cache, **options)


def generate(name="llama", ids=None, **options):
    return known(name).generate(prompt() if ids is None else ids, **{"max_new_tokens": 4, **options})


def forward(ids=None, **options):
    with torch.no_grad():
        return known()(input_ids=prompt(1) if ids is None else ids, **options)


@functools.cache
def longrope():
    """Phi-3 whose positions all turn otherwise once there are more than 16."""
    scaled = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 2.0], "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **scaled}
    backbone = causal("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    return EarlyExitWrapper(backbone.double(), exits=2).eval()


def without_output_embedding():
    backbone = causal("llama")
    backbone.get_output_embeddings = lambda: None
    return EarlyExitWrapper(backbone, exits=1)


def distil(**teacher):
    data = load_token_data({"train": np.arange(400) % 50}, vocab_size=50, block_size=16)
    args = DistillationArguments(epochs=1, batch_size=2, progress_bar=False, cpu_threads=1)
    return Distiller(wrapped(), data, args, "kd", causal("llama", **teacher))


def student_with_another_tokenizer(folder):
    """As many tokens, and other ones."""
    words, data = "to be or not to be, that is the question " * 50, "how now brown cow " * 200
    (folder / "train.txt").write_text(data)
    train_tokenizer([words], 264).save_pretrained(folder)
    causal("llama", vocab_size=264).save_pretrained(folder)
    return create_language_model(str(folder), load_token_data(folder, block_size=16, vocab_size=264), {}, True)


CASES = {
    "exit at the last layer": (
        lambda: wrapped(exits=["model.layers.4"]), ExitPointError, "is the last layer, after which the model answers"
    ),
    "exit at the embeddings": (
        lambda: wrapped("gpt2", ["transformer.wte"]), ExitPointError, "lies at no layer: .*, transformer.h.0 to"
    ),
    "exit in a layer": (
        lambda: wrapped(exits=["model.layers.1.mlp"]), ExitPointError, "in the middle of a layer: .*, model.layers.0"
    ),
    "exit in a layer, another head": (
        lambda: wrapped(exits=["model.layers.1.mlp"], head="linear"), ExitPointError, "in the middle of a layer"
    ),
    "exit after the norm": (
        lambda: wrapped("gpt2", ["transformer.ln_f"]), ExitPointError, "lies at no layer"
    ),
    "no output embedding": (without_output_embedding, InputTypeError, "has no output embedding"),
    "no language model": (
        lambda: EarlyExitWrapper(LlamaModel(causal("llama").config), exits=1), InputTypeError, "is no classifier or"
    ),
    "another size of vocabulary": (lambda: distil(vocab_size=60), ConfigError, "teacher with the same tokenizer"),
    "vocabulary smaller than the data's": (lambda: distil(vocab_size=40), ConfigError, "the teacher knows 40 tokens"),
    "threshold in a beam search": (
        lambda: generate(threshold=0.5, num_beams=2), ConfigError, "greedy search and sampling only, not with beam sea"
    ),
    "drafts in a beam search": (
        lambda: generate(assistant_early_exit=1, num_beams=2), ConfigError, "not with beam search"
    ),
    "thresholds of another number of exits": (
        lambda: generate(threshold=[0.1, 0.2, 0.3]), ThresholdError, "3 thresholds for 2 early exits"
    ),
    "cache of other heads": (
        lambda: with_cache(cache_of(causal("llama", num_key_value_heads=2)), threshold=0.5), ConfigError,
        "another model's: this one keeps 1 heads of 8 numbers",
    ),
    "cache of other layers": (
        lambda: with_cache(cache_of(causal("llama", num_hidden_layers=3)), assistant_early_exit=1), ConfigError,
        "another model's.*a DynamicCache with the 5 layers",
    ),
    "cache of other heads, no exits": (
        lambda: with_cache(cache_of(causal("llama", num_key_value_heads=2))), ConfigError, "not one of this model"
    ),
    "cache of fewer layers, no exits": (
        lambda: with_cache(cache_of(causal("llama", num_hidden_layers=3))), ConfigError, "it has 3 layers"
    ),
    "cache of several texts": (
        lambda: with_cache(cache_of(causal("llama"), 2), threshold=0.5), ConfigError, r"these texts.*\(2, 1, 9, 8\)"
    ),
    "cache of more layers": (
        lambda: with_cache(cache_of(causal("llama", num_hidden_layers=7))), ConfigError, "has 7 layers, this model 5"
    ),
    "forward, cache of other heads": (
        lambda: forward(cache=cache_of(causal("llama", num_key_value_heads=2))), ConfigError, r"keys of shape \(1, 2, 9"
    ),
    "forward, cache of fewer layers": (
        lambda: forward(past_key_values=cache_of(causal("llama", num_hidden_layers=3))), ConfigError, "it has 3 layers"
    ),
    "forward, cache of more layers": (
        lambda: forward(cache=cache_of(causal("llama", num_hidden_layers=7))), ConfigError, "another model's: it has 7"
    ),
    "forward, cache of several texts": (
        lambda: forward(cache=cache_of(causal("llama"), 2)), ConfigError, "these texts: it has 5"
    ),
    "forward, no cache": (
        lambda: forward(cache=((torch.zeros(1, 1, 9, 8),) * 2,) * 5), InputTypeError, "one of transformers.*got tuple"
    ),
    "forward, a token outside, with a cache": (
        lambda: forward(torch.tensor([[60]]), cache=cache_of(causal("llama"))), InputTypeError, "input_ids hold 60"
    ),
    "longrope, a text that grows long": (
        lambda: longrope().generate(prompt(12), max_new_tokens=6, threshold=0.5), ShapeError,
        "after 16 tokens, .* with threshold, 12 tokens and 6 new ones must stay within 16",
    ),
    "longrope, drafts of a text that grows long": (
        lambda: longrope().generate(prompt(16), max_length=18, assistant_early_exit=0), ShapeError, "within 16"
    ),
    "longrope, a short cache": (
        lambda: longrope().generate(prompt(18), max_new_tokens=2, threshold=0.5, cache=cache_of(longrope().backbone)),
        ShapeError, "within 16",
    ),
    "prompt longer than the positions": (
        lambda: generate(ids=prompt(65)), ShapeError, "a prompt of 65 tokens and 4 new ones do not fit the 64 positions"
    ),
    "prompt and text longer than a table": (
        lambda: generate("gpt2", prompt(62)), ShapeError, "62 tokens and 4 new ones do not fit the 64"
    ),
    "max_length longer than a table": (
        lambda: generate("gpt2", prompt(60), max_new_tokens=None, max_length=80, threshold=0.5), ShapeError,
        "60 tokens and 20 new ones do not fit the 64",
    ),
    "embeddings longer than a table": (
        lambda: known("gpt2").generate(inputs_embeds=torch.zeros(1, 65, 16)), ShapeError, "65 tokens"
    ),
    "text longer than a table": (
        lambda: known("gpt2")(input_ids=prompt(65)), ShapeError, "texts of 65 tokens are longer than GPT2LMHeadModel"
    ),
    "token outside the vocabulary": (
        lambda: generate(ids=torch.tensor([[60, 3]])), InputTypeError, "input_ids hold 60, and the vocabulary"
    ),
    "one axis": (lambda: generate(ids=torch.tensor([6, 3]), threshold=0.5), ShapeError, r"got torch.int64 \(2,\)"),
    "no token": (lambda: generate(ids=prompt(0), threshold=0.5), ShapeError, r"at least one token.*\(1, 0\)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), CASES.values(), ids=CASES)
def test_it_is_refused_with_its_reason(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_student_of_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\(264 tokens\) is not that of .* \(264\): teacher, student and data"):
        student_with_another_tokenizer(tmp_path)


def test_a_refused_cache_is_what_it_was():
    cache = cache_of(causal("llama", num_hidden_layers=3))
    before = copy.deepcopy(cache)
    with pytest.raises(ConfigError):
        with_cache(cache)
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in before.layers]
    assert torch.equal(cache.layers[0].keys, before.layers[0].keys)


@pytest.mark.parametrize(("length", "new"), [(6, 11), (17, 12)])
def test_longrope_on_either_side_of_its_length(length, new):
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    expected = longrope().backbone.generate(prompt(length), **settings)
    for options in ({"threshold": 1e-9}, {"assistant_early_exit": 0}, {"assistant_early_exit": 1}):
        assert torch.equal(longrope().generate(prompt(length), **settings, **options), expected), options
    grown = longrope().generate(prompt(12), max_new_tokens=9, do_sample=False, eos_token_id=None)  # without exits
    assert grown.shape == (1, 21)
