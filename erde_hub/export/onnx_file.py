"""Any early-exit model as one ONNX file whose later layers do not run for samples that have left."""

from __future__ import annotations

import glob
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erde_hub._files import disk_errors, replacing_all
from erde_hub._version import __version__
from erde_hub.engine.inputs import check_pixel_values
from erde_hub.errors import ConfigError, ExportError, InputTypeError, ShapeError
from erde_hub.modeling.wrapper import EarlyExitWrapper

from ._inputs import file_path
from ._requirements import require
from .metadata import FileInfo
from .session import EarlyExitSession
from .signature import check_exportable, file_info

if TYPE_CHECKING:
    import onnx_ir as ir

#: What the name of a weights' file adds to that of the ONNX file.
_WEIGHTS = re.compile(r"\.[0-9a-f]{8}\.data")
INSTALL = "'erde-hub[onnx]'"
DEFAULT_OPSET = 20
#: torch's exporter writes this version; older ones it would have to convert down.
OLDEST_OPSET = 18


def export_onnx(
    model: EarlyExitWrapper,
    path: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    batch_size: int | None = None,
    tokenizer: Any = None,
    calibration_data: Iterable[Any] | None = None,
    calibration_method: str = "minmax",
) -> Path:
    """Writes a model with its exits into one ONNX file.

    The file has inputs ``pixel_values`` (batch, C, H, W) and ``threshold`` (1 or one per early exit), both float32, and
    outputs ``logits`` (batch, K) float32 and ``exit_index`` (batch,) int64. Each sample gets the logits of its own
    first exit; layers behind the exit that the last sample of a batch took are not run. A sample with NaN or infinity
    in its input never leaves early and gets NaN logits; one whose logits overflow at an exit goes on, as in torch. The
    metadata hold a :class:`~erde_hub.export.FileInfo`.

    Height and width are those of ``config.input_size``. Text classifiers have inputs ``input_ids``, ``attention_mask``
    and, where the model has several token types, ``token_type_ids``, all (batch, length) int64. An empty batch is
    answered by :class:`EarlyExitSession`; onnxruntime by itself cannot broadcast one.

    The file is written under another name, checked, loaded once where onnxruntime is installed, then renamed: an export
    that is interrupted leaves what was there before. A file of that name is replaced; a second file that held its
    weights is removed.

    Args:
        model: In any mode, on any device; it is copied, not touched. Half-precision weights are written in float32.
        path: The file. Above 2 GB the weights go to ``<path>.<digits>.data`` next to it.
        opset: Version of the ONNX operator set; where onnxruntime is installed, one that it loads.
        batch_size: None for batches of any size. 1 for compilers that want every shape fixed, and for the least time
            per sample: no axis is dynamic, texts are padded to ``config.input_size``, and ``threshold`` holds one
            number per early exit.
        tokenizer: Stored in the file, so that a session takes sentences: a fast tokenizer of transformers, a
            ``tokenizers.Tokenizer``, or the path of a ``tokenizer.json``. For texts only.
        calibration_data: Batches of ``pixel_values``, or for texts dicts of the inputs; some hundred samples of the
            training or validation split: the network is quantised to int8 with the ranges that they cause. The policy's
            decisions stay in float; of a text model the layers with weights are quantised.
        calibration_method: ``minmax``, or ``entropy`` and ``percentile``, which cut rare large values off and need
            memory for all activations. For calibration data only.

    Returns:
        The path.

    Raises:
        MissingDependencyError: onnx, onnxscript or, for int8, onnxruntime is not installed.
        InputTypeError: Not an :class:`~erde_hub.EarlyExitWrapper`, or no path.
        ExportError: A policy that ONNX cannot express, or a network that torch's exporter cannot; the message names the
            exit and the reason. Or a file that onnxruntime does not load.
        ConfigError: An operator set or a calibration method that does not exist, a method without calibration data, a
            path that is a folder, preprocessing that makes images of another size than the file takes, another batch
            size, or a tokenizer of another model.
        ShapeError, DataError: Calibration data that do not fit the model.
        CheckpointWriteError: The file cannot be written; before the work begins, where that can be seen then.
    """
    purpose = "exporting to ONNX"
    onnx: Any = require("onnx", purpose, INSTALL)
    require("onnx_ir", purpose, INSTALL)
    require("onnxscript", purpose, INSTALL)
    if not isinstance(model, EarlyExitWrapper):
        raise InputTypeError(f"export_onnx takes an EarlyExitWrapper, got {type(model).__name__}: wrap it first")

    from ._runtime import check_opset  # noqa: PLC0415 - onnx is optional
    from .flat import flat_model  # noqa: PLC0415 - as above
    from .nesting import nest_exits  # noqa: PLC0415 - as above
    from .quantization import calibration_batches, check_method, quantize_flat  # noqa: PLC0415 - as above

    opset = check_opset(opset, OLDEST_OPSET, onnx.defs.onnx_opset_version())
    if not (batch_size is None or (type(batch_size) is int and batch_size == 1)):
        raise ConfigError(f"batch_size must be 1, or None for batches of any size, got {batch_size!r}")
    check_method(calibration_method, used=calibration_data is not None)
    check_exportable(model)
    target = file_path(path)
    with disk_errors(target):
        if target.is_dir() or not target.name:
            raise ConfigError(f"{str(path)!r} is a folder: give the name of the file, such as model.onnx")
    info = file_info(model, batch_size, tokenizer, "int8" if calibration_data is not None else None)
    with replacing_all(target.parent, last=target.name) as folder:
        batches = None if calibration_data is None else calibration_batches(calibration_data, info)
        file = flat_model(model, opset, batch_size)
        if batches is not None:
            file = quantize_flat(file, batches, calibration_method)
        nested = nest_exits(file)
        _describe(nested, info)
        weights = _write(nested, folder / target.name, opset)
    for other in target.parent.glob(f"{glob.escape(target.name)}.*.data"):  # of the file before, of killed exports
        if _WEIGHTS.fullmatch(other.name.removeprefix(target.name)) and other.name != weights:
            other.unlink(missing_ok=True)
    return target


