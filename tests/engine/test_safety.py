"""Nothing of a pass outlives it: threads, copies, nesting, exceptions, recomputation, compilation."""

from __future__ import annotations

import contextvars
import copy
import functools
import gc
import io
import pickle
import resource
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from erde_hub import EarlyExitWrapper, route_batches
from erde_hub.engine import hooks
from erde_hub.errors import ConfigError, ExitNotReachedError
from erde_hub.export import EarlyExitSession, export_onnx
from tests.fakes.networks import (
    CLASSES,
    FAMILIES,
    TIMM,
    all_logits,
    build,
    images,
    no_randomness,
    quantile_thresholds,
    route_reference,
    spread,
    wrap,
)

DRIVEN = ["resnet", "plain"]  # one staged, one by hooks


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    assert hooks._running.get() == ()


@functools.cache
def thresholds_of(name: str) -> tuple[float, ...]:
    return tuple(quantile_thresholds(wrap(name), images(name)))


def answer(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(images(name), threshold=list(thresholds_of(name))).logits


# Copies


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _averaged(model):
    copied = AveragedModel(model)
    copied.update_parameters(model)
    return copied.module


def _ema(model):
    copied = ModelEmaV3(model)
    copied.update(model)
    return copied.module


@pytest.mark.parametrize("name", [*DRIVEN, "beit"])
@pytest.mark.parametrize("copier", [copy.deepcopy, _pickled, _saved, _averaged, _ema])
def test_a_copy_routes_on_its_own(name, copier):
    model = wrap(name)
    expected = answer(model, name)
    copied = copier(model).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(answer(copied, name), expected)
    assert len(copied(images(name), output_all_exits=True).exit_logits) == 4


def test_quantising_a_copy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the move of its quantisation
        quantised = torch.ao.quantization.quantize_dynamic(wrap("plain"), {nn.Linear}, dtype=torch.qint8)
    assert answer(quantised, "plain").shape == (8, CLASSES)


# Threads and nesting


@pytest.mark.parametrize("name", DRIVEN)
def test_threads_do_not_see_each_other(name):
    model = wrap(name)
    batches = [images(name, 4 + i, seed=i) for i in range(4)]
    cuts = [[t * (0.8 + 0.1 * i) for t in thresholds_of(name)] for i in range(4)]
    with torch.no_grad():
        expected = [model(x, threshold=cut) for x, cut in zip(batches, cuts, strict=True)]
    assert len({tuple(out.exit_index.tolist()) for out in expected}) == 4
    wrong, barrier = [], threading.Barrier(4)

    def work(i):
        barrier.wait()
        for _ in range(15):
            with torch.no_grad():
                out = model(batches[i], threshold=cuts[i])
            if not torch.equal(out.exit_index, expected[i].exit_index) or not torch.equal(
                out.logits, expected[i].logits
            ):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", [*DRIVEN, "beit"])
def test_a_backbone_wrapped_twice(name):
    family, backbone = FAMILIES[name], build(name).eval()
    make = functools.partial(EarlyExitWrapper, backbone, backbone_kwargs=family.kwargs, input_size=family.input_size)
    one, two = spread(make(exits=family.exits)).eval(), spread(make(exits=family.exits[:2], head="linear")).eval()
    x = images(name)
    for model in (one, two, one):
        cuts = quantile_thresholds(model, x)
        answers, taken, _ = route_reference("entropy", all_logits(model, x), cuts)
        out = model(x, threshold=cuts)
        assert out.exit_index.tolist() == taken.tolist()
        torch.testing.assert_close(out.logits, answers, rtol=0, atol=1e-4)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.pre, self.inner, self.fc = nn.Conv2d(3, 3, 3, padding=1), inner, nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        return self.fc(self.inner(self.pre(x)).logits)


@pytest.mark.parametrize("name", DRIVEN)
def test_a_wrapped_model_inside_a_wrapped_model(name):
    inner = wrap(name)
    inner.threshold = list(thresholds_of(name))
    size = FAMILIES[name].input_size
    outer = spread(EarlyExitWrapper(Outer(inner), exits=["pre"], input_size=size)).eval()
    x = images(name)
    cuts = quantile_thresholds(outer, x)
    answers, taken, _ = route_reference("entropy", all_logits(outer, x), cuts)
    assert 0 < int(taken.sum()) < 8
    out = outer(x, threshold=cuts)
    assert out.exit_index.tolist() == taken.tolist()
    torch.testing.assert_close(out.logits, answers, rtol=0, atol=1e-4)
    assert outer.exit_table()[1].macs > inner.exit_table()[0].macs


def test_an_exit_of_the_outer_model_inside_the_inner_one():
    inner = wrap("plain", exits=["trunk.b"], threshold=0.0)
    outer = spread(EarlyExitWrapper(Outer(inner), exits=["pre", "inner.backbone.stem"], input_size=(3, 16, 16))).eval()
    x = images("plain")
    cuts = quantile_thresholds(outer, x)
    logits = all_logits(outer, x)
    answers, taken, _ = route_reference("entropy", logits, cuts)
    out = outer(x, threshold=cuts)
    assert out.exit_index.tolist() == taken.tolist()
    torch.testing.assert_close(out.logits, answers, rtol=0, atol=1e-4)

    inner.threshold = 1.2  # now the inner one routes as well, behind the outer one's exit
    out = outer(x, threshold=[0.0, 100.0])  # everybody leaves in the middle of the inner model's pass
    assert out.exit_index.tolist() == [1] * 8
    torch.testing.assert_close(out.logits, logits[1])
    with pytest.raises(ExitNotReachedError, match="rows where"):  # the inner one loses samples it has not let go
        outer(x, threshold=cuts)


@pytest.mark.parametrize("name", DRIVEN)
def test_outside_a_call_the_hooks_do_nothing(name):
    model = wrap(name, threshold=100.0)
    plain = build(name).eval()
    x = images(name)
    assert torch.equal(model.backbone(x), plain(x))
    model(x)
    assert torch.equal(model.backbone(x), plain(x))


# Exceptions


class Trap(nn.Module):
    error: BaseException | None = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


class Trapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.trap, self.b = nn.Conv2d(3, 3, 3), Trap(), nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.fc(self.b(self.trap(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("staged", [True, False])
def test_an_exception_in_the_middle_leaves_a_usable_model(error, staged):
    torch.manual_seed(0)
    backbone = Trapped()
    if staged:
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        backbone = nn.Sequential(backbone.a, backbone.trap, backbone.b, pool, backbone.fc)
    exits = ["0", "2"] if staged else ["a", "b"]
    model = spread(EarlyExitWrapper(backbone, exits=exits, input_size=(3, 8, 8))).eval()
    assert (model.runner.stages() is not None) is staged
    trap = next(m for m in model.modules() if isinstance(m, Trap))
    x = torch.randn(8, 3, 8, 8)
    cuts = quantile_thresholds(model, x)
    expected = model(x, threshold=cuts)
    for call in ({"threshold": cuts}, {"output_all_exits": True}):
        trap.error = error
        with pytest.raises(type(error)):
            model(x, **call)
        trap.error = None
        assert hooks._running.get() == ()
        assert torch.equal(model(x, threshold=cuts).logits, expected.logits)
        assert torch.equal(model.backbone(x), model(x, threshold=0).logits)


def test_a_backbone_that_swallows_exceptions_does_not_swallow_the_end_of_a_pass():
    class Swallows(Trapped):
        def forward(self, x):
            try:
                x = self.a(x)
            except Exception:  # noqa: BLE001
                x = x * 0
            return self.fc(self.b(x).mean((2, 3)))

    model = EarlyExitWrapper(Swallows(), exits=["a"], input_size=(3, 8, 8)).eval()
    assert model(torch.randn(4, 3, 8, 8), threshold=100.0).exit_index.tolist() == [0] * 4


def test_a_pass_in_another_context_is_its_own():
    model = wrap("plain")
    cuts = list(thresholds_of("plain"))
    expected = answer(model, "plain")
    context = contextvars.copy_context()
    assert torch.equal(context.run(lambda: model(images("plain"), threshold=cuts).logits), expected)


# Modes


@pytest.mark.parametrize("name", DRIVEN)
def test_inference_mode_and_autocast(name):
    model, x = wrap(name), images(name)
    expected = answer(model, name)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, threshold=list(thresholds_of(name))).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        cuts = quantile_thresholds(model, x)
        full = all_logits(model, x)
        out = model(x, threshold=cuts)
        answers, taken, _ = route_reference("entropy", [z.float() for z in full], cuts)
        assert out.exit_index.tolist() == taken.tolist()
        torch.testing.assert_close(out.logits.float(), answers, rtol=0.02, atol=0.02)
        loss = no_randomness(model).train()(x, labels=torch.arange(8) % CLASSES).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-10)], ids=str
)
@pytest.mark.parametrize("name", DRIVEN)
def test_models_in_other_types(name, dtype, tolerance):
    model = wrap(name).to(dtype)
    x = images(name).to(dtype)
    full = all_logits(model, x)
    cuts = quantile_thresholds(model, x)
    answers, taken, clear = route_reference("entropy", full, cuts)
    out = model(x, threshold=cuts)
    assert out.logits.dtype == dtype
    assert clear.sum() > len(x) // 2
    assert torch.equal(out.exit_index[clear], taken[clear])
    torch.testing.assert_close(out.logits[clear], answers[clear].to(dtype), rtol=tolerance, atol=tolerance)


