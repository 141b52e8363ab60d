"""JSON files of studies and benchmarks: versions of the environment, and files that grow run by run."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from erde_hub import __version__
from erde_hub._files import write_text
from erde_hub.errors import ResultsError


def open_results(output: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the results that a file holds, or empty ones where there is none.

    Raises:
        ResultsError: The file cannot be read, or was written with other settings; the message names one.
    """
    fresh = {"erde_hub": __version__, "torch": torch.__version__, "settings": settings, "teachers": [], "runs": []}
    if output is None or not Path(output).is_file():
        return fresh
    name = Path(output).name
    try:
        stored = json.loads(Path(output).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{name} is no JSON file: {error}; give another --output") from error
    if not isinstance(stored, dict) or not {"settings", "teachers", "runs"} <= stored.keys():
        raise ResultsError(f"{name} holds something else than this recipe's results: give another --output")
    before, now = stored["settings"], json.loads(json.dumps(settings))
    different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if different:
        key = different[0]
        raise ResultsError(
            f"{name} holds results of other settings ({key} differs: {before.get(key)!r} there, {now.get(key)!r} now):"
            " give the same ones, or another --output"
        )
    return stored


def environment(*packages: str) -> dict[str, Any]:
    """Returns the versions of erde_hub and of packages (default: torch and timm), and what machine this is.

    A package that is not installed has None.
    """
    versions: dict[str, str | None] = {}
    for package in packages or ("torch", "timm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    return {"erde_hub": __version__, **versions, "cpu": cpu, "cores": os.cpu_count()}


def write_results(output: str | os.PathLike[str] | None, results: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all; None writes nothing."""
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(results, indent=1, allow_nan=False) + "\n")


def means_and_deviations(series: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Returns mean and standard deviation over seeds, ``name`` and ``name_std``; one seed has no deviation.

    A series with a gap is left out.
    """
    row: dict[str, float | None] = {}
    for name, values in series.items():
        whole = [value for value in values if value is not None]
        if len(whole) == len(values):
            row[name] = statistics.fmean(whole)
            row[f"{name}_std"] = statistics.stdev(whole) if len(whole) > 1 else None
    return row
