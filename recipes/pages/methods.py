"""Generated parts of docs/losses.md and docs/experiments/losses.md: each loss with formula and state, figures."""

from __future__ import annotations

import inspect
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from pages.markdown import links, load, registry_table, table
from scipy.stats import t

from erde_hub._registry import Entry
from erde_hub.losses import SampleWeight, get_addition, get_loss, list_additions, list_losses

_FORMULA = re.compile(r"^    (L = .*?)(?=\n\s*\n)", re.DOTALL | re.MULTILINE)

#: Arguments that are explained above the table.
COMMON = ("exit_weights", "teacher_exits", "label_smoothing")


def losses_text() -> str:
    """Every loss of the registry: what it does, its formula, arguments and state."""
    parts = []
    for name in list_losses():
        entry = get_loss(name)
        parts.append(f"{described(entry)}\n\n```text\n{formula(entry.cls)}\n```\n{details(entry.cls)}")
    return "\n\n".join(parts)


def additions_text() -> str:
    """Every weight of samples and further term, with its flag."""
    parts = []
    for name in list_additions():
        entry = get_addition(name)
        weight = issubclass(entry.cls, SampleWeight)
        flag = "--extra_terms" if not weight else "--readout" if entry.cls.needs_index else "--sample_weight"
        parts.append(f"{described(entry)} Flag: `{flag}`.\n{details(entry.cls)}")
    return "\n\n".join(parts)


def described(entry: Entry[Any]) -> str:
    """Key, summary and source of a method, in one line."""
    return f"**`{entry.name}`**: {entry.summary} ({links(entry.reference)})."


def details(cls: type) -> str:
    """The arguments and the state of a method, where it has any."""
    lines = [("Arguments", arguments(cls)), ("State", cls.state)]  # type: ignore[attr-defined]
    return "".join(f"\n- {title}: {text}" for title, text in lines if text)


def comparison_table(name: str = "comparison") -> str:
    """One row per method that was compared on images without groups, and one for the teachers."""
    results = load(f"benchmark_{name}")
    teachers = [teacher["per_exit"][-1] for teacher in results["teachers"]]
    accuracy, nll = (statistics.fmean(teacher[key] for teacher in teachers) for key in ("accuracy", "nll"))
    rows = [("(teacher)", str(len(teachers)), "-", "-", f"{100 * accuracy:.1f}", f"{nll:.3f}")]
    for row in results["summary"]:
        shown = [_percent(row, key) for key in ("first_exit", "half_cost", "last_exit")]
        rows.append((f"`{row['method']}`", _seeds(row), *shown, f"{row['nll_last_exit']:.3f}"))
    header = ("method", "seeds", "first exit %", "at half the cost %", "last exit %", "NLL of the last exit")
    return table(header, rows)


def groups_table() -> str:
    """One row per method that was compared on coloured digits, and one for the teachers."""
    results = load("benchmark_groups")
    rows = []
    teachers = [teacher["groups"][-1] for teacher in results["teachers"]]
    worst, mean = (statistics.fmean(teacher[key] for teacher in teachers) for key in ("worst_group", "mean_of_groups"))
    rows.append(("(teacher)", str(len(teachers)), "-", f"{100 * worst:.1f}", f"{100 * mean:.1f}"))
    for row in results["summary"]:
        keys = ("worst_group_first_exit", "worst_group_last_exit", "mean_of_groups_last_exit")
        rows.append((f"`{row['method']}`", _seeds(row), *(_percent(row, key) for key in keys)))
    header = ("method", "seeds", "worst group, first exit %", "worst group, last exit %", "mean of groups, last exit %")
    return table(header, rows)


