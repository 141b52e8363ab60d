"""Routing gives every sample the answer of its own first sure exit, and runs nothing behind it."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from erde_hub import EarlyExitWrapper, route_batches
from erde_hub.engine.routing import Router
from erde_hub.errors import ExitNotReachedError, ShapeError, ThresholdError
from erde_hub.policies import ExitPolicy, list_policies
from tests.fakes.networks import (
    CLASSES,
    FAMILIES,
    STAGED,
    StructureNet,
    all_logits,
    images,
    quantile_thresholds,
    route_reference,
    spread,
    wrap,
)
from tests.fakes.policies import make_policy

SCORED = ["entropy", "confidence", "margin", "patience"]


@functools.cache
def model_of(name: str) -> EarlyExitWrapper:
    return wrap(name)


def with_policy(model: EarlyExitWrapper, policy: str) -> EarlyExitWrapper:
    model.policy = make_policy(policy, 4, CLASSES)
    return model


@pytest.fixture(autouse=True)
def _the_usual_policy():
    yield
    for name in FAMILIES:
        if model_of.cache_info().currsize:
            with_policy(model_of(name), "entropy")


def test_the_fakes_cover_both_ways_of_driving():
    driven = {name: model_of(name).runner.stages() is not None for name in FAMILIES}
    assert driven == {name: name in STAGED for name in FAMILIES}


def assert_routed(model, x, policy, thresholds):
    logits = all_logits(model, x)
    answers, taken, clear = route_reference(policy, logits, thresholds)
    with torch.no_grad():
        out = model(x, threshold=thresholds)
    assert out.exit_index.dtype == torch.int64
    assert out.exit_logits is None
    assert out.loss is None
    scale = max(1.0, float(answers.abs().max()))
    assert torch.equal(out.exit_index[clear], taken[clear])
    torch.testing.assert_close(out.logits[clear] / scale, answers[clear] / scale, rtol=0, atol=1e-5)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_routed_logits_equal_the_full_forward_masked_per_sample(name):
    model, x = model_of(name), images(name, 12)
    thresholds = quantile_thresholds(model, x)
    out = assert_routed(model, x, "entropy", thresholds)
    assert len(set(out.exit_index.tolist())) >= 3, "the thresholds should spread the batch over the exits"
    assert_routed(model, x.flip(0), "entropy", thresholds)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ends(name):
    model, x = model_of(name), images(name, 5)
    logits = all_logits(model, x)
    for thresholds, exit_index in (
        ([100.0, 0.0, 0.0], 0),
        ([0.0, 100.0, 0.0], 1),
        ([0.0, 0.0, 100.0], 2),
        ([1e-30, 1e-30, 1e-30], 3),
        ([0.0, 0.0, 0.0], 3),
    ):
        with torch.no_grad():
            out = model(x, threshold=thresholds)
        assert out.exit_index.tolist() == [exit_index] * 5
        assert torch.equal(out.logits, logits[exit_index])
    with torch.no_grad():
        assert torch.equal(model(x, threshold=0).logits, model.backbone(x))


@given(
    name=st.sampled_from(["resnet", "vit", "swin", "plain"]),
    policy=st.sampled_from(SCORED),
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 7),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    scalar=st.booleans(),
)
def test_any_batch_any_policy_any_threshold(name, policy, seed, batch, shares, scalar):
    model = with_policy(model_of(name), policy)
    low, high = {"entropy": (0, 1.7), "confidence": (0.15, 1.02), "margin": (0, 1.02), "patience": (1, 3)}[policy]
    thresholds = [low + share * (high - low) for share in shares]
    if policy == "patience":
        thresholds = [float(round(t)) for t in thresholds]
    if scalar:
        thresholds = [thresholds[0]] * 3
        with torch.no_grad():
            x = images(name, batch, seed)
            one, many = model(x, threshold=thresholds[0]), model(x, threshold=thresholds)
        assert torch.equal(one.logits, many.logits)
        assert torch.equal(one.exit_index, many.exit_index)
    assert_routed(model, images(name, batch, seed), policy, thresholds)


@pytest.mark.parametrize("name", ["resnet", "plain"])
@pytest.mark.parametrize("policy", list_policies())
def test_every_policy_of_the_table_routes(name, policy):
    model = with_policy(model_of(name), policy)
    x = images(name, 6)
    logits = all_logits(model, x)
    threshold = model.policy.default_threshold
    with torch.no_grad():
        out = model(x, threshold=threshold)
    expected = torch.full((6,), 3)
    log_probs = torch.stack(logits).log_softmax(-1)
    for e in reversed(range(3)):
        expected[model.policy(log_probs[: e + 1], threshold)] = e
    assert torch.equal(out.exit_index, expected)


@settings(max_examples=25)
@given(
    name=st.sampled_from(["resnet", "vit", "swin", "plain"]),
    policy=st.sampled_from(SCORED),
    seed=st.integers(0, 10_000),
    shares=st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=7),
    form=st.sampled_from(["exits", "column", "flat"]),
)
def test_every_sample_may_have_thresholds_of_its_own(name, policy, seed, shares, form):
    model, batch = with_policy(model_of(name), policy), len(shares)
    low, high = {"entropy": (0, 1.7), "confidence": (0.15, 1.02), "margin": (0, 1.02), "patience": (1, 3)}[policy]
    rows = low + torch.tensor(shares, dtype=torch.float64) * (high - low)
    rows = rows.round() if policy == "patience" else rows
    if form != "exits":
        rows = rows[:, :1].expand(-1, 3)
    form = "column" if form == "flat" and batch == 3 else form  # one per sample, or one per exit?
    threshold = {"exits": rows, "column": rows[:, :1], "flat": rows[:, 0]}[form]
    x = images(name, batch, seed)
    logits = all_logits(model, x)
    with torch.no_grad():
        out = model(x, threshold=threshold)
        alone = [model(x[i : i + 1], threshold=rows[i].tolist()) for i in range(batch)]
    for i in range(batch):
        answer, taken, clear = route_reference(policy, [z[i : i + 1] for z in logits], rows[i].tolist())
        if clear:
            assert out.exit_index[i] == alone[i].exit_index == taken
            scale = max(1.0, float(answer.abs().max()))
            torch.testing.assert_close(out.logits[i] / scale, alone[i].logits[0] / scale, rtol=0, atol=1e-5)
            torch.testing.assert_close(out.logits[i] / scale, answer[0] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "plain"])
@pytest.mark.parametrize("policy", list_policies())
def test_under_every_policy_some_samples_may_be_kept_to_the_end(name, policy):
    model, x = with_policy(model_of(name), policy), images(name, 6)
    usual, never = model.policy.default_threshold, 0.0 if policy == "entropy" else model.policy.never_threshold
    kept = torch.tensor([True, False, True, False, True, False])
    with torch.no_grad():
        out = model(x, threshold=torch.where(kept, never, usual))
        expected = torch.where(kept, model(x, threshold=never).exit_index, model(x, threshold=usual).exit_index)
    assert torch.equal(out.exit_index, expected)


def test_a_threshold_that_no_score_reaches_keeps_its_sample_whatever_rounding_makes_of_it():
    """1 + 1e-9 is 1 in float32, which a confidence can be."""
    model, x = with_policy(model_of("plain"), "confidence"), images("plain", 2)
    rows = torch.tensor([[1 + 1e-9], [0.0]], dtype=torch.float64)
    with torch.no_grad():
        for head in model.heads:
            head.get_submodule("fc").bias[0] += 1e4
        out = model(x, threshold=rows)
        for head in model.heads:
            head.get_submodule("fc").bias[0] -= 1e4
    assert out.exit_index.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3,), r"shape \(3,\) can mean one number per sample or one per early exit, .* give shape \(3, 1\)"),
        ((3, 2), r"of shape \(3, 1\) \(one per sample\) or \(3, 3\) .* got \(3, 2\)"),
        ((2, 3), r"got \(2, 3\)"), ((1, 3), r"got \(1, 3\)"), ((3, 1, 1), r"got \(3, 1, 1\)"),
        ((4,), "got 4 thresholds for 3 early exits"),
    ],
)  # fmt: skip
def test_shapes_of_thresholds_that_are_refused(shape, message):
    with pytest.raises(ThresholdError, match=message):
        model_of("plain")(images("plain", 3), threshold=torch.full(shape, 0.5))


def test_every_samples_threshold_is_checked():
    with pytest.raises(ThresholdError, match=r"threshold -1.0 is not allowed for EntropyPolicy"):
        model_of("plain")(images("plain", 2), threshold=torch.tensor([0.5, -1.0]))


def test_an_answer_does_not_depend_on_the_rest_of_the_batch():
    model, x = model_of("plain"), images("plain", 9)
    thresholds = quantile_thresholds(model, x)
    with torch.no_grad():
        together = model(x, threshold=thresholds)
        alone = [model(x[i : i + 1], threshold=thresholds) for i in range(9)]
    assert together.exit_index.tolist() == [int(out.exit_index) for out in alone]
    torch.testing.assert_close(together.logits, torch.cat([out.logits for out in alone]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "plain"])
def test_an_empty_batch(name):
    model = model_of(name)
    out = model(images(name, 1)[:0])
    assert out.logits.shape == (0, CLASSES)
    assert out.exit_index.shape == (0,)
    assert out.exit_index.dtype == torch.int64
    assert [z.shape for z in model(images(name, 1)[:0], output_all_exits=True).exit_logits] == [(0, CLASSES)] * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_behind_an_exit_see_only_those_who_stayed(name):
    model, x = model_of(name), images(name, 10)
    thresholds = quantile_thresholds(model, x)
    seen: dict[str, list[int]] = {}
    handles = []
    for exit_name in FAMILIES[name].exits:
        module = model.backbone.get_submodule(exit_name)
        while type(module) is nn.Sequential:  # staged forwards call the children
            module = module[-1]
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, args, key=exit_name: seen.setdefault(key, []).append(len(args[0]))
            )
        )
    try:
        with torch.no_grad():
            out = model(x, threshold=thresholds)
            counts = dict(seen)
            seen.clear()
            model(x, threshold=[100.0, 0.0, 0.0])
    finally:
        for handle in handles:
            handle.remove()
    alive = [int((out.exit_index >= e).sum()) for e in range(3)]
    assert counts == {key: [count] for key, count in zip(FAMILIES[name].exits, alive, strict=True)}
    assert seen == {FAMILIES[name].exits[0]: [10]}, "nobody was left, and something behind the first exit ran"


def test_one_hard_sample_does_not_hold_the_others():
    model, x = model_of("resnet"), images("resnet", 16)
    with torch.no_grad():
        first = model(x, output_all_exits=True).exit_logits[0]
        entropy = -(first.softmax(-1) * first.log_softmax(-1)).sum(-1)
        hardest, second = entropy.topk(2).values.tolist()
        out = model(x, threshold=[(hardest + second) / 2, 0.0, 0.0])
    assert torch.bincount(out.exit_index, minlength=4).tolist() == [15, 0, 0, 1]


@pytest.mark.parametrize("name", ["resnet", "convnext", "regnet"])
def test_channels_last_survives_the_shrinking(name):
    model = wrap(name).to(memory_format=torch.channels_last)
    x = images(name, 8).contiguous(memory_format=torch.channels_last)
    last = FAMILIES[name].exits[2]
    formats = []
    model.backbone.get_submodule(last).register_forward_pre_hook(lambda _m, args: formats.append(args[0]))
    module = model.backbone.get_submodule(last)
    if type(module) is nn.Sequential:
        module[0].register_forward_pre_hook(lambda _m, args: formats.append(args[0]))
    with torch.no_grad():
        model(x, threshold=quantile_thresholds(model, x))
    assert 0 < len(formats[-1]) < 8
    assert formats[-1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass", "namedtuple", "model_output"])
@pytest.mark.parametrize("batch", [8, 5])
def test_everything_in_the_live_batch_shrinks_and_nothing_else(kind, batch):
    # With 8 samples the table of 8 rows looks like a batch; it must stay whole.
    torch.manual_seed(0)
    model = spread(EarlyExitWrapper(StructureNet(kind), exits=["a", "b"], input_size=(3, 8, 8))).eval()
    assert model.heads[0].spec.output_index == 0
    x = torch.randn(batch, 3, 8, 8)
    logits = all_logits(model, x)
    thresholds = quantile_thresholds(model, x, 0.4)
    answers, taken, _ = route_reference("entropy", logits, thresholds)
    out = model(x, threshold=thresholds)
    assert out.exit_index.tolist() == taken.tolist()
    assert len(set(taken.tolist())) > 1
    torch.testing.assert_close(out.logits, answers, rtol=0, atol=1e-5)


def test_nan_never_leaves_early_and_the_answer_says_so():
    model, x = model_of("plain"), images("plain", 6)
    x = x.clone()
    x[2, 0, 3, 3] = float("nan")
    x[4] = float("inf")
    for policy, threshold in (("entropy", float("inf")), ("confidence", 0.0), ("margin", 0.0)):
        out = with_policy(model, policy)(x, threshold=threshold)
        assert out.exit_index.tolist() == [0, 0, 3, 0, 3, 0]
        assert out.logits.isnan().any(1).tolist() == [False, False, True, False, True, False]
    out = with_policy(model, "patience")(x, threshold=1)
    assert out.exit_index[[2, 4]].tolist() == [3, 3]


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "plain"])
@pytest.mark.parametrize("policy", list_policies())
def test_nan_in_an_image_is_never_a_silent_exit(name, policy):
    """Under every policy, in a batch and alone, one bad pixel goes to the last exit, and its answer is NaN."""
    policies = {"patience": 1.0, "entropy": float("inf")}
    model = with_policy(model_of(name), policy)
    threshold = policies.get(policy, 0.0 if model.policy.leaves_above else 1e9)
    x = images(name, 4).clone()
    x[1, 2, 7, 9] = float("nan")
    for batch, row in ((x, 1), (x[1:2], 0)):
        with torch.no_grad():
            out = model(batch, threshold=threshold)
        assert int(out.exit_index[row]) == 3
        assert out.logits.isnan().any(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("policy", [*SCORED, "always"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_overflow_answer_nothing(policy, value):
    """A class at minus infinity leaves the others' probabilities as they are, and still no overflow leaves."""
    model, x = with_policy(model_of("plain"), policy), images("plain", 4).clone()
    x[2] *= 1e4

    def overflow(_head, args, logits):
        bright = args[0].flatten(1).abs().amax(1, keepdim=True) > 500
        assert bright.flatten().tolist() in ([False, False, True, False], [True], [False, False], [True, False])
        return logits.masked_fill(bright & (torch.arange(CLASSES) == 1), value)

    threshold = {"patience": 1.0, "entropy": float("inf")}.get(policy, 0.0)
    hook = model.heads[0].register_forward_hook(overflow)
    try:
        with torch.no_grad():
            together = model(x, threshold=threshold)
            alone = model(x[2:3], threshold=threshold)
            streamed = list(route_batches(model, [x], threshold=threshold, batch_size=2))
    finally:
        hook.remove()
    first = 1 if policy == "patience" else 0
    exits = together.exit_index.tolist()
    assert exits[2] > first
    assert policy == "patience" or exits[:2] + exits[3:] == [0, 0, 0]
    assert together.logits.isfinite().all()
    assert int(alone.exit_index) == exits[2]
    assert streamed[0].exit_index.tolist() == exits


