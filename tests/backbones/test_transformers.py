"""Classifiers of the transformers library: the same promises as for timm, and padded texts in a shrinking batch."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from support_models import transformers_model
from torch import nn

from erde_hub import EarlyExitConfig, EarlyExitWrapper, list_exit_points
from erde_hub.backbones.tracing import flop_counter
from erde_hub.backbones.transformers_preprocessing import known_preprocessing
from erde_hub.errors import (
    CheckpointError,
    ConfigError,
    ExitPointError,
    InputTypeError,
    RebuildError,
    ShapeError,
)
from erde_hub.preprocessing import build_image_processor
from tests.fakes.networks import route_reference, score
from tests.fakes.transformers_models import CLASSES, TEXT, VISION, inputs, side, text, vision, wrap

MODELS = [*VISION, *TEXT]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@torch.no_grad()
def thresholds_for(model, batch) -> list[float]:
    chosen = []
    for logits in model(**batch, output_all_exits=True).exit_logits[:-1]:
        values = sorted(score("entropy", [row]) for row in logits)
        chosen.append((values[2] + values[3]) / 2)
    return chosen


@pytest.mark.parametrize("name", MODELS)
def test_routing_equals_the_full_forward_masked_per_sample(name):
    """Also: wrapping changes no output, a copy and a loaded checkpoint answer alike, every exit gets gradients."""
    plain = (vision if name in VISION else text)(name)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    batch = inputs(name)
    model = wrap(name)
    assert all(torch.equal(before[key], value) for key, value in model.backbone.state_dict().items())
    with torch.no_grad():
        whole = plain(**batch).logits
        assert torch.equal(model(**batch, threshold=0).logits, whole)
        recorded = model(**batch, output_all_exits=True).exit_logits
        assert torch.equal(recorded[-1], whole)
        thresholds = thresholds_for(model, batch)
        routed = model(**batch, threshold=thresholds)
        answers, taken, clear = route_reference("entropy", recorded, thresholds)
        assert len(taken.unique()) > 1
        assert clear.all()
        assert torch.equal(routed.exit_index, taken)
        torch.testing.assert_close(routed.logits, answers, rtol=1e-3, atol=1e-4)
        assert torch.equal(copy.deepcopy(model)(**batch, threshold=thresholds).logits, routed.logits)
        row = model(**{key: value[3:4] for key, value in batch.items()}, threshold=thresholds)
        assert row.exit_index.item() == taken[3]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**batch, labels=torch.arange(8) % CLASSES).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.heads.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_comes_back_bit_for_bit(name, tmp_path):
    model, batch = wrap(name), inputs(name, 3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["library"] == "transformers"
    assert config["architecture"] == type(model.backbone).__name__
    again = EarlyExitWrapper.from_pretrained(tmp_path)
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, again.state_dict()[k])] == []
    with torch.no_grad():
        for one, two in zip(
            model(**batch, output_all_exits=True).exit_logits,
            again(**batch, output_all_exits=True).exit_logits,
            strict=True,
        ):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", MODELS)
def test_exit_points_are_listed_with_their_layout(name):
    module = (vision if name in VISION else text)(name)
    size = (3, side(name), side(name)) if name in VISION else None
    points = list_exit_points(module, input_size=size)
    exits = {**VISION, **TEXT}[name][1]
    assert set(exits) <= {p.name for p in points}
    shares = [p.share for p in points]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    formats = {p.format for p in points}
    maps = name in ("resnet", "convnext", "mobilevit", "timm_wrapper")
    assert formats == ({"NCHW"} if maps else {"NLC"})


@pytest.mark.parametrize(
    ("name", "pool", "prefix"),
    [
        ("vit", "token", 1),
        ("deit", "token", 2),
        ("beit", "avg", 1),
        ("dinov2", "token", 5),
        ("swin", "avg", 0),
        ("pvt", "avg", 0),
        ("bert", "token", 1),
        ("modernbert", "avg", 0),
        ("llama", "last", 0),
    ],
)
def test_heads_pool_as_the_model_does(name, pool, prefix):
    spec = wrap(name).heads[0].spec
    assert (spec.pool, spec.prefix_tokens, spec.masked) == (pool, prefix, name in TEXT)
    if name == "pvt":
        last = wrap(name).heads[2].spec
        assert (last.pool, last.prefix_tokens) == ("token", 1)


# Texts


@pytest.mark.parametrize("name", TEXT)
def test_padding_changes_no_exit(name):
    model, batch = wrap(name), inputs(name)
    with torch.no_grad():
        whole = model(**batch, output_all_exits=True).exit_logits
        for row in (0, 3, 5):
            length = int(batch["attention_mask"][row].sum())
            alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
            for one, all_rows in zip(model(**alone, output_all_exits=True).exit_logits, whole, strict=True):
                torch.testing.assert_close(one[0], all_rows[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_embeddings_and_positions_follow_the_batch(name):
    model, batch = wrap(name), inputs(name)
    embedding = model.backbone.get_input_embeddings()
    given = {"inputs_embeds": embedding(batch["input_ids"]).detach(), "attention_mask": batch["attention_mask"]}
    given["position_ids"] = torch.arange(11).repeat(8, 1) + torch.arange(8)[:, None] % 3
    if name == "llama":  # its pooling looks for padding in the ids, which embeddings do not show
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    with torch.no_grad():
        recorded = model(**given, output_all_exits=True).exit_logits
        thresholds = thresholds_for(model, given)
        answers, taken, _ = route_reference("entropy", recorded, thresholds)
        routed = model(**given, threshold=thresholds)
    assert len(taken.unique()) > 1
    assert torch.equal(routed.exit_index, taken)
    torch.testing.assert_close(routed.logits, answers, rtol=1e-3, atol=1e-4)


def test_layers_behind_an_exit_see_the_samples_that_are_left_only():
    model, batch = wrap("bert"), inputs("bert")
    seen = {}
    for i, layer in enumerate(model.backbone.bert.encoder.layer):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.update(
                {i: [x.shape[0] for x in (*args, *kwargs.values()) if x is not None]}
            ),
            with_kwargs=True,
        )
    model.backbone.classifier.register_forward_pre_hook(lambda _, args: seen.update(classifier=[args[0].shape[0]]))
    with torch.no_grad():
        thresholds = thresholds_for(model, batch)
        seen.clear()
        index = model(**batch, threshold=thresholds).exit_index
    left = [8, int((index > 0).sum()), int((index > 1).sum()), int((index > 1).sum())]
    assert [set(seen[i]) for i in range(4)] == [{n} for n in left]
    assert seen["classifier"] == [left[2]]


def test_a_batch_that_is_as_long_as_a_table():
    """Positions (1, L), relative positions and tables are told from samples by name, not by length."""
    for name in ("deberta", "modernbert"):
        model = wrap(name)
        generator = torch.Generator().manual_seed(5)
        count = {"deberta": 16, "modernbert": 11}[name]  # rows of the table of relative positions, tokens
        ids = torch.randint(5, 99, (count, 11), generator=generator)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill_(1, torch.tensor([10]), 0)}
        with torch.no_grad():
            recorded = model(**given, output_all_exits=True).exit_logits
            thresholds = thresholds_for(model, given)
            answers, taken, _ = route_reference("entropy", recorded, thresholds)
            routed = model(**given, threshold=thresholds)
        assert torch.equal(routed.exit_index, taken)
        torch.testing.assert_close(routed.logits, answers, rtol=1e-3, atol=1e-4)


def test_costs_are_counted_at_a_stated_length():
    model = wrap("bert")
    assert model.config.input_size == [40]
    short, long = model.exit_table(input_size=(10,)), model.exit_table(input_size=(20,))
    # per token: 4 projections and the two of the MLP; per pair of tokens: scores and weighted values
    layer = [n * (4 * 16 * 16 + 2 * 16 * 32) + n * n * 2 * 16 for n in (10, 20)]
    assert short[0].cumulative_macs == pytest.approx(layer[0], rel=0.02)
    assert long[0].cumulative_macs == pytest.approx(layer[1], rel=0.02)


@pytest.mark.parametrize("name", TEXT)
def test_costs_on_the_meta_device_are_those_of_one_text_on_the_cpu(name):
    """At every exit: by torch's counter of what ran, and by the shapes of what linear layers and attention get."""
    model, length = wrap(name).requires_grad_(False), 11
    table = model.exit_table(input_size=(length,))
    ids = torch.arange(5, 5 + length)[None]
    linear = {"sum": 0}

    def count(module, args):
        rows = args[0].numel() // args[0].shape[-1]
        linear["sum"] += rows * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(count)
    for exit_index, row in enumerate(table):
        thresholds = [1e-30] * len(model.heads)
        if exit_index < len(model.heads):
            thresholds[exit_index] = 100.0
        linear["sum"], counter = 0, flop_counter()
        with torch.no_grad(), counter:
            assert model(input_ids=ids, threshold=thresholds).exit_index.tolist() == [exit_index]
        assert row.cumulative_macs == counter.get_total_flops() // 2
        layers = {"albert": [1, 3, 4]}.get(name, [1, 2, 4])[exit_index]
        width, span, kernel = 16, 16, 3
        by_hand = linear["sum"] + layers * 2 * length * length * width  # scores and weighted values
        if name == "deberta":  # scores of positions, from either side, and the convolution behind the first layer
            by_hand += layers * 2 * length * span * width + (exit_index > 0) * kernel * length * width * width
        assert row.cumulative_macs == by_hand
    points = {point.name: point.macs for point in list_exit_points(text(name), input_size=(length,))}
    heads = 0
    for row, head in zip(table, model.heads, strict=False):
        heads += sum(layer.weight.numel() for layer in head.modules() if isinstance(layer, nn.Linear))
        assert points[row.exit] == row.cumulative_macs - heads


