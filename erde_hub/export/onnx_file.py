"""Any early-exit model as one ONNX file whose later layers do not run for samples that have left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erde_hub import __version__
from erde_hub.calibration import get_calibrator, list_calibrators
from erde_hub.errors import CheckpointWriteError, ConfigError, ExportError, InputTypeError, ShapeError
from erde_hub.modeling import EarlyExitWrapper
from erde_hub.policies import get_policy, list_policies
from erde_hub.regression import REGRESSION

from ._requirements import require
from .metadata import FileInfo
from .session import EarlyExitSession

if TYPE_CHECKING:
    import onnx_ir as ir

INSTALL = "'erde-hub[onnx]'"
DEFAULT_OPSET = 20
#: torch's exporter writes this version; older ones it would have to convert down.
OLDEST_OPSET = 18


def export_onnx(
    model: EarlyExitWrapper,
    path: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    calibration_data: Iterable[Any] | None = None,
    calibration_method: str = "minmax",
) -> Path:
    """Writes a model with its exits into one ONNX file.

    The file has inputs ``pixel_values`` (batch, C, H, W) and ``threshold`` (1 or one per early exit), both float32, and
    outputs ``logits`` (batch, K) float32 and ``exit_index`` (batch,) int64. Each sample gets the logits of its own
    first exit; layers behind the exit that the last sample of a batch took are not run. A sample with NaN or infinity
    in its input never leaves early and gets NaN logits; one whose logits overflow at an exit goes on, as in torch. The
    metadata hold a :class:`~erde_hub.export.FileInfo`.

    Height and width are those of ``config.input_size``. An empty batch is answered by :class:`EarlyExitSession`;
    onnxruntime by itself cannot broadcast one.

    The file is checked, then renamed into place: an export that is interrupted leaves what was there before.

    Args:
        model: In any mode, on any device; it is copied, not touched. Half-precision weights are written in float32.
        path: The file. Above 2 GB the weights go to ``<path>.data`` beside it.
        opset: Version of the ONNX operator set.
        calibration_data: Batches of ``pixel_values``, some hundred images of the training or validation split: the
            network is quantised to int8 with the ranges that they cause. The policy's decisions stay in float.
        calibration_method: ``minmax``, or ``entropy`` and ``percentile``, which cut rare large values off and need
            memory for all activations.

    Returns:
        The path.

    Raises:
        MissingDependencyError: onnx, onnxscript or, for int8, onnxruntime is not installed.
        InputTypeError: Not an :class:`~erde_hub.EarlyExitWrapper`.
        ExportError: A policy that ONNX cannot express, or a network that torch's exporter cannot; the message names the
            exit and the reason.
        ConfigError: An operator set or a calibration method that does not exist.
        ShapeError, DataError: Calibration data that do not fit the model.
        CheckpointWriteError: The file cannot be written.
    """
    purpose = "exporting to ONNX"
    onnx: Any = require("onnx", purpose, INSTALL)
    require("onnx_ir", purpose, INSTALL)
    require("onnxscript", purpose, INSTALL)
    if not isinstance(model, EarlyExitWrapper):
        raise InputTypeError(f"export_onnx takes an EarlyExitWrapper, got {type(model).__name__}: wrap it first")
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise ConfigError(f"opset must be {OLDEST_OPSET} to {newest}, got {opset!r}")
    _check_exportable(model)
    _check_calibrator(model)
    target = Path(path)
    if target.is_dir() or not target.name:
        raise ConfigError(f"{str(path)!r} is a folder: give the name of the file, such as model.onnx")

    from .flat import flat_model  # noqa: PLC0415 - onnx is optional
    from .nesting import nest_exits  # noqa: PLC0415 - as above

    batches = None
    if calibration_data is not None:
        from .quantization import calibration_batches, quantize_flat  # noqa: PLC0415 - as above

        batches = calibration_batches(calibration_data, tuple(model.config.input_size or ()))
    file = flat_model(model, opset)
    if batches is not None:
        file = quantize_flat(file, batches, calibration_method)
    nested = nest_exits(file)
    _describe(nested, model, "int8" if batches is not None else None)
    _write(nested, target)
    return target


@dataclass(frozen=True)
class ExportCheck:
    """How far a file's answers are from the model's.

    Attributes:
        max_difference: Largest absolute difference of a logit, over samples that took the same exit.
        relative_difference: The same, in units of the largest logit.
        same_exit: Fraction of samples that took the same exit.
        same_answer: Fraction of samples with the same class.
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
    pixel_values: Tensor,
    thresholds: Sequence[float | Sequence[float]] | None = None,
    threads: int | None = None,
) -> ExportCheck:
    """Runs a file in onnxruntime and compares it with the model.

    Args:
        model: In eval mode.
        path: The file.
        pixel_values: (N, C, H, W).
        thresholds: Each is one number, or one per early exit; None compares at the stored one.
        threads: Threads of onnxruntime.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ConfigError: The model is in train mode.
    """
    if model.training:
        raise ConfigError("the model is in train mode, where nothing is routed: call model.eval()")
    if len(pixel_values) == 0:
        raise ShapeError("pixel_values holds no sample to compare")
    session = EarlyExitSession(Path(path), threads=threads)
    largest = scale = 0.0
    exits = answers = total = 0
    for threshold in [None] if thresholds is None else thresholds:
        routed = model(pixel_values.to(model.device, model.dtype), threshold=threshold)
        expected = routed.logits.float().cpu()
        got = session(pixel_values.float().cpu().numpy(), threshold)
        logits = torch.from_numpy(got.logits)
        same = torch.from_numpy(got.exit_index) == routed.exit_index.cpu()
        total += len(same)
        exits += int(same.sum())
        answers += int((logits.argmax(1) == expected.argmax(1)).sum())
        if same.any():
            largest = max(largest, float((logits - expected)[same].abs().max()))
        scale = max(scale, float(expected.abs().max()))
    return ExportCheck(largest, largest / max(scale, 1e-12), exits / total, answers / total, total)


