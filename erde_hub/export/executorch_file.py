"""Any model with known stages as one ExecuTorch program whose later methods are not called for samples that exit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from erde_hub._files import disk_errors, replacing
from erde_hub.engine.routing import read_feature, run_head
from erde_hub.engine.stages import Stage
from erde_hub.errors import ConfigError, ExportError, InputTypeError
from erde_hub.modeling.wrapper import EarlyExitWrapper

from ._inputs import file_path
from ._requirements import require
from .flat import error_reason, exit_decision, exportable_copy, quiet
from .signature import check_exportable, file_info, reads_texts

INSTALL = "'erde-hub[executorch]'"
#: What goes from stage to stage: its values, ... for tensors, and how they are nested.
_Layout = tuple[list[Any], pytree.TreeSpec]


def export_executorch(model: EarlyExitWrapper, path: str | os.PathLike[str]) -> Path:
    """Writes a model with its exits into one ExecuTorch program for one image, lowered to XNNPACK.

    The program has a method for each part of the network between two exits. No weight is stored twice.

    - ``stage_0`` takes ``threshold`` (1,) and ``pixel_values`` (1, C, H, W) and returns ``logits`` (1, K), ``exits``
      (1,) bool, and the tensors that the next method takes.
    - ``stage_<i>`` takes ``threshold`` and those, and returns the same; the last one takes no threshold and returns
      ``logits`` only.
    - ``metadata`` returns a :class:`~erde_hub.export.FileInfo` as text (JSON).

    Who runs it calls one method after the other until ``exits`` is true: :class:`~erde_hub.export.EarlyExitSession`
    does so in Python. A sample with NaN or infinity in its input never exits early and gets NaN logits.

    Args:
        model: In any mode, on any device; it is copied, not touched. Half-precision weights are written in float32.
        path: The file, ``model.pte``; replaced if it exists.

    Returns:
        The path.

    Raises:
        MissingDependencyError: executorch is not installed.
        InputTypeError: Not an :class:`~erde_hub.EarlyExitWrapper`, or no path.
        ExportError: A text model, a backbone whose stages are not known, a policy that a file cannot hold, or a part
            that ExecuTorch cannot lower; the message names it and the reason.
        ConfigError: A path that does not end with ``.pte``, or preprocessing for images of another size.
        CheckpointWriteError: The file cannot be written.
    """
    require("executorch.exir", "exporting to ExecuTorch", INSTALL)
    if not isinstance(model, EarlyExitWrapper):
        raise InputTypeError(f"export_executorch takes an EarlyExitWrapper, got {type(model).__name__}: wrap it first")
    target = file_path(path)
    if target.suffix != ".pte":
        raise ConfigError(f"the name of an ExecuTorch program ends with .pte, got {target.name!r}")
    check_exportable(model)
    if reads_texts(model) or model.policy.uses_history:
        kind = "text models" if reads_texts(model) else f"policy {model.config.policy!r}, which reads earlier exits,"
        raise ExportError(f"{kind} cannot be written into an ExecuTorch program: use erde_hub.export.export_onnx")
    info = file_info(model, batch_size=1, tokenizer=None, quantization=None)
    with replacing(target) as temporary:
        metadata = json.dumps(info.to_metadata())
        with quiet():
            programs = {f"stage_{i}": part for i, part in enumerate(trace_parts(exportable_copy(model)))}
            try:
                content = lower(programs, metadata)
            except Exception as error:
                name = type(model.backbone).__name__
                raise ExportError(f"ExecuTorch cannot lower {name} ({error_reason(error)})") from error
        with disk_errors(target):
            temporary.write_bytes(content)
    return target


def lower(programs: dict[str, torch.export.ExportedProgram], metadata: str = "{}") -> bytes:
    """Returns the bytes of a program for XNNPACK with these methods, and ``metadata``."""
    exir: Any = require("executorch.exir", "exporting to ExecuTorch", INSTALL)
    xnnpack: Any = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "ExecuTorch", INSTALL)
    pooling = {torch.ops.aten._adaptive_avg_pool2d.default: _even_pooling}
    lowered = exir.to_edge_transform_and_lower(
        {name: program.run_decompositions(pooling) for name, program in programs.items()},
        partitioner=[xnnpack.XnnpackPartitioner()],
        constant_methods={"metadata": metadata},
    )
    return lowered.to_executorch().buffer


class _Part(nn.Module):
    """What lies between two exits, and the head and the decision at the second.

    Args:
        model: In eval mode.
        stages: Of this part.
        taken: What the part before it returns besides tensors, see :meth:`forward`; None for the first part.

    Attributes:
        left: The same of what this part returns; known after a call.
    """

    def __init__(self, model: EarlyExitWrapper, stages: Sequence[Stage], taken: _Layout | None) -> None:
        super().__init__()
        self.model = model
        self.stages = stages
        self.taken = taken
        self.left: _Layout | None = None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See :func:`export_executorch`; the first of the tensors between methods is 0, or NaN for bad input."""
        exit_index, tensors = self.stages[-1].exit_index, list(inputs)
        threshold = tensors.pop(0) if exit_index is not None else tensors[0]
        if self.taken is None:
            (x,) = tensors
            means = x.mean((2, 3), keepdim=True)  # a mean is lowered to XNNPACK, a sum is not
            poison = (means - means).sum((1, 2, 3))
        else:
            poison, *tensors = tensors
            left, spec = self.taken
            given = iter(tensors)
            x = pytree.tree_unflatten([next(given) if value is ... else value for value in left], spec)
        for stage in self.stages:
            x = stage.run(x)
        if exit_index is None:
            return (
                _calibrated(self.model, len(self.model.heads.active), self.model.runner.adapter.logits(x)) + poison,
            )
        head = self.model.heads.active[exit_index]
        logits = _calibrated(self.model, exit_index, run_head(head, read_feature(x, head.spec.output_index), None))
        log_probs = logits.float().log_softmax(-1).unsqueeze(0)
        exits = exit_decision(self.model.policy, logits, log_probs, threshold, poison)
        values, spec = pytree.tree_flatten(x)  # sizes of maps go from stage to stage with the tensors
        self.left = [... if isinstance(value, Tensor) else value for value in values], spec
        carried = (value.contiguous() for value in values if isinstance(value, Tensor))
        return (logits + poison, exits, poison, *carried)


