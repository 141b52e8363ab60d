"""The loop on causal language models: chunks of tokens against whole logits, resume, processes, what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM

from erde_hub import EarlyExitWrapper
from erde_hub.data import load_token_data
from erde_hub.errors import ConfigError, DataError, InputTypeError
from erde_hub.losses import ExitLoss, create_loss, next_token_labels
from erde_hub.losses._tokens import TokenLogits
from erde_hub.training import DistillationArguments, Distiller
from erde_hub.training.exit_states import ExitStates
from erde_hub.training.layerskip import layer_dropout
from tests.fakes import training as images
from tests.fakes.memory import PeakMemory
from tests.fakes.training import assert_same, weights
from tests.fakes.transformers_models import CAUSAL, causal

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def tokens(blocks=24, length=16, words=50):
    ids = np.random.default_rng(0).integers(3, words, blocks * length)
    return {"train": ids, "validation": ids[: 6 * length], "test": ids[: 6 * length]}


def data(**kwargs):
    return load_token_data(tokens(), vocab_size=50, **{"block_size": 16, **kwargs})


def llama(seed=0, layers=3, exits=("model.layers.0", "model.layers.1"), words=50, **kwargs):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, attention_dropout=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    backbone = LlamaForCausalLM(config)
    return EarlyExitWrapper(backbone, exits=list(exits), **kwargs) if exits else backbone


def make_args(**changes):
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.01, "optimizer": "adamw", "progress_bar": False, "cpu_threads": 1}
    return DistillationArguments(**{**settings, "mixed_precision": "no", **changes})


def whole(loss, student, teacher, ids):
    """The loss from the logits of all tokens at once."""
    labels = next_token_labels(ids).flatten()
    keep = labels >= 0
    logits = [z.flatten(0, 1)[keep] for z in student(input_ids=ids).exit_logits]
    targets = None
    if teacher is not None:
        with torch.no_grad():
            targets = [z.flatten(0, 1)[keep] for z in teacher(input_ids=ids, output_all_exits=True).exit_logits]
    return loss(logits, targets, labels[keep])


@pytest.mark.parametrize(
    ("name", "head_kwargs"),
    [*((name, {}) for name in ("ce", "kd", "self", "ea_kd", "erde", "egad")), ("kd", {"own_norm": True, "rank": 2})],
)
def test_chunks_of_tokens_add_up_to_the_loss_of_all_of_them(name, head_kwargs):
    """Value, terms and gradients; chunks of five tokens, so that the last one is short."""
    student = llama(exits=("model.layers.0", "model.layers.1"), head_kwargs=head_kwargs).double().train()
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    loss = create_loss(name, **({"feature_weight": 0.0} if name == "egad" else {}))
    teacher = llama(1, layers=2, exits=("model.layers.0",)).double().eval() if loss.reads_teacher else None
    ids = data().train.labels[:4]
    expected = whole(loss, student, teacher, ids)
    expected.loss.backward()
    gradients = {key: p.grad.clone() for key, p in student.named_parameters()}
    student.zero_grad()

    states = ExitStates(student).run(student, {"input_ids": ids})
    with torch.no_grad():
        targets = None if teacher is None else ExitStates(teacher).run(teacher, {"input_ids": ids})
    if name == "egad":
        loss.chunk_size = 5
    result = loss.over_tokens(states, targets, next_token_labels(ids).flatten(), chunk_size=5)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.terms, expected.terms)
    torch.testing.assert_close(result.exit_terms, expected.exit_terms)
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], msg=key)


@pytest.mark.parametrize("name", CAUSAL)
def test_states_give_the_logits_of_every_family(name):
    model = EarlyExitWrapper(causal(name), exits=2).eval()
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = ExitStates(model).run(model, {"input_ids": ids})
        expected = model(input_ids=ids, output_all_exits=True).exit_logits
        for own, logits in zip(found, expected, strict=True):
            torch.testing.assert_close(own[:], logits.flatten(0, 1))
    assert not any(module._forward_pre_hooks for module in (*model.heads, model.backbone.get_output_embeddings()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ce", "kd"])
def test_training_learns_and_reports_perplexity(name):
    student = llama()
    teacher = llama(1) if name == "kd" else None
    distiller = Distiller(student, data(), make_args(), name, teacher)
    before = distiller.evaluate()
    result = distiller.train()
    last = result.history[-1]
    assert last["validation"]["nll"][-1] < before["nll"][-1]
    assert last["validation"]["perplexity"] == pytest.approx(np.exp(last["validation"]["nll"]))
    assert len(last["train"]["accuracy"]) == 3
    ids = data().validation.labels
    with torch.no_grad():
        logits = student(input_ids=ids).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert last["validation"]["nll"][-1] == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    def run(**changes):
        student = llama()
        args = make_args(checkpoint_steps=2, output_dir=str(tmp_path / "run"), **changes)
        teacher = llama(1, layers=2, exits=("model.layers.0",))
        return student, Distiller(student, data(), args, "egad", teacher).train()

    expected, whole_run = run(overwrite_output_dir=True)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for folder in newest[1:]:  # as if it had stopped within the last epoch
        shutil.rmtree(folder)
    resumed, result = run(resume=True)
    assert result.step == whole_run.step == 12
    assert_same(weights(expected), weights(resumed))
    assert [h["validation"] for h in result.history] == [h["validation"] for h in whole_run.history]


def test_blocks_are_the_text_and_splits_are_cut_off_its_end(tmp_path):
    text = "".join(f"line {i}: to be or not to be\n" for i in range(60))
    (tmp_path / "train.txt").write_text(text)
    found = load_token_data(tmp_path, block_size=32)
    assert found.tokenizer.decode(found.train.labels.flatten()) == text[: found.train.labels.numel()]
    ids = torch.cat([found.train.labels, found.validation.labels, found.test.labels]).flatten()
    assert found.tokenizer.decode(ids) == text[: len(ids)]
    assert found.vocab_size == 257
    batch = found.train.inputs(np.array([1, 0]), None, 0)
    assert torch.equal(batch["input_ids"], found.train.labels[[1, 0]])
    collated = DataCollatorForLanguageModeling(found.tokenizer, mlm=False)(list(found.train.labels[:3]))
    assert torch.equal(collated["input_ids"], found.train.inputs(np.arange(3), None, 0)["input_ids"])
    assert torch.equal(collated["labels"], found.train.labels[:3])
    larger = load_token_data(tmp_path, block_size=32, vocab_size=300)
    assert len(larger.train) + len(larger.test) < len(found.train)  # merges: fewer tokens


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"dataset": {"validation": [1]}}, DataError, "train"),
        ({"dataset": {"train": [[1]]}}, InputTypeError, "whole numbers"),
        ({"dataset": {"train": [0.5]}}, InputTypeError, "whole numbers"),
        ({"dataset": {"train": [1, 60] * 40}, "vocab_size": 50}, DataError, "position 1"),
        ({"dataset": {"train": [1, 2]}}, DataError, "no block of 16"),
        ({"block_size": 1}, ConfigError, "block_size"),
        ({"tokenizer": 3}, InputTypeError, "tokenizer"),
    ],
)
def test_bad_data(given, error, words):
    with pytest.raises(error, match=words):
        load_token_data(**{"dataset": tokens(), "block_size": 16, **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"student": lambda: llama(words=40)}, "knows 40 tokens"),
        ({"teacher": lambda: llama(1, words=60), "loss": "kd"}, "same tokenizer"),
        ({"data": lambda: data(block_size=48)}, "32 positions"),
        ({"loss": "dedier", "teacher": lambda: llama(1)}, "per sample"),
        ({"loss": "feature_kd", "teacher": lambda: llama(1)}, "features"),
        ({"loss": create_loss("ea_kd", normalize_weights=True), "teacher": lambda: llama(1)}, "normalize_weights"),
        ({"loss": "mse"}, "regression"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(given, words):
    made = {"student": llama, "data": data, "loss": "ce", **given}
    made = {
        key: value() if callable(value) and not isinstance(value, ExitLoss) else value for key, value in made.items()
    }
    with pytest.raises(ConfigError, match=words):
        Distiller(args=make_args(), **made)


def peak_of_a_step(exits: int, kept: bool = False) -> int:
    """Most bytes of a training step of a model of four layers whose last exits are trained."""
    model = llama(layers=4, exits=[f"model.layers.{i}" for i in range(4 - exits, 3)], words=2000).train()
    ids = torch.randint(0, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
    labels = next_token_labels(ids).flatten()
    with PeakMemory() as memory:
        states = ExitStates(model).run(model, {"input_ids": ids})
        if kept:
            states = [TokenLogits(one[:]) for one in states]
        create_loss("ce").over_tokens(states, None, labels, chunk_size=8).loss.backward()
    return memory.peak


def test_a_step_with_three_early_exits_takes_little_more_memory_than_with_one():
    """One exit more is the logits of all tokens more where they are kept: 128 tokens of 2,000 numbers, 1 MB."""
    assert peak_of_a_step(4) < 1.3 * peak_of_a_step(2)
    assert peak_of_a_step(3) < 1.15 * peak_of_a_step(2)
    assert peak_of_a_step(3, kept=True) > 1.5 * peak_of_a_step(3)


def test_layers_are_skipped_as_often_as_they_should_be():
    """In train mode a text skips layer 2 with probability 0.5, so that its states there are those of layer 1."""
    model = llama(exits=("model.layers.1",)).train()
    ids = data().train.labels[:1].expand(400, 16)[:, :4]
    seen = {}
    for name in ("model.layers.1", "model.layers.2"):
        layer = model.backbone.get_submodule(name)
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    torch.manual_seed(0)
    with layer_dropout(model, 0.5):
        model(input_ids=ids)
        for name, expected in (("model.layers.1", 0.5 * (2**0.5 - 1)), ("model.layers.2", 0.5)):
            before, after = seen[name]
            skipped = (before == after).flatten(1).all(1).float().mean().item()
            assert skipped == pytest.approx(expected, abs=0.07)
        model.eval()(input_ids=ids)
        assert not (seen["model.layers.2"][0] == seen["model.layers.2"][1]).all()
    model.train()(input_ids=ids)
    assert not (seen["model.layers.2"][0] == seen["model.layers.2"][1]).flatten(1).all(1).any()


def test_exits_take_turns():
    model = llama(head_kwargs={"own_norm": True})
    distiller = Distiller(model, data(), make_args(rotate_exits=2), "ce")
    batch = next(iter(distiller.train_loader))
    for step, trained in ((0, [True, False]), (1, [False, True])):
        distiller.position.step = step
        model.zero_grad()
        distiller.training_step(model.train(), dict(batch))
        assert [bool(head.norm.weight.grad.abs().sum()) for head in model.heads] == trained


@pytest.mark.parametrize(("name", "value"), [("layer_dropout", 1.0), ("layer_dropout", -0.1), ("rotate_exits", -1)])
def test_bad_arguments_of_layerskip(name, value):
    with pytest.raises(ConfigError, match=name):
        make_args(**{name: value})


def test_layer_dropout_is_for_language_models():
    with pytest.raises(ConfigError, match="layer_dropout is for language models"):
        Distiller(images.network(), images.make_data(), images.make_args(layer_dropout=0.1), "ce")
