"""The generated parts of recipes/studies/README.md, from recipes/results/studies/*.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from pages.markdown import RESULTS, table

from erde_hub.evaluation.formatting import mmacs, percent

STUDIES = RESULTS / "studies"
TEST_IMAGES = 10_000  # of CIFAR-10 and CIFAR-100


def results(prefix: str) -> list[dict[str, Any]]:
    """Returns the results whose file names begin with a prefix, each with its ``name``."""
    return [
        {"name": path.stem, **json.loads(path.read_text("utf-8"))} for path in sorted(STUDIES.glob(f"{prefix}_*.json"))
    ]


def places_table() -> str:
    """One row per place: accuracy of each kind of head on validation images, a column per size."""
    columns = {
        (result["arguments"]["size"], kind): {
            row["place"]: percent(row["validation_accuracy"]) for row in result["places"] if row["head"] == kind
        }
        for result in results("frozen")
        for kind in ("linear", "mlp", "avg_max")
    }
    places = dict.fromkeys(place for column in columns.values() for place in column)
    order = sorted(places, key=lambda place: (place == "classifier", place))
    header = ("head after", *(f"`{kind}`, {size} pixels, %" for size, kind in columns))
    return table(header, ((f"`{place}`", *(column.get(place, "-") for column in columns.values())) for place in order))


def points_table() -> str:
    """One row per way to use a network with frozen backbone, on test images."""
    rows = []
    for result in results("frozen"):
        size, full = f"{result['arguments']['size']}", result["full_macs"]
        *_, early, last = result["per_exit"]
        ways = {"its own classifier": last | {"macs": full}, f"everybody exits after `{early['exit']}`": early}
        for name, row in ways.items():
            rows.append((size, name, percent(row["accuracy"]), "-", mmacs(row["macs"]), percent(row["macs"] / full)))
        for names, point in distinct_points(result):
            test, won, lost = point["test"], point["only_routed_right"], point["only_last_exit_right"]
            cost = mmacs(test["mean_macs"]), percent(test["mean_macs"] / full)
            rows.append((size, f"threshold: {', '.join(names)}", percent(test["accuracy"]), points(won, lost), *cost))
    header = ("pixels", "how", "test %", "against the classifier, points", "mean MMACs", "of the network's MACs %")
    return table(header, rows)


def distinct_points(result: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Returns the operating points of a run, each with the names of all wishes that the same thresholds fulfil."""
    names: dict[str, list[str]] = {}
    for name, point in result.get("points", {}).items():
        names.setdefault(str(point["threshold"]), []).append(name)
    return [(same, result["points"][same[0]]) for same in names.values()]


def finetuned_table() -> str:
    """One row per fine-tuned network, and per operating point of those with exits, on test images."""
    runs = results("finetune")
    compared = {
        (pair["exits"], pair["point"], pair["static"]): pair
        for comparison in results("compared")
        for pair in comparison["pairs"]
    }
    labels = {
        run["name"]: f"{run['per_exit'][-1]['exit']}, {run['arguments']['size']} pixels".replace("_", " ")
        for run in runs
    }
    rows = []
    for result in sorted(runs, key=lambda result: "points" in result):
        size, seed, last = result["arguments"]["size"], result["arguments"]["seed"], result["per_exit"][-1]
        kind = "exits, all layers" if "points" in result else f"{last['exit']}, no exits".replace("_", " ")
        rows.append((f"{size}", kind, f"{seed}", percent(last["accuracy"]), mmacs(last["macs"]), "-"))
        for wishes, point in distinct_points(result):
            against = [
                f"{points(pair['only_right']['routed'], pair['only_right']['static'])} ({labels[static]})"
                for (exits, name, static), pair in compared.items()
                if exits == result["name"] and name == wishes[0]
            ]
            test = point["test"]
            cost = mmacs(test["mean_macs"]), "; ".join(against) or "-"
            rows.append((f"{size}", f"exits, {', '.join(wishes)}", f"{seed}", percent(test["accuracy"]), *cost))
    return table(("pixels", "how", "seed", "test %", "mean MMACs", "against, points"), rows)


def points(won: int, lost: int) -> str:
    """A paired difference in points, 95 % interval: images on which the two differ count (normal approximation)."""
    return f"{100 * (won - lost) / TEST_IMAGES:+.1f} ± {196 * math.sqrt(won + lost) / TEST_IMAGES:.1f}"


def budget_table() -> str:
    """One row per budget and kind of corruption: how far cost is from the target, and accuracy, of each method."""
    (result,) = results("budget")
    found = {(row["budget"], row["kind"], row["method"]): row for row in result["rows"]}
    rows = []
    for budget, kind in dict.fromkeys((budget, kind) for budget, kind, _ in found):
        frozen, moved, best = (found[budget, kind, method] for method in ("frozen", "controller", "oracle"))
        cells = [f"{100 * row[key]:+.1f}" for row in (frozen, moved) for key in ("missed", "missed_by_worst_window")]
        rows.append((f"{100 * budget:.0f}", kind, *cells, *(percent(row["accuracy"]) for row in (frozen, moved, best))))
    return table(
        ("budget, % of the MACs", "corruption", "frozen: cost off by %", "worst 500 %", "controller: cost off by %",
         "worst 500 %", "accuracy: frozen %", "controller %", "oracle %"), rows,
    )  # fmt: skip


def calibrated_table() -> str:
    """One row per calibrator and budget, and one at all layers."""
    (result,) = results("calibrated")
    rows = []
    for name, found in result["calibrators"].items():
        last = found["per_exit"][-1]
        shares: dict[float, list[str]] = {}  # budgets at which the same thresholds are the best
        for point in found["points"]:
            shares.setdefault(point["mean_macs"], []).append(f"{100 * point['budget']:.0f}")
        distinct = {point["mean_macs"]: point for point in found["points"]}
        for point in (*distinct.values(), last | {"mean_macs": last["macs"]}):
            budget = ", ".join(shares.get(point["mean_macs"], ["all layers"]))
            cells = percent(point["accuracy"]), percent(point["top5"]), f"{point['nll']:.3f}", f"{point['ece']:.3f}"
            rows.append((name, budget, mmacs(point["mean_macs"]), *cells))
    header = ("calibrator", "budget, % of the MACs", "mean MMACs", "accuracy %", "top-5 %", "NLPD", "ECE")
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "frozen_places": places_table,
    "frozen_points": points_table,
    "finetuned": finetuned_table,
    "budget_drift": budget_table,
    "calibrated_exits": calibrated_table,
}
