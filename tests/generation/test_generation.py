"""Text that skips layers: what comes out is compared with passes over the whole text, without a cache."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from erde_hub import EarlyExitForCausalLM, EarlyExitWrapper
from erde_hub.errors import (
    ConfigError,
    ExitPointError,
    InputTypeError,
    MissingDependencyError,
    ShapeError,
    ThresholdError,
)
from erde_hub.generation import ExitGenerateOutput, _transformers
from tests.fakes.networks import wrap as wrap_images
from tests.fakes.transformers_models import CAUSAL, causal

pytestmark = pytest.mark.usefixtures("quiet_transformers")
GREEDY = {"max_new_tokens": 18, "do_sample": False, "eos_token_id": None}
#: Passes that a random model's exits take sometimes.
THRESHOLD = 1.6


def prompts(count: int, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 50, (count, length), generator=torch.Generator().manual_seed(7))


def wrapped(name: str = "llama", exits=3, **kwargs) -> EarlyExitForCausalLM:
    """A random model in float64, where two ways to one text differ by less than two logits do."""
    torch.manual_seed(1)
    return EarlyExitWrapper(causal(name).double(), exits=exits, **kwargs).eval()


@pytest.fixture(scope="module")
def llama() -> EarlyExitForCausalLM:
    return wrapped()


@torch.no_grad()
def slow_exits(
    model, ids: torch.Tensor, threshold: float, new: int, copies: bool = False
) -> tuple[list[int], list[int]]:
    """Greedy text and exits of one text by passes over all of it."""
    tokens, exits = [], []
    for step in range(new):
        logits = [z[0, -1] for z in model(input_ids=ids, output_all_exits=True).exit_logits]
        entropies = [torch.distributions.Categorical(logits=z).entropy() for z in logits[:-1]]
        sure = [e for e, entropy in enumerate(entropies) if entropy < threshold and step > 0]  # the prompt goes deep
        exits.append(sure[0] if sure else len(logits) - 1)
        tokens.append(int(logits[exits[-1]].argmax()))
        ids = torch.cat([ids, torch.tensor([tokens[-1:]])], 1)
    return tokens, exits


@torch.no_grad()
def check_drafts(model, row: torch.Tensor, expected: torch.Tensor) -> int:
    """Compares the text of two ways to draft with greedy text; returns how many drafts were accepted."""
    accepted = 0
    for options in (
        {"assistant_early_exit": 0, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0},
        {"assistant_early_exit": model.exit_names[2], "num_assistant_tokens": 3},
    ):
        got = model.generate(row, **GREEDY, **options, return_dict_in_generate=True)
        assert torch.equal(got.sequences, expected), options
        accepted += int((got.exit_index < 3).sum())
    return accepted


@torch.no_grad()
def check_text(name: str, count: int) -> None:
    model = wrapped(name)
    drafts = skipped = 0
    for row in prompts(count).split(1):
        expected = model.backbone.generate(row, **GREEDY)
        for threshold in (0, 1e-9):
            assert torch.equal(model.generate(row, **GREEDY, threshold=threshold), expected)
        drafts += check_drafts(model, row, expected)
        tokens, exits = slow_exits(model, row, THRESHOLD, 18)
        early = model.generate(row, **GREEDY, threshold=THRESHOLD, return_dict_in_generate=True)
        assert early.sequences[0, 9:].tolist() == tokens
        assert early.exit_index[0].tolist() == exits
        skipped += sum(exit_index < 3 for exit_index in exits)
        full = DynamicCache(config=model.backbone.config)
        model.backbone(early.sequences[:, :-1], cache=full, use_cache=True)
        for one, other in zip(early.cache.layers, full.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-5)
    assert drafts > 0, "no draft was accepted"
    assert skipped > 0, "no token exited early"


#: Llama's layers, GPT-2's, sliding windows, capped logits; the others add names and biases.
QUICK = ("llama", "gpt2", "mistral", "gemma2")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CAUSAL]
)
def test_text_of_every_family(name):
    """Equal to greedy; with early exits, text, exits, keys and values are those of full passes."""
    check_text(name, 2)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CAUSAL)
def test_two_hundred_texts_of_every_family(name):
    model, ids = wrapped(name), prompts(200)
    expected = model.backbone.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, threshold=1e-9), expected)
    assert sum(check_drafts(model, row, text) for row, text in zip(ids.split(1), expected.split(1), strict=True)) > 0


@pytest.mark.parametrize(("policy", "threshold"), [("patience", 1), ("confidence", 0.5), ("margin", [0.2, 1.1, 0.3])])
def test_other_policies(policy, threshold, llama):
    model = EarlyExitWrapper(llama.backbone, exits=llama.config.exits, policy=policy, threshold=1e8).eval()
    every = model.policy.check_threshold(threshold, 3)
    out = model.generate(prompts(1), **GREEDY, threshold=threshold, return_dict_in_generate=True)
    for step in range(1, 18):
        with torch.no_grad():
            logits = model(input_ids=out.sequences[:, : 9 + step], output_all_exits=True).exit_logits
        log_probs = torch.stack([z[:, -1] for z in logits[:-1]]).float().log_softmax(-1)
        sure = [e for e in range(3) if model.policy.compare(model.policy.score(log_probs[: e + 1]), every[e])]
        assert int(out.exit_index[0, step]) == (sure[0] if sure else 3)
    assert out.exit_index.min() < 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_several_texts_go_on_as_each_would_alone(name):
    model, ids = wrapped(name), prompts(3)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    together = model.generate(
        ids, attention_mask=mask, **GREEDY, threshold=THRESHOLD, pad_token_id=0, return_dict_in_generate=True
    )
    for row in range(3):
        own = ids[row : row + 1, 9 - int(mask[row].sum()) :]
        alone = model.generate(own, **GREEDY, threshold=THRESHOLD, return_dict_in_generate=True)
        assert together.sequences[row, 9:].tolist() == alone.sequences[0, own.shape[1] :].tolist()
        assert together.exit_index[row].tolist() == alone.exit_index[0].tolist()
    padded = model.generate(ids[:1], attention_mask=mask[:1], assistant_early_exit=1, **GREEDY)
    assert padded[0, 9:].tolist() == model.backbone.generate(ids[:1, 4:], **GREEDY)[0, 5:].tolist()


def test_copied_states_are_projections_of_the_state_at_the_exit(llama):
    """By hand, of a Llama: keys of the last layer from the first layer's output."""
    out = llama.generate(prompts(1), **GREEDY, threshold=9.0, skipped_states="copy", return_dict_in_generate=True)
    assert out.exit_index[0, 1:].eq(0).all()
    owed = llama.generate(prompts(1), **GREEDY, threshold=9.0, return_dict_in_generate=True)
    assert out.sequences.tolist() == owed.sequences.tolist(), "the first layer alone decides, and it is exact"
    body, length = llama.backbone.model, out.sequences.shape[1] - 1
    states: list[torch.Tensor] = []
    handle = body.layers[0].register_forward_hook(lambda _m, _a, output: states.append(output))
    with torch.no_grad():
        llama.backbone(out.sequences[:, :length])
        handle.remove()
        layer = body.layers[4]
        values = layer.self_attn.v_proj(layer.input_layernorm(states[0][:, -1]))
    torch.testing.assert_close(out.cache.layers[4].values[0, 0, -1], values[0])
    assert not torch.allclose(owed.cache.layers[4].values[0, 0, -1], values[0])


