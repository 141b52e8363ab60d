"""The runtimes that a file is run in: each opens one, tells its metadata and shapes, and runs it; without torch."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde_hub.errors import CheckpointError, ConfigError, unknown_name

from ._requirements import require

CPU_PROVIDER = ("CPUExecutionProvider",)


class OnnxRuntime:
    """A file in onnxruntime.

    Attributes:
        metadata: Strings by name.
        inputs: Shapes by name; axes that are free are None.
        outputs: The same of the outputs.
        batches_int8: int8 files answer batches of several samples as they answer each of them.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CheckpointError: It does not load the file.
        ConfigError: A provider that it does not have.
    """

    batches_int8 = True

    def __init__(self, file: Path, threads: int | None, providers: Any) -> None:
        runtime: Any = require("onnxruntime", "EarlyExitSession", "onnxruntime")
        _check_providers(providers, runtime.get_available_providers())
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        if _products_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = runtime.InferenceSession(str(file), options, providers=list(providers))
        except Exception as error:  # onnxruntime's own classes have no common base
            raise CheckpointError(f"onnxruntime cannot load {str(file)!r}: {_reason(error)}") from error
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.inputs, self.outputs = (
            {entry.name: [size if isinstance(size, int) else None for size in entry.shape] for entry in entries}
            for entries in (self._session.get_inputs(), self._session.get_outputs())
        )

    def run(self, feed: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Returns logits and exit index."""
        logits, exit_index = self._session.run(["logits", "exit_index"], dict(feed))
        return logits, exit_index


