"""One model, one answer: what a call needs is worked out once, and anew when something it depends on changes."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import timm
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from timm.utils import freeze
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from erde_hub import EarlyExitWrapper, route_batches
from erde_hub.calibration import create_calibrator
from erde_hub.errors import ExitPointError, ExportError, ThresholdError
from erde_hub.policies import create_policy
from tests.fakes.networks import (
    CLASSES,
    FAMILIES,
    STAGED,
    all_logits,
    build,
    images,
    quantile_thresholds,
    route_reference,
    wrap,
)

SURE = [100.0, 0.0, 0.0]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def is_staged(model: EarlyExitWrapper) -> bool:
    return model.runner.stages() is not None


def assert_one_answer(model: EarlyExitWrapper, x: torch.Tensor) -> None:
    """Every way of calling a model gives what its own forward and its heads give."""
    with torch.no_grad():
        every = model(x, output_all_exits=True).exit_logits
        assert torch.equal(model(x, threshold=0.0).logits, every[-1])
        assert torch.equal(model(x, threshold=1e-30).logits, every[-1])
        assert torch.equal(model(x, threshold=SURE).logits, every[0])
        alone = model(x[:1], threshold=SURE).logits
        torch.testing.assert_close(alone, every[0][:1], rtol=1e-4, atol=1e-4)
        cuts = quantile_thresholds(model, x)
        answers, taken, clear = route_reference("entropy", every, cuts)
        out = model(x, threshold=cuts)
        assert torch.equal(out.exit_index[clear], taken[clear])
        torch.testing.assert_close(out.logits[clear], answers[clear], rtol=1e-4, atol=1e-4)
        streamed = torch.cat([own.logits for own in route_batches(model, x.split(3), threshold=cuts, batch_size=4)])
        torch.testing.assert_close(streamed[clear], answers[clear], rtol=1e-4, atol=1e-4)


# What a plan depends on


def test_a_plan_is_kept():
    model, x = wrap("resnet"), images("resnet", 1)
    model(x, threshold=0.3)
    plan, stages = model.routing_plan(0.3), model.runner.stages()
    model(x, threshold=0.3)
    assert model.routing_plan(0.3) is plan
    assert model.runner.stages() is stages
    assert model.routing_plan([0.3, 0.3, 0.3]) is not plan


def change_threshold(model: EarlyExitWrapper) -> None:
    model.threshold = 0.0


def change_threshold_in_place(model: EarlyExitWrapper) -> None:
    model.config.threshold[0] = 0.0


def change_policy(model: EarlyExitWrapper) -> None:
    model.set_policy(create_policy("confidence"), 2.0)


def change_policy_by_hand(model: EarlyExitWrapper) -> None:
    model.policy = create_policy("never")


def replace_backbone(model: EarlyExitWrapper) -> None:
    model.backbone = copy.deepcopy(model.backbone)


def replace_stage(model: EarlyExitWrapper) -> None:
    model.backbone.layer1 = nn.Sequential(model.backbone.layer1, nn.Tanh())


def replace_head(model: EarlyExitWrapper) -> None:
    model.heads[0] = nn.Sequential(copy.deepcopy(model.heads[0]), nn.Tanh())
    model.heads[0].spec = model.heads[0][0].spec
    model.heads[0].num_labels = CLASSES


def change_calibrator(model: EarlyExitWrapper) -> None:
    calibrator = create_calibrator("temperature", num_exits=4)
    for buffer in calibrator.buffers():
        buffer.fill_(3.0)
    model.set_calibrator(calibrator)


def compile_stages(model: EarlyExitWrapper) -> None:
    model.compile_stages(backend="eager")


def freeze_norms(model: EarlyExitWrapper) -> None:
    freeze(model.backbone)  # puts other norm layers in the place of those that it freezes
    model.backbone.bn1.bias.add_(1)


def freeze_backbone(model: EarlyExitWrapper) -> None:
    model.freeze_backbone()
    model.train().eval()


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize(
    ("change", "answers_change"),
    [
        (change_threshold, True),
        (change_threshold_in_place, True),
        (change_policy, True),
        (change_policy_by_hand, True),
        (replace_backbone, False),
        (replace_stage, True),
        (replace_head, True),
        (change_calibrator, True),
        (compile_stages, False),
        (freeze_norms, True),
        (freeze_backbone, False),
        (lambda model: model.double(), True),
        (lambda model: model.bfloat16(), True),
        (lambda model: model.backbone.conv1.weight.data.mul_(2), True),
    ],
)
def test_a_plan_follows_what_it_was_made_from(change, answers_change, size):
    model, x = wrap("resnet"), images("resnet", size)
    model.threshold = list(SURE)
    with torch.no_grad():
        before = model(x)
        change(model)
        x = x.to(model.dtype)
        after, fresh = model(x), copy.deepcopy(model)(x)
        assert after.logits.dtype == model.dtype
        assert torch.equal(after.logits, fresh.logits)
        assert torch.equal(after.exit_index, fresh.exit_index)
        assert torch.equal(before.logits, after.logits) is not answers_change
        if model.calibrator is not None:
            model.set_calibrator(None)
            assert torch.equal(model(x).logits, before.logits)


def test_a_plan_follows_the_device():
    model, x = wrap("resnet"), images("resnet", 1)
    assert model(x, threshold=SURE).exit_index.device.type == "cpu"
    out = model.to("meta")(x.to("meta"), threshold=SURE)
    assert (out.logits.device.type, out.exit_index.device.type) == ("meta", "meta")


def test_numbers_that_look_alike_are_checked_each_by_its_type():
    model, x = wrap("resnet"), images("resnet", 1)
    model(x, threshold=1)
    model(x, threshold=[1, 1, 1])
    with pytest.raises(ThresholdError):
        model(x, threshold=[1])
    for wrong in ("1", [1, 1, "1"]):
        with pytest.raises(ThresholdError):
            model(x, threshold=wrong)
    assert torch.equal(model(x, threshold=torch.tensor(1.0)).logits, model(x, threshold=1.0).logits)


def test_a_trace_of_a_routed_pass_is_refused():
    """It would hold the one exit that the traced sample took."""
    model, x = wrap("resnet").requires_grad_(False), images("resnet", 1)
    with pytest.raises(ExportError, match=r"torch\.jit"):
        torch.jit.trace(lambda given: model(given, threshold=0.3).logits, x)
    traced = torch.jit.trace(lambda given: model(given, threshold=0.0).logits, x)
    assert torch.equal(traced(x), model(x, threshold=0.0).logits)


def test_other_ways_to_capture_a_routed_pass_are_refused():
    model, x = wrap("resnet").requires_grad_(False), images("resnet", 2)
    with pytest.raises(ExportError, match=r"torch\.fx.*truncate\(exit\)"):
        make_fx(lambda given: model(given, threshold=0.3).logits)(x)
    with pytest.raises(ExportError, match=r"torch\.vmap.*truncate\(exit\)"):
        torch.vmap(lambda given: model(given[None], threshold=0.3).logits)(x)
    with pytest.raises(ExportError, match=r"torch\.jit.*truncate\(exit\)"):
        torch.jit.script(model)
    every = torch.vmap(lambda given: model(given[None], output_all_exits=True).exit_logits[0])(x)
    torch.testing.assert_close(every[:, 0], model(x, output_all_exits=True).exit_logits[0])


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_the_old_exporter_of_torch_is_refused(threshold):
    model = wrap("resnet", threshold=threshold)
    with pytest.raises(ExportError, match=r"export_onnx .* model\.truncate\(exit\)"):
        torch.onnx.export(model, (images("resnet", 2),), io.BytesIO(), dynamo=False)


# Hooks of others


def halve(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * 0.5 + 0.3, *args[1:])


@pytest.mark.parametrize("name", STAGED)
def test_a_hook_on_the_backbone_counts_in_every_call(name):
    model, x = wrap(name), images(name, 8)
    before = all_logits(model, x)
    handle = model.backbone.register_forward_pre_hook(halve)
    assert not is_staged(model)
    assert_one_answer(model, x)
    assert not torch.equal(all_logits(model, x)[0], before[0])
    handle.remove()
    assert is_staged(model)
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, x), before, strict=True))


@pytest.mark.parametrize(("name", "place"), [("vit", "blocks"), ("sequential", "1"), ("efficientnet", "blocks")])
def test_a_hook_on_what_contains_the_stages_counts_in_every_call(name, place):
    model, x = wrap(name), images(name, 8)
    calls = []
    module = model.backbone.get_submodule(place)
    handle = module.register_forward_hook(lambda _m, _args, output: (calls.append(1), output * 0.7)[1])
    assert not is_staged(model)
    with torch.no_grad():
        for call in ({"threshold": 0.0}, {"threshold": 1e-30}, {"output_all_exits": True}):
            calls.clear()
            model(x, **call)
            assert calls == [1]
    assert_one_answer(model, x)
    handle.remove()


@pytest.mark.parametrize("name", ["vit", "sequential", "resnet"])
def test_a_hook_on_every_module_counts_in_every_call(name):
    model, x = wrap(name), images(name, 8)
    before = all_logits(model, x)
    for register, hook in (
        (register_module_forward_hook, lambda module, _args, output: output * 0.9 if type(output) is Tensor else None),
        (
            register_module_forward_pre_hook,
            lambda module, args: halve(module, args) if module is model.backbone else None,
        ),
    ):
        handle = register(hook)
        try:
            assert not is_staged(model)
            assert_one_answer(model, x)
            assert not torch.equal(all_logits(model, x)[-1], before[-1])
        finally:
            handle.remove()
    assert is_staged(model)
    with FlopCounterMode(display=False):  # whose hooks on every module only watch
        assert is_staged(model)


def test_a_hook_on_a_stage_is_called_by_the_stages_themselves():
    model, x = wrap("resnet"), images("resnet", 8)
    model.backbone.layer2.register_forward_pre_hook(halve)
    assert is_staged(model)
    assert_one_answer(model, x)


def test_a_backward_hook_on_the_backbone_is_called_in_training():
    model, calls = wrap("resnet").train(), []
    model.backbone.register_full_backward_hook(lambda *_: calls.append(1))
    model(images("resnet", 4), labels=torch.arange(4)).loss.backward()
    assert calls == [1]


@pytest.mark.parametrize("place", ["", "blocks"])
def test_a_forward_that_was_replaced_counts_in_every_call(place):
    model, x = wrap("vit"), images("vit", 8)
    before = all_logits(model, x)[0]
    module = model.backbone.get_submodule(place)
    own = module.forward
    module.forward = lambda given: own(given * 0.5)
    assert not is_staged(model)
    assert_one_answer(model, x)
    assert not torch.equal(all_logits(model, x)[0], before)
    del module.forward
    assert is_staged(model)
    assert torch.equal(all_logits(model, x)[0], before)


@pytest.mark.parametrize(
    ("name", "place", "method"),
    [("resnet", "", "forward"), ("vit", "", "forward_features"), ("sequential", "1", "forward")],
)
def test_a_class_that_was_patched_counts_in_every_call(name, place, method, monkeypatch):
    """As patchers of kernels do, after wrapping."""
    model, x = wrap(name), images(name, 8)
    before = all_logits(model, x)
    kind = type(model.backbone.get_submodule(place))
    own = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, given, **more: own(self, given, **more) * 0.5)
    for one in (model, copy.deepcopy(model)):
        assert not is_staged(one)
        assert_one_answer(one, x)
    assert not torch.equal(all_logits(model, x)[-1], before[-1])
    monkeypatch.undo()
    assert is_staged(model)
    assert torch.equal(all_logits(model, x)[-1], before[-1])


@pytest.mark.parametrize("name", ["vit", "resnet", "plain"])
def test_offloaded_weights(name):
    model, x = wrap(name), images(name, 8)
    before = all_logits(model, x)
    cpu_offload(model.backbone, execution_device=torch.device("cpu"))
    assert model.backbone.get_parameter(next(key for key, _ in model.backbone.named_parameters())).is_meta
    assert_one_answer(model, x)
    assert all(torch.equal(a, b) for a, b in zip(all_logits(model, x), before, strict=True))
    remove_hook_from_submodules(model.backbone)
    assert is_staged(model) is (name in STAGED)


def test_hooks_where_only_stages_let_samples_exit():
    kwargs = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1), "img_size": 64}
    model = EarlyExitWrapper(timm.create_model("twins_svt_small", num_classes=3, **kwargs), 2, backbone_kwargs=kwargs)
    x = torch.randn(4, 3, 64, 64)
    handle = model.eval().backbone.register_forward_pre_hook(halve)
    with torch.no_grad():
        assert torch.equal(model(x, output_all_exits=True).logits, model(x, threshold=0.0).logits)
        with pytest.raises(ExitPointError, match="samples can exit Twins only where its stages are run one by one"):
            model(x, threshold=0.9)
        handle.remove()
        assert model(x, threshold=100.0).exit_index.tolist() == [0] * 4


def test_hooks_that_come_and_go_pile_up_nowhere():
    model, x = wrap("vit"), images("vit", 2)
    for _ in range(5):
        model.backbone.register_forward_pre_hook(halve).remove()
        handle = model.backbone.register_forward_pre_hook(halve)
        model(x, threshold=1e-30)
        handle.remove()
        model(x, threshold=1e-30)
    assert sum(len(module._forward_hooks) for module in model.backbone.modules()) == 3


def test_a_copy_has_its_own_runner():
    model, x = wrap("resnet"), images("resnet", 4)
    model(x, threshold=SURE)
    copied = copy.deepcopy(model)
    assert copied.runner.backbone is copied.backbone
    handle = copied.backbone.register_forward_pre_hook(halve)
    assert is_staged(model)
    assert not is_staged(copied)
    assert_one_answer(copied, images("resnet", 8))
    handle.remove()


def test_a_model_is_freed_with_what_it_kept():
    model = wrap("resnet")
    model(images("resnet", 1), threshold=SURE)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", ["plain", "swin"])
def test_a_network_wrapped_again_and_again_keeps_the_hooks_of_the_latest_model(name):
    backbone = build(name)
    family = FAMILIES[name]

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())

    assert hooks() == 0
    counts, answers = [], []
    for _ in range(3):
        model = EarlyExitWrapper(
            backbone, exits=family.exits, input_size=family.input_size, backbone_kwargs=family.kwargs
        ).eval()
        gc.collect()
        counts.append(hooks())
        answers.append(model(images(name), output_all_exits=True).logits.detach())
    assert counts == [3] * 3
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    del model
    gc.collect()
    assert hooks() == 0