@pytest.mark.slow
@pytest.mark.parametrize("draws", [150, pytest.param(700, marks=pytest.mark.long)])
def test_sampled_text_has_the_distribution_of_the_full_model(draws):
    """Pairs of new tokens of a vocabulary of six, next to their exact probabilities."""
    torch.manual_seed(0)
    model = EarlyExitWrapper(causal("llama", vocab_size=6, num_hidden_layers=3), exits=["model.layers.0"]).eval()
    ids, options = torch.tensor([[3, 4]]), {"temperature": 0.8, "top_k": 5, "eos_token_id": None}
    exact = torch.zeros(6, 6, 6, dtype=torch.float64)

    def probabilities(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model.backbone(torch.tensor([[3, 4, *tokens]])).logits[0, -1].double() / 0.8
        return logits.masked_fill(logits < logits.topk(5).values[-1], -math.inf).softmax(-1)

    for first in range(6):
        for second in range(6):
            exact[first, second] = probabilities([])[first] * probabilities([first])[second]
            exact[first, second] *= probabilities([first, second])
    counts = torch.zeros(6, 6, 6)
    for seed in range(draws):
        torch.manual_seed(seed)
        out = model.generate(
            ids, do_sample=True, max_new_tokens=3, assistant_early_exit=0, num_assistant_tokens=2,
            assistant_confidence_threshold=0, **options,
        )  # fmt: skip
        counts[tuple(out[0, 2:].tolist())] += 1
    observed, expected = counts.sum(0).flatten(), exact.sum(0).flatten() * draws
    assert observed[expected == 0].sum() == 0
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3
    with torch.no_grad():  # the drafts alone have another one
        early = model(input_ids=torch.tensor([[3, 4, 3]]), output_all_exits=True).exit_logits[0][0, -1].softmax(-1)
    assert (early - probabilities([3])).abs().max() > 0.05


@pytest.mark.parametrize(("depth", "drafts"), [(1, 4), (3, 3)])
def test_drafts_are_not_computed_twice(depth, drafts, llama):
    """Layers x tokens next to transformers' own self-speculation with equal drafts."""
    settings = {"num_assistant_tokens": drafts, "assistant_confidence_threshold": 0, "pad_token_id": 0}
    model = EarlyExitWrapper(copy.deepcopy(llama.backbone), exits=[f"model.layers.{depth - 1}"]).eval()
    model.generation_config = GenerationConfig(**settings)  # where transformers' own looks for them
    counts = [0] * 5
    for number, layer in enumerate(model.backbone.model.layers):
        layer.register_forward_pre_hook(
            lambda _module, args, number=number: counts.__setitem__(number, counts[number] + args[0].shape[1])
        )
    work = []
    for run, k in ((model, 0), (model.backbone, depth)):
        run.generate(prompts(1, 2), **{**GREEDY, "max_new_tokens": 3}, assistant_early_exit=k)  # what is done once
        counts[:] = [0] * 5
        run.generate(prompts(1, 2), **{**GREEDY, "max_new_tokens": 50}, assistant_early_exit=k)
        work.append(sum(counts))
        assert len(set(counts)) == (1 if run is model else 2)
    # transformers' drafts read n + 1 tokens a round: the n drafts, and the one that the last verification has added
    assert work[0] / work[1] == pytest.approx(1 / (1 + depth / 5), rel=0.02)
    assert work[0] / work[1] < 1.02 / (1 + depth / 5 * drafts / (drafts + 1))


def test_kernels_of_half_precision_may_round_differently():
    """Those of wide models do, with the number of tokens; noise of bfloat16's last bit in every layer stands for it."""
    model = EarlyExitWrapper(causal("llama", num_hidden_layers=12).bfloat16(), exits=["model.layers.3"]).eval()
    for layer in model.backbone.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: out * (1 + 2**-8 * torch.randn_like(out)))
    assert model.generate(prompts(1), threshold=9.0, max_new_tokens=3, eos_token_id=None).shape == (1, 12)
    with pytest.raises(InputTypeError, match="does more between its layers"):
        EarlyExitWrapper(of_another_family("Gemma3").bfloat16(), exits=2).eval().generate(prompts(1), threshold=0.5)


