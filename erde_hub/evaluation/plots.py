"""Pictures of a run, drawn from the contents of its ``results.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erde_hub._files import replacing
from erde_hub.errors import MissingDependencyError

from .formatting import mmacs, percent, threshold_label, thresholds_of
from .results_file import validate_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# Okabe and Ito's palette, told apart with any kind of colour vision; shapes differ as well.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_ORANGE_TEXT = "#8F6200"  # the same hue, dark enough for words on white

#: A teacher up to this many times the student's cost is drawn as a point; a dearer one as a line with its cost written
#: on it, so that the student's curve keeps the width of the picture.
_TEACHER_ON_AXIS = 1.5

#: Width of the ring around the stored threshold, in points.
_RING = 15

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 11,
    "axes.labelsize": 12,
    "legend.fontsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "lines.markersize": 8,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "svg.hashsalt": "erde_hub",
}


def plot_frontier(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws accuracy against mean cost: the threshold sweep, each exit alone, the teacher and the full student.

    The fine sweep is the line, the round thresholds are dots on it, a few of them labelled. A ring marks the operating
    point of the threshold that is stored in the checkpoint. Squares are what each exit
    gives when every sample leaves there. A separately trained network without exits is drawn where ``results`` hold a
    ``static_student``. The same results give the same bytes with the same matplotlib.

    Args:
        results: Contents of ``results.json``.
        path: The picture; the ending gives the format, ``.png`` say.

    Raises:
        ResultsError: See :func:`~erde_hub.evaluation.validate_results`.
        MissingDependencyError: matplotlib is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    try:
        import matplotlib.style as mpl_style  # noqa: PLC0415 - an extra
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: install it with `pip install matplotlib`") from error
    results = validate_results(results)
    suffix = Path(path).suffix.lstrip(".").lower() or "png"
    with mpl_style.context(["default", _STYLE]):  # whatever a user's own style says; it is back afterwards
        figure = Figure(figsize=(6.4, 4.4), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        _draw_frontier(figure, results)
        with replacing(path) as temporary:
            # Neither date nor version, so that a picture changes only when its numbers do.
            blank = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}, "svg": {"Date": None}}
            figure.savefig(temporary, format=suffix, metadata=blank.get(suffix))


def _draw_frontier(figure: Figure, results: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    per_exit, steps, final = results["per_exit"], results["sweep"], results["per_exit"][-1]
    teacher, static = results.get("teacher"), results.get("static_student")
    line = sorted([*results.get("fine_sweep", []), *steps], key=lambda row: row["mean_macs"])
    policy, among = results["student"].get("policy", "entropy"), thresholds_of(results)
    white: dict[str, Any] = {"markeredgecolor": "white", "zorder": 5}
    axes.plot(*_points(line, "mean_macs"), color=_BLUE, linewidth=2.2, zorder=3)
    axes.plot(*_points(steps, "mean_macs"), "o", color=_BLUE, markersize=6.5, zorder=4, label=f"threshold θ ({policy})")
    axes.plot(*_points(per_exit[:-1], "macs"), "s", color=_ORANGE, label="every sample leaves at one exit", **white)
    axes.plot(*_points([final], "macs"), "D", color=_GREEN, markersize=9, label="student run to its last exit", **white)
    if static is not None:
        axes.plot(
            *_points([static], "macs"),
            "^",
            color=_PURPLE,
            markersize=10,
            label="student trained without exits",
            **white,
        )
    point = results.get("operating_point")
    if point is not None and len(per_exit) > 1:
        axes.plot(
            *_points([point], "mean_macs"),
            "o",
            markersize=_RING,
            markerfacecolor="none",
            markeredgecolor="black",
            markeredgewidth=2.2,
            zorder=6,
            label=f"stored threshold, θ={threshold_label(point['threshold'], policy, among)}",
        )
    far = teacher is not None and teacher["macs"] > _TEACHER_ON_AXIS * final["macs"]
    if teacher is not None and not far:
        axes.plot(*_points([teacher], "macs"), "*", color=_RED, markersize=15, label="teacher", **white)
    axes.set_xlabel(f"mean cost per {results.get('dataset', {}).get('kind', 'image')} (MMACs)")
    axes.set_ylabel("accuracy (%)")
    axes.margins(x=0.07, y=0.1)
    left, right = axes.get_xlim()
    if left < 0.3 * (right - left):  # so near to 0 that an axis from 0 costs little and says more
        axes.set_xlim(0, right)
    if teacher is not None and far:
        style: dict[str, Any] = {"color": _RED, "linestyle": (0, (5, 3)), "linewidth": 1.8, "zorder": 2}
        axes.axhline(100 * teacher["accuracy"], label="teacher", **style)
    low, high = axes.get_ylim()
    low = max(low, -3)
    room = 100 * teacher["accuracy"] + 0.1 * (high - low) if teacher is not None and far else 0  # for words on the line
    axes.set_ylim(low, max(min(high, 103), room))
    level = 100 * teacher["accuracy"] if teacher is not None and far else None
    others = [row for row in (static, None if far else teacher) if row is not None]
    ring = point if len(per_exit) > 1 else None
    labels = _Labels(figure, axes, line, level, [*per_exit, *steps, *others], ring)
    labels.legend()
    if teacher is not None and level is not None:
        ratio = teacher["macs"] / max(final["macs"], 1)
        cost = f"{mmacs(teacher['macs'])} MMACs, {ratio:.1f} times the student"
        text = f"teacher: {percent(teacher['accuracy'])} % at {cost} →"
        labels.on_line(level, text, _RED)
    for row in per_exit[:-1]:
        labels.beside(row["macs"], row["accuracy"], row["exit"], _ORANGE_TEXT, _BELOW, needed=True)
    # The cheapest dot first: it is the end of the row, from which the others can be counted.
    for i, row in enumerate(sorted(steps, key=lambda row: row["mean_macs"])):
        text = f"θ={threshold_label(row['threshold'], policy, among)}"
        labels.beside(row["mean_macs"], row["accuracy"], text, _BLUE, _ABOVE, needed=i == 0)


def _points(rows: Sequence[Mapping[str, Any]], cost: str) -> tuple[list[float], list[float]]:
    return [row[cost] / 1e6 for row in rows], [100 * row["accuracy"] for row in rows]


def _around(distance: float) -> list[Any]:
    """Places in the eight directions of a compass, from the east against the clock."""
    slant = 0.7 * distance
    return [
        (distance, 0, "left", "center"),
        (slant, slant, "left", "bottom"),
        (0, distance, "center", "bottom"),
        (-slant, slant, "right", "bottom"),
        (-distance, 0, "right", "center"),
        (-slant, -slant, "right", "top"),
        (0, -distance, "center", "top"),
        (slant, -slant, "left", "top"),
    ]


#: Offsets in points and alignment, tried in turn.
_ABOVE = [
    (-6, 5, "right", "bottom"), (-8, 0, "right", "center"), (0, 9, "center", "bottom"), (7, -5, "left", "top"),
    *_around(9),
]  # fmt: skip
_BELOW = [
    (8, -3, "left", "top"), (9, 0, "left", "center"), (0, -9, "center", "top"), (-9, 0, "right", "center"), *_around(9)
]  # fmt: skip
#: Further away, where a thin line leads back to the point.
_FAR = [place for distance in (20, 32, 45, 60) for place in _around(distance)]


class _Labels:
    """Writes words beside points, each only where it covers neither the data nor another word."""

    def __init__(
        self,
        figure: Figure,
        axes: Axes,
        line: Sequence[Mapping[str, Any]],
        level: float | None,
        points: Sequence[Mapping[str, Any]],
        ring: Mapping[str, Any] | None,
    ) -> None:
        self.figure = figure
        self.axes = axes
        self.line = line
        self.level = level
        self.ring = ring
        self.points = [(row.get("mean_macs", row.get("macs")) / 1e6, 100 * row["accuracy"]) for row in points]
        self.taken: list[Bbox] = []
        self._measure()

    def _measure(self) -> None:
        """Finds out where the data lie in pixels."""
        self.figure.canvas.draw()  # places everything
        self.data = self._dense(self.line)
        if self.level is not None:
            across = [(x, self.level) for x in np.linspace(*self.axes.get_xlim(), 400)]
            self.data = np.concatenate([self.data, self.axes.transData.transform(across)])
        self.marks = self.axes.transData.transform(self.points)
        if self.ring is not None:
            turns = np.linspace(0, 2 * np.pi, 60)
            centre = self.axes.transData.transform(np.stack(_points([self.ring], "mean_macs"), 1))
            circle = centre + self._pixels(_RING / 2) * np.stack([np.cos(turns), np.sin(turns)], 1)
            self.data = np.concatenate([self.data, circle])

    def _pixels(self, points: float) -> float:
        return points * self.figure.dpi / 72

    def legend(self) -> None:
        """Puts the legend into the first place that is free, or below the axes."""
        for corner in (
            "lower right",
            "center right",
            "upper left",
            "lower left",
            "center left",
            "upper right",
            "center",
        ):
            legend = self.axes.legend(loc=corner)
            box = legend.get_window_extent()
            if not _any_inside(box, self.data) and not _any_inside(box.padded(10), self.marks):
                self.taken.append(box)
                return
            legend.remove()
        self.figure.legend(loc="outside lower center", ncols=2)
        self._measure()

    def _dense(self, line: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The pixels of a polyline, a few apart."""
        corners = self.axes.transData.transform(np.stack(_points(line, "mean_macs"), 1))
        steps = np.linspace(0, 1, 40)[:, None, None]
        return (corners[:-1] * (1 - steps) + corners[1:] * steps).reshape(-1, 2) if len(corners) > 1 else corners

    def beside(
        self, macs: float, accuracy: float, text: str, color: str, places: Sequence[Any], needed: bool = False
    ) -> None:
        """Tries the places around a point in turn, for words that are needed also those further away."""
        point = (macs / 1e6, 100 * accuracy)
        for place in places:
            if self._write(text, point, place[:2], place[2:], color):
                return
        lead = {"arrowstyle": "-", "color": color, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 4}
        mark = self.axes.transData.transform(point)
        for place in _FAR if needed else ():
            way = mark + np.linspace(0.2, 1, 40)[:, None] * self._pixels(1) * np.array(place[:2])
            crosses = any(_any_inside(box, way) for box in self.taken)
            if not crosses and self._write(text, point, place[:2], place[2:], color, arrowprops=lead):
                self.data = np.concatenate([self.data, way])
                return

    def on_line(self, level: float, text: str, color: str) -> None:
        """Writes above or below a horizontal line, at either end."""
        for x, horizontal in ((0.995, "right"), (0.01, "left")):
            for dy, vertical in ((4, "bottom"), (-4, "top")):
                place = ("axes fraction", "data")
                if self._write(text, (x, level), (0, dy), (horizontal, vertical), color, xycoords=place):
                    return

    def _write(
        self,
        text: str,
        point: tuple[float, float],
        offset: tuple[float, float],
        alignment: tuple[str, str],
        color: str,
        **where: Any,
    ) -> bool:
        """Writes words at an offset from a point if nothing is in their way, and tells whether it did."""
        note = self.axes.annotate(
            text,
            point,
            offset,
            textcoords="offset points",
            ha=alignment[0],
            va=alignment[1],
            color=color,
            fontsize=10,
            zorder=7,
            **where,
        )
        return self._keep(note)

    def _keep(self, note: Annotation) -> bool:
        from matplotlib.text import Text  # noqa: PLC0415 - an extra

        note.get_window_extent()  # places the words
        box = Text.get_window_extent(note).padded(3)  # without a line that leads to them
        frame, paper = self.axes.bbox, self.figure.bbox
        inside = frame.x0 <= box.x0 and box.x1 <= paper.x1 and frame.y0 <= box.y0 and box.y1 <= paper.y1
        around = box.padded(8)
        free = not (_any_inside(box, self.data) or _any_inside(around, self.marks)) and not box.count_overlaps(
            self.taken
        )
        if inside and free:
            self.taken.append(box)
            return True
        note.remove()
        return False


def _any_inside(box: Bbox, points: np.ndarray) -> bool:
    x, y = points[:, 0], points[:, 1]
    return bool(((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)).any())
