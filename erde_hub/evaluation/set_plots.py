"""Size, coverage and nestedness of prediction sets over the error rate that they are fitted for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from erde_hub._arguments import check_choice
from erde_hub.errors import RecordsError
from erde_hub.prediction_sets import AVCSClassifier, ConformalClassifier, set_metrics
from erde_hub.records import ExitRecords

from .drift import check_same_model
from .figures import SHADES, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Error rates of the curves.
ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
_METHODS: dict[str, Any] = {"conformal": ConformalClassifier, "avcs": AVCSClassifier}
_PANELS = {
    "size": "mean size (classes)",
    "coverage": "coverage of each exit (%)",
    "coverage_so_far": "coverage at all exits so far (%)",
    "consistency": "nested part of a set (%)",
}


def set_curves(
    held_out: ExitRecords,
    records: ExitRecords,
    alphas: Sequence[float] = ALPHAS,
    methods: Sequence[str] = ("conformal", "avcs"),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Fits sets on held-out records for each error rate, and measures them on others.

    Args:
        held_out: What sets are fitted on.
        records: What they are measured on, of another split.
        alphas: Error rates.
        methods: ``conformal``, ``avcs``; AVCS read raw logits, and conformal sets those that the model answers with.
        seed: Of the sets' random parts.

    Returns:
        A row per method, error rate and exit: ``method, alpha, exit``, and ``size, coverage,
        coverage_so_far, consistency`` as :class:`~erde_hub.prediction_sets.SetMetrics` has them.

    Raises:
        RecordsError: Both are of one split, or of different models.
        DataError: The held-out records are of the training split, or too few.
        ConfigError: An error rate that is not between 0 and 1, no such method.
    """
    check_same_model(held_out, records)
    split = held_out.info.get("split")
    if split is not None and split == records.info.get("split"):
        raise RecordsError(f"both records are of the split {split!r}: sets are measured on samples of another one")
    rows = []
    for method in methods:
        cls = _METHODS[check_choice("method", method, list(_METHODS))]
        for alpha in alphas:
            sets = cls.fit(held_out, alpha, seed=seed).sets(records.logits)
            measured = asdict(set_metrics(sets, records.labels))
            for e, name in enumerate(records.exit_names):
                rows.append({"method": method, "alpha": alpha, "exit": name} | {k: v[e] for k, v in measured.items()})
    return rows


def plot_sets(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws what :func:`set_curves` returns: a panel per measure, a line per exit; AVCS are dashed.

    Args:
        rows: Of :func:`set_curves`.
        path: The figure; the ending gives the format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    save_figure(lambda figure: _draw(figure, rows), path, (9.6, 7.2))


def _draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    exits = list(dict.fromkeys(row["exit"] for row in rows))
    for axes, (key, label) in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS.items(), strict=True):
        scale = 1 if key == "size" else 100
        for e, name in enumerate(exits):
            color = SHADES[round((e + 1) * (len(SHADES) - 1) / len(exits))]
            for method, style in (("conformal", "-o"), ("avcs", "--s")):
                own = [row for row in rows if (row["exit"], row["method"]) == (name, method)]
                line = f"{name}, {method}" if key == "size" else None
                points = [row["alpha"] for row in own], [scale * row[key] for row in own]
                axes.plot(*points, style, color=color, markersize=4, label=line)
        if key.startswith("coverage"):
            alphas = sorted({row["alpha"] for row in rows})
            axes.plot(alphas, [100 * (1 - alpha) for alpha in alphas], ":", color="black", linewidth=1.2)
        axes.set_ylabel(label)
        if key in ("coverage_so_far", "consistency"):
            axes.set_xlabel("error rate that was asked for")
    figure.legend(loc="outside lower center", ncols=4)
