"""earlyon beside the engine: the same network with exits at the same places and heads of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.scripts.common.contestants import PlanError, Subject
from erde_hub.scripts.common.turns import Contestant

Runs = dict[str, Contestant]


def load_earlyon(subject: Subject) -> tuple[Any, str | None]:
    """Returns earlyon's wrapper of the same network and exits with its own heads, or None and the reason."""
    try:
        from earlyon.models import custom_ee  # noqa: PLC0415 - an extra
    except ImportError:
        return None, "earlyon is not installed: pip install 'erde-hub[bench]'"
    model = subject.model
    backbone = copy.deepcopy(model.backbone)
    size = (1, *(model.config.input_size or ()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            wrapper = custom_ee(backbone, list(model.config.exits or []), model.config.num_labels, input_shape=size)
            wrapper.eval()
            for head in wrapper.exit_heads.values():
                nn.init.normal_(head.classifier[-1].weight, 0, 2 / head.classifier[-1].in_features ** 0.5)
            wrapper.config.confidence_thresholds = [1.0] * len(model.heads)
            wrapper.forward_inference_batched(torch.zeros(size))  # it estimates its costs once
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is a reason not to compare
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return wrapper, None


@dataclass
class EarlyonPlan:
    """Settings of earlyon at which so many samples are sure enough at each of its exits."""

    thresholds: list[float]
    enabled: list[bool]

    def apply(self, wrapper: Any) -> None:
        """Puts the settings in force."""
        wrapper.config.confidence_thresholds, wrapper.config.enabled_exits = self.thresholds, self.enabled


@torch.no_grad()
def plan_earlyon(wrapper: Any, x: Tensor, counts: Sequence[int]) -> EarlyonPlan:
    """Finds them from the confidences of its own heads, which are not ours: shares agree, samples need not."""
    every = [torch.cat(parts) for parts in zip(*(wrapper(part, mode="training") for part in x.split(16)), strict=True)]
    live = torch.arange(len(x))
    plan = EarlyonPlan([], [])
    for e, count in enumerate(counts):
        plan.enabled.append(count > 0 and len(live) > 0)
        if not plan.enabled[-1] or count >= len(live):
            plan.thresholds.append(0.0)
            live = live if count == 0 else live[:0]
            continue
        confidence = every[e][live].softmax(-1).amax(-1)
        order = confidence.argsort(descending=True)
        plan.thresholds.append(float(confidence[order[count - 1]] + confidence[order[count]]) / 2)
        live = live[order[count:].sort().values]
    return plan


def earlyon_alone(wrapper: Any, x: Tensor, exit_index: int | None) -> Contestant:
    """Its call for one sample, which leaves at one exit; at None all its exits look and nobody leaves."""
    early = len(wrapper.exit_heads)
    plan = EarlyonPlan([1.0] * early, [True] * early)
    if exit_index is not None:
        plan = EarlyonPlan([0.0] * early, [e == exit_index for e in range(early)])

    def run() -> Any:
        plan.apply(wrapper)
        return wrapper(x)

    plan.apply(wrapper)
    taken = wrapper(x).exit_taken
    if taken != (-1 if exit_index is None else exit_index):
        raise PlanError(f"earlyon left at exit {taken} where {exit_index} was set")
    return run


def earlyon_contestants(wrapper: Any, x: Tensor, counts: Mapping[str, Sequence[int]], full: bool) -> Runs:
    """Returns what it runs beside us, by name.

    Args:
        wrapper: See :func:`load_earlyon`.
        x: The batch.
        counts: Samples that leave at each early exit, by the name of such a division; of a single sample there is none.
        full: Its loop over the samples as well.
    """
    runs: Runs = {}
    if len(x) == 1:
        runs["earlyon never"] = earlyon_alone(wrapper, x, None)
        for k in range(len(wrapper.exit_heads)):
            runs[f"earlyon exit {k}"] = earlyon_alone(wrapper, x, k)
        return runs
    for key, own in counts.items():
        settings = plan_earlyon(wrapper, x, own)
        runs[f"earlyon {key}"] = earlyon_batched(wrapper, x, settings)
        if full and key == "even" and len(x) <= 32:  # its time grows with the batch alone
            runs["earlyon one by one"] = earlyon_one_by_one(wrapper, x, settings)
    for run in runs.values():
        run()
    return runs


def earlyon_batched(wrapper: Any, x: Tensor, plan: EarlyonPlan) -> Contestant:
    """Its call for batches: all leave together, when all are sure."""

    def run() -> Any:
        plan.apply(wrapper)
        return wrapper.forward_inference_batched(x)

    return run


def earlyon_one_by_one(wrapper: Any, x: Tensor, plan: EarlyonPlan) -> Contestant:
    """A loop over the batch with its call for one sample."""
    samples = x.split(1)

    def run() -> list[int]:
        plan.apply(wrapper)
        return [wrapper(sample).exit_taken for sample in samples]

    return run
