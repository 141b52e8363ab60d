"""What all generated tables share: Markdown, links to papers, and the stored results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from erde_hub._registry import Entry

RESULTS = Path(__file__).parents[1] / "results"

_ARXIV = re.compile(r"(?<!\d)(\d{4}\.\d{4,5})(?!\d)")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table; columns whose title ends in % or MMACs are numbers."""
    rule = ["---:" if title.endswith(("%", "MMACs")) else "---" for title in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def registry_table(names: Sequence[str], get: Callable[[str], Entry[Any]]) -> str:
    """One row per member of a registry."""
    entries = [get(name) for name in names]
    return table(("key", "what it does", "source"), [(f"`{e.name}`", e.summary, links(e.reference)) for e in entries])


def links(reference: str) -> str:
    """Makes links of the arXiv ids in a reference."""
    return _ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", reference)


def load(name: str) -> dict[str, Any]:
    """Reads recipes/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
