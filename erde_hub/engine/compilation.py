"""Regional compilation: what lies between two exits is compiled, which samples exit is decided outside.

A network whose depth depends on its data cannot be one graph. Its parts can: the stages between two exits become one
compiled function each, and so does every head. That takes a backbone whose stages are known. Of other backbones the
compiler itself can find the parts (``model.backbone = torch.compile(model.backbone)`` breaks at every exit), but it
shares its limit of recompilations between all modules of a class there, reaches it within a few batch sizes, and goes
on without compiling.

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

from .rows import tensors
from .stages import Stage


class StageCompiler:
    """Compiles the stages and the heads of one model.

    Args:
        options: Keyword arguments of ``torch.compile``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._heads: list[CompiledHead] = []

    def stages(self, stages: Sequence[Stage]) -> list[Stage]:
        """Joins the stages between two exits into one compiled function."""
        regions: list[Stage] = []
        functions: list[Callable[[Any], Any]] = []
        for stage in stages:
            functions.append(stage.run)
            if stage.exit_index is not None or stage is stages[-1]:
                regions.append(Stage(self._region(functions, f"stages_{len(regions)}"), stage.exit_index))
                functions = []
        return regions

    def heads(self, heads: Sequence[nn.Module]) -> list[Any]:
        """Returns the heads, compiled."""
        if [compiled.head for compiled in self._heads] != heads:
            self._heads = [CompiledHead(head, self._region([head], f"head_{i}")) for i, head in enumerate(heads)]
        return self._heads

    def _region(self, functions: Sequence[Callable[..., Any]], name: str) -> Callable[..., Any]:
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

    def __init__(self, head: Any, run: Callable[..., Tensor]) -> None:
        self.head = head
        self.spec = head.spec
        self.num_labels = head.num_labels
        self.run = run

    def __call__(self, *args: Any) -> Tensor:
        """Runs the head."""
        return self.run(*args)


def mark_batch(tree: Any) -> None:
    """Tells the compiler that the batch axis of what it gets has no fixed size."""
    for tensor in [tree] if isinstance(tree, Tensor) else tensors(tree):
        if tensor.ndim > 1 and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
