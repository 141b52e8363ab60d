"""Tables of docs/thresholds.md and docs/experiments/, from the registry and from recipes/results/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pages.markdown import load, registry_table, table

from erde_hub.calibration import get_calibrator, list_calibrators
from erde_hub.evaluation.formatting import percent


def guarantee_table(population: int) -> str:
    """Who keeps the bound in a simulation, and at what saving."""
    results = load("threshold_guarantee")
    name = _populations(results)[population]
    header = (
        "samples",
        "method",
        "bound broken %",
        "mean loss %",
        "worst loss %",
        "saving %",
        "where greedy keeps it %",
    )
    shown = [row for row in results["rows"] if row["population"] == name and row["bound"] == results["bound"]]
    defaults = {(row["samples"], row["as"]) for row in shown if "as" in row}
    rows = [
        (
            f"{row['samples']:,}",
            f"**{row['method']}**" if (row["samples"], row["method"]) in defaults else row["method"],
            percent(row["broken"]),
            f"{100 * row['mean_loss']:.2f}",
            percent(row["worst"]),
            percent(row["saving"]),
            "-" if row["saving_where_greedy_keeps"] is None else percent(row["saving_where_greedy_keeps"]),
        )
        for row in shown
        if "as" not in row
    ]
    return table(header, rows)


def greedy_table() -> str:
    """The settings in which greedy search breaks a bound no more often than a guarantee would allow."""
    results = load("threshold_guarantee")
    settings: dict[tuple[str, float, int], dict[str, Any]] = {}
    for row in results["rows"]:
        settings.setdefault((row["population"], row["bound"], row["samples"]), {})[row["method"]] = row
    header = (
        "drawn from",
        "bound %",
        "samples",
        "greedy: broken %",
        "saving %",
        "guarantee, per exit: broken %",
        "saving %",
        "best with room %",
    )
    rows = []
    for (population, bound, samples), methods in settings.items():
        greedy, ours = methods["greedy (earlyon)"], methods["guarantee, per exit"]
        if greedy["broken"] <= 1 - results["confidence"] + 1e-9:
            numbers = (percent(row[key]) for row in (greedy, ours) for key in ("broken", "saving"))
            rows.append((population, f"{100 * bound:g}", f"{samples:,}", *numbers, percent(greedy["ceiling"])))
    return table(header, rows)


def nearby_table() -> str:
    """How often greedy search breaks bounds that are close to each other."""
    nearby = load("threshold_guarantee")["nearby"]
    bounds = list(dict.fromkeys(row["bound"] for row in nearby))
    rows = []
    for name in dict.fromkeys(row["population"] for row in nearby):
        own = {row["bound"]: row for row in nearby if row["population"] == name}
        rows.append((f"{name}: broken %", *(percent(own[bound]["broken"]) for bound in bounds)))
    return table(("bound %", *(f"{100 * bound:g}" for bound in bounds)), rows)


def functions_table() -> str:
    """What each function of records takes."""
    results = load("benchmark_calibration")
    rows = [(f"`{row['function']}`", f"{row['seconds']:.2f}") for row in results["functions"]]
    return table(("function", "seconds"), rows)


def laplace_table() -> str:
    """What the Laplace approximation adds to a forward pass."""
    results = load("benchmark_calibration")
    header = ("network", "classes", "batch", "draws", "forward, ms", "Laplace at all exits, ms", "share %")
    rows = [
        (
            f"`{row['network']}`, {row['exits']} exits",
            str(row["classes"]),
            str(row["batch_size"]),
            str(row["draws"]),
            f"{1000 * row['forward_seconds']:.0f}",
            f"{1000 * row['calibrator_seconds']:.1f}",
            percent(row["share"]),
        )
        for row in results["laplace"]
    ]
    return table(header, rows)


def _populations(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["population"] for row in results["rows"]))


def comparison_table(name: str) -> str:
    """Area under the curve of every policy, and what it gains on entropy."""
    results = load(f"policies_{name}")
    header = (
        "policy",
        "area %",
        "gain on entropy, points",
        "gain on margin, points",
        "EEFP",
        "at 50 % cost",
        "at 75 %",
    )
    rows = []
    for row in results["policies"]:
        rows.append(
            (
                row["policy"],
                "-" if row["area"] is None else f"{100 * row['area']:.2f}",
                _gain(row["difference"], row["difference_interval"]),
                _gain(row["to_margin"], row["to_margin_interval"]),
                "-" if row["eefp"] is None else f"{row['eefp']:.3f}",
                *("-" if value is None else percent(value) for value in row["accuracy_at"][1:]),
            )
        )
    return table(header, rows)


def _gain(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None or interval[0] == interval[1]:  # no area to compare, or a policy with itself
        return "-"
    return f"{100 * value:+.2f} ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})"


def sets_table(name: str) -> str:
    """Size, coverage and nestedness of prediction sets, per exit."""
    results = load(f"policies_{name}")
    header = ("sets", "mean size per exit", "coverage per exit, in %", "coverage so far, in %", "nested, in %")
    rows = [
        (
            row["sets"],
            " / ".join(f"{value:.2f}" for value in row["size"]),
            *(
                " / ".join(percent(value) for value in row[key])
                for key in ("coverage", "coverage_so_far", "consistency")
            ),
        )
        for row in results["sets"]
    ]
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "calibrators": lambda: registry_table(list_calibrators(), get_calibrator),
    "guarantee": lambda: guarantee_table(0),
    "guarantee_cifar10": lambda: guarantee_table(1),
    "guarantee_greedy": greedy_table,
    "guarantee_nearby": nearby_table,
    "records_speed": functions_table,
    "laplace_speed": laplace_table,
    "policies_cifar10": lambda: comparison_table("cifar10_resnet18_resnet10-small"),
    "sets_cifar10": lambda: sets_table("cifar10_resnet18_resnet10-small"),
    "policies_digits": lambda: comparison_table("digits"),
}
