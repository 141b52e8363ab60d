"""Backbones whose forward is a known sequence of stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class ExitVisitor(Protocol):
    """What happens at the exits during one forward pass."""

    def on_exit(self, exit_index: int, output: Any) -> Any | None:
        """Takes the output of the stage of an exit; returns what the next layers get, None where all samples exited."""


class Stage:
    """One stage of a backbone: a callable, and the index of the exit after it, None where there is none."""

    __slots__ = ("exit_index", "run")

    def __init__(self, run: Callable[[Any], Any], exit_index: int | None = None) -> None:
        self.run = run
        self.exit_index = exit_index


def run_stages(stages: Sequence[Stage], visitor: ExitVisitor, x: Any) -> Any | None:
    """Runs stages in order; returns the output of the last one, None where the visitor ended the pass."""
    for stage in stages:
        x = stage.run(x)
        if stage.exit_index is not None:
            x = visitor.on_exit(stage.exit_index, x)
            if x is None:
                return None
    return x
