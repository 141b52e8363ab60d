"""What happens at the exits: visitors that run every exit, or let each sample exit as soon as a policy allows it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from erde_hub.calibration import Calibrator
from erde_hub.errors import ExitNotReachedError, ShapeError
from erde_hub.heads import ExitHead
from erde_hub.policies import ExitPolicy

from .features import CalibratedExits, read_density_terms
from .rows import shrink, tensors
from .runner import ExitRunner
from .stages import Stage


class RoutingPlan:
    """What routing at one threshold needs, worked out once for any number of calls.

    Args:
        runner: Runs the backbone.
        heads: The early exits' heads, as the runner returns them.
        policy: Decides from log-probabilities.
        calibrator: Of the logits, before the policy reads them.
        thresholds: One per early exit, as the policy returns them; or float32 tensors (N,), with a number per sample,
            NaN for samples that never exit there.

    Attributes:
        runs_head: Whether the head of each early exit runs: a sample can exit there, or a later exit reads its logits.
        never_exits: No sample can exit early, and the backbone's own output is the answer.
        looks_at_one: Neither calibrator nor earlier exits matter, so a single sample needs no visitor.
        pools_tokens: Heads have to know which tokens of a padded sequence count.
        rounded: The thresholds in float32, in which scores are computed; for single samples.
    """

    __slots__ = (
        "calibrator",
        "heads",
        "looks_at_one",
        "never_exits",
        "policy",
        "pools_tokens",
        "rounded",
        "runner",
        "runs_head",
        "thresholds",
    )

    def __init__(
        self,
        runner: ExitRunner,
        heads: Sequence[ExitHead],
        policy: ExitPolicy,
        calibrator: Calibrator | None,
        thresholds: Sequence[float] | Sequence[Tensor],
    ) -> None:
        self.runner = runner
        self.heads = heads
        self.policy = policy
        self.calibrator = calibrator
        self.thresholds: list[Any] = list(thresholds)
        reads_all = policy.uses_history or (calibrator is not None and calibrator.uses_history)
        never = [bool(own.isnan().all()) if isinstance(own, Tensor) else policy.never_leaves(own) for own in thresholds]
        self.runs_head = [reads_all or not nobody for nobody in never]
        self.never_exits = calibrator is None and all(never)
        self.looks_at_one = calibrator is None and not policy.uses_history
        self.pools_tokens = pools_tokens(heads)
        self.rounded = [c_float(own).value for own in thresholds if not isinstance(own, Tensor)]

    def calibrated(self) -> CalibratedExits | None:
        """Returns the calibrator with the state of a new pass, None where there is none."""
        return None if self.calibrator is None else CalibratedExits(self.calibrator)


class PlanCache:
    """Holds the latest plan; a copy or a pickle of it is empty.

    Attributes:
        latest: What the plan was made from, to be compared with what the next one would be made from; and the plan.
    """

    def __init__(self) -> None:
        self.latest: tuple[list[Any], RoutingPlan] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def read_feature(output: Any, output_index: int | None) -> Tensor:
    """Returns the tensor that a head reads from a stage's output."""
    if output_index is None:
        if not isinstance(output, Tensor):
            raise ExitNotReachedError(
                f"the stage of an exit returned {type(output).__name__} where one tensor was seen at wrapping"
            )
        return output
    return tensors(output)[output_index]


def run_head(head: ExitHead, feature: Tensor, mask: Tensor | None) -> Tensor:
    """Returns a head's logits; heads on padded sequences also get the mask of their tokens."""
    return head(feature, mask) if head.spec.masked else head(feature)


def pools_tokens(heads: Sequence[ExitHead]) -> bool:
    """Whether heads have to know which tokens of a padded sequence count."""
    return any(head.spec.masked for head in heads)


