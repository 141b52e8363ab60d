"""Loading without the tables and bars that transformers prints about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Mutes transformers' report of weights that are new or left over, for a caller who looks at them himself."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def without_bar() -> Iterator[None]:
    """Hides the bar of loaded weights, for a caller who has mapped them: it is full in milliseconds."""
    shown, hub_hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()  # and those of the Hub
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if hub_hidden:
            disable_progress_bars()
