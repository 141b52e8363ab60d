"""Exports one network of each of twenty families in every form and compares the answers of every runtime with torch's.

    python recipes/studies/export_matrix.py                       # all, about fifteen minutes on one core
    python recipes/studies/export_matrix.py --only ResNet Bert    # some; the other rows are kept
    python recipes/studies/export_matrix.py --seconds 1           # times as well, on a machine that does nothing else

Networks are small and random, their exits decide differently from sample to sample. The limits, fixed before any file
was compared by them, on 64 samples:

- float: every sample takes the exit that it takes in torch, at thresholds away from its scores, at one that nobody
  passes and at one that all pass, and logits differ by at most 1e-3 of the largest. Sums in another order differ by
  about 1e-6; a thousand times as much is another computation.
- int8: at least 90 % of the answers, at the first exit and at the last, are the class that torch answers in float.
  Rounding changes answers near ties, which random networks have many of. Files with a fault (samples mixed up, a head
  that gives zeros) agree about as often as chance, 20 %. The exit may differ at thresholds in between; random exits
  disagree, so that answers there would say nothing of the rounding.

Runtimes that are not installed keep the rows they have. The result is recipes/results/export_matrix.json, from which
`make_tables.py` makes the table in docs/deploy.md.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from support_matrix import example, lively, routed
from support_models import TRANSFORMERS_TEXT, TRANSFORMERS_VISION, transformers_model
from torch import Tensor
from transformers.hf_argparser import HfArg

import erde_hub
from erde_hub import EarlyExitWrapper
from erde_hub.errors import ErdeError, unknown_name
from erde_hub.export import EarlyExitSession, check_onnx, export_onnx
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results

OUTPUT = Path(__file__).parents[1] / "results" / "export_matrix.json"
#: Classes of transformers, without their endings; those of timm are tried by support_matrix.py, in onnxruntime.
FAMILIES = (
    *(
        "ResNet",
        "RegNet",
        "ConvNext",
        "MobileNetV2",
        "MobileViT",
        "EfficientNet",
        "ViT",
        "Swin",
        "PvtV2",
        "TimmWrapper",
    ),
    *("Bert", "DistilBert", "Roberta", "XLMRoberta", "Camembert", "Albert", "DebertaV2", "Electra", "MPNet"),
    "ModernBert",
)
RUNTIMES = ("onnxruntime", "openvino")
#: Precision, and the size of batches: None for any.
FORMS = (("float", None), ("float", 1), ("int8", None), ("int8", 1))
SAMPLES = 64
#: A threshold that every sample passes.
ALL = 50.0


@dataclass
class ExportMatrixArguments:
    """What is tried, and where the result goes."""

    only: list[str] | None = HfArg(default=None, help=f"families; default: {', '.join(FAMILIES)}")
    seconds: float = HfArg(default=0.0, help="measure each session for so long at each threshold; 0: no times")
    output: str = HfArg(default=str(OUTPUT), help="the file; rows of families that are not tried are kept")


def main() -> None:
    """Tries the families one after the other and writes the file after each."""
    args, _ = parse_arguments({"matrix": ExportMatrixArguments}, __doc__ or "")
    for name in args.only or []:
        if name not in FAMILIES:
            raise unknown_name("family", name, FAMILIES)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    path = Path(args.output)
    for name in args.only or FAMILIES:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"families": {}, "versions": {}}
        rows = {**kept["families"], name: try_family(name, args.seconds, kept["families"].get(name, {}))}
        print(name, json.dumps(rows[name]), flush=True)
        versions = {**kept["versions"], "erde_hub": erde_hub.__version__, "torch": torch.__version__}
        for runtime in installed():
            versions[runtime] = importlib.import_module(runtime).__version__
        ordered = {family: rows[family] for family in FAMILIES if family in rows}
        write_results(args.output, {"versions": versions, "families": ordered})


def installed() -> list[str]:
    """The runtimes of this machine."""
    return [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]


def try_family(name: str, seconds: float = 0.0, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns size, what every runtime answered, and times, by form of the file."""
    size = TRANSFORMERS_VISION[name][1] if name not in TRANSFORMERS_TEXT else None
    given = {} if size is None else {"input_size": (3, size, size)}
    torch.manual_seed(0)
    model = EarlyExitWrapper(lively(transformers_model(name), size), exits=2, **given).eval()
    inputs = example(size, model.backbone, SAMPLES)
    spread_heads(model, inputs)
    thresholds = routed(model, inputs)[0]
    row: dict[str, Any] = {"model": type(model.backbone).__name__, "exits": model.exit_names[:-1]}
    with tempfile.TemporaryDirectory() as folder:
        for precision, batch_size in FORMS:
            form = precision if batch_size is None else f"{precision}, batch {batch_size}"
            calibration = [inputs] if precision == "int8" else None
            path = Path(folder) / "model.onnx"
            try:
                export_onnx(model, path, batch_size=batch_size, calibration_data=calibration)
            except ErdeError as error:
                row[form] = {"refused": " ".join(str(error).split())[:300]}
                continue
            row[form] = {**(before or {}).get(form, {}), "bytes": path.stat().st_size}
            for runtime in installed():
                row[form][runtime] = compare(model, path, inputs, thresholds, runtime, precision)
                if seconds:
                    times = measure(EarlyExitSession(path, runtime=runtime, threads=1), inputs, thresholds, seconds)
                    row[form][f"{runtime} milliseconds"] = times
    return row