def readout_table() -> str:
    """One row per confidence of DEDIER's read-out; differences are taken seed by seed, under one teacher."""
    results = load("studies/readout_confidence")
    teachers = [teacher["groups"][-1] for teacher in results["teachers"]]
    worst, mean = (statistics.fmean(teacher[key] for teacher in teachers) for key in ("worst_group", "mean_of_groups"))
    rows = [("(teacher)", "-", str(len(teachers)), f"{100 * worst:.1f}", f"{100 * mean:.1f}", "-")]
    by_seed = {(run["method"], run["seed"]): run["groups"][-1]["worst_group"] for run in results["runs"]}
    for row in sorted(results["summary"], key=lambda row: "readout_alpha" in row["method"]):
        method, _, settings = row["method"].partition(":")
        values = dict(part.split("=") for part in settings.split(",") if part)
        confidence = values.get("readout_confidence")
        softmax = row["method"].removesuffix(f",readout_confidence={confidence}")
        gaps = [100 * (by_seed[row["method"], seed] - by_seed[softmax, seed]) for seed in row["seeds"]]
        half = t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
        against = f"{statistics.fmean(gaps):+.0f} ± {half:.0f}" if confidence else "-"
        name = f"`{confidence or 'softmax'}`" if "dedier" in method else f"(`{method}` alone)"
        alpha = values.get("readout_alpha", "0.05") if "dedier" in method else "-"
        cells = (_percent(row, key) for key in ("worst_group_last_exit", "mean_of_groups_last_exit"))
        rows.append((name, alpha, _seeds(row), *cells, against))
    header = ("confidence", "alpha", "seeds", "worst group %", "mean of groups %", "worst group minus `softmax`")
    return table(header, rows)


def egad_table() -> str:
    """One row per variant of EGAD, and one for the teachers; differences are taken seed by seed, under one teacher."""
    results = load("benchmark_egad")
    teachers = results["teachers"]
    nll, accuracy = (statistics.fmean(teacher[key] for teacher in teachers) for key in ("nll", "accuracy"))
    rows = [("(teacher)", str(len(teachers)), f"{nll:.4f}", "-", "-", f"{100 * accuracy:.2f}")]
    by_seed = {(run["variant"], run["seed"]): run["nll"] for run in results["runs"]}
    for row in results["summary"]:
        name, cells = row["variant"], []
        for other in ("uniform_kd", "egad"):
            seeds = [seed for seed in row["seeds"] if (other, seed) in by_seed and name != other]
            gaps = [by_seed[name, seed] - by_seed[other, seed] for seed in seeds]
            spread = f" ±{statistics.stdev(gaps):.4f}" if len(gaps) > 1 else ""
            cells.append(f"{statistics.fmean(gaps):+.4f}{spread}" if gaps else "-")
        rows.append((f"`{name}`", _seeds(row), f"{row['nll']:.4f}", *cells, f"{100 * row['accuracy']:.2f}"))
    return table(("student", "seeds", "nats per character", "minus `uniform_kd`", "minus `egad`", "right %"), rows)


def speed_table() -> str:
    """One row per loss: time of a call, and its share of a training step."""
    results = load("benchmark_losses")
    students = results["students"]
    header = ["loss"]
    for student in students:
        header += [f"ms, width {student['width']}", f"width {student['width']}, of a step %"]
    rows = []
    for index, first in enumerate(students[0]["losses"]):
        cells = [f"`{first['loss']}`"]
        for student in students:
            row = student["losses"][index]
            cells += [f"{1e3 * row['seconds']:.2f}", f"{100 * row['share']:.2f}"]
        rows.append(cells)
    return table(header, rows)


def _seeds(row: Mapping[str, Any]) -> str:
    return str(len(row["seeds"]))


def _percent(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    spread = "" if row[f"{key}_std"] is None else f" ±{100 * row[f'{key}_std']:.1f}"
    return f"{100 * row[key]:.1f}{spread}"


def formula(cls: type) -> str:
    """Returns the formula in a loss's docstring: the indented block that begins with "L ="."""
    match = _FORMULA.search(inspect.cleandoc(cls.__doc__ or ""))
    if match is None:
        raise SystemExit(f"the docstring of {cls.__name__} has no indented block 'L = ...'")
    return "\n".join(textwrap.wrap(" ".join(match[1].split()), 84, subsequent_indent="    "))


def arguments(cls: type) -> str:
    """Returns the arguments of its own that a constructor takes, with their defaults."""
    own = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name not in COMMON}
    return ", ".join(f"`{name}={value!r}`" for name, value in own.items())


TABLES: dict[str, Callable[[], str]] = {
    "losses": lambda: registry_table(list_losses(), get_loss),
    "methods": losses_text,
    "additions": additions_text,
    "comparison": comparison_table,
    "comparison_cifar10": lambda: comparison_table("comparison_cifar10"),
    "groups": groups_table,
    "readout": readout_table,
    "egad": egad_table,
    "speed": speed_table,
}
