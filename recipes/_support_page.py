"""The tables of recipes/support_matrix.md, from recipes/results/support_matrix.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "support_matrix.json"
CHECKS = ("attach", "train", "routing", "save", "copy", "onnx")

_SIGNS = {"yes": "yes", None: "not tried", "images only": "-"}


def matrix() -> dict[str, Any]:
    """What `support_matrix.py` found."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def support_rows(library: str) -> list[tuple[str, ...]]:
    """One row per family of a library."""
    rows = []
    for family, found in matrix()["families"].items():
        if found.get("library") == library:
            tried = [_SIGNS.get(found.get(check), "no") for check in CHECKS]
            if found.get("attach") != "yes":
                tried[1:] = ["-"] * (len(CHECKS) - 1)
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
    needed = [check for check in CHECKS if check != "onnx"]
    for library in ("timm", "transformers"):
        rows = {name: row for name, row in found["families"].items() if row.get("library") == library}
        good = [name for name, row in rows.items() if all(row.get(check) == "yes" for check in needed)]
        files = [row["onnx"] for row in rows.values() if row.get("onnx") not in (None, "images only")]
        written = f"as ONNX {files.count('yes')} of the {len(files)} that were tried"
        lines.append(f"- {library}: {len(good)} of {len(rows)}; {written}.")
    failures = [
        f"- `{name}`, {check}: {row[check]}"
        for name, row in found["families"].items()
        for check in CHECKS
        if row.get(check) not in ("yes", None, "images only")
    ]
    return "\n".join([*lines, *(["", "What did not work:", "", *failures] if failures else [])])


def tables(table: Callable[..., str]) -> dict[str, Callable[[], str]]:
    """The generated parts by name; ``table`` formats header and rows."""
    header = ("family", "network", "exits", *CHECKS)
    return {
        "support_summary": support_summary,
        "support_timm": lambda: table(header, support_rows("timm")),
        "support_transformers": lambda: table(header, support_rows("transformers")),
    }
