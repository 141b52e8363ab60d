"""The tables of recipes/support_matrix.md, from recipes/results/support_matrix.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from pages.markdown import load, table

CHECKS = ("attach", "train", "routing", "stream", "save", "copy", "onnx")

_SIGNS = {"yes": "yes", None: "not tried", "images only": "-"}


def matrix() -> dict[str, Any]:
    """What `support_matrix.py` found."""
    return load("support_matrix")


def columns() -> list[str]:
    """The checks that at least one row holds: the file may be of a time before one of them."""
    rows = matrix()["families"].values()
    return [check for check in CHECKS if any(check in row for row in rows)]


def support_rows(library: str) -> list[tuple[str, ...]]:
    """One row per family of a library."""
    rows, checks = [], columns()
    for family, found in matrix()["families"].items():
        if found.get("library") == library:
            tried = [_SIGNS.get(found.get(check), "no") for check in checks]
            if found.get("attach") != "yes":
                tried[1:] = ["-"] * (len(checks) - 1)
            name = f"`{found['model']}`" if "model" in found else ""
            exits = ", ".join(f"`{e}`" for e in found.get("exits", []))
            rows.append((f"`{family}`", name, exits, *tried))
    return rows


def support_summary() -> str:
    """How many families passed, and what the others say."""
    found = matrix()
    versions = ", ".join(f"{name} {found[name]}" for name in ("timm", "transformers", "torch"))
    codes = Counter(row.get("code") for row in found["families"].values())
    states = ", ".join(f"{count} with `{code}`" for code, count in codes.most_common())
    tried = f"each family with one state of the code, by its digest {states}"
    lines = [f"Tried with {versions}, {tried}.", ""]
    lines += ["Families that pass attaching, training, routing, saving and copying:", ""]
    needed = [check for check in CHECKS if check not in ("stream", "onnx")]
    for library in ("timm", "transformers"):
        rows = {name: row for name, row in found["families"].items() if row.get("library") == library}
        good = [name for name, row in rows.items() if all(row.get(check) == "yes" for check in needed)]
        counts = [f"- {library}: {len(good)} of {len(rows)}"]
        for check, words in (("stream", "in a stream"), ("onnx", "as ONNX")):
            outcomes = [row[check] for row in rows.values() if row.get(check) not in (None, "images only")]
            if outcomes:
                counts.append(f"{words} {outcomes.count('yes')} of the {len(outcomes)} that were tried")
        lines.append(f"{'; '.join(counts)}.")
    failures = [
        f"- `{name}`, {check}: {row[check]}"
        for name, row in found["families"].items()
        for check in CHECKS
        if row.get(check) not in ("yes", None, "images only")
    ]
    return "\n".join([*lines, *(["", "What did not work:", "", *failures] if failures else [])])


def rows_of(library: str) -> str:
    """The families of a library as a table."""
    return table(("family", "network", "exits", *columns()), support_rows(library))


TABLES: dict[str, Callable[[], str]] = {
    "support_summary": support_summary,
    "support_timm": lambda: rows_of("timm"),
    "support_transformers": lambda: rows_of("transformers"),
}
