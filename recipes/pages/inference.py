"""What the inference benchmark found, as tables, as targets met or missed, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pages.markdown import load, table

from erde_hub.errors import ResultsError
from erde_hub.evaluation.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
FILE = "benchmark_inference"

#: Name of a target, its bound.
BOUNDS = {
    "never leaving / bare backbone and heads by hand": 1.02,
    "batch 1 leaving at exit k / stages and head by hand, worst k": 1.05,
    "batch 32, a quarter leaving at each exit / ideal": 1.08,
    "peak memory of a routed batch / bare backbone": 1.05,
    "batch 32, a quarter at each exit / earlyon's batched call": 0.85,
    "batch 32, a quarter at each exit / earlyon one by one": 0.95,
    "batch 32, 31 leaving at exit 0, one never / earlyon's batched call": 0.4,
}
#: Nothing was aimed at here, but a user of one image at a time will ask.
PEER = "batch 1 leaving at exit 0 / earlyon's call"
#: The same layers twice, once through the wrapper with all exits off: how far apart two times can be for no reason.
CONTROL = "exits off (threshold 0) / bare backbone, the same layers"


@dataclass(frozen=True)
class Target:
    """One bound and what was measured.

    Attributes:
        name: What is divided by what.
        network: Which.
        value: Median of the ratio.
        bound: At most; None where nothing was aimed at.
        ideal: What the stages called by hand reach, where the bound is on a ratio to something else.
    """

    name: str
    network: str
    value: float
    bound: float | None
    ideal: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value is within the bound."""
        return self.bound is None or self.value <= self.bound


def targets(results: Results) -> list[Target]:
    """The bounds that the measurements speak to, with one thread and the default memory format."""
    found: list[Target] = []
    for network, entry in results["networks"].items():
        for name, bound in {**BOUNDS, PEER: None, CONTROL: None}.items():
            found += [Target(name + w, network, value, bound, ideal) for w, value, ideal in _values(name, entry)]
        found += _onnx_targets(network, entry.get("onnx") or {})
    return found


