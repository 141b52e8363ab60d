"""Distils a small character-level language model with EGAD, and with each of its parts switched off. Experimental.

    python recipes/studies/egad.py --data path/to/tinyshakespeare
    python recipes/studies/egad.py --data path/to/tinyshakespeare --seeds 0 1 2 --output results.json

The folder holds train.txt, validation.txt and test.txt. Teacher and student are transformers models of four and two
layers, trained from scratch in minutes on a CPU. Beside `egad` there are `ce` (no teacher), `uniform_kd` (one weight
and one temperature for all tokens, no features) and EGAD without its curriculum, its temperature, its feature branch. A
file that is there already is added to: what it holds is not trained again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.hf_argparser import HfArg

from erde_hub._progress import passing_bar
from erde_hub._tables import format_table
from erde_hub.errors import ConfigError, DataError, unknown_name
from erde_hub.losses import EGADLoss
from erde_hub.scripts.common.arguments import loss_arguments_class, plain_weights
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import means_and_deviations, open_results, write_results

SPLITS = ("train", "validation", "test")

#: What each variant changes in EGAD's arguments; the temperature of the uniform ones is about the mean of EGAD's.
UNIFORM = {"min_temperature": 2.0, "max_temperature": 2.0}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "ce": None,
    "uniform_kd": {**UNIFORM, "curriculum": False, "feature_weight": 0.0},
    "egad": {},
    "egad_without_curriculum": {"curriculum": False},
    "egad_without_temperature": UNIFORM,
    "egad_without_features": {"feature_weight": 0.0},
}


@dataclass
class EGADRecipe:
    """Data, networks, training."""

    data: str | None = HfArg(default=None, help="folder with train.txt, validation.txt and test.txt")
    variants: list[str] = HfArg(
        default_factory=lambda: list(VARIANTS), help=f"students to train: {', '.join(VARIANTS)}"
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="each trains a teacher and all students")
    context: int = HfArg(default=64, help="characters per example")
    batch_size: int = HfArg(default=16, help="examples per step")
    teacher_layers: int = HfArg(default=4, help="layers of the teacher")
    teacher_width: int = HfArg(default=96, help="width of the teacher; a multiple of 24")
    teacher_steps: int = HfArg(default=2000, help="optimizer steps of the teacher")
    student_layers: int = HfArg(default=2, help="layers of the student")
    student_width: int = HfArg(default=48, help="width of the student; a multiple of 24")
    student_steps: int = HfArg(default=1000, help="optimizer steps of each student")
    lr: float = HfArg(default=3e-3, help="highest learning rate (AdamW, warm-up over 5 %, cosine)")
    cpu_threads: int = HfArg(default=1, help="threads")
    progress_bar: bool = HfArg(default=True, help="show progress")
    output: str | None = HfArg(default=None, help="JSON file for the numbers; added to if it exists")

    def __post_init__(self) -> None:
        """Checks names and numbers."""
        for name in self.variants:
            if name not in VARIANTS:
                raise unknown_name("variant", name, VARIANTS)
        for name in (
            "context",
            "batch_size",
            "teacher_layers",
            "teacher_steps",
            "student_layers",
            "student_steps",
            "cpu_threads",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr:g}")
        for name in ("teacher_width", "student_width"):
            if getattr(self, name) < 24 or getattr(self, name) % 24:
                raise ConfigError(f"{name} must be a multiple of 24, got {getattr(self, name)}")


@dataclass
class Text:
    """Characters as numbers, per split."""

    characters: str
    splits: dict[str, Tensor]

    def batches(self, context: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Yields (B, context + 1) pieces of the training text, at places that are a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        train = self.splits["train"]
        while True:
            starts = torch.randint(len(train) - context, (batch_size,), generator=generator)
            yield train[starts[:, None] + torch.arange(context + 1)]

    def pieces(self, split: str, context: int) -> Tensor:
        """Returns a split as pieces (N, context + 1) that follow one another; the rest is left out."""
        text = self.splits[split]
        number = (len(text) - 1) // context
        return text[torch.arange(number)[:, None] * context + torch.arange(context + 1)]


def read_text(folder: str | None, context: int) -> Text:
    """Reads the three splits; the vocabulary is that of the training text.

    Raises:
        ConfigError: No folder was given.
        DataError: A file is missing, too short, or has a character that the training text has not.
    """
    if folder is None:
        raise ConfigError("--data is needed: a folder with train.txt, validation.txt and test.txt")
    texts = {}
    for split in SPLITS:
        path = Path(folder) / f"{split}.txt"
        if not path.is_file():
            raise DataError(f"{path} is not there: --data needs {', '.join(f'{name}.txt' for name in SPLITS)}")
        texts[split] = path.read_text(encoding="utf-8")
        if len(texts[split]) <= context + 1:
            raise DataError(f"{path} has {len(texts[split])} characters, --context {context} needs more")
    characters = "".join(sorted(set(texts["train"])))
    number = {character: index for index, character in enumerate(characters)}
    for split, text in texts.items():
        strange = set(text) - set(characters)
        if strange:
            raise DataError(f"{split}.txt has the character {min(strange)!r}, which the training text has not")
    return Text(characters, {split: torch.tensor([number[c] for c in text]) for split, text in texts.items()})


def build_model(layers: int, width: int, vocab_size: int, context: int, seed: int) -> nn.Module:
    """Builds a causal language model of the transformers library, with new weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 24, max_position_embeddings=context, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    step_loss: Callable[[Tensor, float], Tensor],
    batches: Iterator[Tensor],
    steps: int,
    lr: float,
    bar: str | None,
) -> None:
    """Runs the loop: loss, backward, clip, step.

    Args:
        model: Put into train mode.
        parameters: What is trained: the model's, and those of the loss.
        step_loss: Maps a batch (B, context + 1) and the share of the training that is done to the loss.
        batches: Endless.
        steps: Optimizer steps.
        lr: Highest learning rate.
        bar: Title of the progress bar; None shows none.
    """
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, betas=(0.9, 0.99))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))),
    )
    for step in passing_bar(range(steps), bar or "", shown=bar is not None):
        loss = step_loss(next(batches), step / max(1, steps - 1))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def variant_loss(name: str, chosen: Mapping[str, Any]) -> EGADLoss | None:
    """Returns the loss of a variant with the arguments that were chosen; None where there is no teacher."""
    overrides = VARIANTS[name]
    return None if overrides is None else EGADLoss(**{**chosen, **overrides})


