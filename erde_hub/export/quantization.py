"""Between the two steps of an export: the flat graph in int8.

A nested file cannot be quantised well: onnxruntime's tool looks at the outermost graph only and leaves everything
behind exit 0 in float. So the flat graph is quantised, the policy's decisions kept in float, and nested afterwards.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from erde_hub._arguments import check_choice
from erde_hub.errors import ConfigError, DataError, ExportError, InputTypeError, MissingDependencyError, ShapeError

from ._inputs import as_array
from ._texts import text_arrays
from .metadata import FileInfo
from .nesting import EXTERNAL_DATA_LIMIT, weight_bytes

#: Names of onnxruntime's calibration methods.
CALIBRATION_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}

#: Arithmetic that int8 makes faster, and what lies between it and would otherwise convert back and forth. Norms,
#: softmax, GELU and the like stay in float: they cost little and lose much.
_OPERATORS = [
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "Sigmoid", "Concat"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Pad"),
]


def check_method(method: str, *, used: bool) -> None:
    """Checks what the quantisation needs, before time is lost.

    Args:
        method: Name of a calibration method.
        used: There are calibration data.

    Raises:
        UnknownNameError: No such method.
        ConfigError: One that was chosen for nothing.
        MissingDependencyError: onnxruntime is not installed.
    """
    check_choice("calibration method", method, list(CALIBRATION_METHODS))
    if used:
        _tools()
    elif method != "minmax":
        raise ConfigError(
            f"calibration_method={method!r} says how int8 takes its ranges from images: give calibration_data too, or"
            " leave it out for a file in float"
        )


def _tools() -> Any:
    try:
        return importlib.import_module("onnxruntime.quantization")
    except ImportError as error:
        raise MissingDependencyError("int8 needs onnxruntime: pip install 'erde-hub[onnx]'") from error


def calibration_batches(data: Iterable[Any], info: FileInfo) -> list[dict[str, NDArray[Any]]]:
    """Checks calibration data.

    Args:
        data: Batches of ``pixel_values`` (N, C, H, W): tensors, arrays, or dicts and tuples that hold them, as a data
            loader gives them. For texts dicts, as the tokenizer gives them.
        info: Of the file.

    Returns:
        Inputs of the graph by name; of one sample each where the graph takes one.

    Raises:
        InputTypeError, ShapeError: Not batches of inputs of the file.
        DataError: No batch, or NaN in one.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise InputTypeError(f"calibration_data must be an iterable of batches, got {type(data).__name__}")
    size = tuple(info.input_size)
    batches = _text_batches(data, info) if info.reads_texts else _image_batches(data, size)
    if not batches:
        what = "text" if info.reads_texts else "image"
        raise DataError(f"calibration_data holds no {what}: give some hundred of the training or validation split")
    if info.batch_size is None:
        return batches
    return [
        {k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch[next(iter(batch))]))
    ]


def _text_batches(data: Iterable[Any], info: FileInfo) -> list[dict[str, NDArray[Any]]]:
    batches = []
    for number, item in enumerate(data):
        if not isinstance(item, Mapping):
            raise InputTypeError(f"calibration batch {number} must be a dict of {', '.join(info.input_names)}")
        batch = text_arrays({key: item[key] for key in info.input_names if key in item}, info)
        if len(batch["input_ids"]):
            batches.append(batch)
    return batches


def _image_batches(data: Iterable[Any], size: tuple[int, ...]) -> list[dict[str, NDArray[Any]]]:
    batches = []
    for number, item in enumerate(data):
        value = item
        if isinstance(item, Mapping):
            if "pixel_values" not in item:
                raise InputTypeError(f"calibration batch {number} has no 'pixel_values', it has {sorted(item)}")
            value = item["pixel_values"]
        elif isinstance(item, (list, tuple)) and item:
            value = item[0]
        array = as_array(value, f"calibration batch {number}")
        if not np.issubdtype(array.dtype, np.floating):
            raise InputTypeError(f"calibration batch {number} must hold normalised floats, got {array.dtype}")
        if array.shape[1:] != size:
            wanted = ", ".join(map(str, size))
            raise ShapeError(f"calibration batch {number} must have shape (N, {wanted}), got {array.shape}")
        if not np.isfinite(array).all():
            raise DataError(f"calibration batch {number} holds NaN or infinity")
        if len(array):
            batches.append({"pixel_values": np.ascontiguousarray(array, np.float32)})
    return batches


