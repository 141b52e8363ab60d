"""Tables of docs/experiments/regression.md, from recipes/results/rotation_digits.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from pages.markdown import load, registry_table, table

from erde_hub.evaluation.formatting import mmacs, percent
from erde_hub.policies import get_regression_policy, list_regression_policies


def exits_table() -> str:
    """Error and cost of each exit."""
    rows = [
        (f"`{row['exit']}`", mmacs(row["macs"]), f"{row['mae']:.2f}", f"{row['rmse']:.2f}")
        for row in load("rotation_digits")["per_exit"]
    ]
    return table(("always leave at", "MMACs", "mean error, degrees", "root of the mean square, degrees"), rows)


def intervals_table() -> str:
    """Width and coverage of intervals, one number per exit."""
    header = ("intervals", "mean width, degrees", "coverage, in %", "in all so far, in %", "nested, in %")
    rows = [
        (
            row["method"],
            " / ".join(f"{value:.1f}" for value in row["width"]),
            *(" / ".join(percent(v) for v in row[key]) for key in ("coverage", "coverage_so_far", "nested")),
        )
        for row in load("rotation_digits")["intervals"]
    ]
    return table(header, rows)


def routing_table() -> str:
    """What leaving below a width costs and saves."""
    results = load("rotation_digits")
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


TABLES: dict[str, Callable[[], str]] = {
    "regression_policies": lambda: registry_table(list_regression_policies(), get_regression_policy),
    "rotation_exits": exits_table,
    "rotation_intervals": intervals_table,
    "rotation_routing": routing_table,
}
