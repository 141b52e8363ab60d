"""How figures look, and how they are written: whole, and the same bytes for the same numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erde_hub._files import replacing
from erde_hub.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Files of the figures that a run may leave in its folder.
FIGURES = (
    "frontier.png",
    "frontier_ms.png",
    "reliability.png",
    "scores.png",
    "shares.png",
    "slices.png",
    "sets.png",
    "contact_sheet.png",
    "sample.png",  # an image of the data, for the widget on the Hub
)

# Okabe and Ito's palette, told apart with any kind of colour vision; shapes differ as well.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#555555"
#: Fills of exits, shallow to deep: light to dark, so that a grey copy keeps their order.
SHADES = ("#F0E442", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#3B2A6B")

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same figure everywhere
    "font.size": 11,
    "axes.labelsize": 12,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "lines.markersize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "erde_hub",
}


def save_figure(draw: Callable[[Figure], None], path: str | os.PathLike[str], size: tuple[float, float]) -> None:
    """Draws into a new figure and writes it; a user's own style is neither used nor changed.

    Args:
        draw: Takes the empty figure.
        path: The file; the ending gives the format, ``.png`` say.
        size: Width and height in inches.

    Raises:
        MissingDependencyError: matplotlib or adjustText is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    try:
        import matplotlib.style as mpl_style  # noqa: PLC0415 - an extra
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        with mpl_style.context(["default", _STYLE]):
            figure = Figure(figsize=size, dpi=200, layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure)
            suffix = Path(path).suffix.lstrip(".").lower() or "png"
            with replacing(path) as temporary:
                # Neither date nor version, so that a figure changes only when its numbers do.
                blank: Mapping[str, dict[str, Any]] = {
                    "png": {"Software": None},
                    "pdf": {"CreationDate": None, "Producer": None},
                    "svg": {"Date": None},
                }
                figure.savefig(temporary, format=suffix, metadata=blank.get(suffix))
    except ImportError as error:
        raise MissingDependencyError(
            'figures need matplotlib and adjustText: install them with `pip install "erde-hub[train]"`'
        ) from error
