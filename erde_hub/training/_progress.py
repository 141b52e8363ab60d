"""What a person and a tracker see of a training."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from .distiller import Distiller


def progress_bar(distiller: Distiller) -> tqdm[Any]:
    """Returns one bar for the training, on the main process; into a log file it writes a line every half minute."""
    terminal = sys.stderr.isatty()
    sized = terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm(
        total=distiller.total_steps,
        initial=distiller.position.step,
        desc=f"epoch {distiller.position.epoch + 1}/{distiller.epochs}",
        unit="step",
        dynamic_ncols=sized,
        ncols=100 if terminal and not sized else None,  # some terminals say that they are 0 columns wide
        smoothing=0.1,
        mininterval=0.2 if terminal else 30.0,
        maxinterval=10.0 if terminal else 60.0,
        disable=not (distiller.args.progress_bar and distiller.accelerator.is_main_process),
    )


def show(bar: tqdm[Any], title: str, values: Mapping[str, Any]) -> None:
    """Puts loss, terms and accuracy per exit behind the bar; drawn when the bar moves next."""
    shown = {name: f"{value:.3f}" for name, value in {"loss": values["loss"], **values["terms"]}.items()}
    shown["acc"] = "/".join(f"{100 * share:.0f}" for share in values["accuracy"]) + "%"
    bar.set_description(title, refresh=False)
    bar.set_postfix(shown, refresh=False)


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
