"""Activation checkpointing of a backbone, by the flags that timm and transformers set on modules."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

_FLAGS = ("grad_checkpointing", "gradient_checkpointing")

_lock = threading.Lock()
# Backbones that run without it just now: how many calls, and the flags to set again when the last of them ends.
_suspended: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, str]]]] = weakref.WeakKeyDictionary()


def recomputing(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns the submodules whose activations are recomputed in the backward pass, each with the flag that says so."""
    return [(m, flag) for m in module.modules() for flag in _FLAGS if getattr(m, flag, False) is True]


def is_recomputing(module: nn.Module) -> bool:
    """Tells whether any activation is recomputed in the backward pass."""
    return bool(recomputing(module))


@contextlib.contextmanager
def without_recomputation(module: nn.Module) -> Iterator[None]:
    """Switches it off for a call; of several calls at a time, in several threads, the last to end switches it on."""
    with _lock:
        calls, flagged = _suspended.get(module) or (0, recomputing(module))
        _suspended[module] = (calls + 1, flagged)
        for child, flag in flagged:
            setattr(child, flag, False)
    try:
        yield
    finally:
        with _lock:
            calls, flagged = _suspended.pop(module)
            if calls > 1:
                _suspended[module] = (calls - 1, flagged)
            else:
                for child, flag in flagged:
                    setattr(child, flag, True)