@torch.no_grad()
def spread_heads(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> None:
    """Scales the heads until their logits differ from sample to sample."""
    for head, logits in zip(model.heads, model(**inputs, output_all_exits=True).exit_logits, strict=False):
        layer: Any = head.fc
        scale = 2 / logits.std(0).mean()
        layer.weight *= scale
        layer.bias.copy_(scale * (layer.bias - logits.mean(0)))


def compare(
    model: EarlyExitWrapper,
    path: Path,
    inputs: dict[str, Tensor],
    thresholds: list[float],
    runtime: str,
    precision: str,
) -> str:
    """``yes``, for int8 how many answers are the same, or what is wrong."""
    given: Any = inputs.get("pixel_values", inputs)
    tried = [0.0, ALL] if precision == "int8" else [0.0, thresholds, ALL]
    try:
        check = check_onnx(model, path, given, tried, threads=1, runtime=runtime)
    except ErdeError as error:
        return reason_of(error, path)
    if check.same_exit < 1:
        return f"{check.same_exit:.0%} of the samples take the same exit"
    if precision == "int8":
        return f"{int(100 * check.same_answer)}%"
    return "yes" if check.relative_difference <= 1e-3 else f"differs by {check.relative_difference:.1e}"


def reason_of(error: ErdeError, path: Path) -> str:
    """The message in one line, without names of this run; of OpenVINO's report what it says of the operator."""
    line = " ".join(str(error).replace(str(path), path.name).split())
    start, log, operator = line.partition("Failed operations detailed log: -- ")
    if log:
        line = f"{start[: start.index(':')]}: {operator.partition(' at src/')[0]}"
    return line[:300]


def measure(
    session: EarlyExitSession, inputs: dict[str, Tensor], thresholds: list[float], seconds: float
) -> dict[str, float]:
    """Median milliseconds for one sample: at exit 0, over the samples at thresholds that divide them, all the way."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    count = len(next(iter(arrays.values())))
    samples = [{name: value[i : i + 1] for name, value in arrays.items()} for i in range(count)]
    found = {}
    for name, threshold in (("exit 0", ALL), ("typical", thresholds), ("all the way", 0.0)):
        times: list[float] = []
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends or len(times) < 2 * count:
            sample = samples[len(times) % count]
            started = time.perf_counter()
            session(sample.get("pixel_values", sample), threshold)
            times.append(1000 * (time.perf_counter() - started))
        middle = statistics.fmean if name == "typical" else statistics.median
        found[name] = round(middle(times[count:]), 4)
    return found


if __name__ == "__main__":
    run_script(main)