def test_labels_give_the_loss_of_the_routed_logits():
    model, x = model_of("resnet"), images("resnet", 6)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    out = model(x, labels=labels, threshold=1.2)
    assert torch.equal(out.loss, nn.functional.cross_entropy(out.logits, labels))
    assert out.exit_logits is None


class Detour(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, CLASSES)
        self.path = "ab"

    def forward(self, x):
        for name in self.path:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("path", "words"), [("b", "exit 1 was reached where exit 0"), ("ba", "exit 1 was reached")])
def test_an_exit_that_fires_out_of_turn_is_an_error(path, words):
    model = EarlyExitWrapper(Detour(), exits=["a", "b"], input_size=(3, 8, 8)).eval()
    model.backbone.path = path
    for call in ({"threshold": 100.0}, {"threshold": 1e-30}, {"output_all_exits": True}):
        with pytest.raises(ExitNotReachedError, match=words):
            model(torch.randn(2, 3, 8, 8), **call)


@pytest.mark.parametrize("path", ["a", ""])
def test_an_exit_that_does_not_fire_is_an_error(path):
    model = EarlyExitWrapper(Detour(), exits=["a", "b"], input_size=(3, 8, 8)).eval()
    model.backbone.path = path
    for call in ({"threshold": 1e-30}, {"output_all_exits": True}):
        with pytest.raises(ExitNotReachedError, match="'b'"):
            model(torch.randn(2, 3, 8, 8), **call)


