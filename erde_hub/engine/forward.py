"""The two ways in which a model is run: every exit for every sample, or each sample up to the exit that it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor

from erde_hub.calibration import Calibrator
from erde_hub.errors import ConfigError, ExportError
from erde_hub.outputs import EarlyExitOutput

from .features import CalibratedExits, capture_features
from .inputs import NO_GRAPH, ModelInputs
from .recomputation import is_recomputing, without_recomputation
from .routing import AllExits, Router, RoutingPlan, pools_tokens, route_one
from .runner import ExitRunner


def run_all(
    runner: ExitRunner,
    heads: Sequence[Any],
    inputs: ModelInputs,
    *,
    training: bool = False,
    calibrator: Calibrator | None = None,
) -> EarlyExitOutput:
    """Runs every exit for every sample.

    Args:
        runner: Runs the backbone.
        heads: The early exits' heads.
        inputs: Of the backbone.
        training: Activations may be recomputed in the backward pass.
        calibrator: Of ``logits``; ``exit_logits`` stay as they are.

    Raises:
        ConfigError: Activation checkpointing in the form that would lose the gradients of exits.
    """
    deferred = torch.is_grad_enabled() and runner.stages() is None
    if deferred and use_reentrant_ckpt() and is_recomputing(runner.backbone):
        raise ConfigError(
            "reentrant activation checkpointing records no gradients for exits inside a recomputed region: switch"
            " it off, timm.layers.set_reentrant_ckpt(False)"
        )
    mask = runner.token_mask(inputs.kwargs) if pools_tokens(heads) else None
    visitor = AllExits(heads, deferred, mask)
    calibrated = None if calibrator is None else CalibratedExits(calibrator)
    with capture_features(calibrated.features) if calibrated else contextlib.nullcontext():
        final = runner.run(visitor, inputs.args, inputs.kwargs, checkpointed=training and torch.is_grad_enabled())
        exit_logits = visitor.finish(runner.adapter.logits(final), runner.exits)
    logits = exit_logits[-1]
    if calibrated:
        for index, own in enumerate(exit_logits):
            logits = calibrated(index, own)
    return EarlyExitOutput(logits=logits, exit_logits=exit_logits)


def route(plan: RoutingPlan, inputs: ModelInputs) -> EarlyExitOutput:
    """Lets each sample exit as soon as the plan's policy allows it."""
    runner, main = plan.runner, inputs.main
    batch, device = main.shape[0], main.device
    if batch == 0:
        dtype = next((p.dtype for p in runner.backbone.parameters() if p.is_floating_point()), None)
        return _routed_together(plan, torch.zeros((0, plan.heads[0].num_labels), dtype=dtype, device=device), 0)
    if plan.never_exits:
        logits = runner.adapter.logits(runner.backbone(*inputs.args, **inputs.kwargs))
        return _routed_together(plan, logits, len(plan.heads))
    if main.is_meta:  # shapes without values, as when a wrapped model inside another is traced: no sample exits
        everything: Any = run_all(runner, plan.heads, inputs)
        return _routed_together(plan, everything.logits, len(plan.heads))
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise ExportError(NO_GRAPH)
    stages = runner.stages()
    mask = runner.token_mask(inputs.kwargs) if plan.pools_tokens else None
    if batch == 1 and plan.looks_at_one and mask is None and stages is not None:
        logits, taken = route_one(plan, stages, main)
        index = torch.full((1,), taken, dtype=torch.int64, device=device)
        return _routed(plan, logits, index)
    if stages is None and batch > 1:
        runner.check_shrinks()
    visitor = Router(plan, batch, device, mask)
    with contextlib.ExitStack() as stack:
        if stages is None and torch.is_grad_enabled():  # recomputation would run a hook's shrinking again
            stack.enter_context(without_recomputation(runner.backbone))
        if visitor.calibrated is not None:
            stack.enter_context(capture_features(visitor.calibrated.features))
        elif plan.policy.uses_features:
            stack.enter_context(capture_features({}))
        final = runner.run(visitor, inputs.args, inputs.kwargs)
    return _routed(plan, *visitor.finish(None if final is None else runner.adapter.logits(final), runner.exits))


def _routed_together(plan: RoutingPlan, logits: Tensor, exit_index: int) -> EarlyExitOutput:
    """The output of a batch whose samples all take the same exit."""
    return _routed(plan, logits, torch.full((len(logits),), exit_index, dtype=torch.int64, device=logits.device))


def _routed(plan: RoutingPlan, logits: Tensor, exit_index: Tensor) -> EarlyExitOutput:
    return EarlyExitOutput(logits=logits, exit_index=exit_index, num_exits=len(plan.heads) + 1)