class Streamer(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{"threshold": THRESHOLD}, {"assistant_early_exit": 1}, {"threshold": 0}])
def test_streams_scores_and_stops(options, llama):
    streamer = Streamer()
    out = llama.generate(
        input_ids=prompts(1), streamer=streamer, output_scores=True, output_logits=True, **GREEDY, **options,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(out, ExitGenerateOutput)
    assert streamer.tokens == out.sequences[0].tolist()
    assert streamer.ended
    assert len(out.scores) == len(out.logits) == out.exit_index.shape[1] == 18
    assert [int(z.argmax()) for z in out.logits] == out.sequences[0, 9:].tolist()
    stop = int(out.sequences[0, 14])
    first = out.sequences[0, 9:].tolist().index(stop)
    ended = llama.generate(
        prompts(1), **{**GREEDY, "eos_token_id": stop}, **options, pad_token_id=0, return_dict_in_generate=True
    )
    assert ended.sequences[0].tolist() == out.sequences[0, : 9 + first + 1].tolist()
    assert ended.exit_index.shape == (1, first + 1)


def test_a_cache_goes_on(llama):
    """What is returned owes nothing: the next call may exit early, draft, or run the backbone alone."""
    first = llama.generate(prompts(1), **GREEDY, threshold=THRESHOLD, return_dict_in_generate=True)
    settings = {**GREEDY, "attention_mask": torch.ones_like(first.sequences)}  # a token of the text may be the padding
    expected = llama.backbone.generate(first.sequences, **settings)
    for options in ({"threshold": 0}, {"threshold": 1e-9}, {"assistant_early_exit": 0}):
        cache = copy.deepcopy(first.cache)
        assert torch.equal(llama.generate(first.sequences, **settings, **options, cache=cache), expected)
        assert {layer.get_seq_length() for layer in cache.layers} == {first.sequences.shape[1] + 17}


@pytest.mark.parametrize("options", [{"threshold": THRESHOLD}, {"assistant_early_exit": 1}, {}])
def test_an_exception_leaves_everything_as_it_was(options, llama):
    before = llama.generate(prompts(1), **GREEDY, threshold=THRESHOLD, return_dict_in_generate=True)
    cache, config = before.cache, llama.config.to_dict()
    settings, own = llama.generation_config.to_dict(), llama.backbone.config.to_dict()
    keys = [layer.keys.clone() for layer in cache.layers]
    calls = [0]

    def fail(_module, _args):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt

    handle = llama.backbone.model.layers[4].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        llama.generate(before.sequences, **GREEDY, **options, cache=cache)
    handle.remove()
    assert all(torch.equal(layer.keys, key) for layer, key in zip(cache.layers, keys, strict=True))
    assert (config, settings, own) == (
        llama.config.to_dict(), llama.generation_config.to_dict(), llama.backbone.config.to_dict()
    )  # fmt: skip
    again = llama.generate(prompts(1), **GREEDY, threshold=THRESHOLD, return_dict_in_generate=True)
    assert torch.equal(again.sequences, before.sequences)


def test_settings_are_saved_and_the_auto_class_loads_them(llama, tmp_path):
    model = copy.deepcopy(llama).float()
    model.generation_config = GenerationConfig(max_new_tokens=18, eos_token_id=None, pad_token_id=0)
    model.generation_config.threshold = THRESHOLD
    model.save_pretrained(tmp_path)
    expected = model.generate(prompts(1), return_dict_in_generate=True)
    assert expected.exit_index.min() < 3
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        EarlyExitWrapper.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert type(again) is EarlyExitForCausalLM
        out = again.generate(prompts(1), return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.exit_index, expected.exit_index)
    plain = again.generate(prompts(1), threshold=0)
    assert torch.equal(plain, model.backbone.generate(prompts(1), **GREEDY))


def test_pipeline(llama, tmp_path):
    model = copy.deepcopy(llama).float()
    model.save_pretrained(tmp_path)
    names = {f"w{i}": i for i in range(50)}
    words = Tokenizer(models.WordLevel(names, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    plain = generator("w4 w5 w6", **settings)[0]["generated_text"]
    assert generator("w4 w5 w6", **settings, assistant_early_exit=1)[0]["generated_text"] == plain
    early = generator("w4 w5 w6", **settings, threshold=THRESHOLD)[0]["generated_text"]
    expected = model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=8, do_sample=False, threshold=THRESHOLD)[0, 3:]
    assert early.split() == [f"w{token}" for token in expected]


def test_other_heads_draft_as_well(llama):
    model = EarlyExitWrapper(llama.backbone, exits=2, head="linear").eval()
    out = model.generate(prompts(1), **GREEDY, assistant_early_exit=1)
    assert torch.equal(out, model.backbone.generate(prompts(1), **GREEDY))


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"threshold": math.nan}, ThresholdError, "is not allowed for EntropyPolicy"),
        ({"threshold": [0.5, 0.5]}, ThresholdError, "2 thresholds for 3 early exits"),
        ({"threshold": 0.5, "prompt_lookup_num_tokens": 2}, ConfigError, "not with assisted generation"),
        ({"threshold": 0.5, "assistant_early_exit": 1}, ConfigError, "exclude each other"),
        ({"threshold": 0.5, "skipped_states": "invent"}, ConfigError, "one of owed, copy, got 'invent'"),
        ({"threshold": 0.5, "use_cache": False}, ConfigError, "needs a cache that grows"),
        ({"threshold": 0.5, "cache_implementation": "static"}, ConfigError, "without cache_implementation"),
        ({"threshold": 0.5, "output_hidden_states": True}, ConfigError, "no attentions and hidden states"),
        ({"assistant_early_exit": 3}, ExitPointError, "is no early exit.*0 model.layers.0, 1 model"),
        ({"assistant_early_exit": True}, ExitPointError, "True is no early exit"),
        ({"assistant_early_exit": "model.layers.5"}, ExitPointError, "did you mean 'model.layers"),
        ({"assistant_early_exit": 1, "do_sample": True, "num_return_sequences": 2}, ShapeError, "one text at a time"),
    ],
)
def test_bad_arguments(options, error, words, llama):
    with pytest.raises(error, match=words):
        llama.generate(prompts(1), max_new_tokens=4, **options)


