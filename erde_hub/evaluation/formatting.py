"""How numbers of a report are written, in one place for tables, pictures and cards."""

from __future__ import annotations

import math

from erde_hub.policies import get_policy, list_policies


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal, without the sign: 0.9234 is ``"92.3"``."""
    return f"{100 * fraction:.1f}"


def mmacs(macs: float) -> str:
    """Multiply-accumulates in millions with three to four digits: 12345678 is ``"12.3"``."""
    millions = macs / 1e6
    if millions >= 10 or millions == 0:
        return f"{millions:.1f}"
    return f"{millions:.2f}" if millions >= 1 else f"{millions:.3g}"


def threshold_label(threshold: float | str | list[float | str], policy: str | None = None) -> str:
    """A threshold, or one per early exit, in a few digits: ``"0.2"``, ``"0.2 / 0.4"``, ``"inf"``.

    Where the policy's key is given, infinity is ``"never"`` or ``"always"``, whichever it means to that policy.
    """
    if isinstance(threshold, list):
        return " / ".join(threshold_label(value, policy) for value in threshold)
    value = float(threshold)
    if math.isinf(value):
        if policy not in list_policies():
            return "inf" if value > 0 else "-inf"
        return "never" if get_policy(policy).cls.leaves_above == (value > 0) else "always"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as ``"42 s"``, ``"7 min 5 s"`` or ``"2 h 3 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
