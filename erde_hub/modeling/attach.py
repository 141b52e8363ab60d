"""From a living backbone to the config of a model with exits: what is asked of the backbone when it is wrapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.backbones import BackboneAdapter, ExitPoint, ExitPoints, find_adapter
from erde_hub.backbones.base import example_inputs, find_exit_points, resolve_exits, spread_exits
from erde_hub.backbones.layouts import FeatureFormats
from erde_hub.backbones.shrink_check import check_shrinks, feasible_points
from erde_hub.backbones.tracing import Trace, trace
from erde_hub.config import as_index, check_input_size
from erde_hub.errors import ConfigError, ExitPointError, InputTypeError, LabelError
from erde_hub.tasks import REGRESSION


def list_exit_points(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Tensor] | Tensor | None = None,
    feature_format: str | Mapping[str, str] | None = None,
) -> ExitPoints:
    """Lists the places where a model can get exits: name, width, layout, cumulative MACs.

    Args:
        model: A timm model, a classifier of transformers, or any nn.Module that maps a batch to logits; it is not run,
            a weightless copy is.
        input_size: Shape of one input without the batch, the number of tokens for texts; timm models and those of
            transformers know theirs.
        example_inputs: Batch-first tensors instead, for modules that take several inputs.
        feature_format: ``NCHW``, ``NHWC``, ``NLC`` or ``NCL``, for all places or by their names; places whose layout
            cannot be told are left out.

    Raises:
        ExitPointError: The model does not run on inputs of that shape, or the shape is missing.
    """
    adapter, _, inputs = inspect_backbone(model, input_size, example_inputs)
    formats = FeatureFormats(feature_format, "auto")
    return feasible_points(adapter, model, find_exit_points(adapter, model, trace(model, inputs), formats), inputs)


def choose_exits(
    adapter: BackboneAdapter,
    model: nn.Module,
    exits: Sequence[str] | int | str,
    traced: Trace,
    inputs: Sequence[Tensor],
    formats: FeatureFormats,
) -> tuple[list[ExitPoint], str]:
    """Turns names, a number or "auto" into exit points after which the batch can shrink; also says how.

    Raises:
        ExitPointError: See :func:`~erde_hub.backbones.base.resolve_exits` and
            :func:`~erde_hub.backbones.shrink_check.check_shrinks`.
    """
    points, reason = resolve_exits(adapter, model, exits, traced, formats)
    names = list(exits) if not isinstance(exits, (int, str)) else [p.name for p in points]
    try:
        check_shrinks(adapter, model, names, [p.spec for p in points], inputs)
    except ExitPointError:
        if not isinstance(exits, (int, str)):
            raise
        offered = feasible_points(adapter, model, find_exit_points(adapter, model, traced, formats), inputs)
        points, reason = spread_exits(offered, exits)
        check_shrinks(adapter, model, [p.name for p in points], [p.spec for p in points], inputs)
    return points, reason


def new_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of a network that have no trained weights, by name: new ones around loaded ones.

    transformers marks the weights that it reads, and sets the biases of others to zero, from where training moves them.
    ``network.new_layers``, names, says it of others.
    """
    names = set(getattr(network, "new_layers", ()))
    loaded = {id(weight) for weight in network.parameters() if getattr(weight, "_is_hf_initialized", False)}
    for name, module in network.named_modules() if loaded else ():
        own = {id(weight) for weight in module.parameters(recurse=False)}  # a tied weight was loaded with the other
        bias = getattr(module, "bias", None)
        if own and not own & loaded and not (isinstance(bias, Tensor) and bias.any()):
            names.add(name)
    return {name: module for name, module in network.named_modules() if name in names}


def inspect_backbone(
    model: nn.Module,
    input_size: Sequence[int] | None,
    examples: Sequence[Tensor] | Tensor | None,
) -> tuple[BackboneAdapter, dict[str, Any], tuple[Tensor, ...]]:
    """Finds the adapter, what the model says of itself, and example inputs."""
    _check_module(model)
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
        tensors = example_inputs(input_size, adapter.example_dtype(model))
    facts["input_size"] = [int(s) for s in input_size]
    if facts["preprocessing"]:
        # What the weights were published with says nothing of images of another number of channels.
        channels, *size = facts["input_size"]
        same = channels == len(facts["preprocessing"]["mean"])
        facts["preprocessing"] = {**facts["preprocessing"], "size": size} if same and len(size) == 2 else None
    return adapter, facts, tensors