class OpenVino:
    """A file in OpenVINO, on the processor, in float32 where the file is; see :class:`OnnxRuntime`.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        CheckpointError: It does not load the file.
        ConfigError: Providers were given.
    """

    #: OpenVINO 2026.4 gives the heads of a swin, whose features are int8, zeros for all samples but the first.
    batches_int8 = False

    def __init__(self, file: Path, threads: int | None, providers: Any) -> None:
        runtime: Any = require("openvino", "runtime='openvino'", "openvino")
        _check_providers_left_out(providers, "OpenVINO")
        # Its own choice is bfloat16 on some processors.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            model = runtime.Core().read_model(file)
            self._compiled = runtime.compile_model(model, "CPU", options)
        except Exception as error:  # it raises RuntimeError, and others of its own
            raise CheckpointError(f"OpenVINO cannot load {str(file)!r}: {_reason(error)}") from error
        framework = model.get_rt_info(["framework"]).value if model.has_rt_info(["framework"]) else {}
        self.metadata = {key: str(getattr(value, "value", value)) for key, value in framework.items()}
        self.inputs, self.outputs = (
            {
                entry.any_name: [size.get_length() if size.is_static else None for size in entry.partial_shape]
                for entry in entries
            }
            for entries in (model.inputs, model.outputs)
        )

    def run(self, feed: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Returns logits and exit index."""
        answers = self._compiled.create_infer_request().infer(dict(feed))
        return answers["logits"].copy(), answers["exit_index"].copy()


class ExecuTorch:
    """An ExecuTorch program, on the processor; it answers one sample at a time. See :class:`OnnxRuntime`.

    A method runs where the exit before it is not sure.

    Raises:
        MissingDependencyError: executorch is not installed.
        CheckpointError: It does not load the file.
        ConfigError: Providers were given, or threads for a second program that differ from those of the first: all
            programs of a process share them.
    """

    batches_int8 = True
    _opened = False

    def __init__(self, file: Path, threads: int | None, providers: Any) -> None:
        runtime: Any = require("executorch.runtime", "a .pte file", "executorch")
        _check_providers_left_out(providers, "ExecuTorch")
        self._set_threads(threads)
        try:
            program = runtime.Runtime.get().load_program(file)
            early = sum(name.startswith("stage_") for name in program.method_names) - 1
            self._stages = [program.load_method(f"stage_{i}") for i in range(early + 1)]
            text = program.load_method("metadata").execute([])[0] if "metadata" in program.method_names else "{}"
            self.metadata: dict[str, str] = json.loads(text)
            image, logits = (), ()
            if self._stages:
                image = self._stages[0].metadata.input_tensor_meta(1).sizes()
                logits = self._stages[-1].metadata.output_tensor_meta(0).sizes()
        except Exception as error:  # it raises RuntimeError, and others of its own
            raise CheckpointError(f"ExecuTorch cannot load {str(file)!r}: {_reason(error)}") from error
        self.inputs = {"pixel_values": [*image], "threshold": [early]}
        self.outputs = {"logits": [*logits], "exit_index": [1]}
        self._from_numpy = importlib.import_module("torch").from_numpy
        self._lock = threading.Lock()  # the methods of a program share their memory

    @classmethod
    def _set_threads(cls, threads: int | None) -> None:
        library: Any = importlib.import_module("executorch.extension.pybindings.portable_lib")
        current = library._threadpool_get_thread_count()
        if threads not in (None, current):
            if cls._opened:  # the first program would use threads that are gone
                raise ConfigError(
                    f"threads={threads} where an ExecuTorch program of this process runs with {current}, which all"
                    " share: leave threads out, or give it to the first"
                )
            library._unsafe_reset_threadpool(threads)
        cls._opened = True

    def run(self, feed: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Returns logits and exit index."""
        tensors = [self._from_numpy(np.ascontiguousarray(feed["pixel_values"]))]
        thresholds = self._from_numpy(feed["threshold"].astype(np.float32)).split(1)
        with self._lock:
            for exit_index, (stage, threshold) in enumerate(zip(self._stages, thresholds, strict=False)):
                logits, exits, *tensors = stage.execute((threshold, *tensors))
                if exits.item():
                    return logits.numpy(), np.array([exit_index])
            (logits,) = self._stages[-1].execute(tensors)
            return logits.numpy(), np.array([len(thresholds)])


_RUNTIMES: dict[str, Callable[[Path, int | None, Any], Any]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "executorch": ExecuTorch,
}


def find_runtime(name: str | None, file: Path) -> Callable[[Path, int | None, Any], Any]:
    """Returns what opens files.

    Args:
        name: Of a runtime; None for ExecuTorch where the file is a ``.pte``, otherwise the first that is installed.
        file: The file.

    Raises:
        UnknownNameError: No such runtime.
    """
    if name is None and file.suffix == ".pte":
        name = "executorch"
    if name is None:
        name = next((name for name in ("onnxruntime", "openvino") if _installed(name)), "onnxruntime")
    if name not in _RUNTIMES:
        raise unknown_name("runtime", name, _RUNTIMES)
    return _RUNTIMES[name]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # of a module that was hidden
        return False


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:600]


def _check_providers_left_out(providers: Any, runtime: str) -> None:
    if providers != CPU_PROVIDER:
        raise ConfigError(f"providers={providers!r} are onnxruntime's: leave them out for {runtime}")


def _check_providers(providers: Any, available: Sequence[str]) -> None:
    """Refuses wrong names, for which onnxruntime takes the processor, with a banner on stdout."""
    listed = isinstance(providers, (list, tuple)) and len(providers) > 0
    for entry in providers if listed else [providers]:
        name = entry[0] if listed and isinstance(entry, tuple) and len(entry) == 2 else entry
        if not listed or not isinstance(name, str):
            raise ConfigError(
                f"providers must be a list of names such as ['CPUExecutionProvider'], got {providers!r} (available:"
                f" {', '.join(available)})"
            )
        if name not in available:
            raise unknown_name("execution provider", name, available)


@functools.cache
def _products_overflow() -> bool:
    """Whether 8-bit arithmetic saturates: on x86 processors with AVX2 and without VNNI (known on Linux only).

    onnxruntime has an exact way, which takes longer, and does not tell by itself where it is needed.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags
