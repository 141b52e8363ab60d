"""The generated parts of recipes/pretrained.md: texts under three losses, exits on ImageNet weights, photographs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from erde_hub.evaluation.formatting import mmacs, percent, threshold_label, thresholds_of

RESULTS = Path(__file__).parents[1] / "results"
#: Data sets by the name of their runs.
TEXTS = {"sst2_minilm-small": "SST-2", "agnews_minilm-small": "AG News"}
IMAGES = RESULTS / "pretrained_efficientnet_lite0.json"

Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def tables(table: Table) -> dict[str, Callable[[], str]]:
    """Returns the tables of the page by name."""
    return {
        "texts": lambda: texts_table(table),
        "pretrained": lambda: agreement_table(table),
        "photographs": lambda: photographs_table(table),
    }


def texts_table(table: Table) -> str:
    """One row per loss and data set, and one per teacher."""
    rows = []
    for stem, name in TEXTS.items():
        runs = [_read(RESULTS / f"{stem}{ending}.json") for ending in ("-class_token", "-ce", "-kd", "")]
        found = [run for run in runs if run is not None]
        teachers = [run["teacher"] for run in found if run.get("teacher")]
        if teachers:
            rows.append((name, "(teacher)", "-", *_accuracies(teachers[-1]), "-", "-", "-"))
        for run in found:
            point, last = run["operating_point"], run["per_exit"][-1]
            label = f"threshold {_stored(run)}"
            share = percent(point["mean_macs"] / last["macs"])
            token = "" if run["student"]["head_kwargs"].get("pool") == "mean" else ", heads on the class token"
            rows.append(
                (
                    name,
                    f"`{run['loss']['name']}`{token}",
                    str(run["training"]["epochs"]),
                    *_accuracies(run),
                    f"{last['nll']:.3f}",
                    f"{percent(point['accuracy'])} at {share} ({label})",
                    str(run["metrics"]["samples"]),
                )
            )
    header = (
        "data",
        "loss",
        "epochs",
        "exit 1 %",
        "exit 2 %",
        "last exit %",
        "NLL of the last exit",
        "at its threshold %, at % of full cost",
        "tested on",
    )
    return table(header, rows)


def agreement_table(table: Table) -> str:
    """One row per exit of the network with ImageNet weights, and one for its stored threshold."""
    results = _read(IMAGES)
    if results is None:
        return table(_AGREEMENT, [])
    full, crops = results["per_exit"][-1]["macs"], results["pretrained"]["crops"]
    rows = [
        (
            f"`{own['exit']}`",
            mmacs(own["macs"]),
            percent(own["macs"] / full),
            percent(own["accuracy"]),
            percent(other["accuracy"]),
        )
        for own, other in zip(results["per_exit"], crops["per_exit"], strict=True)
    ]
    own, other = results["operating_point"], crops["operating_point"]
    costs = f"{mmacs(own['mean_macs'])} and {mmacs(other['mean_macs'])}"
    shares = f"{percent(own['mean_macs'] / full)} and {percent(other['mean_macs'] / full)}"
    name = f"threshold {_stored(results)}"
    return table(_AGREEMENT, [*rows, (name, costs, shares, percent(own["accuracy"]), percent(other["accuracy"]))])


_AGREEMENT = (
    "exit",
    "MMACs",
    "of full cost %",
    "right on CIFAR-100 test images %",
    "answers as the whole network, crops of photographs %",
)


def photographs_table(table: Table) -> str:
    """One row per photograph."""
    results = _read(IMAGES)
    rows = []
    for row in results["pretrained"]["photographs"] if results is not None else []:
        rows.append(
            (
                row["photograph"],
                f"{row['whole_network']} ({row['probability']:.2f})",
                f"`{row['exit']}`",
                row["answer"],
                mmacs(row["macs"]),
                " / ".join("yes" if agrees else "no" for agrees in row["agrees"][:-1]),
            )
        )
    header = (
        "photograph",
        "whole network (probability)",
        "leaves at",
        "as",
        "MMACs",
        "early exits that answer the same",
    )
    return table(header, rows)


def _stored(run: Mapping[str, Any]) -> str:
    """The threshold of a report's operating point, as its card writes it."""
    return threshold_label(run["operating_point"]["threshold"], run["student"].get("policy"), thresholds_of(run))


def _accuracies(part: Mapping[str, Any]) -> list[str]:
    return [percent(row["accuracy"]) for row in part["per_exit"]]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
