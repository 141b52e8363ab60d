"""Pre-forward hooks that remove exited samples from tensors computed earlier: masks, positions, skip inputs."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.errors import ExitNotReachedError

from .hooks import running_visitor
from .rows import map_tensors, select_rows


class Carried:
    """What hooked modules got during a pass that puts other samples in the place of its own, as a stream does.

    The frame that calls these modules goes on holding the tensors of the samples that it began with. They are known by
    the order in which the modules first get them, which is the same in every pass over one backbone.

    Attributes:
        rows: By that order, the tensors of the samples that are there now.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self._seen: list[Tensor] = []  # the frame's own; held, so that no other tensor gets the id of one of them
        self._places: dict[int, int] = {}
        self._calls: deque[list[int]] = deque(maxlen=2)

    def start_call(self) -> None:
        """Notes that a module is called, which then takes its tensors."""
        self._calls.append([])

    def take(self, tensor: Tensor) -> Tensor:
        """Returns what stands for a tensor of the frame.

        Raises:
            ExitNotReachedError: It is older than what samples take along when they wait.
        """
        place = self._places.setdefault(id(tensor), len(self._seen))
        if place == len(self._seen):
            self._seen.append(tensor)
            self.rows[place] = tensor
        self._calls[-1].append(place)
        if place not in self.rows:
            raise ExitNotReachedError(
                "a layer reads what was computed more than two layers before the exit where its samples waited for a"
                " full batch: route_batches cannot stream this backbone, call model(...) batch by batch"
            )
        return self.rows[place]

    def recent(self) -> dict[int, Tensor]:
        """What the last two calls got: all that a network whose cells read two cells before them can ask for again."""
        return {place: self.rows[place] for call in self._calls for place in call}


class BatchSyncHook:
    """Forward pre-hook on a module that gets tensors of larger batches: from the frame that calls it, not from a stage.

    Args:
        arguments: Names of arguments with one row per sample, and the number of axes from which on they have: a table
            of 64 positions is not a batch of 64 samples, and tables have fewer axes.
    """

    def __init__(self, arguments: Mapping[str, int]) -> None:
        self.arguments = dict(arguments)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Takes the rows of the active samples where some have exited, or where a stream has taken others in."""
        visitor, memory = running_visitor(self)
        carried: Carried | None = getattr(visitor, "carried", None)
        if carried is not None:
            carried.start_call()
        elif getattr(visitor, "active", None) is None:
            return None

        def take(name: str, value: Any) -> Any:
            axes = self.arguments.get(name)
            rows: Callable[[Tensor], Tensor] = active_rows if carried is None else carried.take
            return value if axes is None else map_tensors(lambda t: rows(t) if t.ndim >= axes else t, value)

        def active_rows(tensor: Tensor) -> Tensor:
            before = visitor.active_by_size.get(tensor.shape[0])
            if before is None:
                return tensor
            key = (id(tensor), visitor.count)  # every layer gets the same mask; the entry keeps it, and so its id
            if key not in memory:
                positions = torch.searchsorted(before, visitor.active)  # both rise
                memory[key] = (tensor, select_rows(tensor, positions.to(tensor.device)))
            return memory[key][1]

        names = _parameters(type(module))  # type: ignore[arg-type]
        taken = [take(name, value) for name, value in zip(names, args, strict=False)]
        return (*taken, *args[len(taken) :]), {name: take(name, value) for name, value in kwargs.items()}


@functools.cache
def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]