def cross_entropy_step(model: nn.Module) -> Callable[[Tensor, float], Tensor]:
    """Next-character cross-entropy, for the teacher and for a student without one."""

    def step(batch: Tensor, _: float) -> Tensor:
        return F.cross_entropy(model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    return step


def egad_step(student: nn.Module, teacher: nn.Module, loss: EGADLoss) -> Callable[[Tensor, float], Tensor]:
    """EGAD on the logits and, where it compares features, on the last hidden states of two transformers models."""

    def step(batch: Tensor, progress: float) -> Tensor:
        inputs, labels = batch[:, :-1], batch[:, 1:]
        loss.set_progress(progress)
        with torch.no_grad():
            target = teacher(input_ids=inputs, output_hidden_states=loss.reads_features)
        own = student(input_ids=inputs, output_hidden_states=loss.reads_features)
        features = {}
        if loss.reads_features:
            features["student_features"] = own.hidden_states[-1]
            features["teacher_features"] = target.hidden_states[-1]
        return loss(own.logits, target.logits, labels, **features).loss

    return step


@torch.no_grad()
def evaluate(model: nn.Module, pieces: Tensor, batch_size: int = 64) -> dict[str, float]:
    """Returns cross-entropy in nats per character and accuracy of the next character."""
    nll, right = 0.0, 0
    for part in pieces.split(batch_size):
        logits, labels = model(input_ids=part[:, :-1]).logits.flatten(0, 1).float(), part[:, 1:].flatten()
        nll += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
    number = pieces[:, 1:].numel()
    return {"nll": nll / number, "accuracy": right / number}


def main() -> None:
    """Trains what is missing, seed by seed, and writes after every student."""
    sections = {"recipe": EGADRecipe, "loss": loss_arguments_class("egad")}
    args, loss_args, _ = parse_arguments(sections, __doc__)
    torch.set_num_threads(args.cpu_threads)
    chosen = {key: plain_weights(value) for key, value in vars(loss_args).items() if value is not None}
    for name in args.variants:  # what is wrong with the arguments is found before time is spent
        variant_loss(name, chosen)
    text = read_text(args.data, args.context)
    left_out = ("data", "variants", "seeds", "cpu_threads", "progress_bar", "output")
    settings = {key: value for key, value in dataclasses.asdict(args).items() if key not in left_out}
    results = open_results(args.output, settings | {"loss": chosen, "data": Path(args.data).name})
    test = text.pieces("test", args.context)
    for seed in args.seeds:
        done = {run["variant"] for run in results["runs"] if run["seed"] == seed}
        missing = [name for name in args.variants if name not in done]
        if not missing:
            continue
        words = len(text.characters)
        teacher = build_model(args.teacher_layers, args.teacher_width, words, args.context, seed)
        train(
            teacher, list(teacher.parameters()), cross_entropy_step(teacher),
            text.batches(args.context, args.batch_size, seed), args.teacher_steps, args.lr,
            f"seed {seed}, teacher" if args.progress_bar else None,
        )  # fmt: skip
        teacher.requires_grad_(False)
        if all(row["seed"] != seed for row in results["teachers"]):
            results["teachers"].append({"seed": seed, **_describe(teacher), **evaluate(teacher, test)})
        for name in missing:
            started = time.perf_counter()
            student = build_model(args.student_layers, args.student_width, words, args.context, seed)
            parameters, step = list(student.parameters()), cross_entropy_step(student)
            loss = variant_loss(name, chosen)
            if loss is not None:
                loss.build([args.student_width], [args.teacher_width])
                parameters += loss.parameters()
                step = egad_step(student, teacher, loss)
            bar = f"seed {seed}, {name}" if args.progress_bar else None
            batches = text.batches(args.context, args.batch_size, seed + 1000)
            train(student, parameters, step, batches, args.student_steps, args.lr, bar)
            row = {"variant": name, "seed": seed, **_describe(student), **evaluate(student, test)}
            results["runs"].append(row | {"seconds": round(time.perf_counter() - started, 1)})
            results["summary"] = summarize(results["runs"])
            write_results(args.output, results)
            print(f"seed {seed}, {name}: {row['nll']:.4f} nats per character, {100 * row['accuracy']:.2f} % right")
    results["summary"] = summarize(results["runs"])
    write_results(args.output, results)
    print(f"\n{format_summary(results)}")


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, one row per variant."""
    rows = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == name]
        series = {key: [run[key] for run in own] for key in ("nll", "accuracy", "seconds")}
        rows.append({"variant": name, "seeds": [run["seed"] for run in own], **means_and_deviations(series)})
    return rows


def format_summary(results: Mapping[str, Any]) -> str:
    """Formats the summary for the terminal."""
    teachers = results["teachers"]
    rows = [["(teacher)", str(len(teachers)), f"{statistics.fmean(t['nll'] for t in teachers):.4f}", "", ""]]
    for row in results["summary"]:
        spread = "" if row["nll_std"] is None else f"±{row['nll_std']:.4f}"
        rows.append(
            [row["variant"], str(len(row["seeds"])), f"{row['nll']:.4f}", spread, f"{100 * row['accuracy']:.2f}"]
        )
    return format_table(("student", "seeds", "nats per character", "", "% right"), rows)


def _describe(model: nn.Module) -> dict[str, int]:
    return {"params": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    run_script(main)
