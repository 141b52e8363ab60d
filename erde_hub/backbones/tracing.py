"""What a backbone computes, stage by stage, found by running a weightless copy of it once.

Costs are multiply-accumulates (MACs), one half of the floating point operations that torch's own counter reports. The
copy lives on the meta device: no memory for weights, no arithmetic, and fused attention is counted, which the counter
does not see on a CPU (pytorch issue 195460).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from erde_hub.engine.recomputation import recomputing
from erde_hub.engine.rows import tensors
from erde_hub.errors import ExitPointError

M = TypeVar("M", bound=nn.Module)


def _cpu_attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the fused attention operator of the CPU, which torch does not register."""
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """Returns torch's counter, with the CPU's fused attention operator added."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={operator: _cpu_attention_flop})


@dataclass
class StageCall:
    """One call of one module, without values.

    Attributes:
        order: When it ended.
        macs: What had been computed by then, for one sample.
        output: What came out.
        versions: Of the tensors that came out; they rise where a later layer writes in place.
        macs_before: What had been computed when it began.
    """

    order: int
    macs: int
    output: Any
    versions: tuple[int, ...] = ()
    macs_before: int = 0

    @property
    def overwritten(self) -> bool:
        """Whether something behind the module wrote over its output."""
        return self.versions != versions(self.output)


def versions(tree: Any) -> tuple[int, ...]:
    """How often each tensor of a structure has been written in place."""
    return tuple(tensor._version for tensor in tensors(tree))


@dataclass
class Trace:
    """What one forward pass called.

    Attributes:
        calls: Module name to its calls, in the order in which the modules ended first.
        total_macs: MACs of the whole pass for one sample; what a batch computes once is counted in full.
        output: The backbone's output, without values.
        last_parametrised: Order at which the last module with weights of its own ended: the classifier.
        batch: Number of samples of the traced pass.
        inputs: Example inputs, batch first.
        layout_runs: Passes that :mod:`~erde_hub.backbones.layouts` compares, once it has made them.
    """

    calls: dict[str, list[StageCall]] = field(default_factory=dict)
    total_macs: int = 0
    output: Any = None
    last_parametrised: int = 0
    batch: int = 1
    inputs: Sequence[Tensor] = ()
    layout_runs: list[Any] | None = None


def tensor_attributes(module: nn.Module) -> Iterable[Tensor]:
    """All tensors that a module holds: parameters, buffers, and those in other attributes."""
    for child in module.modules():
        yield from child.parameters(recurse=False)
        yield from child.buffers(recurse=False)
        for value in vars(child).values():
            if isinstance(value, (Tensor, list, tuple, dict)):
                yield from tensors(value)


def meta_copy(module: M) -> M:
    """Copies a module without its weights: the same structure, every tensor on the meta device, in eval mode."""
    memo: dict[int, Any] = {}
    for tensor in tensor_attributes(module):
        empty = torch.empty_like(tensor, device="meta")
        # Without gradients: torch's counter asserts where a module gets a parameter as an argument.
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).eval()


def copy_around(module: M, given: Mapping[int, Tensor]) -> M:
    """Copies a module, in eval mode, around given tensors; all others are cloned.

    What runs on the copy leaves no trace in the module, and weights that are given take no memory.

    Args:
        module: It is not touched.
        given: Tensors to stand in the copy, by the ``id`` of those in whose place.
    """
    memo: dict[int, Any] = dict(given)
    for tensor in tensor_attributes(module):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
    # What a layer works out from its weights and keeps while it is in eval mode (attention biases in levit) may belong
    # to other weights; train() forgets it.
    return copy.deepcopy(module, memo).train().eval()


def weightless_copy(module: M) -> tuple[M, torch.device]:
    """Returns a copy to run, and its device, to run it under: tensors that a forward makes must lie there too.

    Checkpointing is off in the copy; it would hide modules from hooks.
    """
    clone = meta_copy(module)
    for child, flag in recomputing(clone):
        setattr(child, flag, False)
    for child in clone.modules():
        if hasattr(child, "warn_if_padding_and_no_attention_mask"):  # transformers: it reads token ids
            child.warn_if_padding_and_no_attention_mask = _nothing  # type: ignore[assignment]
    return clone, torch.device("meta")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for what a copy without values cannot do."""


def example_batch(inputs: Sequence[Tensor], batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Blows example inputs (batch first) up to ``batch`` rows, values aside."""
    return tuple(torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=device) for x in inputs)


@torch.inference_mode(False)  # inference tensors do not count how often they are written
@torch.no_grad()
def trace(module: nn.Module, inputs: Sequence[Tensor], *, batch: int = 11) -> Trace:
    """Runs a weightless copy of ``module`` once and records every call of every submodule.

    Args:
        module: The backbone; it is not touched.
        inputs: Example inputs, batch first; only their shapes and dtypes matter.
        batch: Number of samples to trace with; unlikely to be the length of anything else.

    Raises:
        ExitPointError: The backbone does not run on inputs of that shape.
    """
    clone, device = weightless_copy(module)
    result = Trace(batch=batch, inputs=inputs)
    counter = flop_counter()
    ended = 0
    shared = False  # whether something was computed once for the whole batch

    def count() -> int:
        nonlocal shared
        macs, rest = divmod(counter.get_total_flops() // 2, batch)
        shared = shared or rest > 0
        return macs

    def record(name: str, child: nn.Module) -> None:
        weighted = any(True for _ in child.parameters(recurse=False))
        before: list[int] = []
        child.register_forward_pre_hook(lambda _module, _args: before.append(count()))

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal ended
            call = StageCall(ended, count(), output, versions(output), before.pop())
            result.calls.setdefault(name, []).append(call)
            if weighted:
                result.last_parametrised = ended
            ended += 1

        child.register_forward_hook(hook)

    for name, child in clone.named_modules():
        if name:
            record(name, child)
    try:
        with device, counter:
            result.output = clone(*example_batch(inputs, batch, device))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in inputs)
        raise ExitPointError(
            f"{type(module).__name__} does not run on inputs of shape {shapes} ({type(error).__name__}: {error}); pass"
            " input_size=(C, H, W), or example_inputs= for modules that take something else"
        ) from error
    result.total_macs = count()
    if shared:
        alone = trace(module, inputs, batch=1)
        result.total_macs = alone.total_macs
        for name, calls in result.calls.items():
            for call, own in zip(calls, alone.calls[name], strict=True):
                call.macs, call.macs_before = own.macs, own.macs_before
    return result