def score_exit(
    head: ExitHead,
    policy: ExitPolicy,
    feature: Tensor,
    mask: Tensor | None,
    history: list[Tensor],
    calibrate: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs an exit on the active samples: its logits (N, K), and the policy's scores (N,).

    Args:
        head: The exit's head.
        policy: Scores.
        feature: What the head reads.
        mask: (N, L), which tokens of a padded sequence count.
        history: Log-probabilities, or what the policy reads in their place, of the exits before; this exit's are added
            where the policy reads them.
        calibrate: Turns the head's logits into calibrated ones.
    """
    logits = run_head(head, feature, mask)
    if calibrate is not None:
        logits = calibrate(logits)
    log_probs = logits.float().log_softmax(-1)
    if policy.uses_history:
        history.append(read_density_terms(policy, len(history)) if policy.uses_features else log_probs)
        return logits, policy.score(torch.stack(history))
    return logits, policy.score_last(log_probs)


def exit_mask(policy: ExitPolicy, scores: Tensor, threshold: float | Tensor, logits: Tensor) -> Tensor:
    """Returns which samples exit, (N,): those whose score passes the threshold and whose logits are finite.

    Logits that overflowed to NaN or infinity are no answer, whatever their score: such a sample goes on.
    """
    exits = policy.compare(scores, threshold)
    return exits if all_finite(logits) else exits & logits.isfinite().all(-1)


def all_finite(logits: Tensor) -> bool:
    """Whether no logit is NaN or infinite; a single operator wherever the sum already tells."""
    return math.isfinite(logits.sum().item()) or bool(logits.isfinite().all())


def route_one(plan: RoutingPlan, stages: Sequence[Stage], x: Any) -> tuple[Tensor, int]:
    """Takes a single sample through the stages: what :class:`Router` does, where nothing can shrink.

    The kernels of a short network evict the interpreter's code from the caches, so every function called at an exit
    costs microseconds of the few hundred that a stage takes. One loop calls few of them and decides in Python.

    Args:
        plan: Of a policy that reads no earlier exits, without calibrator.
        stages: Of the backbone.
        x: The sample, with an axis of one for the batch.

    Returns:
        Logits (1, K), and the index of the exit.
    """
    policy, runs_head = plan.policy, plan.runs_head
    for stage in stages:
        x = stage.run(x)
        e = stage.exit_index
        if e is None or not runs_head[e]:
            continue
        head = plan.heads[e]
        index = head.spec.output_index
        logits = head(x if index is None and isinstance(x, Tensor) else read_feature(x, index))
        log_probs = (logits if logits.dtype is torch.float32 else logits.float()).log_softmax(-1)
        if policy.compare(policy.score_one(log_probs), plan.rounded[e]) and all_finite(logits):
            return logits, e
    return plan.runner.adapter.logits(x), len(runs_head)


class AllExits:
    """Visitor that runs every exit; the output of each stage goes on unchanged.

    Args:
        heads: The early exits' heads.
        deferred: Run the heads when the backbone is done, for passes with hooks and gradients. In a region that
            activation checkpointing recomputes, a head would save tensors for the backward pass that the recomputation,
            where hooks do nothing, does not make again; and not every backbone announces such a region.
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
        """Returns the logits of all exits.

        Raises:
            ExitNotReachedError: An exit was not reached, or its feature was overwritten before its head could run.
        """
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
    """Raises :class:`ExitNotReachedError` where exits are reached in another order than they are listed."""
    if exit_index != next_exit:
        raise ExitNotReachedError(
            f"exit {exit_index} was reached where exit {next_exit} was due: the backbone took another path than at"
            " wrapping; there is no answer to give"
        )


def check_all_reached(next_exit: int, names: Sequence[str]) -> None:
    """Raises :class:`ExitNotReachedError` where the backbone is done and an exit was not reached."""
    if next_exit != len(names):
        raise ExitNotReachedError(
            f"the forward pass did not reach the exits {list(names[next_exit:])}: the backbone took another path than"
            " at wrapping (torch.compile of the backbone, changed modules?); there is no answer to give"
        )


class Router:
    """Visitor that lets each sample exit where the policy allows it first, and hands the rest of the batch on.

    Args:
        plan: Heads, policy, calibrator and thresholds.
        batch: Number of samples.
        device: Where the indices are kept.
        mask: (N, L), which tokens of a padded sequence count; for heads that pool them.

    Attributes:
        active: Indices of the samples that have not exited, None while that is all of them.
        active_by_size: Those of the larger batches before, by their size.
        count: Number of active samples.
    """

    def __init__(self, plan: RoutingPlan, batch: int, device: torch.device, mask: Tensor | None = None) -> None:
        self.plan = plan
        self.calibrated = plan.calibrated()
        self.mask = mask
        self.batch = batch
        self.device = device
        self.next_exit = 0
        self.active: Tensor | None = None
        self.active_by_size: dict[int, Tensor] = {}
        self.count = batch
        self.history: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.exits: list[int] = []

    def on_exit(self, exit_index: int, output: Any) -> Any | None:
        """Runs the head, takes the samples out that exit, returns the output of the others, None where all exited."""
        check_due(exit_index, self.next_exit)
        self.next_exit += 1
        plan = self.plan
        if not plan.runs_head[exit_index]:
            return output
        head = plan.heads[exit_index]
        feature = read_feature(output, head.spec.output_index)
        if feature.shape[0] != self.count:
            raise ExitNotReachedError(
                f"exit {exit_index} saw {feature.shape[0]} rows where {self.count} samples are active"
            )
        calibrate = None if self.calibrated is None else functools.partial(self.calibrated, exit_index)
        logits, scores = score_exit(head, plan.policy, feature, self.mask, self.history, calibrate)
        threshold = plan.thresholds[exit_index]
        if isinstance(threshold, Tensor) and self.active is not None:
            threshold = threshold.index_select(0, self.active)
        mask = exit_mask(plan.policy, scores, threshold, logits)
        exited = mask.nonzero()
        number = exited.shape[0]
        if number == 0:
            return output
        if number == self.count:
            self._answer(self.active, logits, exit_index)
            self.count = 0
            return None
        exited, kept = exited.squeeze(1), mask.logical_not().nonzero().squeeze(1)
        active = torch.arange(self.batch, device=self.device) if self.active is None else self.active
        self.active_by_size[self.count] = active
        self._answer(active.index_select(0, exited), logits.index_select(0, exited), exit_index)
        self.active = active.index_select(0, kept)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, kept)
        self.history = [h.index_select(0, kept) for h in self.history]
        if self.calibrated is not None:
            self.calibrated.keep(kept)
        output = shrink(output, kept, self.count, head.spec.batch_outputs)
        self.count -= number
        return output

    def _answer(self, rows: Tensor | None, logits: Tensor, exit_index: int) -> None:
        if rows is not None:  # None: the whole batch, together
            self.rows.append(rows)
        self.logits.append(logits)
        self.exits.append(exit_index)

    def finish(self, final: Tensor | None, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Puts logits (N, K) and exit indices (N,) back into the order of the input."""
        if final is not None:
            check_all_reached(self.next_exit, names)
            if final.shape[0] != self.count:
                raise ShapeError(
                    f"the backbone returned {final.shape[0]} rows for {self.count} active samples: a layer after the"
                    " last exit reads the whole batch"
                )
            if self.calibrated is not None:
                final = self.calibrated(len(names), final)
            self._answer(self.active, final, len(names))
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
