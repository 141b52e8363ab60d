"""Whether the installed onnxruntime takes what is written; where there is none, nothing is known and all is taken."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from erde_hub.errors import ConfigError, ExportError

#: Version of the format that torch's exporter writes; what decides here is the version of the operators.
_FORMAT = 10


def check_opset(opset: object, oldest: int, newest: int) -> int:
    """Returns the version of the operator set.

    Args:
        opset: What was asked for.
        oldest: That torch's exporter writes.
        newest: That the installed onnx knows. Versions still in development are among them, which onnxruntime refuses:
            it is asked with a file of one node.

    Raises:
        ConfigError: No such version, or one that onnxruntime does not load.
    """
    runtime = _installed()
    known = isinstance(opset, int) and not isinstance(opset, bool) and oldest <= opset <= newest
    if known and isinstance(opset, int) and (runtime is None or _takes(runtime, opset)):
        return opset
    reason = f" (onnx knows versions up to {newest})"
    if runtime is not None:
        newest = next((version for version in range(newest, oldest, -1) if _takes(runtime, version)), oldest)
        reason = f", which the installed onnxruntime {runtime.__version__} loads"
    raise ConfigError(f"opset must be {oldest} to {newest}{reason}, got {opset!r}")


def check_loads(path: Path, opset: int) -> None:
    """Loads a file that was written, without running it.

    Raises:
        ExportError: onnxruntime is installed and does not take the file.
    """
    runtime = _installed()
    if runtime is None:
        return
    options = _quiet_options(runtime)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base
        reason = " ".join(str(error).replace(str(path), path.name).split())[:400]
        raise ExportError(
            f"onnxruntime {runtime.__version__} does not load what was exported with opset {opset}: {reason}; try"
            " another opset, or another version of onnxruntime"
        ) from error


def _installed() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        return None


def _takes(runtime: Any, opset: int) -> bool:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_FORMAT)
    try:
        runtime.InferenceSession(model.SerializeToString(), _quiet_options(runtime), providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - onnxruntime's own classes have no common base
        return False
    return True


def _quiet_options(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    return options
