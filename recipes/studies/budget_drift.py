"""Does a budget hold while the images get worse? Frozen, controlled and oracle thresholds on corrupted test images.

    python recipes/studies/budget_drift.py --checkpoint runs/board/.../checkpoint --dataset path/to/cifar100 \
        --cache runs/budget --output recipes/results/studies/budget_drift.json

Test images come one by one: clean first, then with noise, blur or low contrast of rising severity (the parameters of
CIFAR-C, made here). Logits of every exit are computed once and kept in ``--cache``; the rest takes seconds. The
thresholds to begin with are chosen for the budget on clean validation images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _study import exit_logits, load, load_images, log, save, start_log, write_result
from pretrained_board import upscale
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from erde_hub import BudgetController, EarlyExitWrapper
from erde_hub.calibration import choose_threshold
from erde_hub.evaluation import ExitRecords
from erde_hub.policies import ExitPolicy
from erde_hub.policies.recorded import exit_indices, score_exits

#: Of CIFAR-C, severities 1 to 5: standard deviation of the noise, width of the blur in pixels, contrast that is left.
SEVERITIES = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
}


def corrupt(images: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """Returns corrupted images, (N, 3, 32, 32) uint8; severity 0 leaves them alone."""
    if severity == 0:
        return images
    amount, x = SEVERITIES[kind][severity - 1], images.float() / 255
    if kind == "noise":
        x = x + amount * torch.randn(x.shape, generator=generator)
    elif kind == "blur":
        x = gaussian_blur(x, [9, 9], [amount, amount])
    else:
        mean = x.mean((2, 3), keepdim=True)
        x = (x - mean) * amount + mean
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def collect(args: argparse.Namespace, model: EarlyExitWrapper) -> dict[str, Tensor]:
    """Returns logits (E, N, K) of the validation images and of a stream per kind, and the labels."""
    file = args.cache / "logits.pt"
    if (stored := load(file)) is not None:
        return stored
    splits, size = load_images(args.dataset, args.cache), model.config.input_size[-1]

    def run(images: Tensor) -> Tensor:
        parts = [exit_logits(model, upscale(x, size), bf16=False) for x in images.split(100)]
        return torch.stack([torch.cat(one) for one in zip(*parts, strict=True)])

    (images, labels), (held_out, held_out_labels) = splits["test"], splits["validation"]
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    rows = rows[: 6 * args.block]
    count = args.validation
    kept = {"validation": run(held_out[:count]), "validation labels": held_out_labels[:count], "labels": labels[rows]}
    for kind in SEVERITIES:
        generator = torch.Generator().manual_seed(args.seed)
        blocks = [corrupt(images[own], kind, s, generator) for s, own in enumerate(rows.split(args.block))]
        kept[kind] = run(torch.cat(blocks))
        log.info("%s done", kind)
    save(file, kept)
    return kept


def controlled(controller: BudgetController, scores: Tensor, policy: ExitPolicy) -> Tensor:
    """Returns the exits that samples take one by one, (N,), while the thresholds move."""
    taken = []
    for own in scores.split(1, dim=1):
        taken.append(exit_indices(own, policy, controller.thresholds))
        controller.update(taken[-1])
    return torch.cat(taken)


def oracle(controller: BudgetController, scores: Tensor, policy: ExitPolicy, costs: Tensor) -> Tensor:
    """Returns the exits at the thresholds that meet the target on just these samples, (N,), in hindsight.

    They are those that the controller could have: its first ones, moved by the best of all amounts.
    """
    low, high = -32.0, 32.0
    for _ in range(40):
        middle = (low + high) / 2
        controller.load_state_dict({**controller.state_dict(), "shift": middle})
        taken = exit_indices(scores, policy, controller.thresholds)
        low, high = (middle, high) if costs[taken].mean() > controller.target else (low, middle)
    return taken


def measure(taken: Tensor, right: Tensor, costs: Tensor, target: float, skip: int = 500) -> dict[str, float]:
    """Returns how far cost is from the target and how many answers are right, without the first ``skip`` samples."""
    spent = costs[taken][skip:]
    windows = spent.unfold(0, skip, 1).mean(1) / target - 1
    return {
        "missed": float(spent.mean()) / target - 1,
        "missed_by_worst_window": float(windows[windows.abs().argmax()]),
        "accuracy": float(right.gather(0, taken[None])[0, skip:].double().mean()),
    }


def simulate(args: argparse.Namespace, model: EarlyExitWrapper, kept: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Returns a row per budget, kind of corruption and method."""
    macs, policy = model.exit_table().cumulative_macs, model.policy
    classes = [str(k) for k in range(model.config.num_labels)]
    index = torch.arange(len(kept["validation labels"]))
    records = ExitRecords(kept["validation"], kept["validation labels"], index, model.exit_names, macs, classes)
    costs, rows = torch.tensor(macs, dtype=torch.float64), []
    for share in args.budgets:
        target = share * macs[-1]
        choice = choose_threshold(records, policy, max_mean_macs=target, per_exit=True, allow_missing_classes=True)
        for kind in SEVERITIES:
            logits = kept[kind]
            scores, right = score_exits(logits, policy), logits.argmax(-1) == kept["labels"]
            controller = BudgetController(model, target_macs=target, threshold=choice.threshold)
            methods = {
                "frozen": exit_indices(scores, policy, choice.threshold),
                "controller": controlled(controller, scores, policy),
                "oracle": torch.cat([oracle(controller, s, policy, costs) for s in scores.split(args.block, dim=1)]),
            }
            for method, taken in methods.items():
                facts = {"budget": share, "kind": kind, "method": method}
                rows.append(facts | measure(taken, right, costs, target))
                log.info("%s", rows[-1])
    return rows


def main() -> None:
    """Collects, simulates, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of the network")
    parser.add_argument("--dataset", required=True, help="folder or Hub name of its images, CIFAR-10 or CIFAR-100")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the logits")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--block", type=int, default=500, help="images of each severity")
    parser.add_argument("--validation", type=int, default=1500, help="clean images on which thresholds are chosen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.6, 0.7], help="shares of the MACs")
    args = parser.parse_args()
    start_log(args.cache / "log.txt")
    model = EarlyExitWrapper.from_pretrained(args.checkpoint).eval()
    rows = simulate(args, model, collect(args, model))
    given = {key: value for key, value in vars(args).items() if key not in ("checkpoint", "cache")}
    network = {"architecture": model.config.architecture, "exits": model.exit_names}
    write_result(args.output, given, {"network": network, "severities": SEVERITIES, "rows": rows})


if __name__ == "__main__":
    main()