def test_bad_prompts_and_caches(llama):
    with pytest.raises(ShapeError, match="drafts for one text at a time, got 2"):
        llama.generate(prompts(2), assistant_early_exit=1)
    long = llama.generate(prompts(1), **GREEDY, threshold=0.5, return_dict_in_generate=True)
    with pytest.raises(ShapeError, match="the whole text, of more than the 26 tokens in the cache, got 9"):
        llama.generate(prompts(1), assistant_early_exit=1, cache=long.cache)
    with pytest.raises(InputTypeError, match="needs input_ids"):
        llama.generate(inputs_embeds=torch.zeros(1, 3, 16).double(), threshold=0.5)


@torch.no_grad()
def test_logits_of_some_tokens(llama):
    ids = prompts(2)
    whole = llama(input_ids=ids, output_all_exits=True, labels=ids)
    for keep, rows in ((2, slice(7, None)), (torch.tensor([0, 4]), [0, 4]), (0, slice(None))):
        some = llama(input_ids=ids, output_all_exits=True, labels=ids, logits_to_keep=keep)
        for a, b in zip((some.logits, *some.exit_logits), (whole.logits, *whole.exit_logits), strict=True):
            assert torch.equal(a, b[:, rows])
        assert torch.equal(some.loss, whole.loss)
    assert llama(input_ids=ids, return_dict=False, logits_to_keep=1)[0].shape == (2, 1, 50)


