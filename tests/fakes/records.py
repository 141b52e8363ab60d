"""Records of made-up exits of known quality."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from erde_hub.evaluation import ExitRecords
from erde_hub.scripts.common.patterns import make_logits

__all__ = ["FakeExits", "batches", "make_logits", "make_records", "records_of"]


def records_of(logits, labels, **changes):
    """Records of a validation split with these logits (E, N, C); names and costs that are not given are made up."""
    exits, samples, classes = logits.shape
    values = {
        "index": torch.arange(samples),
        "exit_names": [*(f"stage{e}" for e in range(exits - 1)), "classifier"],
        "cumulative_macs": [1000 * (e + 1) for e in range(exits)],
        "class_names": [f"c{k}" for k in range(classes)],
        "info": {"split": "validation"},
    }
    return ExitRecords(logits, labels, **{**values, **changes})


def make_records(samples=400, exits=3, classes=10, seed=0, **info):
    logits, labels = make_logits(samples, exits, classes, seed)
    macs = [1000 * (e + 2) for e in range(exits)]
    return records_of(logits, labels, cumulative_macs=macs, fingerprint="f" * 32, info={"split": "validation", **info})


class FakeExits(nn.Module):
    """Two exits on vectors of 4, with what the collector reads and nothing else."""

    exit_names = ("stem", "classifier")

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.heads = nn.ModuleList([nn.Linear(4, 3)])
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        self.config = SimpleNamespace(id2label={0: "cat", 1: "dog", 2: "eel"})

        self.runner = SimpleNamespace(classifier_layer=lambda size: self.backbone[2])
        self.config.input_size = (4,)

    def exits_and_heads(self):
        return [("stem", self.heads[0]), ("classifier", None)]

    def exit_table(self):
        return SimpleNamespace(cumulative_macs=[12, 40])

    def forward(self, pixel_values, output_all_exits=False):
        assert output_all_exits
        x = self.drop(self.norm(pixel_values))
        return SimpleNamespace(exit_logits=(self.heads[0](x), self.backbone(x)))


def batches(samples=10, size=4):
    x, y = torch.randn(samples, 4), torch.randint(3, (samples,))
    index = torch.arange(samples) + 100
    return [
        {"pixel_values": a, "labels": b, "index": c}
        for a, b, c in zip(x.split(size), y.split(size), index.split(size), strict=True)
    ]