def _values(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    if name.startswith("peak memory"):
        memory = entry.get("memory") or {}
        if "mib" in memory:
            yield "", memory["mib"]["routed"] / memory["mib"]["bare"], None
        return
    for setting in entry["settings"]:
        if setting["threads"] != 1 or setting["channels_last"]:
            continue
        ratios, batch = setting["ratios"], setting["batch"]
        if name.startswith("never") and batch in (1, 32) and "never / never by hand" in ratios:
            yield f", batch {batch}", ratios["never / never by hand"]["median"], None
        if name == PEER and batch == 1 and "exit 0 / earlyon exit 0" in ratios:
            yield "", ratios["exit 0 / earlyon exit 0"]["median"], None
        if name == CONTROL and batch in (1, 32) and "never, heads skipped / bare" in ratios:
            yield f", batch {batch}", ratios["never, heads skipped / bare"]["median"], None
        if name.startswith("batch 1 leaving at exit k") and batch == 1:
            exits = [r["median"] for key, r in ratios.items() if key.startswith("exit ") and key.endswith("by hand")]
            if exits:
                yield "", max(exits), None
        if name.startswith("batch 32") and batch == 32:
            key = {
                "ideal": "even / even by hand",
                "one by one": "even / earlyon one by one",
                "never / earlyon's batched call": "one_hard / earlyon one_hard",
                "exit / earlyon's batched call": "even / earlyon even",
            }
            pair = next(pair for ending, pair in key.items() if name.endswith(ending))
            if pair in ratios:
                ours, theirs = pair.split(" / ")
                ideal = ratios.get(f"{ours} by hand / {theirs}", {}).get("median")
                yield "", ratios[pair]["median"], ideal


def _onnx_targets(network: str, onnx: Mapping[str, Any]) -> Iterator[Target]:
    if "ratios" not in onnx:
        return
    flat, prefix = (onnx["seconds"][name]["median"] for name in ("float flat", "float prefix"))
    whole, first = (onnx["ratios"][f"float, {a} / float {b}"]["median"] for a, b in _ONNX_PAIRS)
    yield Target("onnxruntime: nested, all the way / flat", network, whole, 1.15 if flat < 5e-3 else 1.05)
    yield Target("onnxruntime: nested, leaving at exit 0 / prefix", network, first, 1.2 if prefix < 1e-3 else 1.1)


_ONNX_PAIRS = (("all the way", "flat"), ("exit 0", "prefix"))


def target_rows(results: Results) -> list[tuple[str, ...]]:
    """One row per target: what, the bound, the value for every network; values that miss are marked."""
    networks = list(results["networks"])
    by_name: dict[str, dict[str, Target]] = {}
    for target in targets(results):
        by_name.setdefault(target.name, {})[target.network] = target
    rows = []
    for name, own in by_name.items():
        bounds = sorted({target.bound for target in own.values() if target.bound is not None})
        cells = [_verdict(own[n]) if n in own else "-" for n in networks]
        rows.append((name, " or ".join(f"{bound:g}" for bound in bounds) or "-", *cells))
    return rows


def _verdict(target: Target) -> str:
    if target.met:
        return f"{target.value:.3f}"
    ideal = "" if target.ideal is None else f"; by hand {target.ideal:.3f}"
    return f"{target.value:.3f} (missed{ideal})"


# docs/experiments/speed.md


def saving_table() -> str:
    """How much time is saved, beside the same stages called by hand, in per cent of the bare backbone's."""
    results = load(FILE)
    header = (
        "network",
        "one image, out at exit 0",
        "32 images, a quarter out at each exit",
        "32 images, 31 out at exit 0",
    )
    rows = []
    for name, entry in results["networks"].items():
        cells = [_saving(entry, batch, key) for batch, key in ((1, "exit 0"), (32, "even"), (32, "one_hard"))]
        rows.append((f"`{name}`", *cells))
    where = (
        f"{results['cpu']}, one thread, torch {results['torch']}; time saved, in brackets by the stages called by hand"
    )
    words = "Time saved by routing against time saved by the same stages called by hand"
    picture = f"![{words}](../../recipes/results/benchmark_inference.png)"
    return f"{picture}\n\n{table(header, rows)}\n\n{where}."


def _saving(entry: Mapping[str, Any], batch: int, key: str) -> str:
    for setting in entry["settings"]:
        plain = setting["threads"] == 1 and not setting["channels_last"]
        if plain and setting["batch"] == batch and f"{key} by hand / bare" in setting["ratios"]:
            real, ideal = (1 - setting["ratios"][f"{name} / bare"]["median"] for name in (key, f"{key} by hand"))
            return f"{100 * real:.0f} % ({100 * ideal:.0f} %)"
    return "-"


def bounds_table() -> str:
    """What was aimed at and what was reached, misses included."""
    results = load(FILE)
    rows = [(row[0], row[1], *row[2:]) for row in target_rows(results)]
    return table(("time or memory, divided by", "at most", *results["networks"]), rows)


#: Ratios of one image in `batch1_table`, and their bounds: the worst exit, then pairs of the benchmark.
BATCH1 = {
    "leaving at exit k / stages and head by hand, worst k": 1.05,
    "exit 0 / earlyon exit 0": 1.02,
    "never, heads skipped / bare": None,
}


def batch1_table() -> str:
    """One image at a time in several runs: the median over the runs, and the lowest and the highest."""
    networks = load(f"{FILE}_batch1")["networks"]
    rows = []
    for name, bound in BATCH1.items():
        cells = []
        for entry in networks.values():
            runs = sorted(_of_one_image(name, setting["ratios"]) for setting in entry["settings"])
            middle = statistics.median(runs)
            missed = bound is not None and round(middle, 3) > bound
            cells.append(f"{middle:.3f}{' (missed)' if missed else ''}, {runs[0]:.3f} to {runs[-1]:.3f}")
        rows.append((name, "-" if bound is None else f"{bound:g}", *cells))
    return table(("time, divided by", "at most", *networks), rows)


def _of_one_image(name: str, ratios: Mapping[str, Mapping[str, float]]) -> float:
    if name in ratios:
        return ratios[name]["median"]
    return max(r["median"] for pair, r in ratios.items() if pair.startswith("exit ") and pair.endswith("by hand"))


def compiled_table() -> str:
    """What ``compile_stages()`` makes of the times, and what compiling takes."""
    results = load(FILE)
    header = ("network", "batch, never leaving", "a quarter out at each exit", "one image, out at 0", "graphs", "s")
    rows = []
    for name, entry in results["networks"].items():
        compiled = entry.get("compiled") or {}
        if "ratios" not in compiled:
            continue
        times = [compiled["ratios"].get(f"compiled {key} / {key}") for key in ("never", "even", "exit 0")]
        cells = ["-" if ratio is None else f"{ratio['median']:.2f}" for ratio in times]
        rows.append(
            (
                f"`{name}`",
                *cells,
                f"{compiled['graphs']} for {compiled['parts']} parts",
                f"{compiled['compile_seconds']:.0f}",
            )
        )
    return table(header, rows)


def exported_table() -> str:
    """Exported files of texts and for one sample, next to the flat graph and to the part up to exit 0."""
    rows = []
    for row in load("benchmark_exported")["rows"]:
        cells = []
        for kind in ("executorch",) if row["file"].startswith("ExecuTorch") else ("float", "int8"):
            ratios = [row["ratios"][f"{kind}, {way} / {kind} {peer}"]["median"] for way, peer in _ONNX_PAIRS]
            cells += [f"{ratio:.3f}" for ratio in ratios]
        cells += ["-"] * (4 - len(cells))
        rows.append((f"`{row['model']}`", row["file"].removeprefix("batch "), row["inputs"], *cells))
    columns = [f"{kind}, {way} / {peer}" for kind in ("float", "int8") for way, peer in _ONNX_PAIRS]
    return table(("network", "batch of the file", "inputs", *columns), rows)


def stream_table() -> str:
    """Images per second of a stream."""
    results = load(FILE)
    rows = []
    for name, entry in results["networks"].items():
        for stream in entry.get("stream") or []:
            if "images_per_second" in stream:
                speed = stream["images_per_second"]
                ratio = speed["stream"] / speed["plain"]
                batch = str(stream["batch"])
                rows.append((f"`{name}`", batch, f"{speed['plain']:.1f}", f"{speed['stream']:.1f}", f"{ratio:.2f}"))
    return table(("network", "batch", "`model(x)`, images/s", "`route_batches`, images/s", "times"), rows)


# The picture

#: Okabe and Ito's palette; shapes differ as well.
_LOOKS = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#000000", "P"),
)  # fmt: skip


