"""Tables of docs/experiments/speed.md: the allocator, loading, int8 and generation, from recipes/results/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pages.markdown import load, table

#: At most so many times the bare model's time, or so many seconds more: the larger counts.
TIME_BOUND, SECONDS_BOUND = 1.3, 0.1
#: Private memory at its peak, in units of the weights.
MEMORY_BOUND = 1.2


def allocator_table(results: Mapping[str, Any]) -> str:
    """Milliseconds per image of both sides."""
    batch = results["batch_size"]
    header = ("network, no exits", "ms per image as it comes", "keep_freed_memory()", "times faster")
    rows = [
        (
            f"`{name}`",
            *(f"{1e3 * seconds[side] / batch:.1f}" for side in ("default", "kept")),
            f"{seconds['default'] / seconds['kept']:.2f}",
        )
        for name, seconds in results["seconds"].items()
    ]
    return table(header, rows)


def time_bound(bare: float) -> float:
    """The most seconds that loading may take where the bare model takes ``bare``."""
    return max(TIME_BOUND * bare, bare + SECONDS_BOUND)


def loading_table(results: Mapping[str, Any]) -> str:
    """Time and memory of both sides."""
    header = (
        "network with three exits",
        "weights, MiB",
        "bare model, s",
        "with exits, s",
        "at most, s",
        f"private memory at its peak / weights (at most {MEMORY_BOUND})",
        "the bare model's",
    )
    rows = []
    for name, found in results["networks"].items():
        own, bare = found["exits"], found["bare"]
        late = " (missed)" if own["seconds"] > time_bound(bare["seconds"]) else ""
        large = " (missed)" if own["peak_memory"] > MEMORY_BOUND else ""
        rows.append(
            (
                f"`{name}`",
                f"{own['weights_mib']:.1f}",
                f"{bare['seconds']:.3f}",
                f"{own['seconds']:.3f}{late}",
                f"{time_bound(bare['seconds']):.3f}",
                f"{own['peak_memory']:.2f}{large}",
                f"{bare['peak_memory']:.2f}",
            )
        )
    return table(header, rows)


def int8_table(results: Mapping[str, Any]) -> str:
    """Float and int8 side by side."""
    header = ("checkpoint", "threshold", "accuracy, float", "int8", "ms per image, float", "int8", "MB, float", "int8")
    rows = []
    for name, entry in results["models"].items():
        sizes = [f"{entry['bytes'][kind] / 1e6:.2f}" for kind in ("float", "int8")]
        for row in entry["rows"]:
            accuracies = [f"{100 * row[kind]['accuracy']:.1f} %" for kind in ("float", "int8")]
            times = [f"{row[kind]['ms_per_image']['median']:.2f}" for kind in ("float", "int8")]
            threshold = row["threshold"]
            shown = " ".join(f"{t:.3g}" for t in (threshold if isinstance(threshold, list) else [threshold]))
            rows.append((name, shown, *accuracies, *times, *sizes))
    return table(header, rows)


def generation_table(results: Mapping[str, Any]) -> str:
    """Every way to generate, without transformers' own ones that have a partner, which the last columns compare."""
    threads = results["threads"]
    header = ["way", "layers a token", "tokens as in greedy text %"]
    for timed in threads:
        number = f"{timed['threads']} thread{'s' if timed['threads'] > 1 else ''}"
        header += [f"tokens/s, {number}", "times the bare model", "times transformers' own"]
    rows = []
    for name, work in results["work"].items():
        if name.startswith("transformers, "):
            continue
        cells = [f"{work['layers_per_token']:.2f}", f"{100 * work['same_text']:.0f}"]
        for timed in threads:
            cells.append(f"{timed['tokens_per_second'][name]:.1f}")
            for other in ("bare", f"transformers, {name}"):
                ratio = timed["ratios"].get(f"{name} / {other}")
                cells.append("-" if ratio is None else f"{1 / ratio['median']:.2f}")
        rows.append((name, *cells))
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "allocator": lambda: allocator_table(load("benchmark_allocator")),
    "loading": lambda: loading_table(load("benchmark_loading")),
    "int8": lambda: int8_table(load("benchmark_int8")),
    "generation": lambda: generation_table(load("benchmark_generation")),
}