def _calibrated(model: EarlyExitWrapper, exit_index: int, logits: Tensor) -> Tensor:
    return logits if model.calibrator is None else model.calibrator(exit_index, logits, None, [])


@torch.no_grad()
def trace_parts(model: EarlyExitWrapper) -> list[torch.export.ExportedProgram]:
    """Returns the parts, each traced on what the one before it returned.

    Raises:
        ExportError: The stages are not known, or torch.export cannot trace a part.
    """
    stages = model.runner.stages()
    if stages is None:
        raise ExportError(
            f"{type(model.backbone).__name__} is run with hooks, and an ExecuTorch program needs stages that can be run"
            " one by one: use erde_hub.export.export_onnx"
        )
    programs: list[torch.export.ExportedProgram] = []
    tensors: list[Tensor] = [torch.ones((1, *(model.config.input_size or ())))]
    taken, begin = None, 0
    ends = [i + 1 for i, stage in enumerate(stages) if stage.exit_index is not None]
    for name, end in zip(model.exit_names, [*ends, len(stages)], strict=True):
        part = _Part(model, stages[begin:end], taken).eval()
        inputs = (torch.zeros(1), *tensors) if end in ends else (*tensors,)
        try:
            _, *tensors = part(*inputs)
            tensors, taken = tensors[1:], part.left
            programs.append(torch.export.export(part, inputs, strict=False))
        except Exception as error:
            raise ExportError(
                f"torch.export cannot trace the part up to exit {name!r} of {type(model.backbone).__name__}"
                f" ({error_reason(error)})"
            ) from error
        begin = end
    return programs


def _even_pooling(x: Tensor, size: Sequence[int]) -> Tensor:
    """Adaptive pooling as plain pooling, which is lowered to XNNPACK, where all windows are of one size."""
    if any(have % want for have, want in zip(x.shape[-2:], size, strict=True)):
        return NotImplemented
    kernel = [have // want for have, want in zip(x.shape[-2:], size, strict=True)]
    return torch.ops.aten.avg_pool2d.default(x, kernel, kernel)
