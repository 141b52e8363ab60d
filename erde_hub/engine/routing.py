"""One engine behind every forward pass: how the backbone is driven, and what happens at an exit.

A *drive* runs the backbone and shows the output of every exit's stage to a *pass*. There are two drives: a staged one,
for families whose forward is a known sequence of steps, and hooks for everything else. There are two passes: one runs
every exit, one lets samples leave and hands a smaller batch back, so that nothing behind an exit runs for them.

All state of a pass lives in that pass. Hooks find it through a context variable, so threads, models wrapped twice and
wrapped models inside wrapped models do not see each other's, and outside a wrapper's call a hook does nothing.
"""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from erde_hub.errors import ExitNotReachedError, ShapeError
from erde_hub.heads import ExitHead
from erde_hub.policies import ExitPolicy

from .features import CalibratedExits, read_evidence
from .rows import shrink, tensors


class ExitVisitor(Protocol):
    """What happens at the exits during one forward pass."""

    def on_exit(self, exit_index: int, output: Any) -> Any | None:
        """Takes the output of an exit's stage, returns what the next layers get, or None when nobody is left."""


class Runner(Protocol):
    """How the backbone is run so that a pass sees every exit."""

    def __call__(self, visitor: ExitVisitor, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Returns the backbone's output, or None if the pass ended early."""


class Stage:
    """One step of a staged forward: a callable, and the exit behind it if there is one."""

    __slots__ = ("exit_index", "run")

    def __init__(self, run: Callable[[Any], Any], exit_index: int | None = None) -> None:
        self.run = run
        self.exit_index = exit_index


class StageRunner:
    """Runs a backbone step by step. Holds callables, so it is built for a call and never stored in a model."""

    def __init__(self, steps: Sequence[Stage]) -> None:
        self.steps = steps

    def __call__(self, visitor: ExitVisitor, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Runs the steps in order; the staged families take one input tensor and no keyword arguments."""
        (x,) = inputs
        for step in self.steps:
            x = step.run(x)
            if step.exit_index is not None:
                x = visitor.on_exit(step.exit_index, x)
                if x is None:
                    return None
        return x


class _AllExited(BaseException):
    """Ends a pass inside somebody else's forward; not an Exception, so that no backbone swallows it."""

    def __init__(self, running: _RunningPass) -> None:
        super().__init__()
        self.running = running


class _RunningPass:
    """A running hook pass: whose exit_hooks and sync_hooks it answers, and how often each tap was reached."""

    __slots__ = ("calls", "exit_hooks", "memory", "sync_hooks", "visitor")

    def __init__(self, exit_hooks: Sequence[ExitHook], visitor: ExitVisitor, sync_hooks: Sequence[object] = ()) -> None:
        self.exit_hooks = exit_hooks
        self.visitor = visitor
        self.sync_hooks = sync_hooks
        self.memory: dict[Any, Any] = {}
        self.calls = [0] * len(exit_hooks)


_running: contextvars.ContextVar[tuple[_RunningPass, ...]] = contextvars.ContextVar("erde_hub_running", default=())


def running_visitor(follower: object) -> tuple[Any, dict[Any, Any]]:
    """Returns the pass that owns this follower, if one is running in this context, and what its sync_hooks remember.

    Followers are hooks other than exit_hooks: they keep other tensors in step with the batch.
    """
    for running in reversed(_running.get()):
        if any(own is follower for own in running.sync_hooks):
            return running.visitor, running.memory
    return None, {}


class ExitHook:
    """Forward hook behind one exit; a plain object that copies and pickles with the module it sits on.

    Args:
        exit_index: Index of the exit.
        call: The exit is behind this call of the module, counted from 0, where a module is called several times.
    """

    def __init__(self, exit_index: int, call: int = 0) -> None:
        self.exit_index = exit_index
        self.call = call

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any | None:
        """Shows the output to the pass that owns this tap, if one is running in this context."""
        for running in reversed(_running.get()):
            for position, hook in enumerate(running.exit_hooks):
                if hook is self:
                    call = running.calls[position]
                    running.calls[position] += 1
                    if call != self.call:
                        return None
                    seen = running.visitor.on_exit(self.exit_index, output)
                    if seen is None:
                        raise _AllExited(running)
                    return seen
        return None


class HookRunner:
    """Runs a backbone's own forward; exit_hooks on its modules call the pass."""

    def __init__(self, backbone: nn.Module, exit_hooks: Sequence[ExitHook], sync_hooks: Sequence[object] = ()) -> None:
        self.backbone = backbone
        self.exit_hooks = exit_hooks
        self.sync_hooks = sync_hooks

    def __call__(self, visitor: ExitVisitor, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
        """Runs the backbone; the pass's own exception, and nothing else, ends it early."""
        running = _RunningPass(self.exit_hooks, visitor, self.sync_hooks)
        exported = _modules_under_export()
        depth = len(exported)
        token = _running.set((*_running.get(), running))
        try:
            return self.backbone(*inputs, **kwargs)
        except _AllExited as end:
            if end.running is not running:  # of a pass around this one
                raise
            while len(exported) > depth:  # torch.export takes no module off its stack that an exception leaves
                exported.popitem()
            return None
        finally:
            _running.reset(token)


def _modules_under_export() -> dict[str, Any]:
    """The stack of modules that torch.export keeps while it traces; an empty one where it does not."""
    if not torch.compiler.is_exporting():
        return {}
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # noqa: PLC0415 - slow to import, rarely needed

    stack = getattr(getattr(get_proxy_mode(), "tracer", None), "module_stack", None)
    return {} if stack is None else stack


def read_feature(output: Any, leaf: int | None) -> Tensor:
    """Returns the tensor that a head reads from a stage's output."""
    if leaf is None:
        if not isinstance(output, Tensor):
            raise ExitNotReachedError(
                f"the stage of an exit returned {type(output).__name__} where one tensor was seen at wrapping"
            )
        return output
    return tensors(output)[leaf]


def run_head(head: ExitHead, feature: Tensor, mask: Tensor | None) -> Tensor:
    """Returns a head's logits; heads on padded sequences also get the mask of their tokens."""
    return head(feature, mask) if head.spec.masked else head(feature)


def score_exit(
    head: ExitHead,
    policy: ExitPolicy,
    feature: Tensor,
    mask: Tensor | None,
    history: list[Tensor],
    calibrate: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs an exit on the live samples: its logits (N, K), and the policy's scores (N,).

    Args:
        head: The exit's head.
        policy: Scores.
        feature: What the head reads.
        mask: (N, L), which tokens of a padded sequence count.
        history: Log-probabilities, or other evidence, of the exits before; this one's are added where the policy reads
            them.
        calibrate: Takes the head's logits to those that count.
    """
    logits = run_head(head, feature, mask)
    if calibrate is not None:
        logits = calibrate(logits)
    log_probs = logits.float().log_softmax(-1)
    if policy.uses_history:
        history.append(read_evidence(policy, len(history)) if policy.uses_features else log_probs)
        return logits, policy.score(torch.stack(history))
    return logits, policy.score_last(log_probs)


def route_one(
    steps: Sequence[Stage], heads: Sequence[ExitHead], policy: ExitPolicy, thresholds: Sequence[float], x: Any
) -> tuple[Any, int]:
    """Takes a single sample through a staged backbone: what :class:`Router` does, where nothing can shrink.

    A short network leaves nothing of the interpreter's work in the caches, so that every function called at an exit
    costs microseconds of the few hundred that a stage takes; one loop calls as few as it can, and decides in Python.

    Args:
        steps: Of the backbone.
        heads: The early exits' heads.
        policy: Without history.
        thresholds: One per early exit.
        x: The sample, with an axis of one for the batch.

    Returns:
        The exit's logits (1, K), or what the backbone returned, and the index of the exit.
    """
    for step in steps:
        x = step.run(x)
        e = step.exit_index
        if e is None or policy.never_leaves(thresholds[e]):
            continue
        head = heads[e]
        leaf = head.spec.output_index
        logits = head(x if leaf is None and isinstance(x, Tensor) else read_feature(x, leaf))
        log_probs = (logits if logits.dtype is torch.float32 else logits.float()).log_softmax(-1)
        # With the threshold as a tensor would round it.
        if policy.compare(policy.score_one(log_probs), c_float(thresholds[e]).value) and all_finite(logits):
            return logits, e
    return x, len(heads)


def exit_mask(policy: ExitPolicy, scores: Tensor, threshold: float, logits: Tensor) -> Tensor:
    """Returns the mask (N,) of samples that leave: who is sure, and whose answer is one.

    Logits that overflowed to NaN or infinity answer nothing, whatever their score: such a sample goes on.
    """
    leaves = policy.compare(scores, threshold)
    return leaves if all_finite(logits) else leaves & logits.isfinite().all(-1)


def all_finite(logits: Tensor) -> bool:
    """Whether no logit is NaN or infinite; a single operator wherever the sum already tells."""
    return math.isfinite(logits.sum().item()) or bool(logits.isfinite().all())


class AllExits:
    """Runs every exit; the output of each stage goes on unchanged.

    Args:
        heads: The early exits' heads.
        deferred: Run the heads when the backbone is done, for passes with hooks and gradients. Inside a region that
            activation checkpointing recomputes, a head would leave tensors that the recomputation, where exit_hooks are
            silent, does not make again; and such a region is not announced by every backbone.
        mask: (N, L), which tokens of a padded sequence count; for heads that pool them.
    """

    def __init__(self, heads: Sequence[ExitHead], deferred: bool = False, mask: Tensor | None = None) -> None:
        self.heads = heads
        self.deferred = deferred
        self.mask = mask
        self.next_exit = 0
        self.exit_logits: list[Tensor] = []
        self.features: list[tuple[Tensor, int]] = []  # each with the version that its head should read

    def on_exit(self, exit_index: int, output: Any) -> Any:
        """Stores the head's logits, or the feature for later."""
        check_due(exit_index, self.next_exit)
        self.next_exit += 1
        head = self.heads[exit_index]
        feature = read_feature(output, head.spec.output_index)
        if not self.deferred:
            self.exit_logits.append(run_head(head, feature, self.mask))
        else:
            self.features.append((feature, feature._version))
        return output

    def finish(self, final: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Returns the logits of all exits, or raises if one did not fire."""
        check_all_reached(self.next_exit, names)
        for name, head, (feature, version) in zip(names, self.heads, self.features, strict=False):
            if feature._version != version:
                raise ExitNotReachedError(
                    f"the feature of exit {name!r} was overwritten in place by the next layer before its head could"
                    " read it: name that layer instead"
                )
            self.exit_logits.append(run_head(head, feature, self.mask))
        return (*self.exit_logits, final)


def check_due(exit_index: int, next_exit: int) -> None:
    """Raises :class:`ExitNotReachedError` where the exits fire in another order than they are listed."""
    if exit_index != next_exit:
        raise ExitNotReachedError(
            f"exit {exit_index} fired where exit {next_exit} was due: the backbone took another path than at wrapping;"
            " there is no answer to give"
        )


def check_all_reached(next_exit: int, names: Sequence[str]) -> None:
    """Raises :class:`ExitNotReachedError` where the backbone is done and an exit has not fired."""
    if next_exit != len(names):
        raise ExitNotReachedError(
            f"the forward pass did not reach the exits {list(names[next_exit:])}: the backbone took another path than"
            " at wrapping (torch.compile of the backbone, changed modules?); there is no answer to give"
        )


class Router:
    """Lets each sample leave at the first exit that is sure of it and hands the rest of the batch on.

    Args:
        heads: The early exits' heads.
        policy: Decides from log-probabilities.
        thresholds: One per early exit.
        batch: Number of samples.
        device: Where the indices live.
        mask: (N, L), which tokens of a padded sequence count; for heads that pool them.
        calibration: Of the logits, before the policy reads them.
    """

    def __init__(
        self,
        heads: Sequence[ExitHead],
        policy: ExitPolicy,
        thresholds: Sequence[float],
        batch: int,
        device: torch.device,
        mask: Tensor | None = None,
        calibration: CalibratedExits | None = None,
    ) -> None:
        self.calibration = calibration
        self.needs_every_exit = policy.uses_history or (calibration is not None and calibration.calibrator.uses_history)
        self.heads = heads
        self.mask = mask
        self.policy = policy
        self.thresholds = thresholds
        self.batch = batch
        self.device = device
        self.next_exit = 0
        self.active: Tensor | None = None  # indices of the live samples, None while that is all of them
        self.active_by_size: dict[int, Tensor] = {}  # and those of larger batches before, by their size
        self.count = batch
        self.history: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.exits: list[int] = []

    def _leave(self, rows: Tensor | None, logits: Tensor, exit_index: int) -> None:
        if rows is not None:  # None: the whole batch, together
            self.rows.append(rows)
        self.logits.append(logits)
        self.exits.append(exit_index)

    def on_exit(self, exit_index: int, output: Any) -> Any | None:
        """Runs the head, takes out who leaves, returns the output of those who stay, or None."""
        check_due(exit_index, self.next_exit)
        self.next_exit += 1
        threshold = self.thresholds[exit_index]
        if self.policy.never_leaves(threshold) and not self.needs_every_exit:
            return output
        head = self.heads[exit_index]
        feature = read_feature(output, head.spec.output_index)
        if feature.shape[0] != self.count:
            raise ExitNotReachedError(
                f"exit {exit_index} saw {feature.shape[0]} rows where {self.count} samples are alive"
            )
        calibrate = None if self.calibration is None else functools.partial(self.calibration, exit_index)
        logits, scores = score_exit(head, self.policy, feature, self.mask, self.history, calibrate)
        leaves = exit_mask(self.policy, scores, threshold, logits)
        gone = leaves.nonzero()
        leaving = gone.shape[0]
        if leaving == 0:
            return output
        if leaving == self.count:
            self._leave(self.active, logits, exit_index)
            self.count = 0
            return None
        gone, stay = gone.squeeze(1), leaves.logical_not().nonzero().squeeze(1)
        live = torch.arange(self.batch, device=self.device) if self.active is None else self.active
        self.active_by_size[self.count] = live
        self._leave(live.index_select(0, gone), logits.index_select(0, gone), exit_index)
        self.active = live.index_select(0, stay)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, stay)
        self.history = [h.index_select(0, stay) for h in self.history]
        if self.calibration is not None:
            self.calibration.keep(stay)
        output = shrink(output, stay, self.count, head.spec.batch_outputs)
        self.count -= leaving
        return output

    def finish(self, final: Tensor | None, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Puts logits (N, K) and exit indices (N,) back into the order of the input."""
        if final is not None:
            check_all_reached(self.next_exit, names)
            if final.shape[0] != self.count:
                raise ShapeError(
                    f"the backbone returned {final.shape[0]} rows for {self.count} live samples: something behind the"
                    " last exit reads the whole batch"
                )
            if self.calibration is not None:
                final = self.calibration(len(self.heads), final)
            self._leave(self.active, final, len(self.heads))
        if len(self.logits) == 1:
            return self.logits[0], torch.full((self.batch,), self.exits[0], dtype=torch.int64, device=self.device)
        order = torch.cat(self.rows)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=self.device)
        dtype = self.logits[0].dtype
        for logits in self.logits[1:]:  # under autocast a head and the classifier may differ
            dtype = torch.promote_types(dtype, logits.dtype)
        merged = torch.cat([logits.to(dtype) for logits in self.logits]).index_select(0, position)
        index = torch.cat([torch.full_like(r, e) for r, e in zip(self.rows, self.exits, strict=True)]).index_select(
            0, position
        )
        return merged, index
