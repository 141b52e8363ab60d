"""Everything about a network that wrapping, saving, exporting and counting must leave as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Inputs = Sequence[Tensor] | Mapping[str, Tensor]


def mix_states(module: nn.Module) -> RemovableHandle:
    """Gives layers different modes, freezes some parameters and hooks a layer; the handle removes the hook."""
    for number, child in enumerate(module.modules()):
        child.training = number % 3 == 1
    for number, parameter in enumerate(module.parameters()):
        parameter.requires_grad = number % 4 != 0
    return next(m for m in module.modules() if not [*m.children()]).register_forward_hook(_own_hook)


def network_state(module: nn.Module, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Returns what :func:`changes` compares: tensors, their values, modules, modes, hooks, and the logits in eval mode.

    Args:
        module: A classifier or a language model.
        inputs: Of its forward pass, by place or by name; the pass is run without gradients.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    logits = _logits(module, modules, inputs)  # some layers keep what their first pass computes
    tensors = _tensors(modules)
    return {
        "tensors": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "gradients": {name: parameter.grad for name, parameter in module.named_parameters()},
        "modules": {name: id(child) for name, child in modules.items()},
        "modes": {name: child.training for name, child in modules.items()},
        "hooks": {name: _foreign_hooks(child) for name, child in modules.items()},
        "checkpointing": {
            name: [getattr(child, flag, None) is True for flag in ("grad_checkpointing", "gradient_checkpointing")]
            for name, child in modules.items()
        },
        "outputs": {"logits": logits},
    }


def changes(module: nn.Module, before: dict[str, dict[str, Any]], inputs: Inputs) -> list[str]:
    """Names what differs from an earlier :func:`network_state` of the module on the same inputs, to the last bit."""
    now = network_state(module, inputs)
    return [
        f"{kind} of {name!r}"
        for kind, values in before.items()
        for name in {**values, **now[kind]}
        if not _same(values.get(name, "none"), now[kind].get(name, "none"))
    ]


def _own_hook(*_: Any) -> None:
    """Somebody's own hook."""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        return same and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return one is other if isinstance(one, Tensor) or isinstance(other, Tensor) else bool(one == other)


def _tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters, buffers, and what layers keep next to them."""
    found: dict[str, Tensor] = {}
    for name, child in modules.items():
        held = {**child._parameters, **child._buffers, **vars(child)}
        for value in list(held.values()):
            held |= {str(key): kept for key, kept in value.items()} if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": value for key, value in held.items() if isinstance(value, Tensor)}
    return found


def _foreign_hooks(module: nn.Module) -> list[Any]:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._state_dict_hooks)
    return [hook for kept in hooks for hook in kept.values() if not type(hook).__module__.startswith("erde_hub")]


@torch.no_grad()
def _logits(module: nn.Module, modules: dict[str, nn.Module], inputs: Inputs) -> Tensor:
    modes = {name: child.training for name, child in modules.items()}
    for child in modules.values():  # Module.eval would let some layers forget what they keep
        child.training = False
    output = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    for name, child in modules.items():
        child.training = modes[name]
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple) else output
