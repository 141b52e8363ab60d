"""What the inference benchmark measures beside its settings: onnxruntime, streams, compiled stages and memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from process_memory import forget_peak, process_memory
from torch import Tensor

from erde_hub import EarlyExitWrapper
from erde_hub.engine.streaming import route_batches
from erde_hub.scripts.common.contestants import (
    NOBODY,
    Subject,
    routed,
    shares_of,
    thread_count,
    try_plan,
)
from erde_hub.scripts.common.turns import Contestant, summary, take_turns

if TYPE_CHECKING:
    from inference import InferenceBenchmark


def onnx_times(subject: Subject, args: InferenceBenchmark) -> list[dict[str, Any]]:
    """Onnxruntime with the first number of threads: batch 1, then the other batches up to 32."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = export_files(subject.model, {"pixel_values": subject.images(4)}, Path(folder))
        except Exception as error:  # noqa: BLE001 - what cannot be exported is a line of the report
            return [{"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}]
        sizes = {name: path.stat().st_size for name, path in files.items()}
        first, *others = (_onnx(subject, files, b, args) for b in (1, *(b for b in args.batch_size if 1 < b <= 32)))
    return [{"bytes": sizes, **first}, *others]


def _onnx(subject: Subject, files: Mapping[str, Path], batch: int, args: InferenceBenchmark) -> dict[str, Any]:
    """One batch size. A file goes on with the whole batch as long as anybody is left in it."""
    early, x, threads = subject.model.num_exits - 1, subject.images(batch), thread_count(args.cpu_threads[0])
    runs: dict[str, Contestant] = {"torch, all the way": routed(subject, x, [NOBODY] * early)}
    inputs = {"pixel_values": x}
    thresholds = {"all the way": [0.0] * early, "exit 0": [float("inf")] * early}
    plan = try_plan(subject.model, x, shares_of(batch, early)["even"]) if batch > 1 else None
    if plan is not None:
        thresholds["even"] = plan.thresholds
        runs["torch, even"] = routed(subject, x, plan.thresholds)
    for kind in ("float", "int8"):
        runs[f"{kind} flat"] = onnx_contestant(files[f"{kind}_flat"], inputs, [0.0] * early, threads)
        runs[f"{kind} prefix"] = onnx_contestant(files[f"{kind}_prefix"], inputs, [0.0] * early, threads)
        for name, values in thresholds.items():
            runs[f"{kind}, {name}"] = onnx_contestant(files[f"{kind}_nested"], inputs, values, threads)
    label = f"{subject.name}, onnxruntime, batch {batch}"
    times = take_turns(runs, args.rounds, args.min_rounds, args.seconds, label)
    return {"batch": batch, "threads": threads, **summary(times)}


def stream_of(subject: Subject, batch: int, args: InferenceBenchmark) -> dict[str, Any]:
    """Images per second of a stream of batches, routed one by one and with places refilled."""
    model, count = subject.model, max(8, 64 // batch)
    batches = list(subject.images(batch * count).split(batch))
    plan = try_plan(
        model, torch.cat(batches[: max(1, 64 // batch)]), shares_of(max(batch, 64), model.num_exits - 1)["even"]
    )
    if plan is None:
        return {"batch": batch, "reason": "no thresholds divide the images evenly"}

    def plain() -> list[Any]:
        return [model(x, threshold=plan.thresholds) for x in batches]

    def stream() -> list[Any]:
        return list(route_batches(model, batches, threshold=plan.thresholds, batch_size=batch))

    counted = torch.bincount(torch.cat([out.exit_index for out in stream()]), minlength=model.num_exits)
    label = f"{subject.name}, stream of {count} batches of {batch}"
    times = take_turns({"plain": plain, "stream": stream}, args.rounds, args.min_rounds, args.seconds, label)
    result = summary(times)
    images = batch * count
    speed = {name: images / spread["median"] for name, spread in result["seconds"].items()}
    return {
        "batch": batch, "batches": count, "shares": (counted / images).tolist(), "images_per_second": speed, **result
    }  # fmt: skip


def compiled_stages(subject: Subject, args: InferenceBenchmark) -> dict[str, Any]:
    """The same model before and after compile_stages(); counts what was compiled while the batch shrank."""
    if subject.stages() is None:
        return {"reason": "driven by hooks: there are no stages to compile"}
    plain, batch = subject.model, max(b for b in args.batch_size if b <= 32)
    runs: dict[str, Contestant] = {}
    x, early = subject.images(batch), len(plain.heads)
    plan = try_plan(plain, x, shares_of(batch, early)["even"]) if batch > 1 else None
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


# onnxruntime


def export_files(
    model: EarlyExitWrapper, inputs: dict[str, Tensor], folder: Path, batch_size: int | None = None
) -> dict[str, Path]:
    """Writes nested, flat and prefix, in float and in int8; returns the files by name."""
    import onnx  # noqa: PLC0415 - an extra
    import onnx_ir as ir  # noqa: PLC0415 - as above

    from erde_hub.export import EarlyExitSession, export_onnx  # noqa: PLC0415 - as above
    from erde_hub.export.flat import flat_model  # noqa: PLC0415 - as above
    from erde_hub.export.onnx_file import DEFAULT_OPSET  # noqa: PLC0415 - as above
    from erde_hub.export.quantization import calibration_batches, quantize_flat  # noqa: PLC0415 - as above

    files = {}
    for kind in ("float", "int8"):
        files[f"{kind}_nested"] = export_onnx(
            model,
            folder / f"{kind}_nested.onnx",
            batch_size=batch_size,
            calibration_data=[inputs] if kind == "int8" else None,
        )
        flat = flat_model(model, DEFAULT_OPSET, batch_size)
        if kind == "int8":
            info = EarlyExitSession(files["int8_nested"]).info
            flat = quantize_flat(flat, calibration_batches([inputs], info))
        names = [value.name for value in flat.graph.inputs if value.name != "threshold"]
        files[f"{kind}_flat"] = folder / f"{kind}_flat.onnx"
        ir.save(flat, files[f"{kind}_flat"])
        files[f"{kind}_prefix"] = folder / f"{kind}_prefix.onnx"
        onnx.utils.extract_model(str(files[f"{kind}_flat"]), str(files[f"{kind}_prefix"]), names, ["logits_0"])
    return files


def onnx_contestant(path: Path, inputs: Mapping[str, Tensor], thresholds: Sequence[float], threads: int) -> Contestant:
    """One run of a file."""
    import onnxruntime  # noqa: PLC0415 - an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {name: value.numpy() for name, value in inputs.items()}
    feed["threshold"] = torch.tensor(list(thresholds)).numpy()
    feed = {name: feed[name] for name in (given.name for given in session.get_inputs())}
    return lambda: session.run(None, feed)


# Memory, in a process of its own


def peak_memory(subject: Subject, args: InferenceBenchmark) -> dict[str, Any]:
    """Peak memory of this process above where a call starts, of the bare backbone and of a routed batch (MiB)."""
    torch.set_num_threads(thread_count(args.cpu_threads[0]))
    batch = max([b for b in args.batch_size if b <= 32])
    x = subject.images(batch)
    with torch.no_grad():
        plan = try_plan(subject.model, x, shares_of(batch, subject.model.num_exits - 1)["even"])
        thresholds = plan.thresholds if plan is not None else [NOBODY] * (subject.model.num_exits - 1)
        peaks: dict[str, list[float]] = {"bare": [], "routed": []}
        runs = {"bare": lambda: subject.model.backbone(x), "routed": routed(subject, x, thresholds)}
        for _ in range(3):
            for name, run in runs.items():
                run()
                before = forget_peak()
                run()
                peaks[name].append(process_memory("VmHWM") - before)
    return {"batch": batch, "mib": {name: min(values) for name, values in peaks.items()}}


def memory_of(name: str, args: InferenceBenchmark) -> dict[str, Any]:
    """Runs this script once more, with an allocator that hands freed memory back at once."""
    if not Path("/proc/self/clear_refs").exists():
        return {"reason": "the peak memory is measured on Linux only"}
    script = Path(__file__).with_name("inference.py")
    flags = ["--model", name, "--exits", str(args.exits), "--only_memory", "--cpu_threads", str(args.cpu_threads[0])]
    sizes = ["--batch_size", *(str(b) for b in args.batch_size)]
    eager = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc
    run = subprocess.run(
        [sys.executable, str(script), *flags, *sizes],
        capture_output=True,
        text=True,
        env=os.environ | eager,
        check=False,
    )
    if run.returncode:
        return {"reason": f"the process of its own failed: {run.stderr[-300:]}"}
    return json.loads(run.stdout.splitlines()[-1])
