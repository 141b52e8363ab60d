"""Small tables for the terminal and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def format_table(header: Sequence[str], rows: Rows) -> str:
    """Aligns a small table for the terminal: first column left, the others right."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def html_table(header: Sequence[str], rows: Rows, title: str = "") -> str:
    """Returns a small table for notebooks, every cell escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<table>{caption}<thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


class PrintsAsTable:
    """Prints as a table, in the terminal and in notebooks; subclasses say which."""

    def _table(self) -> tuple[Sequence[str], Rows]:
        """Returns header and rows."""
        raise NotImplementedError

    def __str__(self) -> str:
        return format_table(*self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._table())
