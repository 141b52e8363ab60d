"""Accuracy against cost: of a run, drawn from its ``results.json``, and of several methods, from their records."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from erde_hub.errors import ConfigError, MissingDependencyError
from erde_hub.policies import ExitPolicy, PolicyKey
from erde_hub.records import ExitRecords, check_kind

from .figures import BLUE, GREEN, ORANGE, PURPLE, RED, save_figure
from .formatting import mmacs, percent, threshold_label, thresholds_of
from .results_file import mean_milliseconds, validate_results
from .sweep import fine_thresholds, pareto_front, sweep_thresholds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_ORANGE_TEXT = "#8F6200"  # the same hue, dark enough for words on white

#: Colours of methods that are compared.
_METHODS = (BLUE, ORANGE, GREEN, RED, PURPLE)

#: A teacher up to this many times the student's cost is drawn as a point; a dearer one as a line with its cost in the
#: legend, so that the student's curve keeps the width of the figure.
_TEACHER_ON_AXIS = 1.5


def plot_frontier(results: Mapping[str, Any], path: str | os.PathLike[str], *, in_time: bool = False) -> None:
    """Draws accuracy against mean cost: the threshold sweep, each exit alone, the teacher and the full student.

    The fine sweep is the line, the thresholds of the table are dots on it. A ring marks the operating point of the
    threshold that is stored in the checkpoint. Squares are what each exit gives when every sample takes it. A
    separately trained network without exits is drawn where ``results`` hold a ``static_student``. The same results
    give the same bytes with the same matplotlib.

    Args:
        results: Contents of ``results.json``.
        path: The figure; the ending gives the format, ``.png`` say.
        in_time: Milliseconds in place of MACs, the first setting of ``results["latency"]``. Teacher and network without
            exits have no times and are left out.

    Raises:
        ConfigError: ``in_time``, and the results hold no times.
        ResultsError: See :func:`~erde_hub.evaluation.validate_results`.
        MissingDependencyError: matplotlib or adjustText is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    results = validate_results(results)
    if in_time and not results.get("latency"):
        raise ConfigError("the results hold no times: `erde-hub latency --model FOLDER` measures them")
    save_figure(lambda figure: draw_frontier(figure, results, in_time), path, (6.4, 4.4))


def draw_frontier(figure: Figure, results: Mapping[str, Any], in_time: bool = False) -> None:
    """Draws what :func:`plot_frontier` writes."""
    axes = figure.add_subplot()
    mean, own, cost, unit = "mean_macs", "macs", "cost", "MMACs"
    if in_time:
        results, mean, own, cost = _with_times(results), "mean_milliseconds", "milliseconds", "time"
        setting = results["latency"]["settings"][0]
        unit = f"ms; {setting['runtime']}, {setting['threads']} thread{'s' if setting['threads'] != 1 else ''}"
    per_exit, steps, final = results["per_exit"], results["sweep"], results["per_exit"][-1]
    teacher, static, point = (results.get(key) for key in ("teacher", "static_student", "operating_point"))
    line = sorted([*results.get("fine_sweep", []), *steps], key=lambda row: row[mean])
    policy, among = results["student"].get("policy", "entropy"), thresholds_of(results)
    white: dict[str, Any] = {"markeredgecolor": "white", "zorder": 5}
    axes.plot(*_points(line, mean), color=BLUE, linewidth=2.2, zorder=3)
    ends = (f(steps, key=lambda row: row[mean])["threshold"] for f in (min, max))
    label = f"θ = {' … '.join(threshold_label(end, policy, among) for end in ends)} ({policy})"
    axes.plot(*_points(steps, mean), "o", color=BLUE, markersize=6.5, zorder=4, label=label)
    axes.plot(*_points(per_exit[:-1], own), "s", color=ORANGE, label="all samples take one exit", **white)
    axes.plot(*_points([final], own), "D", color=GREEN, markersize=9, label="student run to its last exit", **white)
    if static is not None:
        label = "student trained without exits"
        axes.plot(*_points([static], own), "^", color=PURPLE, markersize=10, label=label, **white)
    if point is not None and len(per_exit) > 1:
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 2.2}
        label = f"stored threshold, θ={threshold_label(point['threshold'], policy, among)}"
        axes.plot(*_points([point], mean), "o", markersize=15, zorder=6, label=label, **ring)
    axes.set_xlabel(f"mean {cost} per {results.get('dataset', {}).get('kind', 'image')} ({unit})")
    axes.set_ylabel("accuracy (%)")
    axes.margins(x=0.1, y=0.15)  # room for labels
    if teacher is not None:
        if teacher["macs"] <= _TEACHER_ON_AXIS * final["macs"]:
            axes.plot(*_points([teacher], own), "*", color=RED, markersize=15, label="teacher", **white)
        else:
            ratio = teacher["macs"] / max(final["macs"], 1)
            label = (
                f"teacher: {percent(teacher['accuracy'])} % at {mmacs(teacher['macs'])} MMACs,\n"
                f"{ratio:.1f} times the student"
            )
            style: dict[str, Any] = {"color": RED, "linestyle": (0, (5, 3)), "linewidth": 1.8, "zorder": 2}
            axes.axhline(100 * teacher["accuracy"], label=label, **style)
    left, right = axes.get_xlim()
    if left < 0.3 * (right - left):  # so near to 0 that an axis from 0 costs little and says more
        axes.set_xlim(0, right)
    figure.legend(loc="outside lower center", ncols=2)
    if len(per_exit) > 1:
        _name_exits(figure, axes, [row["exit"] for row in per_exit[:-1]], *_points(per_exit[:-1], own))


