"""Groups of samples by columns of their data set, for accuracy per slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erde_hub.errors import DataError, nearest

from .base import LabelledData
from .loader import Split
from .opening import open_tables

#: Most groups that are told apart; a column with more values is none of slices.
MAX_GROUPS = 1000


def read_groups(
    data: LabelledData,
    split: str,
    columns: Sequence[str],
    index: Tensor,
    dataset: str,
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> tuple[Tensor, list[str]]:
    """Reads which group each sample is in: one per value of a column, or per combination of values of several.

    Args:
        data: The loaded data set.
        split: "train", "validation" or "test" of it.
        columns: Their names; ``label`` stands for the class, also where the data set has no columns.
        index: ``records.index`` of the samples.
        dataset: Name or folder that the data were loaded from.
        config_name: Its configuration.
        cache_dir: Of ``datasets``.

    Shape:
        index: (N,). Returns the group of each sample (N,) int64, and the names of the groups.

    Raises:
        DataError: No such column, values that are no strings, numbers or classes, more than 1,000 groups, or a stream,
            whose rows cannot be read again by number.
    """
    rows = getattr(data, split)
    if not isinstance(rows, Split):
        raise DataError("groups are read by row number, which streamed data do not have: leave streaming out")
    if not columns:
        raise DataError("no column is named to group by: name one or more, or 'label'")
    values = [_column(data, rows, column, index, dataset, config_name, cache_dir) for column in columns]
    cells = list(zip(*values, strict=True))
    found = sorted(set(cells), key=lambda parts: [(value is None, str(value)) for value in parts])
    if len(found) > MAX_GROUPS:
        raise DataError(
            f"{' and '.join(map(repr, columns))} of {data.name!r} make {len(found):,} groups of {len(cells):,} samples;"
            f" at most {MAX_GROUPS:,} can be compared: name columns with few values"
        )
    numbers = {parts: number for number, parts in enumerate(found)}
    names = [" / ".join("(none)" if value is None else str(value) for value in parts) for parts in found]
    if len(set(names)) < len(names):  # values with a slash in them
        names = [" / ".join("(none)" if value is None else repr(value) for value in parts) for parts in found]
    return torch.tensor([numbers[parts] for parts in cells]), names


def _column(
    data: LabelledData, rows: Split, column: str, index: Tensor, dataset: str, config: str | None, cache: str | None
) -> list[Any]:
    """Returns the value of each sample in a column, of a class its name; None where there is none."""
    if column == "label":
        place = {int(number): position for position, number in enumerate(rows.indices)}
        classes = rows.labels[[place[int(number)] for number in index]]
        return [data.class_names[int(label)] for label in classes]
    source = data.split_info[rows.name]["source"]
    table: Any = (
        None if dataset == "digits" else open_tables(dataset, config, cache, data.kind != "image").splits[source]
    )
    known = [] if table is None else table.column_names
    if column not in known:
        given = ", ".join(known) or "none; 'label' groups by class"
        raise DataError(f"{data.name!r} has no column {column!r}{nearest(column, known)} (columns: {given})")
    feature = table.features[column]
    cells = np.asarray(table.select_columns([column])[column], dtype=object)[index.numpy()].tolist()
    wrong = next((cell for cell in cells if not isinstance(cell, (str, int, float, bool, type(None)))), None)
    if wrong is not None:
        raise DataError(
            f"column {column!r} of {data.name!r} holds {type(wrong).__name__}: name one of texts or numbers"
        )
    names = getattr(feature, "names", None)
    if names is None:
        return cells
    return [names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None for cell in cells]