def _check_module(model: Any) -> None:
    """Refuses what is no module as its author wrote it, or lies in several places.

    Raises:
        InputTypeError: No module, one inside another's machinery, or tensors without a size or on several devices.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected an nn.Module (a timm model, say), got {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise InputTypeError(
            f"got a {type(model).__name__}: give the network exits first and adapt that,"
            " get_peft_model(EarlyExitWrapper(network), LoraConfig(..., modules_to_save=['heads'])), or merge,"
            " EarlyExitWrapper(model.merge_and_unload())"
        )
    if hasattr(model, "_orig_mod"):
        raise InputTypeError(
            "got a compiled module: wrap the module itself and compile then, wrapper.backbone ="
            " torch.compile(wrapper.backbone)"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputTypeError(
            f"got a {type(model).__name__}: wrap what is inside, EarlyExitWrapper(model.module, ...), and put the"
            " result into it"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError(
            "got a TorchScript module, whose layers cannot be hooked: wrap the module it was made from"
        )
    tensors = (*model.parameters(), *model.buffers())
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise InputTypeError(
            f"this {type(model).__name__} has lazy layers, which have no sizes yet: call it once with a batch"
        )
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        raise InputTypeError(
            f"weights and buffers of this {type(model).__name__} lie on several devices ({', '.join(devices)}): move"
            " the model to one of them with .to(device)"
        )


def check_problem_type(given: str | None, declared: str | None) -> str | None:
    """Returns what the model answers with: as given, or as the backbone's own config says.

    Raises:
        ConfigError: The two contradict each other.
    """
    if given is not None and declared is not None and given != declared:
        raise ConfigError(
            f"problem_type={given!r}, but the model's own config says {declared!r}: leave it out, or wrap another model"
        )
    return declared if given is None else given


def count_classes(model: nn.Module, adapter: BackboneAdapter, traced: Trace, problem_type: str | None = None) -> int:
    """Number of classes, or of targets of a regression, that the backbone answers with.

    Raises:
        InputTypeError: The output is not (N, K) with at least two classes, or (N, D).
    """
    regression = problem_type == REGRESSION
    logits = adapter.logits(traced.output)
    if adapter.task(model) == "causal_lm":
        return int(logits.shape[-1])
    declared = adapter.declared_classes(model)
    if declared == 0:
        raise InputTypeError(
            f"{type(model).__name__} was created with num_classes=0 and has no classifier: give it one"
            f"{', e.g. model.reset_classifier(10)' if hasattr(model, 'reset_classifier') else ''}"
        )
    if logits.ndim != 2 or logits.shape[0] != traced.batch or logits.shape[1] < (1 if regression else 2):
        wanted = "a regression returns (N, D), one column per target" if regression else (
            "a classifier returns (N, K) with at least 2 classes (for real numbers: problem_type='regression')"
        )  # fmt: skip
        raise InputTypeError(
            f"{type(model).__name__} returns shape {tuple(logits.shape)} for {traced.batch} inputs; {wanted}"
        )
    if declared is not None and declared != logits.shape[1]:
        raise InputTypeError(
            f"{type(model).__name__} says {adapter.classes_attribute}={declared} but returns {logits.shape[1]} logits:"
            f" after replacing its classifier, set model.{adapter.classes_attribute} = {logits.shape[1]} as well"
        )
    return int(logits.shape[1])


def class_names(
    id2label: Sequence[str] | dict[int, str] | None, num_labels: int, task: str = "classification"
) -> dict[str, Any]:
    """Returns the config's fields for the classes: their names, or their number.

    Raises:
        LabelError: Names that do not fit the classifier.
    """
    if task == "causal_lm":
        if id2label is not None:
            raise LabelError("a language model answers with tokens, which have no id2label: leave it out")
        return {"num_labels": 2}  # transformers' default; its tokens are counted by the backbone's own config
    if id2label is None:
        return {"num_labels": num_labels}
    labels = dict(enumerate(id2label)) if isinstance(id2label, (list, tuple)) else id2label
    if isinstance(labels, dict):
        labels = {as_index(key): label for key, label in labels.items()}
    if not isinstance(labels, dict) or set(labels) != set(range(num_labels)):
        raise LabelError(
            f"id2label must name the {num_labels} classes of the classifier, as a list or with the keys 0 to"
            f" {num_labels - 1}, got {id2label!r}"
        )
    return {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
