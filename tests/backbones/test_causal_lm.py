"""Language models: logits of every exit for every token, losses over tokens, and no routing."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch.nn import functional as F

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, InputTypeError, LabelError, ShapeError, ThresholdError

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_SIZES, **_SPECIAL, num_key_value_heads=1)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_SIZES, **_SPECIAL, num_key_value_heads=1)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, **_SPECIAL)),
}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> EarlyExitWrapper:
    torch.manual_seed(0)
    return EarlyExitWrapper(MODELS[request.param](), exits=2, head="linear").eval()


@pytest.fixture
def texts() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_eval_gives_the_last_exits_logits(model, texts):
    with torch.no_grad():
        own = model.backbone(**texts).logits
        routed = model(**texts)
        every = model(**texts, output_all_exits=True)
    assert torch.equal(routed.logits, own)
    assert routed.exit_index.tolist() == [2, 2, 2]
    assert [z.shape for z in every.exit_logits] == [(3, 7, 50)] * 3
    assert torch.equal(every.exit_logits[-1], own)
    assert not torch.equal(every.exit_logits[0], own)


def test_the_loss_is_that_of_transformers_at_every_exit(model, texts):
    labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
    with torch.no_grad():
        own = model.backbone(**texts, labels=labels).loss
        assert model(**texts, labels=labels).loss == pytest.approx(float(own), abs=1e-5)
        every = model(**texts, labels=labels, output_all_exits=True)
    by_hand = [F.cross_entropy(z[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100) for z in every.exit_logits]
    assert every.loss == pytest.approx(float(sum(by_hand)), abs=1e-5)
    assert model(**texts, labels=torch.full_like(labels, -100)).loss == 0


def test_training_reaches_every_head_and_a_checkpoint_comes_back(model, texts, tmp_path):
    model.train()(**texts, labels=texts["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().zero_grad()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").stat().st_size < 4000  # tokens are no classes with names
    again = EarlyExitWrapper.from_pretrained(tmp_path)
    assert again.config.task == "causal_lm"
    with torch.no_grad():
        for one, two in zip(
            model(**texts, output_all_exits=True).exit_logits,
            again(**texts, output_all_exits=True).exit_logits,
            strict=True,
        ):
            assert torch.equal(one, two)


def test_nobody_leaves(model, texts):
    with pytest.raises(ThresholdError, match=r"\[0\.5, 0\.5\].*not routed.*generate\(threshold="):
        model(**texts, threshold=0.5)
    with pytest.raises(ThresholdError, match="not routed"):
        model.threshold = [0.0, 0.1]
    assert model.threshold == 0.0
    with pytest.raises(ThresholdError, match="not routed"):
        EarlyExitWrapper(model.backbone, exits=1, threshold=1.0)
    with pytest.raises(InputTypeError, match="use_cache=True"):
        model(**texts, use_cache=True)


def test_labels_that_are_refused(model, texts):
    ids = texts["input_ids"]
    with pytest.raises(ShapeError, match=r"shape \(3, 7\), one per token, got \(3,\)"):
        model(**texts, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(LabelError, match="hold 50, but there are 50 tokens"):
        model(**texts, labels=ids.index_fill(1, torch.tensor([2]), 50))
    with pytest.raises(InputTypeError, match="token ids"):
        model(**texts, labels=ids.float())
    with pytest.raises(LabelError, match="tokens, which have no id2label"):
        EarlyExitWrapper(model.backbone, exits=1, id2label=["a", "b"])
    model.config.task, task = "chat", model.config.task
    with pytest.raises(ConfigError, match="task must be one of classification, causal_lm, got 'chat'"):
        model.config.check()
    model.config.task = task
