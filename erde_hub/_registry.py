"""One kind of table for heads, losses, policies and everything else that has a name.

A folder's ``__init__`` lists its members explicitly, so that a built-in name works without importing anything first,
and users add their own with the folder's ``register_*``. The folder's ``create_*``, ``get_*`` and ``list_*`` are the
methods of its table.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import ConfigError, unknown_argument, unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One member of a table: what it is called, what builds it, what it does and where it comes from."""

    name: str
    cls: type[T]
    summary: str
    reference: str = ""


class Registry(Generic[T]):
    """Names to classes, with misses that help and duplicates that raise."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, cls: type[T], summary: str, reference: str = "") -> None:
        """Adds a member; a name that is taken raises :class:`ConfigError`."""
        if name in self._entries:
            raise ConfigError(
                f"{self.kind} {name!r} is already registered ({self._entries[name].cls.__qualname__}): take another"
            )
        self._entries[name] = Entry(name, cls, summary, reference)

    def get(self, name: str) -> Entry[T]:
        """Returns class, summary and reference of that name; a miss lists what exists and the nearest spelling."""
        if not isinstance(name, str) or name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """Returns the names in the order in which they were registered."""
        return list(self._entries)

    def entries(self) -> list[Entry[T]]:
        """Returns the entries in the order in which they were registered."""
        return list(self._entries.values())

    def create(self, name: str, *args: Any, **kwargs: Any) -> T:
        """Builds a member by name; an unknown name or keyword raises :class:`ConfigError` with the nearest one."""
        cls = self.get(name).cls
        parameters = inspect.signature(cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            allowed = list(parameters)[len(args) :]
            unknown = [key for key in kwargs if key not in allowed]
            if unknown:
                raise unknown_argument(f"{self.kind} {name!r}", unknown[0], allowed)
        return cls(*args, **kwargs)
