"""Learning rates as pure functions of the number of optimizer steps, so that a resumed run needs no state for them.

timm's schedulers have that form already; one-cycle, which timm lacks, is added in the same form.
"""

from __future__ import annotations

import math

import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler

from .arguments import DistillationArguments


class OneCycleScheduler(Scheduler):
    """Up from 1/25 of the learning rate along a cosine, then down to 1/250,000 of it along another.

    The values are those of ``torch.optim.lr_scheduler.OneCycleLR`` with its default factors and a constant momentum.

    Args:
        optimizer: Its groups' ``lr`` is the highest value.
        total_steps: Optimizer steps of the whole run.
        warmup: Fraction of the updates on the way up.

    References:
        Leslie N. Smith, Nicholay Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning
        Rates, 2017, arXiv 1708.07120. Deviation: the momentum stays constant.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int, warmup: float) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.total_steps = total_steps
        self.warmup = warmup
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        last = max(self.total_steps - 1, 1)
        peak = self.warmup * self.total_steps - 1
        if t <= peak:
            low, fraction = 1 / 25, t / peak if peak > 0 else 1.0
        else:
            low, fraction = 1 / 250_000, 1 - min((t - peak) / max(last - peak, 1e-9), 1.0)
        factor = low + (1 - low) * (1 - math.cos(math.pi * fraction)) / 2
        return [value * factor for value in self.base_values]


def create_schedule(
    args: DistillationArguments, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: int
) -> Scheduler:
    """Builds the schedule of a run; the loop calls ``step_update(steps done)`` after every optimizer step."""
    if args.scheduler == "onecycle":
        return OneCycleScheduler(optimizer, total_steps, args.warmup)
    # "constant" is younger than the oldest timm that is supported: a step schedule that never decays is the same
    constant = args.scheduler == "constant"
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched="step" if constant else args.scheduler,
        num_epochs=total_steps,  # with one update per "epoch", everything below counts optimizer steps
        updates_per_epoch=1,
        step_on_epochs=False,
        warmup_epochs=round(args.warmup * total_steps),
        warmup_lr=min(args.warmup_lr, args.lr),
        min_lr=min(args.min_lr, args.lr),
        decay_rate=1.0 if constant else args.decay_rate,
        decay_epochs=None if args.scheduler in ("wsd", "rsqrt") else max(1, round(args.decay_epochs * steps_per_epoch)),
        decay_milestones=[max(1, round(fraction * total_steps)) for fraction in args.decay_milestones],
    )
    return scheduler
