"""Which loss should a small student with exits learn from? A ladder from cross-entropy to ERDE and EA-KD.

    python recipes/studies/erde_board.py --dataset path/to/cifar10 --output runs/board --seed 0

A ResNet18 teacher with exits (width 32) is trained once per data set. ResNet10 students (width 16), one for each row of
METHODS, then train side by side in one process: from the same weights, on the same augmented batches, with the same
dropout masks, so that differences between rows are differences between losses, and the teacher's forward is paid once.

Thresholds are chosen on validation images, held out of the training set; test images are used once, at the end. To pick
a row as a preset, read its validation accuracies. A run that was killed continues when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from _study import (
    DEVICE,
    Learner,
    batch_indices,
    crop_and_flip,
    exit_logits,
    load_images,
    log,
    save,
    start_log,
    train,
    write_result,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper, keep_freed_memory
from erde_hub.calibration import choose_threshold
from erde_hub.evaluation import (
    ExitRecords,
    accuracy_at_cost,
    aurc,
    collect_exit_records,
    curve_area,
    fine_thresholds,
    per_exit_metrics,
    sweep_thresholds,
)
from erde_hub.losses import ExitLoss, create_addition, create_loss

EXITS = ["layer1", "layer2", "layer3"]
BATCH_SIZE, LR, WEIGHT_DECAY, EMA_DECAY = 128, 0.2, 5e-4, 0.999


def build_losses(num_classes: int) -> dict[str, ExitLoss]:
    """Returns the ladder; each row changes one thing against a row above it."""
    plain = {"entropy_weight": 0.0, "kd_on_teacher_wrong": True}
    return {
        "ce": create_loss("ce"),
        "kd": create_loss("kd"),  # temperature 4, 0.9 of the divergence, 0.1 of the cross-entropy
        "kd, scaled as in erde": create_loss("erde", **plain),  # temperature 2, divergence / classes, cross-entropy
        "kd where the teacher is right": create_loss("erde", entropy_weight=0.0),
        "erde": create_loss("erde"),  # as published: entropy weight 0.005
        "erde, entropy 0.05": create_loss("erde", entropy_weight=0.05),
        "erde, full divergence": create_loss("erde", kl_weight=num_classes),
        "ea_kd": create_loss("ea_kd"),
        "erde + ea_kd": create_loss("erde").add(create_addition("ea_kd")),
        "kd from the last exit": create_loss("kd", teacher_exits=[-1] * 4),  # candidate for a preset
    }


def main() -> None:
    """Trains the teacher if there is none, then the students, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder or Hub name of CIFAR-10 or CIFAR-100")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, log and result files")
    parser.add_argument("--seed", type=int, default=0, help="of the students; the teacher's is always 0")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=list(build_losses(10)), help="default: the whole ladder")
    parser.add_argument("--student", default="resnet10_cifar")
    parser.add_argument("--width", type=int, default=16, help="of the students; the teacher's is 32")
    parser.add_argument("--max-steps", type=int, help="stop there, for a quick look")
    parser.add_argument("--limit", type=int, help="number of training images, for a quick look")
    args = parser.parse_args()
    keep_freed_memory()
    dataset = Path(args.dataset).name
    methods = f"_{len(args.methods)}methods" if args.methods else ""
    folder = args.output / f"{dataset}_{args.student}_{args.epochs}epochs{methods}_seed{args.seed}"
    if (folder / "result.json").exists():
        raise SystemExit(f"{folder.name} is complete")
    start_log(folder / "log.txt")
    data = load_images(args.dataset, args.output, args.limit)
    num_classes = int(data["train"][1].max()) + 1

    teacher = network("resnet18_cifar", 32, num_classes, seed=0)
    teacher_folder = args.output / f"{dataset}_teacher_{args.teacher_epochs}epochs"
    ce = {"teacher": create_loss("ce")}
    teacher = learn(
        {"teacher": teacher}, ce, data, teacher_folder, epochs=args.teacher_epochs, seed=0, max_steps=args.max_steps
    )["teacher"]

    losses = build_losses(num_classes)
    losses = {name: losses[name] for name in args.methods or losses}
    students = {name: network(args.student, args.width, num_classes, args.seed) for name in losses}
    trained = learn(
        students, losses, data, folder, epochs=args.epochs, seed=args.seed, max_steps=args.max_steps, teacher=teacher
    )
    rows, records_folder = {}, folder / "records"
    records_folder.mkdir(exist_ok=True)
    for name, model in {"teacher": teacher, **trained}.items():
        records = {split: collect(model, *data[split]) for split in ("validation", "test")}
        for split, own in records.items():
            own.save(records_folder / f"{name.replace(' ', '_')}_{split}.safetensors")
        rows[name] = measure(records["validation"], records["test"])
        log.info("%s: %s", name, " ".join(f"{100 * row['accuracy']:.1f}" for row in rows[name]["per_exit"]))
    save(folder / "students.pt", {name: model.state_dict() for name, model in trained.items()})
    write_result(folder / "result.json", vars(args), {"methods": rows})


