"""What every exit of a model costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from erde_hub._tables import PrintsAsTable, Rows
from erde_hub.backbones.tracing import flop_counter, weightless_copy
from erde_hub.engine.routing import AllExits
from erde_hub.engine.runner import ExitRunner
from erde_hub.engine.stages import run_stages
from erde_hub.errors import ExitPointError
from erde_hub.heads import ExitHead


@dataclass(frozen=True)
class ExitRow:
    """One exit of a model's :meth:`~erde_hub.EarlyExitWrapper.exit_table`; MACs are those of one sample by itself.

    What a batch computes once for all its samples, such as DeBERTa's projections of relative positions, is in them.

    Attributes:
        exit: Name of the stage, ``"classifier"`` for the backbone's own.
        width: Channels that the head reads, None for the classifier.
        head: Key of the head, None for the classifier.
        macs: What this exit adds: the layers since the previous exit and its own head.
        cumulative_macs: All that a sample costs that exits here, heads of earlier exits included.
        params: Parameters of those layers and that head.
        cumulative_params: Parameters that are used for a sample that exits here.
    """

    exit: str
    width: int | None
    head: str | None
    macs: int
    cumulative_macs: int
    params: int
    cumulative_params: int


class ExitTable(PrintsAsTable, list[ExitRow]):
    """One row per exit, shallow to deep; prints as a table."""

    @property
    def cumulative_macs(self) -> list[int]:
        """MACs per sample up to each exit."""
        return [row.cumulative_macs for row in self]

    def with_costs(self, macs: Iterable[int]) -> ExitTable:
        """Returns the table with MACs added to each exit, those of a calibrator for instance."""
        macs = list(macs)
        return ExitTable(
            replace(row, macs=row.macs + own, cumulative_macs=row.cumulative_macs + before)
            for row, own, before in zip(self, macs, itertools.accumulate(macs), strict=True)
        )

    def _table(self) -> tuple[Sequence[str], Rows]:
        total = max(self[-1].cumulative_macs, 1)
        rows = [
            (
                row.exit,
                str(row.width or "-"),
                row.head or "-",
                f"{row.macs / 1e6:.1f}",
                f"{row.cumulative_macs / 1e6:.1f}",
                f"{row.cumulative_macs / total:.1%}",
                f"{row.params / 1e6:.3f}",
                f"{row.cumulative_params / 1e6:.3f}",
            )
            for row in self
        ]
        header = ("exit", "width", "head", "own MMACs", "MMACs", "share", "own params M", "params M")
        return header, rows


class _Counter(AllExits):
    """Runs every exit of a weightless copy and notes what had been computed and touched at each.

    Args:
        heads: The heads, shallow to deep.
        ends: The last of them answers, and no layer comes after it.
        total: Returns the MACs so far.
        touched: Parameters so far.
    """

    def __init__(self, heads: Sequence[ExitHead], ends: bool, total: Any, touched: set[int]) -> None:
        super().__init__(heads)
        self.ends = ends
        self.total = total
        self.touched = touched
        self.macs: list[int] = []
        self.params: list[set[int]] = []

    def on_exit(self, exit_index: int, output: Any) -> Any:
        output = super().on_exit(exit_index, output)
        self.macs.append(self.total())
        self.params.append(set(self.touched))
        return None if self.ends and exit_index == len(self.heads) - 1 else output


@torch.no_grad()
def count_exits(
    runner: ExitRunner, exits: Sequence[tuple[str, ExitHead | None]], size: tuple[int, ...], head_name: str
) -> ExitTable:
    """Counts MACs and parameters of every exit on a weightless copy.

    Args:
        runner: Runs the backbone.
        exits: Name and head of every exit, shallow to deep; the backbone's own classifier has no head.
        size: Shape of one input.
        head_name: Key of the heads.

    Raises:
        ExitPointError: The backbone does not run on inputs of that size.
    """
    parts: Any = nn.Module()
    parts.backbone, parts.runner = runner.backbone, runner
    parts.heads = nn.ModuleList(head for _, head in exits if head is not None)
    clone, device = weightless_copy(parts)
    clone.backbone = clone.runner.backbone = getattr(clone.backbone, "_orig_mod", clone.backbone)  # of torch.compile
    counter = flop_counter()
    sizes = {id(p): p.numel() for p in clone.parameters()}
    touched = {id(p) for p in clone.backbone.parameters(recurse=False)}

    def touch(module: nn.Module, _args: Any) -> None:
        touched.update(id(p) for p in module.parameters(recurse=False))

    def finish(module: nn.Module, _args: Any, _output: Any) -> None:
        # Attention uses the weights of its last projection without calling it.
        touched.update(id(p) for p in module.parameters())

    stages = clone.runner.stages()  # before the hooks below, which a runner would not pass over
    for module in clone.modules():
        module.register_forward_pre_hook(touch)
        if module not in (clone, clone.backbone):
            module.register_forward_hook(finish, prepend=True)
    heads = [*clone.heads]
    ends = len(heads) == len(exits)
    visitor = _Counter(heads, ends, lambda: counter.get_total_flops() // 2, touched)
    dtype = runner.adapter.example_dtype(clone.backbone)
    inputs = torch.empty((1, *size), dtype=dtype, device=device)
    try:
        with device, counter:
            if stages is None:
                clone.runner.run(visitor, (inputs,), {})
            else:
                run_stages(stages, visitor, inputs)
    except Exception as error:
        raise ExitPointError(
            f"{type(runner.backbone).__name__} does not run on inputs of shape {size} ({type(error).__name__}: {error})"
        ) from error
    macs = visitor.macs if ends else [*visitor.macs, visitor.total()]
    touched.update(id(p) for p in clone.backbone.parameters())  # the last exit has all that the model has
    before = visitor.params[:-1] if ends else visitor.params
    params = [sum(sizes[i] for i in ids) for ids in (*before, touched)]
    table = ExitTable()
    for i, (name, head) in enumerate(exits):
        table.append(
            ExitRow(
                exit=name,
                width=None if head is None else head.spec.width,
                head=None if head is None else head_name,
                macs=macs[i] - (macs[i - 1] if i else 0),
                cumulative_macs=macs[i],
                params=params[i] - (params[i - 1] if i else 0),
                cumulative_params=params[i],
            )
        )
    return table