def test_recomputation_of_activations_changes_no_gradient():
    model, batch = wrap("bert").train(), inputs("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    grads = []
    for recompute in (False, True):
        if recompute:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert model.is_activation_checkpointing
        model.zero_grad()
        model(**batch, labels=torch.arange(8) % CLASSES).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_the_text_pipeline(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = t.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = wrap("bert", threshold=0.4, id2label=["a", "b", "c", "d", "e"])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert type(t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")) is EarlyExitWrapper
    classify = t.pipeline("text-classification", model=str(tmp_path / "model"))
    texts = ["a good film", "bad"]
    got = classify(texts, batch_size=2)
    with torch.no_grad():
        probs = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    assert [g["label"] for g in got] == [model.config.id2label[int(p.argmax())] for p in probs]
    assert [g["score"] for g in got] == pytest.approx([float(p.max()) for p in probs], abs=1e-5)


# Preprocessing


@pytest.mark.parametrize("family", ["ViT", "EfficientNet", "PoolFormer", "Levit"])
@pytest.mark.parametrize("stored", [True, False])
def test_pixels_are_those_of_the_own_processor(family, stored, tmp_path):
    """EfficientNet's divides twice, the others resize by more than their size says."""
    theirs = getattr(t, f"{family}ImageProcessor")()
    output = theirs.crop_size["height"] if getattr(theirs, "do_center_crop", None) else theirs.size["height"]
    config = getattr(t, f"{family}Config")(image_size=output)
    if stored:
        theirs.save_pretrained(tmp_path)
        config._name_or_path = str(tmp_path)
    found = known_preprocessing(config)
    assert found is not None
    assert found["size"] == [output, output]
    pixels = np.random.default_rng(3).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((420, 310), Image.Resampling.BICUBIC)
    expected = theirs(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(build_image_processor(found)(picture, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize(
    ("make", "warned"),
    [
        (lambda: transformers_model("MobileViT"), "MobileViTForImageClassification"),
        (lambda: transformers_model("ViT"), None),
        (lambda: text("bert"), None),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)), None),
    ],
)
def test_unknown_preprocessing_is_said_once(make, warned, tmp_path, caplog):
    module = make()
    side = getattr(getattr(module, "config", None), "image_size", 32)
    size = None if isinstance(module, t.BertForSequenceClassification) else (3, side, side)
    model = EarlyExitWrapper(module, exits=1, input_size=size)
    for _ in range(2):
        model.save_pretrained(tmp_path / "a")
    said = [
        r.getMessage() for r in caplog.records if r.name == "erde_hub.modeling.pretrained" and r.levelname == "WARNING"
    ]
    assert len(said) == (warned is not None)
    if warned:
        assert warned in said[0]
        assert "model.set_preprocessing(" in said[0]
        again = EarlyExitWrapper.from_pretrained(tmp_path / "a")
        again.set_preprocessing(mean=[0.5] * 3, std=[0.5] * 3, size=[side, side])
        caplog.clear()
        again.save_pretrained(tmp_path / "b")
        assert [r for r in caplog.records if r.name == "erde_hub.modeling.pretrained"] == []
        assert (tmp_path / "b" / "preprocessor_config.json").is_file()


# What is refused


def test_a_model_without_exits_is_not_loaded_as_one_with(tmp_path):
    text("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a 'bert' model without exits .* EarlyExitWrapper\(model, exits="):
        EarlyExitWrapper.from_pretrained(tmp_path)


def test_inputs_that_a_text_model_does_not_take():
    model, batch = wrap("modernbert"), inputs("modernbert")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with pytest.raises(InputTypeError, match=r"reads texts: call model\(input_ids="):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(InputTypeError, match="takes no token_type_ids"):
        model(input_ids=ids, token_type_ids=mask)
    with pytest.raises(InputTypeError, match="got attention_mask"):
        model(attention_mask=mask)
    with pytest.raises(InputTypeError, match=r"integer tensor \(N, L\), got torch.float32 of shape \(8, 11\)"):
        model(input_ids=ids.float())
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(8, 10\) for tokens of shape \(8, 11\)"):
        model(input_ids=ids, attention_mask=mask[:, 1:])
    with pytest.raises(ShapeError, match=r"mask of shape \(N, L\), got \(8, 1, 11, 11\)"):
        model(input_ids=ids, attention_mask=torch.ones(8, 1, 11, 11).bool())


def test_images_of_another_size_or_type():
    model = wrap("swin")
    vit = wrap("vit")
    with pytest.raises(ShapeError, match=r"\(2, 3, 40, 40\); the model was wrapped for inputs of \(3, 32, 32\)"):
        vit(torch.randn(2, 3, 40, 40))
    with pytest.raises(InputTypeError, match=r"inputs are torch.float64, the weights torch.float32"):
        model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(InputTypeError, match="on the meta device, where tensors have a shape and no values"):
        model(torch.empty(2, 3, 32, 32, device="meta"))


def _multi_label() -> nn.Module:
    module = text("bert")
    module.config.problem_type = "multi_label_classification"
    return module


def _other_labels() -> nn.Module:
    module = text("bert")
    module.config.num_labels = 7
    return module


def _no_padding() -> nn.Module:
    module = text("llama")
    module.config.pad_token_id = None
    return module


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: text("bert").bert, InputTypeError, "load it as BertForSequenceClassification"),
        (lambda: vision("vit").vit, InputTypeError, "load it as ViTForImageClassification"),
        (lambda: t.BertForTokenClassification(text("bert").config), InputTypeError, "is no classifier"),
        (_multi_label, InputTypeError, "problem_type='multi_label_classification'"),
        (_other_labels, InputTypeError, r"num_labels=7 but returns 5 logits: .* set model\.config\.num_labels = 5"),
        (_no_padding, InputTypeError, r"set model\.config\.pad_token_id"),
    ],
)
def test_models_that_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        EarlyExitWrapper(make(), exits=1)