def saving_points(results: Results) -> dict[str, list[tuple[float, float, int]]]:
    """Per network: ideal saving, realised saving (fractions of the bare backbone's time) and batch, with one thread."""
    points: dict[str, list[tuple[float, float, int]]] = {}
    for name, entry in results["networks"].items():
        own = points.setdefault(name, [])
        for setting in entry["settings"]:
            if setting["threads"] != 1 or setting["channels_last"]:
                continue
            ratios = {pair: spread["median"] for pair, spread in setting["ratios"].items()}
            for key in setting["seconds"]:
                if f"{key} by hand / bare" in ratios and key != "never":
                    own.append((1 - ratios[f"{key} by hand / bare"], 1 - ratios[f"{key} / bare"], setting["batch"]))
    return points


def draw_saving(results: Results, path: str) -> None:
    """Draws how much time routing saves against how much the same stages called by hand save.

    On the diagonal nothing is lost. Filled marks are batches in which samples leave at different exits; hollow ones are
    single images that leave at one exit.

    Raises:
        MissingDependencyError: matplotlib or adjustText is not installed.
        ResultsError: Nothing was measured with one thread beside the stages by hand.
    """
    points = {name: own for name, own in saving_points(results).items() if own}
    if not points:
        raise ResultsError("nothing to draw: no setting with one thread has the stages called by hand beside it")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([-10, 100], [-10, 100], color="#777777", linewidth=1.5, zorder=1)
        lowest = 0.0
        for (name, own), (color, marker) in zip(
            points.items(), _LOOKS * (1 + len(points) // len(_LOOKS)), strict=False
        ):
            label = name
            for single, fill in ((False, color), (True, "white")):
                shown = [(100 * x, 100 * y) for x, y, batch in own if (batch == 1) is single]
                if shown:
                    xs, ys = zip(*shown, strict=True)
                    lowest = min(lowest, *ys)
                    axes.plot(
                        xs,
                        ys,
                        marker,
                        markerfacecolor=fill,
                        markeredgecolor=color if single else "white",
                        markeredgewidth=2 if single else 0.8,
                        markersize=8,
                        zorder=3,
                        label=label,
                    )
                    label = None
        axes.plot(
            [], [], "o", markerfacecolor="white", markeredgecolor="#444444", markeredgewidth=2, label="batch of 1"
        )
        axes.set_xlim(-3, 100)
        axes.set_ylim(min(-3, lowest - 3), 100)
        axes.set_aspect("equal", adjustable="box")
        axes.set_xlabel("time saved by the same stages called by hand (%)")
        axes.set_ylabel("time saved by routing (%)")
        axes.text(78, 82, "nothing lost", rotation=45, rotation_mode="anchor", color="#555555", fontsize=10.5)
        figure.legend(loc="outside lower center", ncols=3)

    save_figure(draw, path, (6.4, 6.2))


TABLES: dict[str, Callable[[], str]] = {
    "saving": saving_table,
    "bounds": bounds_table,
    "batch1": batch1_table,
    "exported": exported_table,
    "compiled": compiled_table,
    "stream": stream_table,
}
