"""`benchmark.py inference`: how much of what early exits leave out a clock shows.

    python recipes/benchmark.py inference --output recipes/results/benchmark_inference.json --picture saving.png
    python recipes/benchmark.py --model runs/digits-1 --batch_size 1 64

Contestants take turns, round by round; numbers are medians, with quartiles in the file. Run it on a machine that does
nothing else: with several threads on shared cores the times mean nothing.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _cli import parse_arguments
from _inference_contestants import (
    Contestant,
    Plan,
    PlanError,
    Subject,
    by_hand,
    earlyon_batched,
    earlyon_one_by_one,
    export_files,
    load_earlyon,
    load_subject,
    onnx_contestant,
    plan_earlyon,
    plan_for,
    routed,
)
from _inference_report import draw_saving, tables
from _memory import forget_peak, process_memory
from _results import write_results

from erde_hub import __version__, keep_freed_memory
from erde_hub.errors import ConfigError
from erde_hub.streaming import route_batches

NETWORKS = (
    "resnet18",
    "resnet50",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
)
#: A threshold that nobody passes, but for which every head is run: zero would skip them.
NOBODY = 1e-30


@dataclass
class InferenceBenchmark:
    """What is measured, how long, and where the numbers go."""

    model: list[str] = field(
        default_factory=lambda: list(NETWORKS),
        metadata={"help": "checkpoints (folder or Hub repository), or timm names for random weights"},
    )
    exits: int = field(default=3, metadata={"help": "early exits of a timm model, evenly spaced in MACs"})
    batch_size: list[int] = field(default_factory=lambda: [1, 8, 32, 128], metadata={"help": "images per call"})
    cpu_threads: list[int] = field(
        default_factory=lambda: [1, 0],
        metadata={"help": "CPU threads, 0: one per core; everything is run with the first"},
    )
    channels_last: bool = field(default=True, metadata={"help": "the first number of threads in channels_last as well"})
    rounds: int = field(default=150, metadata={"help": "rounds at most; in each, all contestants take turns"})
    seconds: float = field(default=20.0, metadata={"help": "seconds per network and setting, after which rounds end"})
    min_rounds: int = field(default=3, metadata={"help": "rounds at least"})
    peer: bool = field(default=True, metadata={"help": "earlyon beside it, where it is installed and runs"})
    onnx: bool = field(default=True, metadata={"help": "onnxruntime: nested, flat and prefix, float and int8"})
    stream: bool = field(default=True, metadata={"help": "route_batches beside plain batching"})
    memory: bool = field(default=True, metadata={"help": "peak memory, in a process of its own (Linux)"})
    compiled: list[str] = field(
        default_factory=lambda: ["resnet18", "mobilenetv4_conv_small"],
        metadata={
            "help": "networks to run after compile_stages() as well, or none (minutes each; needs a C++ compiler)"
        },
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file for the numbers; networks that it holds from such a machine are kept"},
    )
    picture: str | None = field(default=None, metadata={"help": "picture of realised against ideal saving"})
    only_memory: bool = field(default=False, metadata={"help": "print the peak memory of the first model, no more"})

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("exits", "rounds", "min_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.model or not self.batch_size or not self.cpu_threads:
            raise ConfigError("model, batch_size and cpu_threads need one value at least")
        if min(self.batch_size) < 1 or min(self.cpu_threads) < 0 or self.seconds <= 0:
            raise ConfigError(
                f"batch_size must be at least 1, cpu_threads at least 0 and seconds above 0, got {self.batch_size},"
                f" {self.cpu_threads} and {self.seconds}"
            )


def benchmark_inference(argv: list[str]) -> None:
    """Measures, prints, writes and draws."""
    args, _ = parse_arguments({"benchmark": InferenceBenchmark}, __doc__, argv)
    if args.only_memory:
        print(json.dumps(_peak_memory(load_subject(args.model[0], args.exits), args)))
        return
    environment = {**_environment(), "freed_memory_kept": keep_freed_memory()}
    results: dict[str, Any] = {**environment, "networks": _networks_in(args.output, environment)}
    for name in args.model:
        torch.set_num_threads(_threads(args.cpu_threads[0]))
        subject = load_subject(name, args.exits)
        results["networks"][subject.name] = _measure(subject, name, args)
        results["networks"] = dict(sorted(results["networks"].items(), key=lambda item: _place(item[0])))
        write_results(args.output, results)  # after every network, so that hours are not lost
    print(tables(results))
    if args.picture is not None:
        draw_saving(results, args.picture)


def _networks_in(path: str | None, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds that was measured with the same versions on the same kind of machine; those are kept."""
    if path is None or not Path(path).is_file():
        return {}
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    networks = stored.pop("networks", None)
    return networks if stored == environment and isinstance(networks, dict) else {}