# Leaks


def _objects_after(calls: int, call: Callable[[], Any]) -> int:
    for _ in range(calls):
        call()
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("way", ["routed", "streamed", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", DRIVEN)
def test_calls_leave_no_objects(name, way):
    model, x, cuts = wrap(name), images(name, 4), list(thresholds_of(name))
    calls: dict[str, Callable[[], Any]] = {
        "routed": lambda: model(x, threshold=cuts),
        "all": lambda: model(x, output_all_exits=True),
        "streamed": lambda: list(route_batches(model, [x, x], threshold=cuts)),
    }
    before = _objects_after(5, calls[way])
    assert _objects_after(30, calls[way]) - before < 30, "one object a call"


@pytest.mark.slow
def test_calls_of_a_session_leave_no_objects(tmp_path):
    pytest.importorskip("onnxruntime")
    session = EarlyExitSession(export_onnx(wrap("resnet"), tmp_path / "model.onnx"), threads=1)
    x, cuts = images("resnet", 4).numpy(), list(thresholds_of("resnet"))
    before = _objects_after(5, lambda: session(x, cuts))
    assert _objects_after(30, lambda: session(x, cuts)) - before < 30, "one object a call"


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", DRIVEN)
def test_memory_stays_level_over_many_calls(name):
    model, x, cuts = wrap(name), images(name, 4), list(thresholds_of(name))

    def pages_after(calls: int) -> int:
        _objects_after(calls, lambda: model(x, threshold=cuts))
        return int(Path("/proc/self/statm").read_text().split()[1])

    with torch.no_grad():
        before = pages_after(500)
        assert (pages_after(3000) - before) * resource.getpagesize() < 8 * 2**20, "3 kB a call"


# Activation checkpointing


def gradients(model, name, train):
    torch.manual_seed(0)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    model.zero_grad()
    labels = torch.arange(8) % CLASSES
    model.train(train)
    call = {} if train else {"threshold": list(thresholds_of(name))}
    out = model(images(name), labels=labels, **call)
    out.loss.backward()
    with torch.no_grad():
        for key, value in model.named_buffers():
            value.copy_(buffers[key])
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TIMM)
def test_recomputation_gives_the_same_gradients(name):
    model = no_randomness(wrap(name))
    assert model.supports_gradient_checkpointing
    for train in (True, False):
        model.activation_checkpointing_disable()
        expected = gradients(model, name, train)
        model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing
        found = gradients(model, name, train)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(found[key] / scale, gradient / scale, rtol=0, atol=1e-5)
        assert model.is_activation_checkpointing, "a routed pass must switch it on again"
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("name", ["resnet", "beit"])
def test_recomputation_really_happens(name):
    model = no_randomness(wrap(name)).train()
    model.activation_checkpointing_enable()
    calls = []
    first = model.backbone.get_submodule(FAMILIES[name].exits[0])
    inner = next(m for m in first.modules() if isinstance(m, (nn.Conv2d, nn.LayerNorm)))
    inner.register_forward_hook(lambda *_: calls.append(1))
    model(images(name), labels=torch.arange(8) % CLASSES).loss.backward()
    assert len(calls) == 2


def test_a_backbone_that_recomputes_on_its_own():
    class Recomputes(Trapped):
        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(lambda y: self.b(self.a(y)), x, use_reentrant=False)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    plain = EarlyExitWrapper(Trapped(), exits=["a"], input_size=(3, 8, 8))
    again = EarlyExitWrapper(Recomputes(), exits=["a"], input_size=(3, 8, 8))
    again.load_state_dict(plain.state_dict())
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    for model in (plain, again):
        no_randomness(model).train()(x, labels=labels).loss.backward()
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_a_stem_without_gradients_trains_its_exit():
    class FrozenStem(Trapped):
        def forward(self, x):
            with torch.no_grad():
                x = self.a(x)
            return self.fc(self.b(x).mean((2, 3)))

    model = EarlyExitWrapper(FrozenStem(), exits=["a"], input_size=(3, 8, 8)).train()
    model(torch.randn(4, 3, 8, 8), labels=torch.arange(4)).loss.backward()
    assert all(p.grad is not None for p in model.heads.parameters())
    assert model.backbone.a.weight.grad is None


def test_reentrant_recomputation_is_refused_where_it_would_lose_gradients():
    model = wrap("beit").train()
    model.activation_checkpointing_enable()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(ConfigError, match="reentrant"):
            model(images("beit"), labels=torch.arange(8) % CLASSES)
    finally:
        set_reentrant_ckpt(False)


def test_a_model_without_checkpointing_says_so():
    assert not wrap("plain").supports_gradient_checkpointing
    with pytest.raises(ValueError, match="checkpointing"):
        wrap("plain").activation_checkpointing_enable()


# torch.compile


@pytest.mark.parametrize("name", ["resnet", pytest.param("plain", marks=pytest.mark.long)])  # one break per hook
def test_a_compiled_backbone_gives_the_same_answers(name):
    model = wrap(name)
    expected = answer(model, name)
    full = all_logits(model, images(name))
    model.backbone = torch.compile(model.backbone, backend="eager", dynamic=True)
    try:
        assert torch.equal(answer(model, name), expected)
        assert all(torch.equal(a, b) for a, b in zip(all_logits(model, images(name)), full, strict=True))
        with torch.no_grad():
            assert torch.equal(model(images(name), threshold=0).logits, full[-1])
        assert model.exit_table() == wrap(name).exit_table()
    finally:
        torch._dynamo.reset()
