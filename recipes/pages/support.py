"""The tables of docs/support_matrix.md, from recipes/results/support_matrix.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from pages.markdown import load, table

CHECKS = ("attach", "train", "routing", "stream", "save", "copy", "onnx")

_SIGNS = {"yes": "yes", None: "not tried", "images only": "-", "one sample only": "batch 1"}


def matrix() -> dict[str, Any]:
    """What `support_matrix.py` found."""
    return load("support_matrix")


def columns() -> list[str]:
    """The checks that were tried in at least one row: the file may be of a time before one of them."""
    rows = matrix()["families"].values()
    return [check for check in CHECKS if any(row.get(check) not in (None, "images only") for row in rows)]


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


def rows_with(library: str) -> list[dict[str, Any]]:
    """What was found for the families of a library."""
    return [row for row in matrix()["families"].values() if row.get("library") == library]


def passed(library: str) -> int:
    """Counts the families that pass everything but streams and ONNX, which some cannot have."""
    needed = [check for check in CHECKS if check not in ("stream", "onnx")]
    return sum(all(row.get(check) == "yes" for check in needed) for row in rows_with(library))


def supported() -> str:
    """The same in one sentence each, for the README."""
    timm, transformers = (f"{passed(name)} of {len(rows_with(name))}" for name in ("timm", "transformers"))
    return (
        "One network of each family was tried: wrapped, trained for a step, run with early exits, saved and loaded."
        f" {timm} families of timm and {transformers} of transformers passed"
        " ([support matrix](docs/support_matrix.md))."
        " Wrapping checks each network anew, and says why if it refuses one. For a module of your own,"
        " `EarlyExitWrapper` needs `input_size=` or `example_inputs=`, and `from_pretrained` needs `backbone=`."
    )


def support_summary() -> str:
    """How many families passed, and what the others say."""
    found = matrix()
    versions = ", ".join(f"{name} {found[name]}" for name in ("timm", "transformers", "torch"))
    codes = Counter(row.get("code") for row in found["families"].values())
    states = ", ".join(f"{count} with `{code}`" for code, count in codes.most_common())
    tried = f"each family with one state of the code, by its digest {states}"
    lines = [f"Tried with {versions}, {tried}.", ""]
    lines += ["Families that pass attaching, training, routing, saving and copying:", ""]
    for library in ("timm", "transformers"):
        rows = rows_with(library)
        counts = [f"- {library}: {passed(library)} of {len(rows)}"]
        for check, words in (("stream", "in a stream"), ("onnx", "as ONNX")):
            outcomes = [row[check] for row in rows if row.get(check) not in (None, "images only")]
            if outcomes:
                counts.append(f"{words} {outcomes.count('yes')} of the {len(outcomes)} that were tried")
            if "one sample only" in outcomes:
                counts[-1] += f", and {outcomes.count('one sample only')} for one sample only"
        lines.append(f"{'; '.join(counts)}.")
    failures = [
        f"- `{name}`, {check}: {row[check]}"
        for name, row in found["families"].items()
        for check in CHECKS
        if row.get(check) not in ("yes", None, "images only", "one sample only")
    ]
    return "\n".join([*lines, *(["", "What did not work:", "", *failures] if failures else [])])


def rows_of(library: str) -> str:
    """The families of a library as a table."""
    return table(("family", "network", "exits", *columns()), support_rows(library))


TABLES: dict[str, Callable[[], str]] = {
    "supported": supported,
    "support_summary": support_summary,
    "support_timm": lambda: rows_of("timm"),
    "support_transformers": lambda: rows_of("transformers"),
}