@dataclass(frozen=True)
class ExportCheck:
    """How far a file's answers are from the model's.

    Attributes:
        max_difference: Largest absolute difference of a logit, over samples that took the same exit; infinite where one
            of the two is NaN or infinite and the other is not.
        relative_difference: The same, in units of the largest finite logit.
        same_exit: Fraction of samples that took the same exit.
        same_answer: Fraction of samples with the same class, and NaN at the same places.
        samples: Number of samples.
    """

    max_difference: float
    relative_difference: float
    same_exit: float
    same_answer: float
    samples: int


@torch.no_grad()
def check_onnx(
    model: EarlyExitWrapper,
    path: str | os.PathLike[str],
    inputs: Tensor | Mapping[str, Tensor],
    thresholds: Sequence[float | Sequence[float]] | None = None,
    threads: int | None = None,
    runtime: str | None = None,
) -> ExportCheck:
    """Runs a file and compares it with the model.

    Args:
        model: In eval mode.
        path: The file.
        inputs: ``pixel_values`` (N, C, H, W), or for texts a dict of ``input_ids`` (N, L) and the rest.
        thresholds: Each is one number, or one per early exit; None compares at the stored one.
        threads: Threads of the runtime.
        runtime: See :class:`EarlyExitSession`.

    Raises:
        MissingDependencyError: The runtime is not installed.
        ConfigError: The model is in train mode.
        CheckpointError: No file that erde_hub wrote.
        InputTypeError, ShapeError: Images that do not fit, or a file of a model with other exits or classes.
    """
    if model.training:
        raise ConfigError("the model is in train mode, where nothing is routed: call model.eval()")
    given: dict[str, Tensor] = {}
    if isinstance(inputs, Mapping):
        given = {key: value.detach() for key, value in inputs.items()}
    else:
        given = {"pixel_values": check_pixel_values(inputs, model.config.input_size or ()).detach()}
    if any(len(value) == 0 for value in given.values()):
        raise ShapeError(f"{next(iter(given))} holds no sample to compare")
    session = EarlyExitSession(path, threads=threads, runtime=runtime)
    exits_and_classes = (model.exit_names, int(model.config.num_labels))
    if exits_and_classes != (session.info.exit_names, len(session.info.id2label)):
        raise ShapeError(
            f"the file has exits {', '.join(session.info.exit_names)} and {len(session.info.id2label)} classes, the"
            f" model {', '.join(model.exit_names)} and {model.config.num_labels}: it was not written from this model"
        )
    largest = scale = 0.0
    exits = answers = total = 0
    for threshold in [None] if thresholds is None else thresholds:
        moved = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for key, value in given.items()
        }
        routed = model(**moved, threshold=threshold)
        expected = routed.logits.float().cpu()
        got = session(given.get("pixel_values", given), threshold)
        logits = torch.from_numpy(got.logits)
        same = torch.from_numpy(got.exit_index) == routed.exit_index.cpu()
        total += len(same)
        exits += int(same.sum())
        alike = (logits.isnan() == expected.isnan()).all(1)  # argmax takes the first NaN for the largest
        answers += int((alike & (logits.argmax(1) == expected.argmax(1))).sum())
        if same.any():
            largest = max(largest, float(_differences(logits, expected)[same].max()))
        scale = max(scale, float(expected.abs().nan_to_num(0.0, posinf=0.0).max()))
    return ExportCheck(largest, largest / max(scale, 1e-12), exits / total, answers / total, total)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """Absolute differences; 0 where both are NaN or the same infinity, infinite where only one is no number."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf, posinf=torch.inf)


def _describe(nested: ir.Model, info: FileInfo) -> None:
    """Metadata in, traces of the exporting machine out."""
    from onnx_ir.passes import common as passes  # noqa: PLC0415 - onnx is optional

    passes.ClearMetadataAndDocStringPass()(nested)  # torch writes stack traces with paths
    nested.metadata_props.update(info.to_metadata())
    nested.producer_name, nested.producer_version = "erde_hub", __version__
    nested.graph.name = "early_exit"


def _write(nested: ir.Model, path: Path, opset: int) -> str | None:
    """Writes a file, checks that it can be loaded, and returns the name of its weights' own file: above 2 GB."""
    import onnx  # noqa: PLC0415 - optional
    import onnx_ir as ir  # noqa: PLC0415 - optional

    from ._runtime import check_loads  # noqa: PLC0415 - onnx is optional
    from .nesting import EXTERNAL_DATA_LIMIT, weight_bytes  # noqa: PLC0415 - as above

    # A name of their own: an earlier file keeps its weights until the new one is in its place.
    weights = f"{path.name}.{secrets.token_hex(4)}.data" if weight_bytes(nested) > EXTERNAL_DATA_LIMIT else None
    with disk_errors(path):
        ir.save(nested, path, format="protobuf", external_data=weights)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported file is not valid ONNX: {error}") from error
        check_loads(path, opset)
    return weights