def test_models_that_cannot(llama, monkeypatch):
    images = wrap_images("resnet")
    assert not hasattr(images, "generate")
    with pytest.raises(ConfigError, match="is for causal language models, this checkpoint's task is 'classification'"):
        EarlyExitForCausalLM(images.config)
    monkeypatch.setattr(_transformers, "what_moved", lambda: ["GenerationMixin._get_candidate_generator"])
    with pytest.raises(MissingDependencyError, match=r"has no GenerationMixin\._get_candidate_generator"):
        llama.generate(prompts(1), threshold=0.5)
    assert llama.generate(prompts(1), **GREEDY).shape == (1, 27), "without exits any version will do"


def test_a_users_own_class_without_generate_is_told(llama, caplog):
    class Own(EarlyExitWrapper):
        pass

    class Generating(EarlyExitForCausalLM):
        pass

    assert type(Generating(llama.config)) is Generating
    assert not caplog.messages
    assert type(Own(llama.config)) is Own
    assert "Own lacks what EarlyExitForCausalLM adds, such as generate(): derive it from that" in caplog.text


def test_what_generation_needs_of_transformers_is_where_it_was():
    assert _transformers.what_moved() == []


# Families without an entry


OTHERS = {
    "Gemma3": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "GPTJ": {"n_embd": 16, "n_layer": 4, "n_head": 2, "rotary_dim": 4},
    "Granite": {"num_key_value_heads": 1},
    "Olmo2": {"num_key_value_heads": 1},
    "Qwen3Next": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "mlp_only_layers": [0, 1, 2, 3],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
    "Cohere": {"num_key_value_heads": 1, "logit_scale": 0.5},
    "Bloom": {"n_layer": 4, "n_head": 2},
}


