"""Generated parts of docs/experiments/published_weights.md: texts under three losses, ImageNet weights, photographs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pages.markdown import RESULTS, load, table

from erde_hub.evaluation.formatting import mmacs, percent, threshold_label, thresholds_of

#: Data sets by the name of their runs.
TEXTS = {"sst2_minilm-small": "SST-2", "agnews_minilm-small": "AG News"}
IMAGES = "pretrained_efficientnet_lite0"


def texts_table() -> str:
    """One row per loss and data set, and one per teacher."""
    rows = []
    for stem, name in TEXTS.items():
        files = (f"{stem}{ending}" for ending in ("-class_token", "-ce", "-kd", ""))
        found = [load(file) for file in files if (RESULTS / f"{file}.json").is_file()]
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


def agreement_table() -> str:
    """One row per exit of the network with ImageNet weights, and one for its stored threshold."""
    results = load(IMAGES)
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


def photographs_table() -> str:
    """One row per photograph."""
    results = load(IMAGES)
    rows = []
    for row in results["pretrained"]["photographs"]:
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


TABLES: dict[str, Callable[[], str]] = {
    "texts": texts_table,
    "pretrained": agreement_table,
    "photographs": photographs_table,
}
