"""The runtimes that a file is run in: each opens one, tells its metadata and shapes, and runs it; without torch."""

from __future__ import annotations

import functools
import importlib.util
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
        if providers != CPU_PROVIDER:
            raise ConfigError(f"providers={providers!r} are onnxruntime's: leave them out for OpenVINO")
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


_RUNTIMES: dict[str, Callable[[Path, int | None, Any], Any]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


def find_runtime(name: str | None) -> Callable[[Path, int | None, Any], Any]:
    """Returns what opens files.

    Args:
        name: Of a runtime; None for the first that is installed.

    Raises:
        UnknownNameError: No such runtime.
    """
    if name is None:
        name = next((name for name in _RUNTIMES if _installed(name)), "onnxruntime")
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
