"""Tables of calibration.md about regression, from recipes/results/rotation_digits.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from erde_hub.evaluation.formatting import mmacs, percent
from erde_hub.policies import get_regression_policy, list_regression_policies

RESULTS = Path(__file__).parents[1] / "results"
Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def tables(table: Table, registry_table: Callable[..., str]) -> dict[str, Callable[[], str]]:
    """Returns the tables by name."""
    return {
        "regression_policies": lambda: registry_table(list_regression_policies(), get_regression_policy),
        "rotation_exits": lambda: exits_table(table),
        "rotation_intervals": lambda: intervals_table(table),
        "rotation_routing": lambda: routing_table(table),
    }


def exits_table(table: Table) -> str:
    """Error and cost of each exit."""
    rows = [
        (f"`{row['exit']}`", mmacs(row["macs"]), f"{row['mae']:.2f}", f"{row['rmse']:.2f}")
        for row in _load()["per_exit"]
    ]
    return table(("always leave at", "MMACs", "mean error, degrees", "root of the mean square, degrees"), rows)


def intervals_table(table: Table) -> str:
    """Width and coverage of intervals, one number per exit."""
    header = ("intervals", "mean width, degrees", "coverage, in %", "in all so far, in %", "nested, in %")
    rows = [
        (
            row["method"],
            " / ".join(f"{value:.1f}" for value in row["width"]),
            *(" / ".join(percent(v) for v in row[key]) for key in ("coverage", "coverage_so_far", "nested")),
        )
        for row in _load()["intervals"]
    ]
    return table(header, rows)


def routing_table(table: Table) -> str:
    """What leaving below a width costs and saves."""
    results = _load()
    full = results["per_exit"][-1]["macs"]
    header = (
        "leave below, degrees",
        "mean error, degrees",
        "at random, degrees",
        "mean MMACs",
        "cost, in %",
        "leave at, in %",
        "coverage, in %",
    )
    rows = [
        (
            f"{row['threshold']:.1f}",
            f"{row['mae']:.2f}",
            f"{_mixture(results['per_exit'], row['mean_macs']):.2f}",
            mmacs(row["mean_macs"]),
            f"{100 * row['mean_macs'] / full:.0f}",
            " / ".join(f"{100 * share:.0f}" for share in row["exit_share"]),
            percent(row["coverage"]),
        )
        for row in results["routing"]
    ]
    return table(header, rows)


def _mixture(per_exit: Sequence[dict[str, Any]], macs: float) -> float:
    """Mean error of drawing at random between the two exits whose costs are nearest."""
    for shallow, deep in pairwise(per_exit):
        if macs <= deep["macs"]:
            share = (macs - shallow["macs"]) / (deep["macs"] - shallow["macs"])
            return shallow["mae"] + share * (deep["mae"] - shallow["mae"])
    return per_exit[-1]["mae"]


def _load() -> dict[str, Any]:
    return json.loads((RESULTS / "rotation_digits.json").read_text(encoding="utf-8"))