def _place(name: str) -> int:
    """Where a network stands in the file: the default ones first, as they are listed."""
    return NETWORKS.index(name) if name in NETWORKS else len(NETWORKS)


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("torch", "timm", "onnxruntime", "earlyon"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    return {"erde_hub": __version__, **versions, "cpu": cpu, "cores": os.cpu_count()}


def _threads(number: int) -> int:
    return number or os.cpu_count() or 1


@torch.no_grad()
def _measure(subject: Subject, name: str, args: InferenceBenchmark) -> dict[str, Any]:
    table = subject.model.exit_table()
    peer, reason = load_earlyon(subject) if args.peer else (None, "left out")
    result: dict[str, Any] = {
        "weights": subject.weights,
        "input_size": list(subject.model.config.input_size or ()),
        "exits": subject.model.exit_names,
        "macs": table.cumulative_macs,
        "driven_by": "hooks" if subject.model._taps else "stages",
        "earlyon": reason,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "settings": [],
    }
    first = args.cpu_threads[0]
    for threads in args.cpu_threads:
        torch.set_num_threads(_threads(threads))
        for batch in args.batch_size:
            runs = _contestants(subject, batch, peer if threads == first else None, full=threads == first)
            result["settings"].append(_race(subject, runs, batch, threads, False, args))
    torch.set_num_threads(_threads(first))
    if args.channels_last and not _without_maps(subject):
        subject.model.to(memory_format=torch.channels_last)
        for batch in args.batch_size:
            runs = _contestants(subject, batch, None, full=False, channels_last=True)
            result["settings"].append(_race(subject, runs, batch, first, True, args))
        subject.model.to(memory_format=torch.contiguous_format)
    if args.onnx:
        result["onnx"] = _onnx(subject, args)
    if args.stream:
        result["stream"] = [_stream(subject, batch, args) for batch in args.batch_size if 1 < batch <= 32]
    if args.memory:
        result["memory"] = _memory_of(name, args)
    if subject.name in args.compiled:
        result["compiled"] = _compiled(subject, args)
    return result


def _without_maps(subject: Subject) -> bool:
    """Whether the network reads tokens at all its exits, where a memory format of maps says nothing."""
    return all(values["format"] != "NCHW" for values in subject.model.config.exit_features or [])


def shares_of(batch: int, exits: int) -> dict[str, list[int]]:
    """Samples that leave at each early exit: an equal share everywhere, or all but one at the first.

    >>> shares_of(32, 3)
    {'even': [8, 8, 8], 'one_hard': [31, 0, 0]}
    """
    return {"even": [batch // (exits + 1)] * exits, "one_hard": [batch - 1] + [0] * (exits - 1)}


def _contestants(
    subject: Subject, batch: int, peer: Any, full: bool, channels_last: bool = False
) -> tuple[dict[str, Contestant], dict[str, Any]]:
    """Returns functions by name, and the shares that they are run at."""
    model, x = subject.model, subject.images(batch, channels_last)
    early = len(model.heads)
    staged = subject.steps() is not None
    everywhere, nowhere = [True] * early, [None] * early
    runs: dict[str, Contestant] = {
        "bare": lambda: model.backbone(x),
        "never": routed(subject, x, [NOBODY] * early),
        "never, heads skipped": routed(subject, x, [0.0] * early),
    }
    if staged:
        runs["never by hand"] = by_hand(subject, x, nowhere, everywhere)
    shares: dict[str, Any] = {}
    if batch == 1:
        for k in range(early):
            runs[f"exit {k}"] = routed(subject, x, [float("inf") if e == k else 0.0 for e in range(early)])
            if staged:
                leave = [x.new_zeros(0, dtype=torch.int64) if e == k else None for e in range(early)]
                runs[f"exit {k} by hand"] = by_hand(subject, x, leave, [e == k for e in range(early)])
            if full:
                static = model.truncate(k)
                runs[f"static {k}"] = lambda static=static: static(x).logits
        return runs, shares
    for key, counts in shares_of(batch, early).items():
        if key == "one_hard" and not full:
            continue
        plan = _plan(model, x, counts)
        if plan is None:
            continue
        shares[key] = plan.shares(early + 1)
        runs[key] = routed(subject, x, plan.thresholds)
        if staged:
            runs[f"{key} by hand"] = by_hand(subject, x, plan.stays, [n > 0 for n in counts])
        if peer is not None and not channels_last:
            settings = plan_earlyon(peer, x, counts)
            runs[f"earlyon {key}"] = earlyon_batched(peer, x, settings)
            if key == "even" and batch <= 32:  # its time grows with the batch alone
                runs["earlyon one by one"] = earlyon_one_by_one(peer, x, settings)
    return runs, shares


def _plan(model: Any, x: torch.Tensor, counts: Sequence[int]) -> Plan | None:
    try:
        return plan_for(model, x, counts)
    except PlanError as error:
        print(f"  batch {len(x)}: {error}", file=sys.stderr)
        return None


def _race(
    subject: Subject,
    contestants: tuple[dict[str, Contestant], dict[str, Any]],
    batch: int,
    threads: int,
    channels_last: bool,
    args: InferenceBenchmark,
) -> dict[str, Any]:
    runs, shares = contestants
    label = f"batch {batch}, {_threads(threads)} thread(s){', channels_last' if channels_last else ''}"
    times = take_turns(runs, args.rounds, args.min_rounds, args.seconds, f"{subject.name}, {label}")
    return {
        "batch": batch,
        "threads": _threads(threads),
        "channels_last": channels_last,
        "shares": shares,
        **summary(times),
    }


#: A turn lasts at least so many seconds: a server calls one model again and again, and finds its code in the caches.
TURN = 0.03


def take_turns(
    runs: Mapping[str, Contestant], rounds: int, min_rounds: int, seconds: float, label: str = ""
) -> dict[str, list[float]]:
    """Runs every contestant in turn, round by round, beginning with another each time.

    A turn is one call that is not counted, where calls are short, and as many as fill ``TURN``, whose mean counts.

    Returns:
        Seconds per call by name, one value for each round.
    """
    names = list(runs)
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
        for name in names[i % len(names) :] + names[: i % len(names)]:
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
    ("float, all the way", "float flat"),
    ("float, exit 0", "float prefix"),
    ("int8, all the way", "int8 flat"),
    ("int8, exit 0", "int8 prefix"),
    ("int8, all the way", "float, all the way"),
    ("int8, exit 0", "float, exit 0"),
    ("stream", "plain"),
    ("compiled even", "even"),
    ("compiled never", "never"),
    ("compiled exit 0", "exit 0"),
)


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians and quartiles of times, and of ratios within a round, whose two halves saw the same machine."""
    exits = [(name, f"{name} by hand") for name in times if name.startswith("exit ") and f"{name} by hand" in times]
    ratios = {}
    for a, b in (*PAIRS, *exits):
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


def _onnx(subject: Subject, args: InferenceBenchmark) -> dict[str, Any]:
    """Batch 1 in onnxruntime, with the first number of threads."""
    early, x = len(subject.model.heads), subject.images(1)
    threads = _threads(args.cpu_threads[0])
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = export_files(subject, Path(folder))
        except Exception as error:  # noqa: BLE001 - what cannot be exported is a line of the report
            return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        runs: dict[str, Contestant] = {"torch, all the way": routed(subject, x, [NOBODY] * early)}
        for kind in ("float", "int8"):
            nobody, everybody = [0.0] * early, [float("inf")] * early
            runs[f"{kind} flat"] = onnx_contestant(files[f"{kind}_flat"], x, nobody, threads)
            runs[f"{kind}, all the way"] = onnx_contestant(files[f"{kind}_nested"], x, nobody, threads)
            runs[f"{kind}, exit 0"] = onnx_contestant(files[f"{kind}_nested"], x, everybody, threads)
            runs[f"{kind} prefix"] = onnx_contestant(files[f"{kind}_prefix"], x, everybody, threads)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        times = take_turns(runs, args.rounds, args.min_rounds, args.seconds, f"{subject.name}, onnxruntime")
    return {"batch": 1, "threads": threads, "bytes": sizes, **summary(times)}


def _stream(subject: Subject, batch: int, args: InferenceBenchmark) -> dict[str, Any]:
    """Images per second of a stream of batches, routed one by one and with places refilled."""
    model, count = subject.model, max(8, 64 // batch)
    batches = list(subject.images(batch * count).split(batch))
    plan = _plan(model, torch.cat(batches[: max(1, 64 // batch)]), shares_of(max(batch, 64), len(model.heads))["even"])
    if plan is None:
        return {"batch": batch, "reason": "no thresholds divide the images evenly"}

    def plain() -> list[Any]:
        return [model(x, threshold=plan.thresholds) for x in batches]

    def stream() -> list[Any]:
        return list(route_batches(model, batches, threshold=plan.thresholds, batch_size=batch))

    counted = torch.bincount(torch.cat([out.exit_index for out in stream()]), minlength=len(model.heads) + 1)
    label = f"{subject.name}, stream of {count} batches of {batch}"
    times = take_turns({"plain": plain, "stream": stream}, args.rounds, args.min_rounds, args.seconds, label)
    result = summary(times)
    images = batch * count
    speed = {name: images / spread["median"] for name, spread in result["seconds"].items()}
    return {
        "batch": batch, "batches": count, "shares": (counted / images).tolist(), "images_per_second": speed, **result
    }  # fmt: skip


def _compiled(subject: Subject, args: InferenceBenchmark) -> dict[str, Any]:
    """The same model before and after compile_stages(); counts what was compiled while the batch shrank."""
    if subject.model._taps:
        return {"reason": "driven by hooks: there are no stages to compile"}
    plain, batch = subject.model, max(b for b in args.batch_size if b <= 32)
    runs: dict[str, Contestant] = {}
    x, early = subject.images(batch), len(plain.heads)
    plan = _plan(plain, x, shares_of(batch, early)["even"]) if batch > 1 else None
    other = Subject(subject.name, copy.deepcopy(plain), subject.weights)
    began = time.perf_counter()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        other.model.compile_stages()
        for who, owner in (("", subject), ("compiled ", other)):
            runs[f"{who}never"] = routed(owner, x, [NOBODY] * early)
            runs[f"{who}exit 0"] = routed(owner, subject.images(1), [float("inf")] + [0.0] * (early - 1))
            if plan is not None:
                runs[f"{who}even"] = routed(owner, x, plan.thresholds)
        for run in runs.values():
            run()
        for size in range(batch - 1, 1, -7):  # other sizes of the same batch
            other.model(x[:size], threshold=plan.thresholds if plan is not None else [NOBODY] * early)
    except Exception as error:  # noqa: BLE001 - a machine without a compiler is a line of the report
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    seconds = time.perf_counter() - began
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    label = f"{subject.name}, compiled in {seconds:.0f} s"
    times = take_turns(runs, args.rounds, args.min_rounds, args.seconds, label)
    return {"batch": batch, "compile_seconds": seconds, "graphs": graphs, "parts": 2 * early + 1, **summary(times)}


# Memory, in a process of its own


def _peak_memory(subject: Subject, args: InferenceBenchmark) -> dict[str, Any]:
    torch.set_num_threads(_threads(args.cpu_threads[0]))
    batch = max([b for b in args.batch_size if b <= 32])
    x = subject.images(batch)
    with torch.no_grad():
        plan = _plan(subject.model, x, shares_of(batch, len(subject.model.heads))["even"])
        thresholds = plan.thresholds if plan is not None else [NOBODY] * len(subject.model.heads)
        peaks: dict[str, list[float]] = {"bare": [], "routed": []}
        runs = {"bare": lambda: subject.model.backbone(x), "routed": routed(subject, x, thresholds)}
        for _ in range(3):
            for name, run in runs.items():
                run()
                before = forget_peak()
                run()
                peaks[name].append(process_memory("VmHWM") - before)
    return {"batch": batch, "mib": {name: min(values) for name, values in peaks.items()}}


def _memory_of(name: str, args: InferenceBenchmark) -> dict[str, Any]:
    """Runs this script once more, with an allocator that hands freed memory back at once."""
    if not Path("/proc/self/clear_refs").exists():
        return {"reason": "the peak memory is measured on Linux only"}
    script = Path(__file__).with_name("benchmark.py")
    flags = ["--model", name, "--exits", str(args.exits), "--only_memory", "--cpu_threads", str(args.cpu_threads[0])]
    sizes = ["--batch_size", *(str(b) for b in args.batch_size)]
    eager = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc
    run = subprocess.run(
        [sys.executable, str(script), "inference", *flags, *sizes],
        capture_output=True,
        text=True,
        env=os.environ | eager,
        check=False,
    )
    if run.returncode:
        return {"reason": f"the process of its own failed: {run.stderr[-300:]}"}
    return json.loads(run.stdout.splitlines()[-1])
