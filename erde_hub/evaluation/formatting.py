"""How numbers of a report are written, in one place for tables, figures and cards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from erde_hub.policies import ExitPolicy, get_policy, list_policies

#: A written threshold is nearer to the true one than this part of the way to the next one.
_ROUNDED = 1 / 50
#: Scores do not reach this number, which learned policies store for "no sample exits".
_NEVER = ExitPolicy.never_threshold


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal, without the sign: 0.9234 is ``"92.3"``."""
    return f"{100 * fraction:.1f}"


def mmacs(macs: float) -> str:
    """Multiply-accumulates in millions with three to four digits: 12345678 is ``"12.3"``."""
    millions = macs / 1e6
    if millions >= 10 or millions == 0:
        return f"{millions:.1f}"
    return f"{millions:.2f}" if millions >= 1 else f"{millions:.3g}"


def threshold_label(
    threshold: float | str | list[float | str], policy: str | None = None, among: Sequence[float] = ()
) -> str:
    """A threshold, or one per early exit, in a few digits: ``"0.2"``, ``"0.2 / 0.4"``, ``"inf"``.

    Three digits, and more where those of ``among`` are so near, as with scores close to 1, that three would name
    another threshold, or one with which other samples exit.

    Args:
        threshold: As in a row of ``results.json``.
        policy: Its key; where it is given, infinity is ``"never"`` or ``"always"``, whichever it means to that policy.
        among: Thresholds of the same report, see :func:`thresholds_of`.
    """
    if isinstance(threshold, list):
        return " / ".join(threshold_label(value, policy, among) for value in threshold)
    value = float(threshold)
    if abs(value) >= _NEVER:
        if policy not in list_policies():
            return "inf" if value > 0 else "-inf"
        return "never" if get_policy(policy).cls.leaves_above == (value > 0) else "always"
    # The same number from other arithmetic, 0.1 + 0.2 next to 0.3, is no neighbour.
    others = [other for other in among if not math.isclose(other, value, rel_tol=1e-12)]
    allowed = _ROUNDED * min((abs(other - value) for other in others), default=math.inf)
    labels = (f"{value:.{digits}g}" for digits in range(3, 18))
    return next(label for label in labels if abs(float(label) - value) <= allowed)


def thresholds_of(results: Mapping[str, Any]) -> list[float]:
    """The finite thresholds of a report's sweep and of its operating point, for :func:`threshold_label`."""
    point = results.get("operating_point")
    found = [row["threshold"] for row in (*results["sweep"], *([] if point is None else [point]))]
    values = [float(value) for entry in found for value in (entry if isinstance(entry, list) else [entry])]
    return [value for value in values if math.isfinite(value)]


def with_point(
    sweep: Sequence[Mapping[str, Any]], point: Mapping[str, Any] | None
) -> list[tuple[Mapping[str, Any], bool]]:
    """Returns the rows of a sweep by rising threshold, and of each whether it is that of the stored threshold.

    Args:
        sweep: Rows of ``results.json``.
        point: Its operating point, which takes the place of a row that is the same; None where there is none.
    """
    rows = [(row, False) for row in sweep]
    if point is not None:

        def is_point(row: Mapping[str, Any]) -> bool:
            same_end = row["threshold"] == "inf" and row["exit_share"] == point["exit_share"]
            return row["threshold"] == point["threshold"] or same_end

        rows = [(row, False) for row in sweep if not is_point(row)] + [(point, True)]
    if not any(isinstance(row["threshold"], list) for row, _ in rows):
        rows.sort(key=lambda entry: float(entry[0]["threshold"]))
    return rows


def duration(seconds: float) -> str:
    """Seconds as ``"42 s"``, ``"7 min 5 s"`` or ``"2 h 3 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
