"""Padded sequences in a shrinking batch: masks, positions and what is read behind the last layer follow the samples.

A tap hands a smaller hidden state to the next layer. The loop around the layers still holds the attention mask, the
positions and their embeddings of the whole batch, and gives them to every layer; a follower in front of each module
that this loop calls takes the rows of the samples that are left. Code behind the last layer reads them without calling
a module (a mean over unmasked tokens, the last token that is no padding). So when the body of the network is done with
a smaller batch, the rest of the model's own forward is run on inputs of that batch, with the body's output in place of
the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from erde_hub.engine.batch_sync import BatchSyncHook
from erde_hub.engine.hooks import HookRunner, running_visitor
from erde_hub.engine.inputs import TEXT_INPUTS
from erde_hub.engine.rows import map_tensors, select_rows
from erde_hub.engine.stages import ExitVisitor

#: Arguments of layers that have one row per sample, with the number of axes from which on they do: a table of 64
#: positions is not a batch of 64 samples, and tables have fewer axes.
_PER_SAMPLE = {
    "hidden_states": 3,
    "residual_states": 3,
    "attention_mask": 2,
    "input_mask": 2,
    "mask": 2,
    "position_ids": 2,
    "position_embeddings": 3,
    "position_bias": 4,
    "query_states": 3,
}


class _BodyDone(BaseException):
    """Ends a pass after the body of the network, whose batch has shrunk."""

    def __init__(self, visitor: ExitVisitor, output: Any) -> None:
        super().__init__()
        self.visitor = visitor
        self.output = output


class BodyEnd:
    """Forward hook on the body: where the batch has shrunk, what follows must not see the whole one."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hands the body's output to the runner."""
        visitor, _ = running_visitor(self)
        if getattr(visitor, "active", None) is not None:
            raise _BodyDone(visitor, output)


class SequenceRunner(HookRunner):
    """Runs a transformers text model; see the module."""

    def run(self, visitor: ExitVisitor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Runs the model to the end of its body and, where samples have exited, the rest for the active ones."""
        try:
            return super().run(visitor, args, kwargs)
        except _BodyDone as done:
            if done.visitor is not visitor:  # of a pass around this one
                raise
            active, batch = visitor.active, visitor.batch  # type: ignore[attr-defined]
            kept = {
                name: map_tensors(lambda t: _rows(t, active, batch, 2), value) if name in TEXT_INPUTS else value
                for name, value in kwargs.items()
            }
            args = tuple(_rows(x, active, batch, 2) if isinstance(x, Tensor) else x for x in args)
            return _with_body(self.backbone, done.output).forward(*args, **kept)


def add_sync_hooks(backbone: nn.Module, body: str, exits: Sequence[str]) -> list[Any]:
    """Puts sync_hooks in front of the modules that the loops around the exits call, and one behind the body.

    Args:
        backbone: A text model.
        body: Name of the submodule that holds the layers.
        exits: Module names of the exits.
    """
    sync_hooks: list[Any] = [BodyEnd()]
    backbone.get_submodule(body).register_forward_hook(sync_hooks[0])
    seen: set[int] = set()
    for path in _loops(body, exits):
        for child in _called_children(backbone.get_submodule(path)):
            if id(child) not in seen:
                seen.add(id(child))
                sync_hooks.append(BatchSyncHook(_PER_SAMPLE))
                child.register_forward_pre_hook(sync_hooks[-1], with_kwargs=True)
    return sync_hooks


def _loops(body: str, exits: Sequence[str]) -> list[str]:
    """Names of the modules around the exits, the body and everything inside it."""
    found: dict[str, None] = {}
    for name in exits:
        parent = name.rpartition(".")[0]
        while parent and (parent == body or parent.startswith(body + ".")):
            found[parent] = None
            parent = parent.rpartition(".")[0]
    return list(found)


def _called_children(module: nn.Module) -> list[nn.Module]:
    """Children, with those of lists and dicts, which are never called themselves, in their place."""
    called: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            called += _called_children(child)
        else:
            called.append(child)
    return called


def _rows(tensor: Tensor, active: Tensor, batch: int, axes: int) -> Tensor:
    return tensor if tensor.ndim < axes or tensor.shape[0] != batch else select_rows(tensor, active.to(tensor.device))


class _Given(nn.Module):
    """Stands where the body stood and answers with what it has given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def _with_body(backbone: nn.Module, output: Any) -> Any:
    """A second view of the backbone, for one call, whose body answers with ``output``; the backbone is not touched."""
    view: Any = object.__new__(type(backbone))
    view.__dict__.update(backbone.__dict__)
    body: str = backbone.base_model_prefix  # type: ignore[assignment]
    view.__dict__["_modules"] = {**backbone._modules, body: _Given(output)}
    return view
