"""The steps of a staged forward, found once and kept as long as they are what a new look would find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .routing import Stage

if TYPE_CHECKING:
    from erde_hub.backbones import BackboneAdapter


class _Kept:
    """Steps, and the modules that they were found in."""

    __slots__ = ("backbone", "exits", "holders", "steps")

    def __init__(self, backbone: nn.Module, exits: list[str], steps: list[Stage] | None) -> None:
        self.backbone = backbone
        self.exits = exits
        self.steps = steps
        # Every module whose children become steps: the backbone, and what is taken apart on the way to an exit.
        paths = {""} | {
            name[:i] for exit_name in exits for name in [exit_name.partition("@")[0]] for i in _dots(name)
        }  # fmt: skip
        held = [part for path in sorted(paths) for part in _with_lists(backbone.get_submodule(path))]
        self.holders = [(module._modules, list(module._modules.values())) for module in held]

    def fits(self, backbone: nn.Module, exits: Sequence[str]) -> bool:
        """Tells whether nothing was replaced, added or taken away since: a handful of comparisons by identity."""
        if self.backbone is not backbone or self.exits != exits:
            return False
        return all([*modules.values()] == kept for modules, kept in self.holders)


def _with_lists(module: nn.Module) -> Iterator[nn.Module]:
    """A module and the lists and dicts of modules in it, whose members its own forward calls one by one."""
    yield module
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _with_lists(child)


def _dots(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."]


class StepCache:
    """Keeps the steps of a model's routed pass.

    Steps are bound to one backbone, so a copy or a pickle of the cache is an empty one: a copied model finds its own.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def get(self, adapter: BackboneAdapter, backbone: nn.Module, exits: list[str]) -> list[Stage] | None:
        """Returns the staged forward without recomputation, or None where the backbone has none."""
        kept = self._kept
        if kept is None or not kept.fits(backbone, exits):
            steps = adapter.stages(backbone, exits, checkpointed=False)
            kept = _Kept(backbone, list(exits), self.prepare(steps) if steps is not None else None)
            self._kept = kept
        return kept.steps

    def prepare(self, steps: list[Stage]) -> list[Stage]:
        """Returns what is run in place of the steps; here themselves."""
        return steps

    def heads(self, heads: Any) -> Any:
        """Returns what is run in place of the heads; here themselves, in a list, which is read faster."""
        return [*heads._modules.values()]