def of_another_family(name: str):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    special = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5}
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config(**{**sizes, **special, **OTHERS[name]})).double().eval()


@pytest.mark.parametrize("name", ["GPTJ", "Granite", "Olmo2"])
def test_decoders_of_the_same_shape_need_no_entry(name, tmp_path):
    backbone = of_another_family(name)
    model = EarlyExitWrapper(backbone, exits=2).eval()
    expected = backbone.generate(prompts(1), **GREEDY)
    for options in ({"threshold": 1e-9}, {"assistant_early_exit": 0}):
        assert torch.equal(model.generate(prompts(1), **GREEDY, **options), expected)
    tokens, exits = slow_exits(model, prompts(1), THRESHOLD, 18)
    out = model.generate(prompts(1), **GREEDY, threshold=THRESHOLD, return_dict_in_generate=True)
    assert (out.sequences[0, 9:].tolist(), out.exit_index[0].tolist()) == (tokens, exits)
    model.float().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).exit_names == model.exit_names


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("Cohere", InputTypeError, "does more after its last layer than its final norm"),
        ("Bloom", InputTypeError, "several modules that may be its final norm: word_embeddings_layernorm, ln_f"),
        ("Gemma3", InputTypeError, "does more between its layers than handing one the state of the other"),
        ("Qwen3Next", ConfigError, r"some layers of this model \(linear_attention\) cannot be given skipped tokens"),
    ],
)
def test_decoders_of_another_shape_are_refused(name, error, words):
    with pytest.raises(error, match=words):
        EarlyExitWrapper(of_another_family(name), exits=2).eval().generate(prompts(1), threshold=0.5)


def test_heads_under_lora():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model, row = wrapped(head="linear"), prompts(1)
    options = [{"threshold": THRESHOLD}, {"assistant_early_exit": 0}]
    before = [model.generate(row, **GREEDY, **more) for more in options]
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["heads"])).eval()
    for text, more in zip(before, options, strict=True):
        assert torch.equal(model.generate(row, **GREEDY, **more), text), "LoRA begins as zeros"
    for head in model.heads.active:
        torch.nn.init.zeros_(head.fc.weight)
    assert not torch.equal(model.generate(row, **GREEDY, **options[0]), before[0]), "the adapter's heads answer"
