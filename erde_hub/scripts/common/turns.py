"""Contestants take turns, and what is made of their times: medians, quartiles, and ratios within a round."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Contestant = Callable[[], Any]

#: A turn lasts at least so many seconds: a server calls one model again and again, and finds its code in the caches.
TURN = 0.03


def take_turns(
    runs: Mapping[str, Contestant], rounds: int, min_rounds: int, seconds: float, label: str = ""
) -> dict[str, list[float]]:
    """Runs every contestant in turn, round by round, in another order each time.

    In one order that only rotates, each would always find the caches as the same other one left them. A turn is one
    call that is not counted, where calls are short, and as many as fill ``TURN``, whose mean counts.

    Returns:
        Seconds per call by name, one value for each round.
    """
    names, orders = list(runs), random.Random(0)
    calls: dict[str, int] = {}
    for name, run in runs.items():  # what is allocated, chosen or compiled on first use is no part of it
        once = _seconds(run, 1)
        if once < 1:
            once = _seconds(run, 1)
        calls[name] = max(1, round(TURN / once))
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for i in range(rounds):
        if i >= min_rounds and time.perf_counter() - began > seconds:
            break
        for name in orders.sample(names, len(names)):
            if calls[name] > 1:
                runs[name]()
            times[name].append(_seconds(runs[name], calls[name]))
    if label:
        print(f"{label}: {len(times[names[0]])} rounds in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return times


def _seconds(run: Contestant, calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


#: Whose time is divided by whose.
PAIRS = (
    ("never", "never by hand"),
    ("never, heads skipped", "bare"),
    ("even", "even by hand"),
    ("one_hard", "one_hard by hand"),
    ("even", "earlyon even"),
    ("even", "earlyon one by one"),
    ("one_hard", "earlyon one_hard"),
    ("never", "earlyon never"),
    ("float, all the way", "float flat"),
    ("float, exit 0", "float prefix"),
    ("int8, all the way", "int8 flat"),
    ("int8, exit 0", "int8 prefix"),
    ("int8, all the way", "float, all the way"),
    ("int8, exit 0", "float, exit 0"),
    ("float, even", "torch, even"),
    ("int8, even", "float, even"),
    ("stream", "plain"),
    ("compiled even", "even"),
    ("compiled never", "never"),
    ("compiled exit 0", "exit 0"),
)


def summary(times: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Medians and quartiles of times, and of ratios within a round, whose two halves saw the same machine.

    Args:
        times: By name, one value for each round.
        pairs: Whose time is also divided by whose.
    """
    exits = [(name, other) for name in times for other in (f"{name} by hand", f"earlyon {name}") if name[:5] == "exit "]
    by_hand = [(f"{key} by hand", f"earlyon {key}") for key in ("even", "one_hard")]
    by_hand.append(("even by hand", "earlyon one by one"))
    of_bare = [(name, "bare") for name in times if name != "bare"]
    ratios = {}
    for a, b in (*PAIRS, *pairs, *exits, *by_hand, *of_bare):
        if a in times and b in times:
            ratios[f"{a} / {b}"] = _spread([p / q for p, q in zip(times[a], times[b], strict=True)])
    return {
        "rounds": len(next(iter(times.values()))),
        "seconds": {name: _spread(values) for name, values in times.items()},
        "ratios": ratios,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}
