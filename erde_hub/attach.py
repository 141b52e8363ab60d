"""From a living backbone to the config of a model with exits: what is asked of the backbone when it is wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._tree import shrink
from .backbones import BackboneAdapter, ExitPoints, find_adapter
from .backbones.base import example_inputs, find_exit_points
from .config import check_input_size
from .cost import Trace, example_batch, trace, weightless_copy
from .errors import ExitPointError, InputTypeError, LabelError
from .heads import FeatureSpec
from .routing import HookDrive

if TYPE_CHECKING:
    from .modeling import EarlyExitWrapper


def list_exit_points(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Tensor] | Tensor | None = None,
) -> ExitPoints:
    """Lists the places where a model can get exits: name, width, layout, cumulative MACs.

    Args:
        model: A timm model or any nn.Module that maps a batch to logits; it is not run, a weightless copy is.
        input_size: Shape of one input without the batch; timm models know theirs.
        example_inputs: Batch-first tensors instead, for modules that take several inputs.

    Raises:
        ExitPointError: The model does not run on inputs of that shape, or the shape is missing.
    """
    adapter, _, inputs = inspect_backbone(model, input_size, example_inputs)
    return find_exit_points(adapter, model, trace(model, inputs))


def inspect_backbone(
    model: nn.Module,
    input_size: Sequence[int] | None,
    examples: Sequence[Tensor] | Tensor | None,
) -> tuple[BackboneAdapter, dict[str, Any], tuple[Tensor, ...]]:
    """Finds the adapter, what the model says of itself, and example inputs."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected an nn.Module (a timm model, say), got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise InputTypeError(
            "got a compiled module: wrap the module itself and compile then, wrapper.backbone ="
            " torch.compile(wrapper.backbone)"
        )
    adapter = find_adapter(model)
    facts = adapter.describe(model)
    if examples is not None:
        tensors = (examples,) if isinstance(examples, Tensor) else tuple(examples)
        if not tensors or not all(isinstance(t, Tensor) and t.ndim >= 2 for t in tensors):
            raise InputTypeError(f"example_inputs must be a tensor with a batch axis, or several, got {examples!r}")
        if input_size is None:
            input_size = tuple(tensors[0].shape[1:])
    else:
        input_size = input_size if input_size is not None else facts["input_size"]
        if input_size is None:
            raise ExitPointError(
                f"{type(model).__name__} does not say what it takes: pass input_size=(C, H, W), or example_inputs="
            )
        input_size = check_input_size(input_size)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        tensors = example_inputs(input_size, dtype)
    facts["input_size"] = [int(s) for s in input_size]
    if facts["preprocessing"]:
        # What the weights were published with says nothing of images of another number of channels.
        channels, *size = facts["input_size"]
        same = channels == len(facts["preprocessing"]["mean"])
        facts["preprocessing"] = {**facts["preprocessing"], "size": size} if same and len(size) == 2 else None
    return adapter, facts, tensors


def count_classes(model: nn.Module, adapter: BackboneAdapter, traced: Trace) -> int:
    """Number of classes that the backbone answers with.

    Raises:
        InputTypeError: The output is not (N, K) with at least two classes.
    """
    logits = adapter.logits(traced.output)
    declared = getattr(model, "num_classes", None)
    if declared == 0:
        raise InputTypeError(
            f"{type(model).__name__} was created with num_classes=0 and has no classifier: give it one, e.g."
            " model.reset_classifier(10)"
        )
    if logits.ndim != 2 or logits.shape[0] != traced.batch or logits.shape[1] < 2:
        raise InputTypeError(
            f"{type(model).__name__} returns shape {tuple(logits.shape)} for {traced.batch} inputs; a classifier"
            " returns (N, K) with at least 2 classes"
        )
    if isinstance(declared, int) and declared != logits.shape[1]:
        raise InputTypeError(f"{type(model).__name__} says num_classes={declared} but returns {logits.shape[1]} logits")
    return int(logits.shape[1])


def class_names(id2label: Sequence[str] | dict[int, str] | None, num_labels: int) -> dict[str, Any]:
    """Returns the config's fields for the classes: their names, or their number.

    Raises:
        LabelError: Names that do not fit the classifier.
    """
    if id2label is None:
        return {"num_labels": num_labels}
    labels = dict(enumerate(id2label)) if isinstance(id2label, (list, tuple)) else id2label
    if not isinstance(labels, dict) or set(labels) != set(range(num_labels)):
        raise LabelError(
            f"id2label must name the {num_labels} classes of the classifier, as a list or with the keys 0 to"
            f" {num_labels - 1}, got {id2label!r}"
        )
    return {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}


class _DropLast:
    """Takes one sample out at every exit, to find out whether the rest of the backbone follows."""

    def __init__(self, batch: int, specs: Sequence[FeatureSpec]) -> None:
        self.count = batch
        self.specs = specs

    def visit(self, exit_index: int, output: Any) -> Any:
        self.count -= 1
        rows = torch.arange(self.count, device="meta")
        return shrink(output, rows, self.count + 1, self.specs[exit_index].batched)


def check_batch_shrinks(model: EarlyExitWrapper, inputs: tuple[Tensor, ...]) -> None:
    """Runs a weightless copy with a shrinking batch: an exit inside a residual block shows here, not in use.

    Raises:
        ExitPointError: The backbone cannot go on with fewer samples behind one of the exits.
    """
    clone, device = weightless_copy(model)
    names = list(model.config.exits or [])
    specs = [FeatureSpec.from_dict(values) for values in model.config.exit_features or []]
    batch = len(names) + 3
    try:
        with torch.no_grad(), device:
            drive = HookDrive(clone.backbone, clone._taps)
            output = drive(_DropLast(batch, specs), example_batch(inputs, batch, device), {})
        rows = int(model._adapter.logits(output).shape[0])
    except (RuntimeError, IndexError, ValueError, AssertionError, TypeError) as error:
        raise ExitPointError(
            f"the batch cannot shrink behind all of {names} ({type(error).__name__}: {error}): an exit inside a"
            " residual block, or a backbone that keeps the whole batch aside; name the enclosing block"
        ) from error
    if rows != batch - len(names):
        raise ExitPointError(
            f"after {len(names)} samples of {batch} had left, {type(model.backbone).__name__} returned {rows} rows: an"
            f" exit of {names} lies inside a residual block; name the enclosing block"
        )