def test_something_behind_the_exits_that_changes_the_number_of_rows_is_an_error():
    model = EarlyExitWrapper(Detour(), exits=["a"], input_size=(3, 8, 8)).eval()
    original = model.backbone.b.forward
    model.backbone.b.forward = lambda x: original(torch.cat([x, x]))
    with pytest.raises(ShapeError, match="8 rows for 4 active samples"):
        model(torch.randn(4, 3, 8, 8), threshold=1e-30)


def test_a_module_called_several_times_has_exits_at_its_calls():
    class Reuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.act, self.fc = nn.ReLU(), nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.fc(self.act(self.b(self.act(self.a(x)))).mean((2, 3)))

    torch.manual_seed(0)
    model = spread(EarlyExitWrapper(Reuse(), exits=["act@0", "act@1"], input_size=(3, 8, 8))).eval()
    x = torch.randn(8, 3, 8, 8)
    thresholds = quantile_thresholds(model, x)
    answers, taken, _ = route_reference("entropy", all_logits(model, x), thresholds)
    out = model(x, threshold=thresholds)
    assert out.exit_index.tolist() == taken.tolist()
    torch.testing.assert_close(out.logits, answers, rtol=0, atol=1e-5)
    assert not torch.equal(*model(x, output_all_exits=True).exit_logits[:2])


