"""Heads that learn from inputs which are computed once: the same logits as in the network, and learning that helps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from erde_hub.data.augment import epoch_order
from erde_hub.data.images import BatchLoader
from erde_hub.engine.features import last_linears
from erde_hub.errors import ConfigError, NonFiniteLossError
from erde_hub.losses import create_loss
from erde_hub.training.frozen import _reading_vectors, collect_head_inputs, train_heads
from tests.fakes import networks, transformers_models
from tests.fakes.training import assert_same, make_args, make_data, network, weights


def batches_of(inputs):
    labels = torch.arange(len(next(iter(inputs.values())))) % 3
    for rows in (slice(0, 3), slice(3, None)):
        yield {**{key: value[rows] for key, value in inputs.items()}, "labels": labels[rows]}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param(
            name, head, marks=() if head == "avg_max" or name in ("resnet", "vit", "bert") else pytest.mark.long
        )
        for name in (*networks.FAMILIES, "hf_vit", "bert", "roberta")
        for head in ("linear", "mlp", "avg_max")
    ],
)
def test_heads_answer_from_what_is_kept_as_in_the_network(name, head):
    if name in networks.FAMILIES:
        model, inputs = networks.wrap(name, head=head), {"pixel_values": networks.images(name)}
    else:
        name = {"hf_vit": "vit"}.get(name, name)
        model, inputs = transformers_models.wrap(name, head=head), transformers_models.inputs(name)
    model.backbone.requires_grad_(False)
    with torch.no_grad():
        expected = model(**inputs, output_all_exits=True).exit_logits
        kept = collect_head_inputs(model, batches_of(inputs), progress=False)
        with _reading_vectors(model.heads):
            answers = [head(kept[exit_]) for head, exit_ in zip(model.heads, model.exit_names[:-1], strict=True)]
        again = model(**inputs, output_all_exits=True).exit_logits
    for own, same, after in zip((*answers, kept[model.exit_names[-1]]), expected, again, strict=True):
        torch.testing.assert_close(own, same, rtol=1e-4, atol=1e-5)
        assert torch.equal(after, same), "the heads are as they were"
    assert all(kept[exit_].ndim == 2 for exit_ in model.exit_names), "one vector of a sample, no maps"


def test_mirrored_images_are_further_samples():
    model, data = network(head="linear"), make_data()
    model.backbone.requires_grad_(False)
    plain, both = (collect_head_inputs(model, BatchLoader(data.train, 16), flip, False) for flip in (False, True))
    assert len(both["labels"]) == 2 * len(plain["labels"])
    torch.testing.assert_close(both["layer1"][:16], plain["layer1"][:16])
    with torch.no_grad():
        mirrored = model.eval()(next(iter(BatchLoader(data.train, 16)))["pixel_values"].flip(-1), output_all_exits=True)
    torch.testing.assert_close(both["classifier"][16:32], mirrored.exit_logits[-1])


@pytest.mark.parametrize("new", [False, True])
def test_heads_learn_and_nothing_else_changes(new):
    model, data = network(head="mlp"), make_data()
    model.backbone.requires_grad_(False)
    classifier = list(last_linears(model).values())[-1].requires_grad_(new)
    before = weights(model)
    inputs = collect_head_inputs(model, BatchLoader(data.train, 16), progress=False)
    result = train_heads(model, inputs, make_args(epochs=30, optimizer="adamw", lr=0.01), create_loss("self"), False)
    assert result.status == "completed"
    first, last = (result.history[epoch]["train"] for epoch in (0, -1))
    assert last["loss"] < 0.7 * first["loss"]
    assert set(last["terms"]) == {"ce", "self"}
    trained = {f"heads.{name}" for name, _ in model.heads.named_parameters()}
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    names = {id(module): name for name, module in model.named_modules()}
    last = {f"{names[id(classifier)]}.{part}" for part in ("weight", "bias")}
    assert changed == trained | (last if new else set())
    again = network(head="mlp")
    again.load_state_dict(before)
    again.backbone.requires_grad_(False)
    list(last_linears(again).values())[-1].requires_grad_(new)
    train_heads(again, inputs, make_args(epochs=30, optimizer="adamw", lr=0.01), create_loss("self"), False)
    assert_same(weights(again), weights(model))


def test_heads_that_do_not_pool_first_are_refused():
    data = make_data()
    with pytest.raises(ConfigError, match=r"FCHead does not begin with a pooling.*linear or mlp"):
        collect_head_inputs(network(head="fc"), BatchLoader(data.train, 16), progress=False)


def test_a_classifier_that_is_more_than_a_linear_layer_is_not_trained_so():
    model = networks.wrap("deit", head="linear")  # its answer is the mean of two classifiers
    with pytest.raises(ConfigError, match="come from no linear layer as they are"):
        collect_head_inputs(model, batches_of({"pixel_values": networks.images("deit")}), progress=False)


def frozen_with_inputs():
    model, data = network(head="linear"), make_data()
    model.backbone.requires_grad_(False)
    return model, collect_head_inputs(model, BatchLoader(data.train, 16), progress=False)


def test_gradients_are_clipped():
    moved = []
    for largest in (1e-3, 2e-3, 0.0):
        model, inputs = frozen_with_inputs()
        before = weights(model.heads)
        args = make_args(max_steps=1, weight_decay=0.0, max_grad_norm=largest)
        train_heads(model, inputs, args, create_loss("ce"), False)
        moved.append(sum((t - before[name]).square().sum() for name, t in weights(model.heads).items()).sqrt())
    assert float(moved[1]) == pytest.approx(2 * float(moved[0]), rel=1e-3)
    assert moved[2] > 2 * moved[1]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt():
    model, inputs = frozen_with_inputs()
    inputs["layer2"][5] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"became nan at step \d+: term 'ce' of exit 'layer2'.*lower lr"):
        train_heads(model, inputs, make_args(), create_loss("ce"), False)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())


def test_label_smoothing_reaches_the_loss():
    model, inputs = frozen_with_inputs()
    args, rows = make_args(max_steps=1, label_smoothing=0.4), epoch_order(len(inputs["labels"]), 0, 0)[:8]
    *early, last = (inputs[name][rows] for name in model.exit_names)
    with torch.no_grad(), _reading_vectors(model.heads):
        logits = [*(head(x) for head, x in zip(model.heads, early, strict=True)), last]
        expected = sum(F.cross_entropy(z, inputs["labels"][rows], label_smoothing=0.4) for z in logits)
    first = train_heads(model, inputs, args, create_loss("ce"), False).history[0]["train"]["loss"]
    assert first == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        {"gradient_accumulation_steps": 2},
        {"ema_decay": 0.9},
        {"mixed_precision": "bf16"},
        {"report_to": "tensorboard"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_would_be_ignored_are_refused(setting):
    model, inputs = frozen_with_inputs()
    with pytest.raises(ConfigError, match=rf"{next(iter(setting))}=.* have none"):
        train_heads(model, inputs, make_args(**setting), create_loss("ce"), False)


def test_under_peft_the_heads_that_run_are_trained():
    adapted = get_peft_model(
        transformers_models.wrap("bert", head="linear"),
        LoraConfig(target_modules=["query"], modules_to_save=["heads"]),
    )
    inputs = collect_head_inputs(adapted, batches_of(transformers_models.inputs("bert")), progress=False)
    heads = adapted.base_model.model.heads
    original, active = weights(heads.original_module), weights(heads.active)
    train_heads(adapted, inputs, make_args(batch_size=4), create_loss("ce"), False)
    assert_same(weights(heads.original_module), original)
    assert not any(torch.equal(tensor, active[name]) for name, tensor in weights(heads.active).items())
