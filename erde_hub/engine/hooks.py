"""Hooks that show the outputs of exits' modules to a visitor, for backbones that run their own forward.

All state of a forward pass lives in that pass. Hooks find it through a context variable, so threads, models wrapped
twice and wrapped models inside wrapped models do not see each other's, and outside a runner's call a hook does nothing.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from erde_hub.errors import ExitPointError, nearest

from .stages import ExitVisitor


class _AllExited(BaseException):
    """Ends a pass inside a backbone's own forward; not an Exception, so that no backbone swallows it."""

    def __init__(self, running: _RunningPass) -> None:
        super().__init__()
        self.running = running


class _RunningPass:
    """A forward pass with hooks: which hooks belong to it, and how often each exit's module was called."""

    __slots__ = ("calls", "exit_hooks", "memory", "sync_hooks", "visitor")

    def __init__(self, exit_hooks: Sequence[ExitHook], visitor: ExitVisitor, sync_hooks: Sequence[object]) -> None:
        self.exit_hooks = exit_hooks
        self.visitor = visitor
        self.sync_hooks = sync_hooks
        self.memory: dict[Any, Any] = {}
        self.calls = [0] * len(exit_hooks)


_running: contextvars.ContextVar[tuple[_RunningPass, ...]] = contextvars.ContextVar("erde_hub_running", default=())


def running_visitor(sync_hook: object) -> tuple[Any, dict[Any, Any]]:
    """Returns the visitor of the pass that owns this hook, None outside a pass, and what the pass's hooks remember.

    Such hooks keep what a backbone carries next to its features in step with the batch.
    """
    for running in reversed(_running.get()):
        if any(own is sync_hook for own in running.sync_hooks):
            return running.visitor, running.memory
    return None, {}


class ExitHook:
    """Forward hook on the module of an exit; a plain object that copies and pickles with that module.

    Args:
        exit_index: Index of the exit.
        call: Which call of the module is the exit's, counted from 0, where a module is called several times.
    """

    def __init__(self, exit_index: int, call: int = 0) -> None:
        self.exit_index = exit_index
        self.call = call

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any | None:
        """Shows the output to the visitor of the pass that owns this hook, if one is running in this context."""
        for running in reversed(_running.get()):
            for position, hook in enumerate(running.exit_hooks):
                if hook is self:
                    call = running.calls[position]
                    running.calls[position] += 1
                    if call != self.call:
                        return None
                    smaller = running.visitor.on_exit(self.exit_index, output)
                    if smaller is None:
                        raise _AllExited(running)
                    return smaller
        return None


class HookRunner:
    """Runs a backbone's own forward, in which hooks call the visitor.

    Args:
        backbone: The backbone.
        exit_hooks: On the modules of its exits.
        sync_hooks: Those that keep other tensors in step with the batch.
    """

    def __init__(self, backbone: nn.Module, exit_hooks: Sequence[ExitHook], sync_hooks: Sequence[object] = ()) -> None:
        self.backbone = backbone
        self.exit_hooks = exit_hooks
        self.sync_hooks = sync_hooks

    def run(self, visitor: ExitVisitor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Returns the backbone's output, None where the visitor ended the pass."""
        running = _RunningPass(self.exit_hooks, visitor, self.sync_hooks)
        exported = _modules_under_export()
        depth = len(exported)
        token = _running.set((*_running.get(), running))
        try:
            return self.backbone(*args, **kwargs)
        except _AllExited as end:
            if end.running is not running:  # of a pass around this one
                raise
            while len(exported) > depth:  # torch.export leaves modules on its stack that ended by an exception
                exported.popitem()
            return None
        finally:
            _running.reset(token)


def _modules_under_export() -> dict[str, Any]:
    """Returns the stack of modules that torch.export keeps while it traces, empty outside an export."""
    if not torch.compiler.is_exporting():
        return {}
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # noqa: PLC0415 - slow to import, rarely needed

    stack = getattr(getattr(get_proxy_mode(), "tracer", None), "module_stack", None)
    return {} if stack is None else stack


def parse_exit(name: str) -> tuple[str, int | None]:
    """Splits ``module@call`` into the module name and the call, counted from 0 (None where not given)."""
    module, mark, call = name.partition("@")
    if not mark:
        return module, None
    if not call.isdigit():
        raise ExitPointError(f"exit {name!r}: the part after '@' must be the number of a call, counted from 0")
    return module, int(call)


def add_exit_hooks(module: nn.Module, exits: Sequence[str]) -> list[ExitHook]:
    """Puts a hook on the module of every exit and returns the hooks, in the order of ``exits``.

    Raises:
        ExitPointError: There is no such module.
    """
    hooks = [ExitHook(i, parse_exit(name)[1] or 0) for i, name in enumerate(exits)]
    for hook, name in zip(hooks, exits, strict=True):
        hooked_module(module, parse_exit(name)[0]).register_forward_hook(hook)
    return hooks


def hooked_module(module: nn.Module, name: str) -> nn.Module:
    """Returns the module whose output is that of ``name`` and which activation checkpointing still calls.

    timm's checkpointing calls the children of a Sequential and never the Sequential, so its last child gets the hook.

    Raises:
        ExitPointError: There is no such module.
    """
    try:
        target = module.get_submodule(name)
    except AttributeError as error:
        hint = nearest(name, dict(module.named_modules()))
        raise ExitPointError(f"{type(module).__name__} has no stage {name!r}{hint}") from error
    while type(target) is nn.Sequential and len(target):
        child = target[len(target) - 1]
        if sum(c is child for m in module.modules() for c in m._modules.values()) > 1:
            break  # used elsewhere too
        target = child
    return target