@pytest.mark.parametrize(
    ("name", "exits", "words"),
    [
        ("vit", ["vit.layers.9"], r"did you mean 'vit\.layers\.\d'"),
        ("vit", ["vit.layers.0.mlp"], "cannot shrink|residual block"),
        ("albert", ["albert.encoder.albert_layer_groups.0"], r"called 4 times.*@0, .*@3"),
        ("bert", ["bert.encoder.layer.0.intermediate"], "residual block"),
        ("bert", ["bert.pooler"], None),
        ("bert", ["classifier"], "at or behind the classifier"),
    ],
)
def test_places(name, exits, words):
    module = (vision if name in VISION else text)(name)
    if words is None:
        assert EarlyExitWrapper(module, exits=exits).heads[0].spec.format == "NC"
        return
    size = (3, side(name), side(name)) if name in VISION else None
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    with pytest.raises(ExitPointError, match=words):
        EarlyExitWrapper(module, exits=exits, input_size=size)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()) == hooks


def test_a_model_that_was_changed_by_hand_is_found():
    module = text("bert")
    module.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    with pytest.raises(RebuildError, match=r"another output.*layers were changed"):
        EarlyExitWrapper(module, exits=1)
    with pytest.raises(ConfigError, match="carries its own config"):
        EarlyExitWrapper(text("bert"), exits=1, backbone_kwargs={"hidden_size": 16})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "BertModel"}, "unknown architecture"),
        ({"architecture": "org/repo"}, "unknown architecture"),
        ({"architecture": 3}, "unknown architecture"),
        ({"hiden_size": 16}, "has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"auto_map": {"AutoModel": "org/repo--module.Class"}}, "must not hold 'auto_map'"),
        ({"attn_implementation": "org/kernel"}, "attn_implementation must be one of"),
        ({"hidden_act": "https://example.org/act"}, "points elsewhere"),
        ({"hidden_size": "large"}, "do not fit BertForSequenceClassification"),
        ({"num_attention_heads": 3}, "do not fit BertForSequenceClassification"),
        ({"hidden_act": "no such"}, "do not fit BertForSequenceClassification"),
    ],
)
def test_configs_that_are_refused(changes, words):
    stored = wrap("bert").config.to_dict()
    kwargs = dict(stored["backbone_kwargs"])
    architecture = changes.pop("architecture", stored["architecture"])
    config = EarlyExitConfig(
        library="transformers",
        architecture=architecture,
        backbone_kwargs={**kwargs, **changes},
        exits=["bert.encoder.layer.0"],
        num_labels=CLASSES,
    )
    with pytest.raises((ConfigError, CheckpointError), match=words):
        EarlyExitWrapper(config)


