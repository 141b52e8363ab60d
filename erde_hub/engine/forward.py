"""The two ways in which a model is run: every exit for every sample, or each sample to the first exit that is sure."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor

from erde_hub.errors import ConfigError, ExportError
from erde_hub.losses.exit_weights import weights_per_exit
from erde_hub.outputs import EarlyExitOutput

from . import features as fitted
from .inputs import ModelInputs
from .recomputation import without_recomputation
from .routing import AllExits, Router, route_one

if TYPE_CHECKING:
    from erde_hub.modeling.wrapper import EarlyExitWrapper


def run_all(model: EarlyExitWrapper, inputs: ModelInputs, labels: Tensor | None) -> EarlyExitOutput:
    """Runs every exit for every sample; with labels, the weighted sum of the exits' losses as well."""
    deferred = bool(model._taps) and torch.is_grad_enabled()
    if deferred and use_reentrant_ckpt() and model.is_activation_checkpointing:
        raise ConfigError(
            "reentrant activation checkpointing records no gradients for exits inside a recomputed region: switch"
            " it off, timm.layers.set_reentrant_ckpt(False)"
        )
    visitor = AllExits(model.heads, deferred, model._token_mask(inputs))  # type: ignore[arg-type]
    drive = model._drive(checkpointed=model.training and torch.is_grad_enabled())
    calibration = None if model.training else model._calibration()
    with calibration.watching() if calibration else contextlib.nullcontext():
        final = drive(visitor, inputs.args, inputs.kwargs)
        exit_logits = visitor.finish(model._adapter.logits(final), model.exit_names[:-1])
    logits = exit_logits[-1]
    if calibration:
        for index, own in enumerate(exit_logits):
            logits = calibration(index, own)
    loss = None
    if labels is not None:
        weights = weights_per_exit(model.config.exit_weights or "uniform", len(exit_logits))
        losses = [w * model._loss_of(z, labels) for w, z in zip(weights, exit_logits, strict=True)]
        loss = torch.stack(losses).sum()
    return EarlyExitOutput(loss=loss, logits=logits, exit_logits=exit_logits)


def route(model: EarlyExitWrapper, inputs: ModelInputs, thresholds: Sequence[float]) -> EarlyExitOutput:
    """Lets each sample leave at the first exit that is sure of it; one threshold per early exit."""
    main = inputs.main
    batch, device = main.shape[0], main.device
    if batch == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return EarlyExitOutput(
            logits=torch.zeros((0, model.config.num_labels), dtype=model.dtype, device=device), exit_index=empty
        )
    if main.is_meta:  # shapes without values, as when a wrapped model inside another is traced: all stay
        logits = run_all(model, inputs, None).logits
        return EarlyExitOutput(
            logits=logits, exit_index=torch.full((batch,), len(model.heads), dtype=torch.int64, device="meta")
        )
    policy, calibration = model._modules["policy"], model._calibration()  # faster than as an attribute
    if calibration is None and all(map(policy.never_leaves, thresholds)):
        logits = model._adapter.logits(model.backbone(*inputs.args, **inputs.kwargs))
        index = torch.full((batch,), len(thresholds), dtype=torch.int64, device=device)
        return EarlyExitOutput(logits=logits, exit_index=index)
    if torch.compiler.is_exporting():
        raise ExportError(
            "a pass in which samples leave early depends on their values and is no graph that torch.export can write:"
            " export model.truncate(exit), or all of it with erde_hub.export.export_onnx, or call the model with"
            " output_all_exits=True"
        )
    mask, drive = model._token_mask(inputs), model._drive(checkpointed=False)
    heads = model._steps.heads(model._modules["heads"])
    if batch == 1 and calibration is None and mask is None and not policy.uses_history and not model._taps:
        logits, taken = route_one(drive.steps, heads, policy, thresholds, main)  # type: ignore[attr-defined]
        if taken == len(heads):
            logits = model._adapter.logits(logits)
        return EarlyExitOutput(logits=logits, exit_index=torch.full((1,), taken, dtype=torch.int64, device=device))
    visitor = Router(heads, policy, thresholds, batch, device, mask, calibration)
    with contextlib.ExitStack() as stack:
        if model._taps and torch.is_grad_enabled():  # recomputation would run a hook's shrinking again
            stack.enter_context(without_recomputation(model.backbone))
        watching = fitted.watching(policy, calibration)
        if watching is not None:
            stack.enter_context(watching)
        final = drive(visitor, inputs.args, inputs.kwargs)
    if final is not None:
        final = model._adapter.logits(final)
    logits, index = visitor.finish(final, model._exits)
    return EarlyExitOutput(logits=logits, exit_index=index)