def test_a_threshold_where_every_exit_runs_is_refused():
    model, x = model_of("resnet"), images("resnet", 2)
    with pytest.raises(ThresholdError, match=r"threshold=0\.1 has no effect"):
        model(x, threshold=0.1, output_all_exits=True)


def test_gradients_flow_through_a_routed_pass():
    for name in ("resnet", "plain"):
        model, x = model_of(name), images(name, 8)
        thresholds = quantile_thresholds(model, x)
        labels = torch.arange(8) % CLASSES

        def gradients(loss, model=model):
            model.zero_grad()
            loss.backward()
            return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

        routed = gradients(model(x, threshold=thresholds, labels=labels).loss)
        full = model(x, output_all_exits=True).exit_logits
        _, taken, _ = route_reference("entropy", [z.detach() for z in full], thresholds)
        masked = torch.stack(full)[taken, torch.arange(8)]
        expected = gradients(nn.functional.cross_entropy(masked, labels))
        assert set(routed) == {key for key, gradient in expected.items() if key in routed}
        for key, gradient in routed.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)
        model.zero_grad()


def test_the_reference_routes_as_the_definitions_say():
    # the reference itself: a saturated row is sure under every policy, a flat one under none
    sure, flat = torch.tensor([50.0, 0, 0]), torch.zeros(3)
    logits = [torch.stack([sure, flat]), torch.stack([sure, flat]), torch.stack([sure, flat])]
    for policy, threshold in (("entropy", 0.5), ("confidence", 0.9), ("margin", 0.5)):
        assert route_reference(policy, logits, [threshold] * 2)[1].tolist() == [0, 2]
    assert route_reference("patience", logits, [1, 1])[1].tolist() == [1, 1]


