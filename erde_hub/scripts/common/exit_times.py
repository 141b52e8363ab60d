"""How long one sample takes on this machine if it leaves at each of the exits."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erde_hub.errors import ConfigError, ExportError, MissingDependencyError
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.policies import create_policy
from erde_hub.tasks import REGRESSION

from .contestants import NOBODY
from .patterns import coarse_patterns
from .results_files import environment
from .turns import summary, take_turns

RUNTIMES = ("torch", "onnxruntime")


def measure_exits(
    model: EarlyExitWrapper,
    runtimes: Sequence[str] = RUNTIMES,
    threads: Sequence[int] = (1, 0),
    rounds: int = 50,
    seconds: float = 5.0,
    say: Any = print,
) -> dict[str, Any]:
    """Measures one sample per call, at every exit, with every runtime and number of threads; all exits take turns.

    Each exit on the way is asked and passed on, by the entropy policy; what another policy or a calibrator takes is not
    in the times.

    Args:
        model: Any classifier with exits.
        runtimes: ``torch``, ``onnxruntime``; one that cannot be had is left out, and ``say`` says why.
        threads: Numbers of CPU threads, 0 for one per core.
        rounds: At most; in each, all exits take turns.
        seconds: After which rounds end, per runtime and number of threads.
        say: Prints.

    Returns:
        The machine, and in ``settings`` one entry per runtime and number of threads with ``exit_milliseconds``.

    Raises:
        ConfigError: The model has no early exit, or is no classifier.
    """
    early = model.num_exits - 1
    regression = model.config.problem_type == REGRESSION
    if not early or regression or model.config.task != "classification":
        raise ConfigError("times of exits are for classifiers with early exits")
    routed = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()
    routed.set_calibrator(None)
    routed.set_policy(create_policy("entropy"))
    plans = [[NOBODY] * k + [math.inf] * (early - k) for k in range(early + 1)]
    inputs = _inputs(routed, plans)
    settings, before = [], torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        for runtime in runtimes:
            for count in dict.fromkeys(number or os.cpu_count() or 1 for number in threads):
                torch.set_num_threads(count)
                try:
                    call = partial(_torch, routed) if runtime == "torch" else _session(routed, Path(folder), count)
                except (MissingDependencyError, ExportError) as error:
                    say(f"{runtime} is left out: {error}")
                    break
                runs = {f"exit {k}": partial(call, inputs, plan) for k, plan in enumerate(plans)}
                times = summary(take_turns(runs, rounds, min(rounds, 4), seconds))["seconds"]
                medians = [1e3 * times[name]["median"] for name in runs]
                settings.append({"runtime": runtime, "threads": count, "exit_milliseconds": medians})
    torch.set_num_threads(before)
    return {**environment("torch", "onnxruntime"), "batch_size": 1, "exits": model.exit_names, "settings": settings}


def known_exit_times(results: Mapping[str, Any] | None) -> list[float] | None:
    """Returns the times with torch and one thread that a report has of this machine; None where it has none."""
    latency = (results or {}).get("latency") or {}
    here = environment("torch", "onnxruntime")
    if any(latency.get(key) != here[key] for key in ("cpu", "cores", "torch")):
        return None
    rows = (row for row in latency["settings"] if (row["runtime"], row["threads"]) == ("torch", 1))
    return next((list(row["exit_milliseconds"]) for row in rows), None)


def _inputs(model: EarlyExitWrapper, plans: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """One sample that leaves where it shall at every plan."""
    size = model.config.input_size or (128,)
    for seed in range(1, 9):
        if model.main_input_name == "pixel_values":
            inputs = {"pixel_values": coarse_patterns(seed, size)[:1]}
        else:
            words: Any = model.backbone.config
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(1, words.vocab_size, (1, size[0]), generator=generator)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if all(int(_torch(model, inputs, plan).exit_index[0]) == k for k, plan in enumerate(plans)):
            return inputs
    raise ConfigError("the exits of this model are certain of every random input: their times cannot be measured so")


@torch.no_grad()
def _torch(model: EarlyExitWrapper, inputs: Mapping[str, Tensor], thresholds: Sequence[float]) -> Any:
    return model(**inputs, threshold=thresholds)


def _session(model: EarlyExitWrapper, folder: Path, threads: int) -> Any:
    from erde_hub.export import EarlyExitSession, export_onnx  # noqa: PLC0415 - an extra

    path = folder / "model.onnx"
    if not path.is_file():
        export_onnx(model, path)
    session = EarlyExitSession(path, threads=threads)

    def call(inputs: Mapping[str, Tensor], thresholds: Sequence[float]) -> Any:
        arrays = {name: value.numpy() for name, value in inputs.items()}  # a session takes longer to read tensors
        return session(arrays.get("pixel_values", arrays), threshold=thresholds)

    return call
