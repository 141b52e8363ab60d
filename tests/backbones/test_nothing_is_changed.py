"""Wrapping, saving, truncating and counting leave a network as they found it, whatever it shares and in any mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from support_models import TRANSFORMERS_TEXT, TRANSFORMERS_VISION, timm_choice, timm_families, transformers_model
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper, list_exit_points
from erde_hub.export import export_onnx
from tests.fakes.networks import FAMILIES, Plain, build, sequential

#: Modules registered twice, biases kept in eval mode (coat, levit), staged and hooked families, buffers of positions.
QUICK = ("coat", "levit", "resnet", "vision_transformer", "swin_transformer", "twins", "eva")
QUICK_TRANSFORMERS = ("Pvt", "Levit", "TimmWrapper", "Bert", "Albert", "ModernBert", "GPT2", "Llama")
REFUSED = ("gemma4_vit",)


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def _watch(*_: Any) -> None:
    """Somebody's own hook."""


def _own_hooks(module: nn.Module) -> list[Any]:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._state_dict_hooks)
    return [hook for kept in hooks for hook in kept.values() if not type(hook).__module__.startswith("erde_hub")]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, and what layers keep beside them."""
    found: dict[str, Tensor] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        held = {**child._parameters, **child._buffers, **vars(child)}
        for value in list(held.values()):
            held |= {str(key): kept for key, kept in value.items()} if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": value for key, value in held.items() if isinstance(value, Tensor)}
    return found


def _state(module: nn.Module) -> dict[str, Any]:
    modules = dict(module.named_modules(remove_duplicate=False))
    return {
        "objects": {name: id(tensor) for name, tensor in _tensors(module).items()},
        "modules": {name: id(child) for name, child in modules.items()},
        "modes": {name: child.training for name, child in modules.items()},
        "trained": {name: tensor.requires_grad for name, tensor in _tensors(module).items()},
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "hooks": {name: _own_hooks(child) for name, child in modules.items()},
        "recomputed": {
            name: [getattr(child, flag, None) is True for flag in ("grad_checkpointing", "gradient_checkpointing")]
            for name, child in modules.items()
        },
    }


def _check_unchanged(module: nn.Module, inputs: tuple[Tensor, ...], run: Callable[[nn.Module], None]) -> None:
    """Gives layers different modes, freezes some of them, hooks one, and looks at everything before and after."""
    with torch.no_grad():
        for tensor in module.state_dict().values():  # what nobody could draw again by the same seed
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
        before = _logits(module.eval()(*inputs))
    for number, child in enumerate(module.modules()):
        child.training = number % 3 == 1
    for number, parameter in enumerate(module.parameters()):
        parameter.requires_grad = number % 4 != 0
    next(m for m in module.modules() if not [*m.children()]).register_forward_hook(_watch)
    state, values = _state(module), {name: tensor.clone() for name, tensor in _tensors(module).items()}
    run(module)
    for what, later in _state(module).items():
        names = {**later, **state[what]}
        assert [name for name in names if later.get(name, "no") != state[what].get(name, "no")] == [], what
    now = _tensors(module)
    assert [name for name, value in values.items() if not torch.equal(now[name], value)] == []
    for child in module.modules():
        child.training = False
    with torch.no_grad():
        torch.testing.assert_close(_logits(module(*inputs)), before, rtol=0, atol=0, equal_nan=True)


def _logits(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple) else output


def _everything(tmp_path: Any, size: int | None, kwargs: dict[str, Any] | None) -> Callable[[nn.Module], None]:
    given = {} if size is None else {"input_size": (3, size, size)}

    def run(module: nn.Module) -> None:
        list_exit_points(module, **given)
        model = EarlyExitWrapper(module, exits="auto", backbone_kwargs=kwargs or None, **given)
        model.exit_table()
        model.truncate(0)
        model.truncate("classifier")
        model.save_pretrained(tmp_path / "model")

    return run


def _check_family(family: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    if family in TRANSFORMERS_TEXT:
        module, size, kwargs = transformers_model(family), None, {}
        inputs: tuple[Tensor, ...] = (torch.randint(5, 99, (2, 7)),)
    else:
        if family in TRANSFORMERS_VISION:
            module, size, kwargs = transformers_model(family), TRANSFORMERS_VISION[family][1], {}
        else:
            name, size, kwargs = timm_choice(family, timm_families()[family])
            module = timm.create_model(name, num_classes=5, **kwargs)
        inputs = (torch.randn(2, 3, size, size),)
    _check_unchanged(module, inputs, _everything(tmp_path, size, kwargs))


@pytest.mark.parametrize("family", [*QUICK, *QUICK_TRANSFORMERS])
def test_quick_families(family, tmp_path):
    _check_family(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "family", [f for f in (*timm_families(), *TRANSFORMERS_VISION, *TRANSFORMERS_TEXT) if f not in REFUSED]
)
def test_every_family(family, tmp_path):
    _check_family(family, tmp_path)


@pytest.mark.parametrize("make", [Plain, sequential])
def test_modules_of_ones_own(make, tmp_path):
    torch.manual_seed(0)
    _check_unchanged(make(), (torch.randn(2, 3, 16, 16),), _everything(tmp_path, 16, None))


def test_activation_checkpointing_of_some_stages_stays_so(tmp_path):
    module = build("swin")
    module.layers[1].grad_checkpointing = True
    size = FAMILIES["swin"].size
    _check_unchanged(module, (torch.randn(2, 3, size, size),), _everything(tmp_path, size, FAMILIES["swin"].kwargs))


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_exporting(name, tmp_path):
    torch.manual_seed(0)
    family = FAMILIES[name]

    def run(module: nn.Module) -> None:
        given = {"exits": family.exits, "input_size": family.input_size, "backbone_kwargs": family.kwargs}
        model = EarlyExitWrapper(module, **given)
        modes = {name: child.training for name, child in model.named_modules()}
        export_onnx(model, tmp_path / "model.onnx")
        assert {name: child.training for name, child in model.named_modules()} == modes

    _check_unchanged(build(name), (torch.randn(2, *family.input_size),), run)
