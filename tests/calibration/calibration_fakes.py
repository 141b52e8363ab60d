"""Made-up records with exits of known quality, and earlyon's threshold search as its documentation describes it."""

from __future__ import annotations

import torch

from erde_hub.evaluation import ExitRecords


def make_logits(samples, exits=3, classes=10, seed=0, spread=1.5):
    """Exits that share evidence, get better with depth and differ from sample to sample in how hard they find it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    hard = torch.rand(samples, generator=generator)
    common = torch.randn(samples, classes, generator=generator)
    logits = []
    for e in range(exits):
        depth = (e + 1) / exits
        own = common * 0.7 + (1.9 - 0.9 * depth) * torch.randn(samples, classes, generator=generator)
        own[torch.arange(samples), labels] += (1.2 + 4.2 * depth) * (1.6 - hard)
        logits.append(spread * own)
    return torch.stack(logits), labels


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


#: Confidence thresholds of earlyon 0.3.0, careful to bold.
EARLYON_GRID = (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


def earlyon_thresholds(confidences, losses, costs, max_drop, grid=EARLYON_GRID):
    """Exit by exit from shallow to deep, keeps the boldest value whose accuracy drop is allowed and that saves.

    ``confidences``: (E - 1, N). ``losses``: (E, N) of accuracy against the last exit. Exits without such a value stay
    off (infinity).
    """
    exits = len(losses)

    def evaluate(thresholds):
        taken = torch.full((confidences.shape[1],), exits - 1)
        for e in reversed(range(exits - 1)):
            taken[confidences[e] >= thresholds[e]] = e
        return float(losses.gather(0, taken[None]).mean()), float(costs[taken].mean())

    best = [float("inf")] * (exits - 1)
    for e in range(exits - 1):
        _, without = evaluate(best)
        chosen = None
        for value in grid:
            drop, cost = evaluate([*best[:e], value, *best[e + 1 :]])
            if cost < without and drop <= max_drop + 1e-12 and (chosen is None or value < chosen):
                chosen = value
        if chosen is not None:
            best[e] = chosen
    return best
