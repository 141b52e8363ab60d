"""What a person and a tracker see of a training."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from .state import Position

_FORMAT = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {desc} [{elapsed}<{remaining}]{postfix}"
#: Columns of the bar itself and of what surrounds numbers in the format above, times of more than an hour included.
_FIXED = 5 + len("100%|| step /,  [1:00:00<1:00:00]")


def progress_bar(position: Position, total_steps: int, epochs: int, shown: bool) -> tqdm[Any]:
    """Returns the bar of a training; into a log file it writes a line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total_steps,
        initial=position.step,
        desc=f"epoch {min(position.epoch + 1, epochs)}/{epochs}",  # or all are done
        unit="step",
        bar_format=_FORMAT,
        ncols=_columns(),
        smoothing=0.1,
        mininterval=0.2 if terminal else 30.0,
        maxinterval=10.0 if terminal else 60.0,
        disable=not shown,
    )


def show(bar: tqdm[Any], title: str, values: Mapping[str, Any]) -> None:
    """Puts accuracy, or error, per exit, loss and terms after the bar, as many as fit; drawn when the bar moves."""
    if "mae" in values:
        quality = "off by " + "/".join(f"{error:.3g}" for error in values["mae"])
    else:
        quality = "/".join(f"{100 * accuracy:.0f}" for accuracy in values["accuracy"]) + "% correct"
    parts = [quality, f"loss {values['loss']:.3g}"]
    if len(values["terms"]) > 1:
        parts += [f"{name} {value:.2g}" for name, value in values["terms"].items()]
    bar.ncols = columns = _columns()  # the window may have changed its size
    room = columns - _FIXED - len(title) - 2 * len(str(bar.total))
    shown = ""
    for part in parts:
        if len(shown) + len(part) + 2 > room:
            break
        shown += f", {part}" if shown else part
    bar.set_description_str(title, refresh=False)
    bar.set_postfix_str(shown, refresh=False)


def _columns() -> int:
    """Returns the columns of the terminal; of a log file, and of terminals that say they have none, 120."""
    width = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    return width - 1 if width > 1 else 120  # some terminals wrap when the last column is written


def flatten(values: Any, names: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
    """Flattens nested values for trackers, which take numbers and texts: ``train/accuracy/layer1``.

    Args:
        values: Mappings, lists and plain values.
        names: Lists of that length are entries by these names.
        prefix: Of the keys, with a leading slash.
    """
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in flatten(value, names, f"{prefix}/{key}").items()}
    if isinstance(values, list) and len(values) == len(names):
        return {f"{prefix[1:]}/{name}": value for name, value in zip(names, values, strict=True)}
    return {prefix[1:]: values if isinstance(values, (int, float, str)) else str(values)}