def test_a_config_alone_is_enough():
    config = EarlyExitConfig(
        library="transformers",
        architecture="BertForSequenceClassification",
        backbone_kwargs={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        exits=["bert.encoder.layer.0"],
        num_labels=3,
    )
    model = EarlyExitWrapper(config).eval()
    spec = model.heads[0].spec
    assert (spec.width, spec.format, spec.pool, spec.masked) == (16, "NLC", "token", True)
    assert model(input_ids=torch.randint(5, 99, (4, 7))).logits.shape == (4, 3)


def test_eager_attention_is_remembered(tmp_path):
    module = t.BertForSequenceClassification._from_config(text("bert").config, attn_implementation="eager")
    model = EarlyExitWrapper(module, exits=1)
    model.save_pretrained(tmp_path)
    assert EarlyExitWrapper.from_pretrained(tmp_path).backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "modernbert"])
@pytest.mark.parametrize("how", ["loaded", "cast before", "cast after"])
@torch.no_grad()
def test_rotary_models_in_bfloat16(name, how, tmp_path):
    """transformers keeps their frequencies in float32 when it loads, and ``.to`` rounds them: both come back alike."""
    module = text(name)
    if how == "loaded":
        module.save_pretrained(tmp_path / "bare")
        module = type(module).from_pretrained(tmp_path / "bare", dtype=torch.bfloat16)
    elif how == "cast before":
        module = module.to(torch.bfloat16)
    model = EarlyExitWrapper(module, exits=TEXT[name][1]).eval().to(torch.bfloat16 if how == "cast after" else None)
    frequencies = {n: b for n, b in model.backbone.named_buffers() if n.endswith("inv_freq")}
    assert {b.dtype for b in frequencies.values()} == {torch.float32 if how == "loaded" else torch.bfloat16}
    ids = torch.randint(5, 99, (4, 40), generator=torch.Generator().manual_seed(0))
    right = model(input_ids=ids, output_all_exits=True).exit_logits
    model.save_pretrained(tmp_path / "exits")
    again = EarlyExitWrapper.from_pretrained(tmp_path / "exits")
    answers = again(input_ids=ids, output_all_exits=True).exit_logits
    assert all(torch.equal(a, b) for a, b in zip(answers, right, strict=True))
    if how != "loaded":
        exact = EarlyExitWrapper.from_pretrained(tmp_path / "exits", rotary_dtype=None)
        assert not torch.equal(exact(input_ids=ids, output_all_exits=True).logits, right[-1])


def test_rates_that_were_rounded_are_the_same(tmp_path):
    transformers_model("Swinv2").save_pretrained(tmp_path)
    module = t.Swinv2ForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert EarlyExitWrapper(module, exits=1).dtype == torch.bfloat16
