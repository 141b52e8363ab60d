"""The generated parts of recipes/methods.md: every loss with formula, arguments, source and state; measured figures."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence

from erde_hub.losses import SampleWeight, get_addition, get_loss, list_additions, list_losses

Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]
Links = Callable[[str], str]

_FORMULA = re.compile(r"^    (L = .*?)(?=\n\s*\n)", re.DOTALL | re.MULTILINE)

#: Arguments that every loss takes, explained above the table.
COMMON = ("exit_weights", "teacher_exits", "label_smoothing", "reduction")


def losses_table(table: Table, links: Links) -> str:
    """One row per loss of the registry."""
    rows = []
    for name in list_losses():
        entry = get_loss(name)
        state = entry.cls.state or "-"
        rows.append((f"`{name}`", formula(entry.cls), arguments(entry.cls), links(entry.reference), state))
    return table(("key", "formula", "arguments, with defaults", "source", "state"), rows)


def additions_table(table: Table, links: Links) -> str:
    """One row per weight of samples and further term."""
    rows = []
    for name in list_additions():
        entry = get_addition(name)
        weight = issubclass(entry.cls, SampleWeight)
        flag = "`--extra_terms`" if not weight else "`--readout`" if entry.cls.needs_index else "`--sample_weight`"
        rows.append(
            (f"`{name}`", flag, entry.summary, arguments(entry.cls), links(entry.reference), entry.cls.state or "-")
        )
    return table(("key", "flag", "what it does", "arguments, with defaults", "source", "state"), rows)


def formula(cls: type) -> str:
    """Returns the formula in a loss's docstring: the indented block that begins with "L =", on one line."""
    match = _FORMULA.search(inspect.cleandoc(cls.__doc__ or ""))
    if match is None:
        raise SystemExit(f"the docstring of {cls.__name__} has no indented block 'L = ...'")
    text = " ".join(match[1].split())
    return f"`{text}`".replace("|", "\\|")


def arguments(cls: type) -> str:
    """Returns the arguments of its own that a constructor takes, with their defaults."""
    own = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name not in COMMON}
    return ", ".join(f"`{name}={value!r}`" for name, value in own.items()) or "-"