@pytest.mark.parametrize("policy", ["entropy", "confidence"])
@pytest.mark.parametrize("threshold", [0.9, 0.1, 1 / 3, 1e-46, 1e39, float("inf")])
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_one_sample_is_decided_as_in_a_batch(policy, threshold, beside, monkeypatch):
    """A score in float32 against a threshold in Python's float64, at the threshold and one step to either side."""
    score = torch.tensor([threshold], dtype=torch.float64).float()
    if beside:
        score = score.nextafter(torch.full((1,), beside * float("inf")))
    model = with_policy(model_of("plain"), policy)
    monkeypatch.setattr(type(model.policy), "score_last", lambda self, log_probs: score.expand(len(log_probs)))
    monkeypatch.setattr(type(model.policy), "score_one", ExitPolicy.score_one)
    x = images("plain", 2)
    with torch.no_grad():
        if model.policy.never_leaves(threshold):
            threshold = [threshold, 0.0, 0.0]
        several = model(x, threshold=threshold).exit_index.tolist()
        assert several == [int(model(x[i : i + 1], threshold=threshold).exit_index) for i in range(2)]


def test_nothing_is_copied_where_nobody_leaves():
    model = model_of("plain")
    visitor = Router(model.routing_plan(1e-30), 4, torch.device("cpu"))
    feature = torch.randn(4, 4, 8, 8)
    assert visitor.on_exit(0, feature) is feature
    everybody = Router(model.routing_plan(100.0), 4, torch.device("cpu"))
    assert everybody.on_exit(0, feature) is None