def _with_times(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results whose rows have milliseconds, of what was measured: the network with exits."""
    times = results["latency"]["settings"][0]["exit_milliseconds"]

    def timed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "mean_milliseconds": mean_milliseconds(row["exit_share"], times)} for row in rows]

    point = results.get("operating_point")
    return {
        **results,
        "per_exit": [{**row, "milliseconds": time} for row, time in zip(results["per_exit"], times, strict=True)],
        "sweep": timed(results["sweep"]),
        "fine_sweep": timed(results.get("fine_sweep", [])),
        "operating_point": None if point is None else timed([point])[0],
        "teacher": None,
        "static_student": None,
    }


def _name_exits(
    figure: Figure, axes: Axes, names: Sequence[str], costs: Sequence[float], heights: Sequence[float]
) -> None:
    """Writes the names of exits next to their points and clear of the data."""
    from adjustText import adjust_text  # noqa: PLC0415 - an extra

    style: dict[str, Any] = {"color": _ORANGE_TEXT, "fontsize": 10, "ha": "center", "va": "center", "zorder": 7}
    texts = [axes.text(*place, **style) for place in zip(costs, heights, names, strict=True)]
    figure.draw_without_rendering()  # the layout is final from here on
    figure.set_layout_engine("none")
    data = np.concatenate([_outline(line, figure.dpi) for line in axes.lines])
    lead = {"arrowstyle": "-", "color": _ORANGE_TEXT, "linewidth": 0.8}
    adjust_text(
        texts, *axes.transData.inverted().transform(data).T, ax=axes, expand=(1.2, 1.4), iter_lim=500, arrowprops=lead
    )


def _outline(line: Line2D, dpi: float) -> np.ndarray:
    """Pixels (P, 2) that words should not cover: points along a line, or around its markers."""
    corners = line.get_transform().transform(np.stack(line.get_data(), 1).astype(float))
    if line.get_linestyle() == "None":
        turns = np.linspace(0, 2 * np.pi, 6, endpoint=False)
        radius = line.get_markersize() / 2 * dpi / 72
        return (corners[:, None] + radius * np.stack([np.cos(turns), np.sin(turns)], 1)).reshape(-1, 2)
    along = np.concatenate([[0.0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    places = np.linspace(0, along[-1], 150)
    return np.stack([np.interp(places, along, corners[:, axis]) for axis in (0, 1)], 1)


def plot_curves(
    methods: Mapping[str, ExitRecords | Sequence[ExitRecords]],
    ax: Axes | None = None,
    policy: PolicyKey | ExitPolicy = "entropy",
) -> Axes:
    """Draws accuracy against mean cost of several methods, each with a band over its seeds.

    The line is the mean over seeds of the best accuracy up to each cost, the band one standard deviation on either
    side. A line begins where all its seeds reach the cost. Fractions of cost refer to each student's own last exit.

    Args:
        methods: Name of each method to the records of its seeds, or to those of one run.
        ax: Where to draw; None makes a figure, which ``matplotlib.pyplot`` shows and closes as its others.
        policy: A key of the policies table, or a policy; all thresholds of it are drawn.

    Returns:
        The axes, for titles, limits and ``ax.figure.savefig``.

    Raises:
        ConfigError: There is no method, or one has no records.
        InputTypeError: Something else in place of records.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> ax = plot_curves({"kd": [kd_seed_0, kd_seed_1], "erde": [erde_seed_0, erde_seed_1]})  # doctest: +SKIP
    """
    seeds = {name: [own] if isinstance(own, ExitRecords) else list(own) for name, own in methods.items()}
    if not seeds or not all(seeds.values()):
        raise ConfigError(f"plot_curves needs records of every method, got {dict.fromkeys(seeds, '...')}")
    if ax is None:
        try:
            import matplotlib.pyplot as plt  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingDependencyError(
                'figures need matplotlib: install it with `pip install "erde-hub[train]"`'
            ) from error
        ax = plt.subplots(layout="constrained")[1]
    for (name, runs), color in zip(seeds.items(), itertools.cycle(_METHODS)):
        curves = []
        for records in runs:
            check_kind(records, name)
            front = pareto_front(sweep_thresholds(records, fine_thresholds(records, policy), policy))
            curves.append(_points(front, "mean_macs", records.cumulative_macs[-1] / 100))
        costs = np.linspace(max(cost[0] for cost, _ in curves), 100, 200)
        accuracy = np.stack([np.interp(costs, *curve) for curve in curves])
        middle, deviation = accuracy.mean(0), accuracy.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(costs)
        ax.plot(costs, middle, color=color, linewidth=2, label=name)
        if len(runs) > 1:
            ax.fill_between(costs, middle - deviation, middle + deviation, color=color, alpha=0.2, linewidth=0)
    ax.set_xlabel("mean cost, % of the full model's MACs")
    ax.set_ylabel("accuracy (%)")
    ax.legend()
    return ax


def _points(rows: Sequence[Mapping[str, Any]], cost: str, unit: float | None = None) -> tuple[list[float], list[float]]:
    """Costs, MACs in millions unless ``unit`` says otherwise, and accuracies in percent."""
    unit = unit or (1 if "milliseconds" in cost else 1e6)
    return [row[cost] / unit for row in rows], [100 * row["accuracy"] for row in rows]
