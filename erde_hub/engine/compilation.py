"""Regional compilation: what lies between two exits is compiled, who leaves is decided outside.

A network whose depth depends on its data cannot be one graph. Its parts can: the steps between two exits become one
compiled function each, and so does every head. That takes a staged forward. Of other backbones the compiler itself can
find the parts (``model.backbone = torch.compile(model.backbone)`` breaks at every exit), but it shares its limit of
recompilations between all modules of a class there, reaches it within a few batch sizes, and goes on without compiling.

A shrinking batch has a new size at nearly every call. The batch axis is therefore marked as dynamic, and a part is
compiled for one sample, which compilers treat apart, and for any other number; a third time where the number happens to
equal another size of the first batch.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.heads import ExitHead

from .routing import Stage
from .rows import tensors
from .steps import StepCache


class CompiledSteps(StepCache):
    """Keeps compiled steps and heads of one model.

    A copy or a pickle of it is an ordinary cache: compiled code belongs to the modules it was made from.

    Args:
        options: Keyword arguments of ``torch.compile``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self._heads: list[CompiledHead] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCache, ()

    def prepare(self, steps: list[Stage]) -> list[Stage]:
        """Joins the steps between two exits into one compiled function."""
        regions: list[Stage] = []
        functions: list[Callable[[Any], Any]] = []
        for step in steps:
            functions.append(step.run)
            if step.exit_index is not None or step is steps[-1]:
                regions.append(Stage(self._region(functions, f"stages_{len(regions)}"), step.exit_index))
                functions = []
        return regions

    def heads(self, heads: Sequence[ExitHead]) -> Sequence[Any]:
        """Returns the heads, compiled."""
        if [compiled.head for compiled in self._heads] != list(heads):
            self._heads = [CompiledHead(head, self._region([head], f"head_{i}")) for i, head in enumerate(heads)]
        return self._heads

    def _region(self, functions: Sequence[Callable[[Any], Any]], name: str) -> Callable[..., Any]:
        chain = tuple(functions)

        def run(x: Any, *args: Any) -> Any:
            for function in chain:
                x = function(x, *args)
            return x

        # The compiler counts recompilations per code object and gives up on the ninth: every region gets its own.
        code = run.__code__.replace(co_name=name)
        compiled = torch.compile(types.FunctionType(code, run.__globals__, name, None, run.__closure__), **self.options)

        def call(x: Any, *args: Any) -> Any:
            mark_batch(x)
            return compiled(x, *args)

        return call


class CompiledHead:
    """Stands for a head where a pass runs it."""

    def __init__(self, head: ExitHead, run: Callable[..., Tensor]) -> None:
        self.head = head
        self.spec = head.spec
        self.run = run

    def __call__(self, *args: Any) -> Tensor:
        """Runs the head."""
        return self.run(*args)


def mark_batch(tree: Any) -> None:
    """Tells the compiler that the batch axis of what it gets has no fixed size."""
    for tensor in [tree] if isinstance(tree, Tensor) else tensors(tree):
        if tensor.ndim > 1 and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def no_stages(backbone: nn.Module) -> str:
    """What to tell somebody whose backbone has no staged forward."""
    return (
        f"{type(backbone).__name__} is driven by hooks, so there are no stages to compile one by one: compile the"
        " backbone instead, model.backbone = torch.compile(model.backbone), which breaks its graph at every exit"
    )