def network(name: str, width: int, num_classes: int, seed: int) -> EarlyExitWrapper:
    """Builds a network with exits; the same seed gives the same weights."""
    torch.manual_seed(seed)
    backbone = timm.create_model(name, num_classes=num_classes, width=width)
    model = EarlyExitWrapper(
        backbone, EXITS, head_kwargs={"dropout": 0.1}, input_size=(3, 32, 32), backbone_kwargs={"width": width}
    )
    return model.to(DEVICE, memory_format=torch.channels_last)


def normalise(images: Tensor) -> Tensor:
    """Uint8 images to floats of about mean 0 and deviation 1."""
    return (images.to(DEVICE).contiguous(memory_format=torch.channels_last).float() - 120.0) / 64.0


def learn(
    models: Mapping[str, EarlyExitWrapper],
    losses: Mapping[str, ExitLoss],
    data: Mapping[str, tuple[Tensor, Tensor]],
    folder: Path,
    *,
    epochs: int,
    seed: int,
    max_steps: int | None,
    teacher: EarlyExitWrapper | None = None,
) -> dict[str, EarlyExitWrapper]:
    """Trains models side by side and returns the averages of their weights."""
    images, labels = data["train"]
    steps_of_epoch = len(images) // BATCH_SIZE
    steps = min(epochs * steps_of_epoch, max_steps or epochs * steps_of_epoch)
    learners = {}
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps + 1, cycle_momentum=False)
        average = ModelEmaV3(model, decay=EMA_DECAY, use_warmup=True)
        learners[name] = Learner(model, losses[name], optimizer, schedule, average)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(images), BATCH_SIZE, seed, step)
        return normalise(crop_and_flip(images[rows], seed, step)), labels[rows].to(DEVICE)

    def look(model: nn.Module) -> str:
        some_images, some_labels = (part[:1000] for part in data["validation"])
        logits = exit_logits(model, normalise(some_images))
        accuracies = [(one.cpu().argmax(1) == some_labels).float().mean() for one in (logits[0], logits[-1])]
        return " to ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)

    train(learners, batch, steps, folder, seed=seed, teacher=teacher, look=(steps_of_epoch, look))
    return {name: learner.average.module for name, learner in learners.items()}


def collect(model: EarlyExitWrapper, images: Tensor, labels: Tensor) -> ExitRecords:
    """Runs every exit on the images, in float32."""
    batches = ((normalise(x), y) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return collect_exit_records(model, batches, progress=False)


def measure(validation: ExitRecords, test: ExitRecords) -> dict[str, Any]:
    """Every exit; accuracy at budgets, by thresholds from validation images and along the test curve; area under it."""
    exits = []
    for held_out, row, logits in zip(per_exit_metrics(validation), per_exit_metrics(test), test.logits, strict=True):
        confidence, predicted = logits.softmax(-1).max(-1)
        own = {key: row[key] for key in ("exit", "accuracy", "macs", "ece", "nll")}
        own |= {"aurc": aurc(confidence, predicted == test.labels), "validation_accuracy": held_out["accuracy"]}
        exits.append(own)
    full, curve = test.cumulative_macs[-1], sweep_thresholds(test, fine_thresholds(test))
    budgets = {}
    for share in (0.4, 0.5, 0.6, 0.75, 0.9):
        if share * full <= test.cumulative_macs[0]:
            continue
        choice = choose_threshold(validation, max_mean_macs=share * full, allow_missing_classes=True)
        (row,) = sweep_thresholds(test, [choice.threshold])
        budgets[f"{share:.0%}"] = {
            "threshold": choice.threshold,
            **{key: row[key] for key in ("accuracy", "mean_macs", "exit_share", "ece")},
            "accuracy_on_test_curve": accuracy_at_cost(curve, share * full),
            "validation_accuracy": choice.accuracy,
        }
    area = curve_area(test, low=0.4, resamples=0).area
    return {"per_exit": exits, "budgets": budgets, "area_from_40%": area}


if __name__ == "__main__":
    main()
