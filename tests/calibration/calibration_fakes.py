"""Records of made-up exits of known quality, as the simulation of the recipes makes them."""

from __future__ import annotations

import torch
from simulate_guarantee import EARLYON_GRID, earlyon_thresholds, make_logits

from erde_hub.evaluation import ExitRecords

__all__ = ["EARLYON_GRID", "earlyon_thresholds", "make_logits", "make_records"]


def make_records(samples=400, exits=3, classes=10, seed=0, **info):
    logits, labels = make_logits(samples, exits, classes, seed)
    return ExitRecords(
        logits=logits,
        labels=labels,
        index=torch.arange(samples),
        exit_names=[f"stage{e}" for e in range(exits - 1)] + ["classifier"],
        cumulative_macs=[1000 * (e + 2) for e in range(exits)],
        class_names=[f"c{k}" for k in range(classes)],
        fingerprint="f" * 32,
        info={"split": "validation", **info},
    )
