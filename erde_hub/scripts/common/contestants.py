"""What latency measurements run: a model with exits, its bare backbone, and its stages called by hand.

Every contestant is a function without arguments. Where each sample exits is fixed in advance by thresholds that lie
between the scores of the very batch that is run, so that all contestants can be given the same shares; the decisions
themselves are taken at run time, by the real engine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper
from erde_hub.engine.routing import read_feature
from erde_hub.engine.rows import shrink
from erde_hub.engine.stages import Stage
from erde_hub.errors import ConfigError, ErdeError
from erde_hub.policies import create_policy

from .networks import load_model
from .patterns import coarse_patterns
from .turns import Contestant

#: No sample exits at this threshold, but every head is run; 0 would skip the heads.
NOBODY = 1e-30


class PlanError(ErdeError, RuntimeError):
    """A batch cannot be divided as planned."""


@dataclass
class Plan:
    """The exit of each sample of one batch.

    Attributes:
        thresholds: One per early exit; they make the engine follow the plan.
        taken: (N,) int64, the exit of each sample.
        stays: Per early exit, the rows of the active batch that continue; None if all do.
    """

    thresholds: list[float]
    taken: Tensor
    stays: list[Tensor | None]

    def shares(self, num_exits: int) -> list[float]:
        """Fraction of the batch that each exit answers."""
        return (torch.bincount(self.taken, minlength=num_exits) / len(self.taken)).tolist()


@dataclass
class Subject:
    """One network under test.

    Attributes:
        name: timm name, or that of a checkpoint.
        model: In eval mode, with the entropy policy.
        weights: ``"random"``, or ``"checkpoint"``.
    """

    name: str
    model: EarlyExitWrapper
    weights: str

    def images(self, batch: int, channels_last: bool = False) -> Tensor:
        """The same random batch for everybody, see :func:`coarse_patterns`."""
        x = coarse_patterns(batch, self.model.config.input_size or ())
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def stages(self) -> list[Stage] | None:
        """The stages to call by hand; None where the backbone is driven by hooks and has none."""
        return self.model.runner.stages()


def load_subject(name: str, exits: int) -> Subject:
    """Loads a checkpoint, or makes a timm model with random weights and that many exits."""
    if timm.is_model(name) and not Path(name).exists():
        torch.manual_seed(0)
        model = EarlyExitWrapper(timm.create_model(name), exits=exits)
        subject = Subject(name, model, "random")
        _settle(model, subject.images(8))
        model.eval()
    else:
        subject = Subject(Path(name).name, load_model(name), "checkpoint")
    if subject.model.main_input_name != "pixel_values":
        raise ConfigError(f"{name} reads texts; only image models are measured")
    if subject.model.config.task != "classification":
        raise ConfigError(f"{name} is for {subject.model.config.task!r}; only classifiers are measured")
    subject.model.set_calibrator(None)
    subject.model.set_policy(create_policy("entropy"))  # its scores are continuous, so every share can be set
    return subject


@torch.no_grad()
def _settle(model: EarlyExitWrapper, images: Tensor) -> None:
    """Gives a fresh network activations of ordinary size and exits that differ in how sure they are.

    Without statistics of any data, deep networks shrink their activations into denormal numbers, which take a processor
    many times longer, and all samples score the same.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over what it sees
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for head in model.heads.active:
        linear = [m for m in head.modules() if isinstance(m, nn.Linear)][-1]
        linear.weight.normal_(0, 2 / linear.in_features**0.5)


@torch.no_grad()
def plan_for(model: EarlyExitWrapper, x: Tensor, counts: Sequence[int]) -> Plan:
    """Finds thresholds at which given numbers of samples of this batch exit at each early exit.

    Raises:
        PlanError: Two samples score alike where the batch has to be divided, or the engine does not follow.
    """
    every = [model(part, output_all_exits=True).exit_logits for part in x.split(16)]
    taken = torch.full((len(x),), len(counts))
    live = torch.arange(len(x))
    thresholds: list[float] = []
    stays: list[Tensor | None] = []
    for e, count in enumerate(counts):
        logits = torch.cat([part[e] for part in every])[live]
        scores = model.policy.score(logits.float().log_softmax(-1)[None])
        order = scores.argsort()
        if count == 0:
            thresholds.append(0.0)
            stays.append(None)
            continue
        if count >= len(live):
            thresholds.append(float("inf"))
            taken[live] = e
            stays.append(live[:0])
            thresholds += [0.0] * (len(counts) - e - 1)
            stays += [None] * (len(counts) - e - 1)
            break
        low, high = scores[order[count - 1]].item(), scores[order[count]].item()
        if high - low < 1e-6 * max(abs(low), 1):
            raise PlanError(f"exit {e} scores two images {low:.6f} and {high:.6f}: no threshold lies between")
        thresholds.append((low + high) / 2)
        taken[live[order[:count]]] = e
        rows = order[count:].sort().values
        stays.append(rows)
        live = live[rows]
    plan = Plan(thresholds, taken, stays)
    followed = model(x, threshold=plan.thresholds).exit_index
    if not torch.equal(followed, taken):
        raise PlanError(f"the engine let {int((followed != taken).sum())} of {len(x)} samples exit elsewhere")
    return plan


