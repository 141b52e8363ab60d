"""A progress bar for work that a person waits for."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def passing_bar(
    over: Iterable[Any] | None, title: str, total: int | None = None, *, shown: bool = True, **options: Any
) -> tqdm[Any]:
    """Returns a bar that is gone when it is done; into a log file, which takes nothing back, it writes nothing.

    Args:
        over: What it runs over; None where the caller moves it.
        title: What is being done.
        total: How many there are; None where ``over`` knows.
        shown: False for no bar.
        **options: Of tqdm.
    """
    return tqdm(over, title, total, disable=not (shown and sys.stderr.isatty()), leave=False, **options)