def _check_exportable(model: EarlyExitWrapper) -> None:
    if model.main_input_name != "pixel_values":
        raise ExportError(
            f"{type(model.backbone).__name__} reads texts, whose length and masks the file does not hold: image models"
            " can be written"
        )
    if model.config.problem_type == REGRESSION:
        raise ExportError(
            "a regression has no class probabilities, which the policies of an ONNX file (entropy and its like) read:"
            " export the static network of an exit, torch.onnx.export(model.truncate(exit), ...)"
        )
    if not model.policy.exportable:
        possible = [name for name in list_policies() if get_policy(name).cls.exportable]
        raise ExportError(
            f"policy {model.config.policy!r} cannot be written into an ONNX file (those that can:"
            f" {', '.join(possible)}): wrap the model with one of them"
        )


def _check_calibrator(model: EarlyExitWrapper) -> None:
    if model.calibrator is not None and not model.calibrator.affine:
        possible = [name for name in list_calibrators() if get_calibrator(name).cls.affine]
        raise ExportError(
            f"calibrator {model.config.calibrator!r} cannot be written into an ONNX file (those that can:"
            f" {', '.join(possible)}): fit one of them, or take it off with model.set_calibrator(None)"
        )


def _describe(nested: ir.Model, model: EarlyExitWrapper, quantization: str | None) -> None:
    """Metadata in, traces of the exporting machine out."""
    from onnx_ir.passes import common as passes  # noqa: PLC0415 - onnx is optional

    passes.ClearMetadataAndDocStringPass()(nested)  # torch writes stack traces with paths
    config = model.config
    info = FileInfo(
        erde_hub_version=__version__,
        policy=str(config.policy),
        threshold=model._thresholds(model.threshold),
        threshold_range=list(model.policy.threshold_range),
        exit_names=model.exit_names,
        cumulative_macs=model.exit_table().cumulative_macs,
        id2label={int(i): str(label) for i, label in (config.id2label or {}).items()},
        input_size=list(config.input_size or []),
        preprocessing=config.preprocessing,
        quantization=quantization,
    )
    nested.metadata_props.update(info.to_metadata())
    nested.producer_name, nested.producer_version = "erde_hub", __version__
    nested.graph.name = "early_exit"


def _write(nested: ir.Model, target: Path) -> None:
    """Writes beside the target, checks, renames."""
    import onnx  # noqa: PLC0415 - optional
    import onnx_ir as ir  # noqa: PLC0415 - optional

    from .nesting import EXTERNAL_DATA_LIMIT, weight_bytes  # noqa: PLC0415 - onnx is optional

    data = f"{target.name}.data" if weight_bytes(nested) > EXTERNAL_DATA_LIMIT else None
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        ir.save(nested, folder / target.name, external_data=data)
        try:
            onnx.checker.check_model(str(folder / target.name), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported file is not valid ONNX: {error}") from error
        names = [target.name] if data is None else [data, target.name]
        for name in names:
            _sync(folder / name)
        _move_in(folder, target.parent, names)
        if data is None:  # of a larger model that was there before
            target.with_name(f"{target.name}.data").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot write {target.name} ({error.strerror or error}): check space and permissions of its folder; what"
            " was there is unchanged"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _move_in(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Moves files that belong together into a folder; where one cannot be moved, what was there before is put back."""
    if len(names) == 1:
        (source / names[0]).replace(folder / names[0])
        return
    aside = Path(tempfile.mkdtemp(prefix="old-", dir=source))
    old = [name for name in names if (folder / name).exists()]
    moved: list[str] = []
    try:
        for name in old:  # never an old file with new weights
            (folder / name).replace(aside / name)
        for name in names:
            (source / name).replace(folder / name)
            moved.append(name)
    except OSError:
        for name in moved:
            (folder / name).unlink()
        for name in old:
            if (aside / name).exists():
                (aside / name).replace(folder / name)
        raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