def try_plan(model: EarlyExitWrapper, x: Tensor, counts: Sequence[int]) -> Plan | None:
    """Finds a plan, or says why there is none and returns None."""
    try:
        return plan_for(model, x, counts)
    except PlanError as error:
        print(f"  batch {len(x)}: {error}", file=sys.stderr)
        return None


def shares_of(batch: int, exits: int) -> dict[str, list[int]]:
    """Samples that exit at each early exit: an equal share everywhere, or all but one at the first.

    >>> shares_of(32, 3)
    {'even': [8, 8, 8], 'one_hard': [31, 0, 0]}
    """
    return {"even": [batch // (exits + 1)] * exits, "one_hard": [batch - 1] + [0] * (exits - 1)}


def thread_count(number: int) -> int:
    """Returns a number of threads; 0 stands for one per core."""
    return number or os.cpu_count() or 1


def by_hand(subject: Subject, x: Tensor, stays: Sequence[Tensor | None], heads: Sequence[bool]) -> Contestant:
    """The stages called one after the other on the batch that shrinks as planned; no decisions, no results.

    Args:
        subject: The network.
        x: The batch.
        stays: See :class:`Plan`.
        heads: Whether each exit's head is run.
    """
    stages, model = subject.stages() or [], subject.model
    own: list[Any] = list(model.heads.active)

    def run() -> Tensor | None:
        h: Any = x
        count = len(x)
        for stage in stages:
            h = stage.run(h)
            e = stage.exit_index
            if e is None:
                continue
            if heads[e]:
                logits = own[e](read_feature(h, own[e].spec.output_index))
            rows = stays[e]
            if rows is not None:
                if len(rows) == 0:
                    return logits
                h = shrink(h, rows, count, own[e].spec.batch_outputs)
                count = len(rows)
        return model.runner.adapter.logits(h)

    return run


def routed(subject: Subject, x: Tensor, thresholds: Sequence[float]) -> Contestant:
    """The engine."""
    model, values = subject.model, list(thresholds)
    return lambda: model(x, threshold=values).logits


def contestants(
    subject: Subject, x: Tensor, counts: Mapping[str, list[int]], full: bool
) -> tuple[dict[str, Contestant], dict[str, Any]]:
    """Returns functions by name, and the shares that they are run at.

    Args:
        subject: The network.
        x: The batch.
        counts: Samples that exit at each early exit, by the name of such a division.
        full: The static networks up to each exit as well.
    """
    model, early = subject.model, subject.model.num_exits - 1
    staged = subject.stages() is not None
    everywhere, nowhere = [True] * early, [None] * early
    runs: dict[str, Contestant] = {
        "bare": lambda: model.backbone(x),
        "never": routed(subject, x, [NOBODY] * early),
        "never, heads skipped": routed(subject, x, [0.0] * early),
    }
    if staged:
        runs["never by hand"] = by_hand(subject, x, nowhere, everywhere)
    for k in range(early if len(x) == 1 else 0):
        runs[f"exit {k}"] = routed(subject, x, [float("inf") if e == k else 0.0 for e in range(early)])
        if staged:
            goes_on = [x.new_zeros(0, dtype=torch.int64) if e == k else None for e in range(early)]
            runs[f"exit {k} by hand"] = by_hand(subject, x, goes_on, [e == k for e in range(early)])
        if full:
            static: nn.Module = model.truncate(k)
            runs[f"static {k}"] = partial(static, x)
    shares: dict[str, Any] = {}
    for key, own in counts.items():
        plan = try_plan(model, x, own)
        if plan is None:
            continue
        shares[key] = plan.shares(early + 1)
        runs[key] = routed(subject, x, plan.thresholds)
        if staged:
            runs[f"{key} by hand"] = by_hand(subject, x, plan.stays, [n > 0 for n in own])
    return runs, shares
