"""Finding images that cannot be read before training starts, and remembering which ones can."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erde_hub._cores import available_cores
from erde_hub._image_files import header_size
from erde_hub._progress import passing_bar

from .decoding import EncodedImages, evenly_spaced

_logger = logging.getLogger(__name__)

#: What is looked at: every pixel of every image, the headers of some, or nothing.
IMAGE_CHECKS = ("all", "headers", "none")

_HEADERS = 20_000
# Rows that are remembered together. A check that is cut off goes on behind the last complete piece.
_PIECE = 4096


def find_unreadable(
    encoded: EncodedImages, rows: NDArray[np.int64], how: str, memory: Path | None, progress: bool
) -> None:
    """Reads images that stay encoded, so that a broken one is found before training and not in its middle.

    "all" decodes every image once, on all cores, and remembers pieces of 4,096 rows that are fine. Processes of one
    machine start at different pieces and skip those that another one has finished, so together they read the set about
    once. "headers" opens up to 20,000 evenly spaced images without decoding them; one that is cut off passes.

    Args:
        encoded: The images of a source split.
        rows: Rows that are going to be used.
        how: One of :data:`IMAGE_CHECKS`.
        memory: Folder that belongs to this split of these data; None remembers nothing.
        progress: Show a progress bar.

    Raises:
        DataError: An image cannot be read; the message names its row.
    """
    if how == "none" or not len(rows):
        return
    if how == "headers":
        rows = rows[evenly_spaced(len(rows), _HEADERS)]
        contents = passing_bar(encoded.iterate(rows), "checking images", len(rows), shown=progress)
        for row, content in contents:
            header_size(content, encoded.where(row))
        return
    pieces = np.split(rows, np.flatnonzero(np.diff(rows // _PIECE)) + 1)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = int(os.environ.get("LOCAL_RANK", "0")) * len(pieces) // processes
    threads = max(1, available_cores() // processes)
    executor = ThreadPoolExecutor(threads)  # Pillow decodes without holding Python's lock
    bar = passing_bar(None, "checking images", len(rows), shown=progress, delay=1.0)
    try:
        for piece in [*pieces[first:], *pieces[:first]]:
            number = int(piece[0]) // _PIECE
            whole = len(piece) == min(_PIECE, len(encoded) - number * _PIECE)
            mark = None if memory is None or not whole else memory / str(number)
            if mark is not None and mark.is_file():
                bar.update(len(piece))
                continue
            for _ in executor.map(encoded.image, piece.tolist()):
                bar.update()
            if mark is not None:
                _remember(mark)
    finally:
        executor.shutdown(cancel_futures=True)
        bar.close()


def _remember(mark: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:  # costs time on the next run, nothing else
        _logger.warning("which images were checked could not be kept in %s: %s", mark.parent, error)
