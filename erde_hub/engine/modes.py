"""Train and eval modes of a network, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # train() of a module may do more than set a flag: levit drops its caches
            if module.training != training:
                module.train(training)
        for module, training in modes:  # and it sets the modules inside, which may have been frozen
            module.training = training
