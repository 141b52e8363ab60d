"""Checks of what a model, a loss or a metric is given."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erde_hub.errors import ExportError, InputTypeError, ShapeError

#: What text models take, by name; all but one have one row per sample, and positions may be shared.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")

#: Why a routed pass cannot be captured.
NO_GRAPH = (
    "a pass in which samples exit early depends on their values and is no graph that torch.export, torch.jit, torch.fx,"
    " torch.vmap or the old ONNX exporter can hold: take model.truncate(exit), or write all of it with"
    " erde_hub.export.export_onnx, or call the model with output_all_exits=True"
)


class ModelInputs(NamedTuple):
    """What a backbone is called with.

    Attributes:
        args: Positional arguments.
        kwargs: Named arguments.
        main: The one whose rows are the samples.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    main: Tensor


def check_text_inputs(given: Mapping[str, Any], accepted: Collection[str], name: str) -> ModelInputs:
    """Returns the inputs of a text model.

    Args:
        given: Arguments by name; None where one was not given.
        accepted: Names that the backbone's forward takes.
        name: The backbone's class, for messages.

    Raises:
        InputTypeError: No ``input_ids``, an input that the backbone does not take, or one of another type.
        ShapeError: Inputs that do not agree in samples or tokens.
    """
    kwargs = {key: value for key, value in given.items() if value is not None}
    for key in kwargs:
        if key in TEXT_INPUTS and key not in accepted:
            raise InputTypeError(f"{name} takes no {key}: leave it out (return_{key}=False in the tokenizer)")
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise InputTypeError(
            f"{name} takes input_ids=tokenizer(texts, padding=True, return_tensors='pt').input_ids, or inputs_embeds in"
            f" their place; got {' and '.join(sorted(kwargs)) or 'neither'}"
        )
    if ids is not None:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputTypeError(f"input_ids must be an integer tensor (N, L), got {_kind(ids)}")
        if ids.ndim != 2:
            raise ShapeError(f"input_ids must have shape (N, L), got {tuple(ids.shape)}")
    elif not isinstance(embeds, Tensor) or not embeds.is_floating_point() or embeds.ndim != 3:
        raise InputTypeError(f"inputs_embeds must be floats (N, L, C), got {_kind(embeds)}")
    main: Any = embeds if ids is None else ids
    shape = tuple(main.shape[:2])
    if shape[1] == 0:
        raise ShapeError(f"the texts have no tokens: got shape {tuple(main.shape)}")
    for key in ("attention_mask", "token_type_ids", "position_ids"):
        value = kwargs.get(key)
        if isinstance(value, Tensor) and value.ndim == 2:
            shared = key == "position_ids" and value.shape[0] == 1
            if tuple(value.shape) != shape and not (shared and value.shape[1] == shape[1]):
                raise ShapeError(f"{key} has shape {tuple(value.shape)} for tokens of shape {shape}")
    return ModelInputs((), kwargs, main)


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def explain_failure(error: Exception, inputs: ModelInputs, input_size: Sequence[int], dtype: torch.dtype) -> Exception:
    """Returns a typed error in place of a backbone's own where the inputs are not those of its config, else ``error``.

    Checked only where a pass failed: many backbones take other sizes, and some convert other types.

    Args:
        error: What the backbone raised.
        inputs: What it was called with.
        input_size: Shape of one input at wrapping.
        dtype: Of its weights.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # noqa: PLC0415 - seldom needed

    x = inputs.main
    if get_proxy_mode() is not None or torch._C._functorch.is_batchedtensor(x):
        return ExportError(f"{NO_GRAPH} ({error})")
    if x.is_floating_point() and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return InputTypeError(f"the inputs are {x.dtype}, the weights {dtype}: convert one with .to(...) ({error})")
    if len(input_size) == 3 and tuple(x.shape[1:]) != tuple(input_size):
        return ShapeError(
            f"pixel_values have shape {tuple(x.shape)}; the model was wrapped for inputs of {tuple(input_size)} and"
            f" does not run on these: resize them with model.image_processor() ({error})"
        )
    if x.is_meta:
        return InputTypeError(
            f"the inputs are on the meta device, where tensors have a shape and no values: give real ones ({error})"
        )
    return error


def check_pixel_values(pixel_values: Any, input_size: Sequence[int]) -> Tensor:
    """Returns a batch of inputs of that size; height and width may differ from it.

    Args:
        pixel_values: (N, C, H, W) float for images.
        input_size: Shape of one input, () where it is not known.

    Raises:
        InputTypeError: Not a tensor, or images that are not floats.
        ShapeError: Another number of axes or channels.
    """
    if not isinstance(pixel_values, Tensor):
        raise InputTypeError(f"pixel_values must be a tensor (N, C, H, W), got {type(pixel_values).__name__}")
    shape = pixel_values.shape
    if input_size and len(shape) != len(input_size) + 1:
        raise ShapeError(
            f"pixel_values must have {len(input_size) + 1} axes, (N, {', '.join(map(str, input_size))}), got shape"
            f" {tuple(shape)}"
        )
    if len(input_size) == 3:
        if shape[1] != input_size[0]:
            raise ShapeError(f"pixel_values must have {input_size[0]} channels, got shape {tuple(shape)}")
        if not pixel_values.is_floating_point():
            raise InputTypeError(
                f"pixel_values must be floats, got {pixel_values.dtype}: preprocess images with model.image_processor()"
            )
    return pixel_values