def quantize_flat(flat: ir.Model, batches: list[dict[str, NDArray[Any]]], method: str = "minmax") -> ir.Model:
    """Returns the flat graph with int8 weights (per channel) and activations, in QuantizeLinear/DequantizeLinear form.

    Args:
        flat: See :func:`~erde_hub.export.flat.flat_model`.
        batches: From :func:`calibration_batches`.
        method: How ranges come from the batches: ``minmax``, ``entropy`` or ``percentile``.

    Raises:
        MissingDependencyError, UnknownNameError: See :func:`check_method`.
        ExportError: onnxruntime cannot quantise this graph.
    """
    check_method(method, used=True)
    quantization = _tools()
    passes.NameFixPass()(flat)
    decisions = _decisions(flat)
    texts = "input_ids" in batches[0]
    proto = ir.to_proto(flat)
    # What its own preprocessing would do (shapes, folding) the exporter has done; without the mark it warns.
    proto.metadata_props.append(onnx.StringStringEntryProto(key="onnx.quant.pre_process", value="onnxruntime.quant"))
    with tempfile.TemporaryDirectory(prefix="erde_hub-") as folder, _no_log_setup():
        path = Path(folder) / "int8.onnx"
        try:
            quantization.quantize_static(
                proto,
                path,
                _Reader(batches, len(_early_exits(flat))),
                quant_format=quantization.QuantFormat.QDQ,
                # Of texts the layers with weights: sums with masks, for one, have no range worth dividing.
                op_types_to_quantize=["Gemm", "MatMul"] if texts else _OPERATORS,
                per_channel=True,
                # Unsigned times signed is what x86 has instructions for; signed times signed took three times as long.
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=[*decisions, *(_without_weights(flat) if texts else [])],
                use_external_data_format=weight_bytes(flat) > EXTERNAL_DATA_LIMIT,
                calibrate_method=quantization.CalibrationMethod[CALIBRATION_METHODS[method]],
                # Logits and what follows a linear layer stay in float: nothing is won by rounding them.
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
            )
        except (RuntimeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
            raise ExportError(
                f"onnxruntime cannot quantise this model ({type(error).__name__}: {error}); export it in float by"
                " leaving calibration_data out"
            ) from error
        quantized = ir.load(path)
        ir.external_data.load_to_model(quantized)  # the folder is about to go
    quantized.metadata_props.clear()
    _read_unrounded(quantized, set(decisions))
    _keep_products_apart(quantized)
    return quantized


class _Reader:
    """Hands batches to onnxruntime; a threshold is among the graph's inputs and its value does not matter."""

    def __init__(self, batches: list[dict[str, NDArray[Any]]], early: int) -> None:
        self.batches = iter(batches)
        self.threshold = np.zeros(early, np.float32)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {**batch, "threshold": self.threshold}


def _early_exits(flat: ir.Model) -> list[ir.Value]:
    return list(flat.graph.outputs[: (len(flat.graph.outputs) - 2) // 2])


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    stack = [value.producer() for value in values]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(value.producer() for value in node.inputs if value is not None)
    return found


def _decisions(flat: ir.Model) -> list[str]:
    """Names of the nodes that turn logits into decisions."""
    early = len(_early_exits(flat))
    outputs = list(flat.graph.outputs)
    network = _ancestors(outputs[: early + 1])
    return [node.name for node in _ancestors(outputs[early + 1 :]) - network if node.name]


def _without_weights(flat: ir.Model) -> list[str]:
    """Names of the products of two computed tensors: those of attention."""
    products = [node for node in flat.graph if node.op_type == "MatMul"]
    return [str(node.name) for node in products if all(v is None or v.const_value is None for v in node.inputs)]


def _read_unrounded(quantized: ir.Model, names: set[str]) -> None:
    """Lets excluded nodes read a tensor as it was before it was rounded for others: NaN does not survive rounding."""
    for node in quantized.graph:
        for position, value in enumerate(node.inputs) if node.name in names else ():
            dequantize = value.producer() if value is not None else None
            if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
                continue
            quantize = dequantize.inputs[0].producer()
            if quantize is not None and quantize.op_type == "QuantizeLinear":
                node.replace_input_with(position, quantize.inputs[0])


def _keep_products_apart(quantized: ir.Model) -> None:
    """Gives biases that follow a product three axes, (1, 1, C).

    Where onnxruntime knows every size, it joins a product and a bias of one axis into a Gemm, for which it has no int8
    code without an int32 bias: texts took 1.6 times as long as in float.
    """
    for node in quantized.graph:
        if node.op_type == "Add" and any(v is not None and _is_product_of_three_axes(v) for v in node.inputs):
            for position, bias in enumerate(node.inputs):
                if bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1:
                    array = bias.const_value.numpy().reshape(1, 1, -1)
                    apart = ir.Value(name=f"{bias.name}_apart_{node.name}", const_value=ir.tensor(array))
                    quantized.graph.register_initializer(apart)
                    node.replace_input_with(position, apart)


def _is_product_of_three_axes(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "MatMul" and value.shape is not None and len(value.shape) == 3


@contextlib.contextmanager
def _no_log_setup() -> Iterator[None]:
    """The tools log through the root logger, which would install a handler if there were none."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
