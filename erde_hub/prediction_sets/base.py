"""What sets of classes and intervals have in common."""

from __future__ import annotations

from dataclasses import dataclass

from erde_hub.errors import ConfigError


@dataclass(frozen=True)
class SetMetrics:
    """How good sets are, per exit.

    Attributes:
        size: Mean number of classes, or mean length of intervals.
        coverage: Fraction of samples whose truth is in the set.
        coverage_so_far: Fraction whose truth is in the sets of this exit and of all before.
        consistency: Mean fraction of a set that is left after intersecting it with all before, 1 where sets are nested;
            two empty ones count 1.
    """

    size: list[float]
    coverage: list[float]
    coverage_so_far: list[float]
    consistency: list[float]


def check_alpha(alpha: float) -> float:
    """Returns an error rate between 0 and 1, both excluded; raises :class:`ConfigError` otherwise."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        raise ConfigError(f"alpha must be between 0 and 1, both excluded, got {alpha!r}")
    return float(alpha)
