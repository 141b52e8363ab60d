"""What people do to a transformers model, done to one with exits: honoured, or refused with the way to do it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, InputTypeError, NotSupportedError, ShapeError
from tests.fakes.networks import wrap

pytestmark = pytest.mark.usefixtures("quiet_transformers")

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def text() -> EarlyExitWrapper:
    torch.manual_seed(0)
    config = BertConfig(**_SMALL, vocab_size=50, num_labels=3, max_position_embeddings=32)
    return EarlyExitWrapper(BertForSequenceClassification(config), exits=1).eval()


def vit() -> EarlyExitWrapper:
    torch.manual_seed(0)
    config = ViTConfig(**_SMALL, image_size=16, patch_size=8, num_labels=3)
    return EarlyExitWrapper(ViTForImageClassification(config), exits=1).eval()


def language_model() -> EarlyExitWrapper:
    config = LlamaConfig(**_SMALL, vocab_size=50, num_key_value_heads=2)
    return EarlyExitWrapper(LlamaForCausalLM(config), exits=1)


def test_more_tokens(tmp_path):
    model = text()
    assert model.get_input_embeddings() is model.backbone.get_input_embeddings()
    assert model.resize_token_embeddings(60).num_embeddings == 60
    new = torch.tensor([[3, 55, 59]])
    expected = model(input_ids=new).logits
    model.save_pretrained(tmp_path)
    loaded = EarlyExitWrapper.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == 60
    assert torch.equal(loaded(input_ids=new).logits, expected)
    table = torch.nn.Embedding(60, 16)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table


@pytest.mark.parametrize("method", ["get_input_embeddings", "set_input_embeddings", "resize_token_embeddings"])
def test_images_have_no_tokens(method):
    arguments = () if method.startswith("get") else (7,)
    with pytest.raises(NotSupportedError, match=rf"{method}\(\): CifarResNet reads images") as caught:
        getattr(wrap("resnet"), method)(*arguments)
    assert isinstance(caught.value, NotImplementedError)


def test_the_tokens_of_a_language_model_are_its_answers():
    with pytest.raises(NotSupportedError, match="resize the model first, then wrap it"):
        language_model().resize_token_embeddings(60)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([[1, 50]], InputTypeError, "hold 50, and the vocabulary of BertForSequenceClassification is 0 to 49"),
        ([[1, -1]], InputTypeError, "hold -1"),
        ([[1] * 33], ShapeError, r"texts of 33 tokens are longer than .* takes \(32 positions\).*truncation=True"),
    ],
)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_texts_that_the_model_cannot_read(ids, error, words, threshold):
    with pytest.raises(error, match=words):
        text()(input_ids=torch.tensor(ids), threshold=threshold)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"token_type_ids": 2},
            "token_type_ids hold 2, and BertForSequenceClassification takes 0 to 1: leave them out",
        ),
        ({"position_ids": 32}, "position_ids hold 32, and BertForSequenceClassification takes 0 to 31"),
    ],
)
def test_ids_beyond_their_tables(more, words):
    inputs = {name: torch.full((1, 4), value) for name, value in more.items()}
    with pytest.raises(InputTypeError, match=words):
        text()(input_ids=torch.ones(1, 4, dtype=torch.int64), **inputs)


@pytest.mark.parametrize("kind", ["bert", "roberta", "opt", "gpt2"])
def test_the_longest_text_is_that_of_the_table(kind):
    """RoBERTa's table has two rows in front of the first position, OPT's two more than its config says."""
    sizes = {**_SMALL, "vocab_size": 50, "num_labels": 3, "max_position_embeddings": 32, "pad_token_id": 1}
    own = {"opt": {"ffn_dim": 16, "word_embed_proj_dim": 16}, "gpt2": {"n_positions": 32}}.get(kind, {})
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "num_labels": 3, "pad_token_id": 1}
    backbone = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes, **own))
    model = EarlyExitWrapper(backbone, exits=1).eval()
    longest = 30 if kind == "roberta" else 32
    ids = torch.full((1, longest), 5)
    assert model(input_ids=ids).logits.shape == (1, 3)
    with pytest.raises(ShapeError, match=rf"texts of {longest + 1} tokens .* takes \({longest} positions\)"):
        model(input_ids=torch.cat([ids, ids[:, :1]], 1))
    table = model.get_input_embeddings()
    with pytest.raises(ShapeError, match=rf"texts of 40 tokens .*\({longest} positions\)"):
        model(inputs_embeds=table(ids[:, :1]).expand(1, 40, -1))
    model.backbone.register_forward_pre_hook(_fails)
    with pytest.raises(RuntimeError, match="something else"):
        model(input_ids=ids)


def _fails(*_):
    raise RuntimeError("something else")


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("make", [text, vit, language_model, lambda: wrap("resnet"), lambda: wrap("swin")])
def test_what_is_asked_of_the_backbone_is_not_swallowed(make, name):
    model = make().eval()
    size = (1, *model.config.input_size)
    texts = model.main_input_name == "input_ids"
    inputs = torch.ones(size, dtype=torch.int64)[:, :4] if texts else torch.randn(size)
    with pytest.raises(InputTypeError, match=f"{name}=True: .* answers with logits; ask model.backbone"):
        model(**{model.main_input_name: inputs, name: True})
    assert model(**{model.main_input_name: inputs, name: False}).logits is not None


@pytest.mark.parametrize("make", [text, vit])
def test_the_implementation_of_attention(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = EarlyExitWrapper.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.backbone.config._attn_implementation == "eager"
    assert model.truncate(0).config.backbone_kwargs == model.config.backbone_kwargs
    model.set_attn_implementation("eager")
    assert EarlyExitWrapper(model.config).backbone.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert EarlyExitWrapper.from_pretrained(tmp_path).backbone.config._attn_implementation == "eager"
    again = EarlyExitWrapper.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert again.backbone.config._attn_implementation == "sdpa"


def test_networks_of_timm_choose_their_attention(tmp_path):
    model = wrap("vit")
    with pytest.raises(NotSupportedError, match="chooses its attention itself"):
        model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="attn_implementation='eager' is for backbones of transformers"):
        EarlyExitWrapper.from_pretrained(tmp_path, attn_implementation="eager")
    assert EarlyExitWrapper.from_pretrained(tmp_path, attn_implementation="sdpa")


class PeftModel(torch.nn.Module):
    """What tells the real one: its configurations."""

    peft_config: dict[str, object] = {}  # noqa: RUF012 - as there


def test_a_model_with_adapters_around_it():
    with pytest.raises(InputTypeError, match=r"got a PeftModel.*modules_to_save=\['heads'\].*merge_and_unload"):
        EarlyExitWrapper(PeftModel(), exits=1)
