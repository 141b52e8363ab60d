"""The table of exported files in docs/deploy.md, from recipes/results/export_matrix.json."""

from __future__ import annotations

from typing import Any

from pages.markdown import load, table

#: Per cent of the answers of an int8 file that are those of the float model.
LEAST_AGREEMENT = 90
FORMS = ("float", "float, batch 1", "int8", "int8, batch 1")
RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO"}


def export_table() -> str:
    """One row per family, one column per runtime and form."""
    families = load("export_matrix")["families"]
    header = ["family", *(f"{RUNTIMES[name]}: {form}" for name in RUNTIMES for form in FORMS), "kB float / int8"]
    timed = any("onnxruntime milliseconds" in row.get("float", {}) for row in families.values())
    if timed:
        header += [f"{title}, ms" for title in RUNTIMES.values()]
    rows = []
    for family, row in families.items():
        cells = [_cell(row.get(form, {}), runtime) for runtime in RUNTIMES for form in FORMS]
        sizes = [row.get(form, {}).get("bytes") for form in ("float", "int8")]
        cells.append(" / ".join("-" if size is None else f"{size / 1000:.0f}" for size in sizes))
        if timed:
            cells += [_times(row.get("float, batch 1", {}), runtime) for runtime in RUNTIMES]
        rows.append((f"`{family}`", *cells))
    return table(header, rows)


def reasons() -> str:
    """What is not verified, in a line for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for family, row in load("export_matrix")["families"].items():
        for form in FORMS:
            own = row.get(form, {})
            told = [own["refused"]] if "refused" in own else []
            told += [
                f"{title}: {_told(own[name])}" for name, title in RUNTIMES.items() if not _good(own.get(name, "yes"))
            ]
            for reason in told:
                found.setdefault((family, reason), []).append(form)
    lines = [f"- `{family}` ({'; '.join(forms)}): {reason}" for (family, reason), forms in found.items()]
    return "\n".join(lines) or "All of them answer as torch does."


def versions() -> str:
    """What the files were run with."""
    known = load("export_matrix")["versions"]
    return ", ".join(f"{RUNTIMES.get(name, name)} {str(known[name]).split('-')[0]}" for name in sorted(known))


def _good(answer: str) -> bool:
    share = answer.removesuffix("%")
    return answer == "yes" or (share.isdecimal() and int(share) >= LEAST_AGREEMENT)


def _told(answer: str) -> str:
    return f"{answer} of the answers are the same" if answer.removesuffix("%").isdecimal() else answer


def _cell(row: dict[str, Any], runtime: str) -> str:
    if "refused" in row:
        return "refused"
    answer = row.get(runtime)
    if answer is None:
        return "not tried"
    return answer if _good(answer) else "no"


def _times(row: dict[str, Any], runtime: str) -> str:
    times = row.get(f"{runtime} milliseconds")
    return "-" if times is None else " / ".join(f"{times[name]:.2f}" for name in ("exit 0", "typical", "all the way"))


TABLES = {"export": export_table, "export_reasons": reasons, "export_versions": versions}
