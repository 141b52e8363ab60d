"""Simulates calibration sets from known populations: who keeps a bound on the loss of accuracy, and at what saving?

    python recipes/studies/simulate_guarantee.py --output recipes/results/threshold_guarantee.json
    python recipes/studies/simulate_guarantee.py --records runs/test/records.safetensors --output guarantee.json

Calibration sets are drawn, with replacement, from made-up exits and from the records of real ones, so that the loss of
every threshold over the whole population is known. Each method chooses thresholds from many calibration sets; counted
are the sets after which the loss over the population exceeds the bound, and the saving over the population. The greedy
search is that of earlyon 0.3.0 as its documentation describes it, on its grid.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from erde_hub import __version__
from erde_hub.calibration import ThresholdChoice, choose_threshold
from erde_hub.calibration.objective import Objective
from erde_hub.calibration.outcomes import exit_losses
from erde_hub.calibration.search import best_per_exit
from erde_hub.errors import RepeatedSamplesWarning
from erde_hub.evaluation import ExitRecords
from erde_hub.policies import create_policy
from erde_hub.policies.recorded import exit_indices, score_exits
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.patterns import make_logits
from erde_hub.scripts.common.results_files import write_results

#: Confidence thresholds of earlyon 0.3.0, careful to bold.
EARLYON_GRID = (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
COSTS = (0.3, 0.65, 1.0)
MADE_UP, GREEDY = "made-up exits", "greedy (earlyon)"


@dataclass
class SimulationArguments:
    """What is simulated."""

    output: str = HfArg(help="JSON file of the results")
    records: list[str] = HfArg(
        default_factory=list,
        help="files of evaluate.py --save_records to draw from as well; best of the test split",
    )
    sizes: list[int] = HfArg(default_factory=lambda: [500, 1000, 2500, 10000], help="numbers of calibration samples")
    draws: int = HfArg(default=500, help="calibration sets of each size")
    bound: float = HfArg(default=0.01, help="loss of accuracy that is allowed, for every method")
    other_bounds: list[float] = HfArg(
        default_factory=lambda: [0.07, 0.02, 0.15],
        help="further ones, at which greedy search and what --confidence takes, per exit, are compared",
    )
    near_bounds: list[float] = HfArg(
        default_factory=lambda: [0.06, 0.0625, 0.065, 0.0675, 0.07, 0.0725, 0.075],
        help="bounds at which greedy search is tried alone: how much its promise hangs on them",
    )
    near_samples: int = HfArg(default=2500, help="number of calibration samples for --near_bounds")
    confidence: float = HfArg(default=0.9, help="confidence of the methods that promise one")
    population: int = HfArg(default=60000, help="made-up samples that calibration sets are drawn from")
    spread: float = HfArg(default=1.0, help="factor of made-up logits: 1.5 is calibrated, 1 too unsure")


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


class Population:
    """Samples that calibration sets are drawn from, all together: what a threshold does to them is the truth.

    Args:
        name: For the report.
        records: Of all of them.
    """

    def __init__(self, name: str, records: ExitRecords) -> None:
        self.name, self.records, self.policy = name, records, create_policy("confidence")
        self.scores = score_exits(records.logits, self.policy)
        self.losses = exit_losses(records.logits, records.labels, "accuracy_drop")
        self.costs = torch.tensor(records.cumulative_macs, dtype=torch.float64) / records.cumulative_macs[-1]

    def draw(self, samples: int, seed: int) -> Tensor:
        """Rows of a calibration set."""
        return torch.randint(len(self.records), (samples,), generator=torch.Generator().manual_seed(seed))

    def truth(self, threshold: float | list[float]) -> tuple[float, float]:
        """Loss and saving of a threshold, or one per early exit."""
        values = threshold if isinstance(threshold, list) else [threshold] * len(self.scores)
        index = exit_indices(self.scores, self.policy, values)
        return float(self.losses.gather(0, index[None]).mean()), 1 - float(self.costs[index].mean())

    def greedy(self, records: ExitRecords, rows: Tensor, bound: float) -> list[float]:
        """What earlyon would choose."""
        return earlyon_thresholds(self.scores[:, rows], self.losses[:, rows], self.costs, bound)

    def choose(self, records: ExitRecords, bound: float, **options: Any) -> ThresholdChoice:
        """What we choose."""
        return choose_threshold(records, self.policy, max_accuracy_drop=bound, allow_missing_classes=True, **options)


def made_up(args: SimulationArguments) -> Population:
    """Exits whose answers are drawn."""
    logits, labels = make_logits(args.population, spread=args.spread)
    names = [str(k) for k in range(logits.shape[2])]
    macs = [int(1000 * cost) for cost in COSTS]
    records = ExitRecords(logits, labels, torch.arange(len(labels)), ["a", "b", "classifier"], macs, names)
    return Population(MADE_UP, records)


def recorded(path: str) -> Population:
    """Exits of a trained network."""
    records = ExitRecords.load(path)
    return Population(f"{records.info.get('dataset', 'records')}, {len(records):,} images", records)


def methods_of(population: Population, args: SimulationArguments, bound: float) -> dict[str, Callable[..., Any]]:
    """Returns the methods that are tried at a bound: all of them at ``args.bound``, at others what users get."""

    def ours(**options: Any) -> Callable[..., Any]:
        return lambda records, rows: population.choose(records, bound, **options).threshold

    methods: dict[str, Callable[..., Any]] = {GREEDY: lambda records, rows: population.greedy(records, rows, bound)}
    if bound != args.bound:
        methods["guarantee, per exit"] = ours(confidence=args.confidence, per_exit=True)
        return methods
    for kind, per_exit in (("shared", False), ("per exit", True)):
        methods[f"search, {kind}"] = ours(per_exit=per_exit)
        methods[f"crc, {kind}"] = ours(method="crc", per_exit=per_exit)
        for method in ("ltt", "exact", "ucb"):
            methods[f"{method}, {kind}"] = ours(method=method, confidence=args.confidence, per_exit=per_exit)
    return methods


def simulate(population: Population, args: SimulationArguments, bound: float, size: int) -> Iterator[dict[str, Any]]:
    """Draws calibration sets of a size, and yields what became of each method."""
    methods = methods_of(population, args, bound)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    named = {}
    for seed in tqdm(range(args.draws), desc=f"{population.name}, {bound:g}, {size} samples", unit="draw"):
        rows = population.draw(size, seed)
        # Draws with replacement from a population are independent samples, each with an index of its own.
        records = dataclasses.replace(population.records.select(rows), index=torch.arange(size))
        for name, method in methods.items():
            found[name].append(population.truth(method(records, rows)))
    if bound == args.bound:
        for kind, per_exit in (("shared", False), ("per exit", True)):
            default = population.choose(records, bound, confidence=args.confidence, per_exit=per_exit).method
            named[f"{default}, {kind}"] = f"guarantee, {kind}"
    kept = torch.tensor([loss <= bound for loss, _ in found[GREEDY]])
    for name, values in found.items():
        table = torch.tensor(values, dtype=torch.float64)
        row = {
            "population": population.name,
            "bound": bound,
            "samples": size,
            "method": name,
            "broken": float((table[:, 0] > bound).double().mean()),
            "mean_loss": float(table[:, 0].mean()),
            "mean_loss_error": float(table[:, 0].std()) / args.draws**0.5,
            "worst": float(table[:, 0].max()),
            "saving": float(table[:, 1].mean()),
            "saving_where_greedy_keeps": float(table[kept, 1].mean()) if kept.any() else None,
        }
        yield row
        if name in named:
            yield row | {"method": named[name], "as": name}


def greedy_nearby(population: Population, args: SimulationArguments) -> Iterator[dict[str, Any]]:
    """Yields how often greedy search breaks bounds that are close to each other."""
    for bound in args.near_bounds:
        found = []
        for seed in tqdm(range(args.draws), desc=f"{population.name}, {bound:g}, {GREEDY}", unit="draw"):
            rows = population.draw(args.near_samples, seed)
            found.append(population.truth(population.greedy(population.records, rows, bound)))
        yield {
            "population": population.name,
            "bound": bound,
            "samples": args.near_samples,
            "broken": sum(loss > bound for loss, _ in found) / args.draws,
            "saving": sum(saving for _, saving in found) / args.draws,
        }


def ceiling(population: Population, bound: float, size: int, confidence: float) -> float:
    """The saving of the best thresholds of all whose loss leaves room for the sampling error at a confidence.

    They are read off the whole population, and a one-sided normal test on all samples would accept them in half of the
    draws. What has to find its thresholds on the samples themselves and test them cannot be expected to save more.
    """
    ranks = population.scores.double()
    normal, room, best = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(confidence)), 0.0, 0.0
    for _ in range(4):  # the deviation is that of the thresholds that it leads to
        objective = Objective("accuracy_drop", bound - room)
        point = best_per_exit(ranks, population.losses, population.costs, objective, [torch.inf] * len(ranks))
        index = exit_indices(population.scores, population.policy, point.levels)
        deviation = population.losses.gather(0, index[None])[0].std()
        room, best = float(normal * deviation / size**0.5), 1 - point.cost
    return best


def results_before(path: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows that a simulation with the same settings has left, of which none is simulated again."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(before.get(key) == value for key, value in settings.items())
    return {key: before.get(key, []) if same else [] for key in ("rows", "nearby")}


def main() -> None:
    """Draws, chooses, counts, writes; a simulation that was cut off goes on with what is missing."""
    args, _ = parse_arguments({"what is simulated": SimulationArguments}, __doc__)
    warnings.simplefilter("ignore", RepeatedSamplesWarning)
    populations = [made_up(args), *(recorded(path) for path in args.records)]
    results: dict[str, Any] = {
        "erde_hub": __version__,
        "bound": args.bound,
        "confidence": args.confidence,
        "draws": args.draws,
        "population": args.population,
        "spread": args.spread,
    }
    results |= results_before(Path(args.output), results)
    done = {(row["population"], row["bound"], row["samples"]) for row in results["rows"]}
    for bound in (args.bound, *args.other_bounds):
        for population in populations:
            for size in args.sizes:
                if (population.name, bound, size) not in done:
                    best = ceiling(population, bound, size, args.confidence)
                    results["rows"] += [row | {"ceiling": best} for row in simulate(population, args, bound, size)]
                    write_results(args.output, results)
    for population in populations:
        if population.name not in {row["population"] for row in results["nearby"]}:
            results["nearby"] += list(greedy_nearby(population, args))
            write_results(args.output, results)
    for row in results["rows"]:
        print(
            f"{row['population']:24} {row['bound']:<6g} {row['samples']:>6,} {row['method']:20}"
            f" broken {row['broken']:6.1%}  saving {row['saving']:6.1%}"
        )


if __name__ == "__main__":
    run_script(main)
