"""Simulates calibration sets from a known population: who keeps a bound of one point, and at what saving?

    python recipes/simulate_guarantee.py --output recipes/results/threshold_guarantee.json

Exits are made up, so that the true loss of every threshold is known. Each method chooses thresholds from many small
calibration sets; counted are the sets after which the true loss exceeds the bound, and the true saving. The greedy
search is that of earlyon 0.3.0 as its documentation describes it, on its grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from _early import refuse_unknown_flags

if __name__ == "__main__":
    refuse_unknown_flags(__file__)

import torch
from _cli import clean_errors, parse_arguments
from torch import Tensor
from tqdm.auto import tqdm

from erde_hub import __version__
from erde_hub._files import write_text
from erde_hub.calibration import choose_threshold
from erde_hub.calibration.thresholds import exit_losses
from erde_hub.evaluation import ExitRecords
from erde_hub.policies import create_policy
from erde_hub.policies.offline import exit_indices, score_exits

#: Confidence thresholds of earlyon 0.3.0, careful to bold.
EARLYON_GRID = (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
COSTS = (0.3, 0.65, 1.0)


@dataclass
class SimulationArguments:
    """What is simulated."""

    output: str = field(metadata={"help": "JSON file of the results"})
    sizes: list[int] = field(
        default_factory=lambda: [500, 1000, 2500, 10000], metadata={"help": "numbers of calibration samples"}
    )
    draws: int = field(default=200, metadata={"help": "calibration sets of each size"})
    bound: float = field(default=0.01, metadata={"help": "loss of accuracy that is allowed, as a fraction"})
    confidence: float = field(default=0.9, metadata={"help": "confidence of the methods that promise one"})
    population: int = field(default=60000, metadata={"help": "samples that calibration sets are drawn from"})
    spread: float = field(default=1.0, metadata={"help": "factor of the logits: 1.5 is calibrated, 1 too unsure"})


def make_logits(
    samples: int, exits: int = 3, classes: int = 10, seed: int = 0, spread: float = 1.5
) -> tuple[Tensor, Tensor]:
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


def earlyon_thresholds(
    confidences: Tensor, losses: Tensor, costs: Tensor, max_drop: float, grid: Sequence[float] = EARLYON_GRID
) -> list[float]:
    """Exit by exit from shallow to deep, keeps the boldest value whose accuracy drop is allowed and that saves.

    Exits without such a value stay off (infinity).

    Shape:
        confidences: (E - 1, N). losses: (E, N) of accuracy against the last exit. costs: (E,).
    """
    exits = len(losses)

    def evaluate(thresholds: Sequence[float]) -> tuple[float, float]:
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


def main() -> None:
    """Draws, chooses, counts, writes."""
    args, _ = parse_arguments({"what is simulated": SimulationArguments}, __doc__)
    policy = create_policy("confidence")
    logits, labels = make_logits(args.population, spread=args.spread)
    scores, costs = score_exits(logits, policy), torch.tensor(COSTS, dtype=torch.float64)
    losses, _ = exit_losses(logits, labels, "accuracy_drop")

    def truth(thresholds: Any) -> tuple[float, float]:
        values = list(thresholds) if isinstance(thresholds, list) else [thresholds] * 2
        index = exit_indices(scores, policy, values)
        return float(losses.gather(0, index[None]).mean()), 1 - float(costs[index].mean())

    def choose(**options: Any) -> Callable[[ExitRecords, Tensor], Any]:
        def run(records: ExitRecords, rows: Tensor) -> Any:
            return choose_threshold(records, policy, max_accuracy_drop=args.bound, **options).threshold

        return run

    methods: dict[str, Callable[[ExitRecords, Tensor], Any]] = {
        "greedy (earlyon)": lambda records, rows: earlyon_thresholds(
            scores[:, rows], losses[:, rows], costs, args.bound
        ),
        "search, shared": choose(),
        "search, per exit": choose(per_exit=True),
        "crc, shared": choose(method="crc"),
        "guarantee, shared": choose(confidence=args.confidence),
        "guarantee, per exit": choose(confidence=args.confidence, per_exit=True),
    }
    rows = []
    for size in args.sizes:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        for seed in tqdm(range(args.draws), desc=f"{size} samples", unit="draw"):
            drawn = torch.randint(args.population, (size,), generator=torch.Generator().manual_seed(seed))
            records = ExitRecords(
                logits[:, drawn], labels[drawn], drawn, ["a", "b", "classifier"], [int(1000 * c) for c in COSTS],
                [str(k) for k in range(10)],
            )  # fmt: skip
            for name, method in methods.items():
                found[name].append(truth(method(records, drawn)))
        kept = torch.tensor([loss <= args.bound for loss, _ in found["greedy (earlyon)"]])
        for name, values in found.items():
            table = torch.tensor(values, dtype=torch.float64)
            rows.append(
                {
                    "samples": size,
                    "method": name,
                    "broken": float((table[:, 0] > args.bound).double().mean()),
                    "worst": float(table[:, 0].max()),
                    "saving": float(table[:, 1].mean()),
                    "saving_where_greedy_keeps": float(table[kept, 1].mean()) if kept.any() else None,
                }
            )
            print(rows[-1])
    results = {
        "erde_hub": __version__,
        "bound": args.bound,
        "confidence": args.confidence,
        "draws": args.draws,
        "population": args.population,
        "spread": args.spread,
        "rows": rows,
    }
    write_text(args.output, json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    with clean_errors():
        main()
