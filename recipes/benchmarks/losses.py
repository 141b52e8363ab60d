"""Measures what each loss costs, beside one training step of the student that it trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper, __version__
from erde_hub._tables import format_table
from erde_hub.errors import ConfigError, unknown_name
from erde_hub.losses import EGADLoss, ExitLoss, FeatureTerm, ReadoutWeight, create_loss, list_losses
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results
from erde_hub.training import ExitFeatures

#: A loss may take this share of a step at most.
LIMIT = 0.03


@dataclass
class LossBenchmark:
    """What is measured, and where the numbers go."""

    architecture: str = HfArg(default="resnet10_cifar", help="timm name of the student")
    widths: list[int] = HfArg(default_factory=lambda: [64, 16], help="width of the student; one measurement each")
    batch_size: int = HfArg(default=128, help="samples per step")
    num_classes: int = HfArg(default=10, help="classes of all exits")
    losses: list[str] = HfArg(default_factory=list_losses, help="keys of the losses")
    rounds: int = HfArg(default=9, help="rounds; in each, the step and all losses take turns")
    repeats: int = HfArg(default=5, help="calls of a loss per round, of which the median counts")
    cpu_threads: int = HfArg(default=1, help="threads of the step and of the losses")
    output: str | None = HfArg(default=None, help="JSON file for the numbers; replaced if it exists")

    def __post_init__(self) -> None:
        """Checks names and numbers."""
        for name in ("batch_size", "rounds", "repeats", "cpu_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in self.losses:
            if name not in list_losses():
                raise unknown_name("loss", name, list_losses())


def main() -> None:
    """Times every loss (forward, and backward to the logits and features) beside a step of the student, in turns."""
    benchmark, _ = parse_arguments({"benchmark": LossBenchmark}, __doc__)
    torch.set_num_threads(benchmark.cpu_threads)
    results: dict[str, Any] = {
        "erde_hub": __version__,
        "torch": torch.__version__,
        "device": "cpu",
        "limit": LIMIT,
        **{key: getattr(benchmark, key) for key in ("architecture", "batch_size", "num_classes", "rounds", "repeats")},
        "threads": torch.get_num_threads(),
        "clock": "processor time",
        "students": [measure(benchmark, width) for width in benchmark.widths],
    }
    print(format_results(results))
    write_results(benchmark.output, results)


def measure(benchmark: LossBenchmark, width: int) -> dict[str, Any]:
    """Times step and losses for a student of one width."""
    torch.manual_seed(0)
    backbone = timm.create_model(benchmark.architecture, num_classes=benchmark.num_classes, width=width)
    student = EarlyExitWrapper(backbone, backbone_kwargs={"width": width}).train()
    images = torch.randn(benchmark.batch_size, *student.config.input_size)
    labels = torch.randint(benchmark.num_classes, (benchmark.batch_size,))
    tap = ExitFeatures(student)
    with torch.no_grad(), tap.watching():
        shapes = [logits.shape for logits in student(images).exit_logits]
        features = tap.take()
    calls = {name: loss_call(name, shapes, features, labels) for name in benchmark.losses}
    step = training_step(student, images, labels)
    step()  # warms up
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *calls)}
    for _ in range(benchmark.rounds):
        seconds["step"].append(timed(step))
        for name, call in calls.items():
            seconds[name].append(statistics.median(timed(call) for _ in range(benchmark.repeats)))
    rows = []
    for name in calls:
        shares = [own / whole for own, whole in zip(seconds[name], seconds["step"], strict=True)]
        rows.append({"loss": name, "seconds": statistics.median(seconds[name]), "share": statistics.median(shares)})
    return {
        "width": width,
        "exits": student.num_exits,
        "step_seconds": statistics.median(seconds["step"]),
        "losses": rows,
    }


def training_step(student: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Returns a step: all exits forward, the plainest loss there is, backward, SGD. The teacher's pass is left out."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        sum(F.cross_entropy(logits, labels) for logits in student(images).exit_logits).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_call(
    name: str, shapes: Sequence[torch.Size], features: Sequence[Tensor | None], labels: Tensor
) -> Callable[[], None]:
    """Returns a call of a loss, forward and backward to logits and features, with all the state that it has in use."""
    loss = create_loss(name)
    if loss.task == "regression":
        labels = F.one_hot(labels, shapes[0][1]).float()
    elif loss.task != "classification":  # tokens: one hidden state each
        features = [f if f is None else f.flatten(1, -2).mean(1) for f in features]
    prepare(loss, features, len(labels))
    student = [torch.randn(shape, requires_grad=True) for shape in shapes]
    teacher = [torch.randn(shape) for shape in shapes] if loss.reads_teacher else None
    index = torch.arange(len(labels))
    given: dict[str, Any] = {}
    if loss.reads_features:
        given["student_features"] = [f if f is None else f.detach().requires_grad_() for f in features]
        given["teacher_features"] = [f if f is None else torch.randn_like(f) for f in features]

    leaves = [*student, *(f for f in given.get("student_features", ()) if f is not None)]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(student, teacher, labels, index=index, **given).loss.backward()

    return call


def prepare(loss: ExitLoss, features: Sequence[Tensor | None], num_samples: int) -> None:
    """Builds projections and tables, as the Distiller does."""
    widths = [None if feature is None else feature.shape[-1] for feature in features]
    for part in (loss, *loss.extra_terms):
        if isinstance(part, (FeatureTerm, EGADLoss)):
            part.build(widths, widths)
    for weight in loss.sample_weights:
        if isinstance(weight, ReadoutWeight):
            weight.allocate(num_samples)


def timed(function: Callable[[], None]) -> float:
    """Returns the seconds of processor time that a call takes; other work on the machine does not count."""
    start = time.process_time()
    function()
    return time.process_time() - start


def format_results(results: dict[str, Any]) -> str:
    """Formats the shares of all losses, one column per width."""
    students = results["students"]
    rows = [
        [row["loss"], *(f"{1e3 * s['losses'][i]['seconds']:.2f}" for s in students),
         *(f"{100 * s['losses'][i]['share']:.2f}" for s in students)]
        for i, row in enumerate(students[0]["losses"])
    ]  # fmt: skip
    header = ["loss", *(f"ms, width {s['width']}" for s in students), *(f"% of a step, width {s['width']}" for s in students)]  # fmt: skip # noqa: E501
    steps = ", ".join(f"width {s['width']} {1e3 * s['step_seconds']:.0f} ms" for s in students)
    title = (
        f"{results['architecture']}, batch {results['batch_size']}, {results['num_classes']} classes,"
        f" {students[0]['exits']} exits, {results['threads']} thread(s); one step: {steps};"
        f" limit {100 * results['limit']:g} %"
    )
    return f"{title}\n\n{format_table(header, rows)}"


if __name__ == "__main__":
    run_script(main)
