"""``results.json`` as a file: checked, written and read.

It goes into repositories and onto the Hub, so it holds no absolute path, user or host: local data and checkpoints
appear by name, data with a fingerprint.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erde_hub._files import write_text
from erde_hub.errors import ResultsError, nearest

# An absolute path of either kind, a home folder or a file URL, at the start or after a separator; not a web address.
_END = r"[^\s\"',;|<>]"
PLACE = re.compile(
    rf"(?:^|(?<=[\s=:,;\"'(\[{{|<>]))"
    rf"(?:file:/+{_END}*|/[^/\s\"',;|<>]{_END}*|[A-Za-z]:[\\/]{_END}*|\\\\{_END}+|~[\w.-]*/{_END}*)"
)

_FRACTION = "a fraction in [0, 1]"
_REQUIRED: dict[str, Any] = {
    "erde_hub": str,
    "args": Mapping,
    "student": Mapping,
    "dataset": Mapping,
    "per_exit": list,
    "sweep": list,
}


def validate_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the contents of a ``results.json`` and returns them.

    Raises:
        ResultsError: A part is missing, has the wrong type or an impossible value, is not JSON, or holds an absolute
            path; the message names the place, such as ``sweep[3].accuracy``.
    """
    if not isinstance(results, Mapping):
        raise ResultsError(f"results must be a mapping, got {type(results).__name__}")
    for key, kind in _REQUIRED.items():
        if key not in results:
            raise ResultsError(f"results have no {key!r}{nearest(key, results)} (they hold: {', '.join(results)})")
        _expect(key, results[key], kind)
    exits = len(results["per_exit"])
    for key in ("per_exit", "sweep"):
        if not results[key]:
            raise ResultsError(f"{key} is empty")
    for i, row in enumerate(results["per_exit"]):
        _check_row(f"per_exit[{i}]", row, {"exit": str, "accuracy": _FRACTION, "macs": int})
    for key in ("sweep", "fine_sweep"):
        _expect(key, results.get(key, []), list)
        for i, row in enumerate(results.get(key, [])):
            _check_sweep_row(f"{key}[{i}]", row, exits)
    if results.get("operating_point") is not None:
        _check_sweep_row("operating_point", results["operating_point"], exits)
    _check_row("student", results["student"], {"architecture": str, "exits": list, "macs": int, "accuracy": _FRACTION})
    for key in ("teacher", "static_student"):
        if results.get(key) is not None:
            _expect(key, results[key], Mapping)
            _check_row(key, results[key], {"architecture": str, "macs": int, "accuracy": _FRACTION})
    _check_row("dataset", results["dataset"], {"name": str, "num_classes": int})
    for key in ("loss", "training"):
        if results.get(key) is not None:
            _expect(key, results[key], Mapping)
    _check_values("", results)
    return dict(results)


def save_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Checks and writes ``results.json``, one row of a table per line; an earlier file survives a failure.

    Raises:
        ResultsError: See :func:`validate_results`.
        CheckpointWriteError: The file cannot be written.
    """
    write_text(path, _dumps(validate_results(results)) + "\n")


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a ``results.json``.

    Raises:
        ResultsError: There is no such file, it is not JSON, or see :func:`validate_results`.
    """
    try:
        return validate_results(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ResultsError(f"there is no {os.fspath(path)!r}: a finished run writes it to its output folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{Path(path).name} is not JSON: {error}") from error


def _expect(where: str, value: Any, kind: Any) -> None:
    if kind is _FRACTION:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    elif kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    else:
        good = isinstance(value, kind)
    if not good:
        kinds = {int: "an integer of at least 0", float: "a number of at least 0", Mapping: "a mapping"}
        names = kind if isinstance(kind, str) else kinds.get(kind, f"a {getattr(kind, '__name__', kind)}")
        raise ResultsError(f"{where} must be {names}, got {value!r:.80}")


def _check_row(where: str, row: Any, kinds: Mapping[str, Any]) -> None:
    _expect(where, row, Mapping)
    for key, kind in kinds.items():
        if key not in row:
            raise ResultsError(f"{where} has no {key!r}{nearest(key, row)} (it holds: {', '.join(row)})")
        _expect(f"{where}.{key}", row[key], kind)


def _check_sweep_row(where: str, row: Any, exits: int) -> None:
    _check_row(where, row, {"threshold": object, "accuracy": _FRACTION, "mean_macs": float, "exit_share": list})
    fractions = row["exit_share"]
    for fraction in fractions:
        _expect(f"{where}.exit_share", fraction, _FRACTION)
    if len(fractions) != exits or abs(sum(fractions) - 1) > 1e-6:
        raise ResultsError(f"{where}.exit_share must be {exits} fractions that sum to 1, got {fractions}")
    threshold = row["threshold"]
    for value in threshold if isinstance(threshold, list) else [threshold]:
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("inf", "-inf")):
            raise ResultsError(f"{where}.threshold must be a number, 'inf' or a list of these, got {threshold!r}")


def _check_values(where: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ResultsError(f"{where or 'results'} has the key {key!r}, which is no string")
            _check_values(f"{where}.{key}" if where else key, entry)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _check_values(f"{where}[{i}]", entry)
    elif isinstance(value, str):
        if ".class_names[" not in where and PLACE.search(value):
            raise ResultsError(f"{where} holds a place on the machine, {value!r}: give a name instead")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ResultsError(f"{where} is {value}, which JSON cannot hold: write 'inf', or leave it out")
    elif value is not None and not isinstance(value, (bool, int)):
        raise ResultsError(f"{where} holds a {type(value).__name__}, which JSON cannot")


def _dumps(results: Mapping[str, Any]) -> str:
    """Indents mappings to the second level and puts each row of a table on its own line."""
    lines = []
    for key, value in results.items():
        if isinstance(value, Mapping) and value:
            inner = [f"    {json.dumps(k)}: {_compact(v)}" for k, v in value.items()]
            text = "{\n" + ",\n".join(inner) + "\n  }"
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            text = "[\n" + ",\n".join(f"    {_compact(row)}" for row in value) + "\n  ]"
        else:
            text = _compact(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def mean_milliseconds(exit_share: Sequence[float], exit_milliseconds: Sequence[float]) -> float:
    """Returns the mean time of samples of which a fraction exits at each exit, as a row of the sweep has it."""
    return sum(fraction * time for fraction, time in zip(exit_share, exit_milliseconds, strict=True))
