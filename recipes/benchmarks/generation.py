"""Measures generation with early exits beside the bare model and transformers' own ways.

    python recipes/distill.py --config shakespeare_llama-12 --dataset tinyshakespeare --output_dir runs/llama12
    python recipes/benchmarks/generation.py --model runs/llama12 --dataset tinyshakespeare --output generation.json

Every way continues the same texts of the test split, greedily and one at a time; the ways take turns, round by round.
Numbers are medians. The work per token is counted, and the same on every machine. Run it on a machine that does nothing
else. `--large` measures memory instead: a random model of Llama 3.2's 1B shape in bfloat16.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from process_memory import forget_peak, process_memory
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitForCausalLM, EarlyExitWrapper
from erde_hub._tables import format_table
from erde_hub.backbones.decoders import exit_layers, read_decoder
from erde_hub.data import load_token_data
from erde_hub.errors import ConfigError
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.contestants import thread_count
from erde_hub.scripts.common.results_files import environment, write_results
from erde_hub.scripts.common.turns import summary, take_turns

#: Llama 3.2 1B.
LARGE = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True, eos_token_id=None,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
)  # fmt: skip


@dataclass
class GenerationBenchmark:
    """What is measured, how long, and where the numbers go."""

    model: str | None = HfArg(default=None, help="checkpoint of a causal language model with exits")
    dataset: str | None = HfArg(default=None, help="texts whose test split begins the prompts, see distill")
    prompts: int = HfArg(default=2, help="texts per turn")
    prompt_tokens: int = HfArg(default=64, help="tokens that are given of each")
    new_tokens: int = HfArg(default=48, help="tokens that are generated of each")
    drafts: list[int] = HfArg(default_factory=lambda: [3, 6], help="tokens that are drafted before a verification")
    confidence: float = HfArg(default=0.4, help="drafts end after a less probable token; 0: never")
    thresholds: list[float] = HfArg(default_factory=lambda: [0.5, 1.0], help="of the model's policy, beside 0")
    cpu_threads: list[int] = HfArg(default_factory=lambda: [1, 0], help="CPU threads, 0: one per core")
    rounds: int = HfArg(default=9, help="rounds at most; in each, all ways take turns")
    min_rounds: int = HfArg(default=3, help="rounds at least")
    seconds: float = HfArg(default=120.0, help="seconds per number of threads, after which rounds end")
    large: bool = HfArg(default=False, help="add the memory of the 1B shape to the file (2.5 GB, a minute), no more")
    output: str | None = HfArg(default=None, help="JSON file for the numbers")

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("prompts", "prompt_tokens", "new_tokens", "rounds", "min_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.drafts or min(self.drafts) < 1 or not self.cpu_threads or min(self.cpu_threads) < 0:
            raise ConfigError(f"drafts must be at least 1 and cpu_threads 0, got {self.drafts} and {self.cpu_threads}")
        if not self.large and (self.model is None or self.dataset is None):
            raise ConfigError("--model and --dataset are needed, or --large")


@dataclass
class Way:
    """A way to continue a text: arguments of ``generate`` of the model with exits, or of the bare one."""

    options: dict[str, Any]
    bare: bool = False
    drafts: int | None = None


def main() -> None:
    """Counts, measures and writes."""
    args, _ = parse_arguments({"benchmark": GenerationBenchmark}, __doc__)
    if args.large:
        results = {"large": large_model()}
        print(results["large"])
    else:
        results = {**environment("torch", "transformers"), **measure(args)}
        print(format_results(results))
    write_results(args.output, _stored(args.output) | results)


@torch.no_grad()
def measure(args: GenerationBenchmark) -> dict[str, Any]:
    """All ways on the same prompts."""
    model = EarlyExitWrapper.from_pretrained(args.model).eval()
    if not isinstance(model, EarlyExitForCausalLM):
        raise ConfigError(f"{args.model!r} is no causal language model with exits")
    data = load_token_data(args.dataset, str(args.model), block_size=args.prompt_tokens)
    blocks = data.test.labels
    prompts = blocks[:: max(1, len(blocks) // args.prompts)][: args.prompts]
    every = ways(model, args)
    torch.set_num_threads(thread_count(args.cpu_threads[0]))
    _generate(model, Way({"threshold": 1e-9}), prompts[0], args)  # the first time also checks the layers
    expected = [_generate(model, every["bare"], row, args) for row in prompts]
    work = {}
    for name, way in every.items():
        with counted_layers(model) as layers:
            texts = [_generate(model, way, row, args) for row in prompts]
        read_once = len(prompts) * args.prompt_tokens * read_decoder(model.backbone).depth
        new = len(prompts) * (args.new_tokens - 1)  # the first token comes with the prompt
        pairs = zip(texts, expected, strict=True)
        same = torch.stack([a[0, args.prompt_tokens :] == b[0, args.prompt_tokens :] for a, b in pairs])
        work[name] = {"layers_per_token": (sum(layers) - read_once) / new, "same_text": same.float().mean().item()}
    settings = {key: getattr(args, key) for key in ("prompts", "prompt_tokens", "new_tokens", "confidence")}
    results: dict[str, Any] = {**_facts(model), **settings, "work": work, "threads": []}
    partners = [(name, f"transformers, {name}") for name in every if f"transformers, {name}" in every]
    for number in args.cpu_threads:
        torch.set_num_threads(thread_count(number))
        runs = {
            name: lambda way=way: [_generate(model, way, row, args) for row in prompts] for name, way in every.items()
        }
        label = f"{torch.get_num_threads()} threads"
        times = take_turns(runs, args.rounds, args.min_rounds, args.seconds, label)
        found = summary(times, partners)
        tokens = {name: len(prompts) * args.new_tokens / spread["median"] for name, spread in found["seconds"].items()}
        results["threads"].append({"threads": torch.get_num_threads(), "tokens_per_second": tokens, **found})
    return results


def ways(model: EarlyExitForCausalLM, args: GenerationBenchmark) -> dict[str, Way]:
    """Names and arguments of all ways; those of transformers that have a partner are called after it."""
    early = model.exit_names[:-1]
    numbers = exit_layers(model.backbone, early)
    found = {"bare": Way({}, bare=True), "threshold 0": Way({"threshold": 0})}
    for threshold in args.thresholds:
        found[f"threshold {threshold:g}"] = Way({"threshold": threshold})
    copied = {"threshold": args.thresholds[-1], "skipped_states": "copy"} if args.thresholds else None
    if copied:
        found[f"threshold {args.thresholds[-1]:g}, states copied"] = Way(copied)
    for drafts in args.drafts:
        for exit_, number in zip(early, numbers, strict=True):
            found[f"{exit_} drafts {drafts}"] = Way({"assistant_early_exit": exit_}, drafts=drafts)
            theirs = Way({"assistant_early_exit": number + 1}, bare=True, drafts=drafts)
            found[f"transformers, {exit_} drafts {drafts}"] = theirs
        found[f"prompt lookup, {drafts}"] = Way({"prompt_lookup_num_tokens": drafts}, bare=True)
    return found


def _generate(model: EarlyExitForCausalLM, way: Way, row: Tensor, args: GenerationBenchmark) -> Tensor:
    """Continues one text; transformers reads the number of drafts from the settings of the model alone."""
    model.generation_config = GenerationConfig(
        max_new_tokens=args.new_tokens, do_sample=False, num_assistant_tokens=way.drafts,
        num_assistant_tokens_schedule="constant", assistant_confidence_threshold=args.confidence, pad_token_id=0,
    )  # fmt: skip
    generate: Any = model.backbone.generate if way.bare else model.generate
    return generate(row[None], attention_mask=torch.ones_like(row[None]), **way.options)


@contextlib.contextmanager
def counted_layers(model: EarlyExitForCausalLM) -> Iterator[list[int]]:
    """Counts the tokens that each layer takes to its end while the context is open."""
    decoder = read_decoder(model.backbone)
    counts = [0] * decoder.depth

    def count(number: int, hidden: Tensor) -> None:
        counts[number] += hidden.shape[0] * hidden.shape[1]

    layers: Any = model.backbone.get_submodule(decoder.layers)
    handles = [
        layer.register_forward_hook(lambda _, given, __, number=number: count(number, given[0]))
        for number, layer in enumerate(layers)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def large_model() -> dict[str, Any]:
    """Wraps a random model of the 1B shape and generates 8 tokens each way; memory at its peak, in units of weights."""
    before = forget_peak()
    torch.manual_seed(0)
    backbone = LlamaForCausalLM._from_config(LARGE, dtype=torch.bfloat16).eval()
    weights, count = process_memory("VmRSS") - before, _parameters(backbone)
    forget_peak()
    model: Any = EarlyExitWrapper(backbone, exits=["model.layers.3", "model.layers.7"]).eval()
    wrapped = process_memory("VmHWM") - before
    result: dict[str, Any] = {
        "parameters": count, "added": _parameters(model) - count, "weights_mib": count * 2 / 2**20,
        "memory_of_weights": weights / (count * 2 / 2**20), "peak_of_wrapping": wrapped / (count * 2 / 2**20),
    }  # fmt: skip
    prompt = torch.randint(0, 1000, (1, 16))
    for name, options in (("bare", {}), ("threshold", {"threshold": 1e9}), ("drafts", {"assistant_early_exit": 0})):
        began = time.perf_counter()
        text = model.generate(prompt, max_new_tokens=8, do_sample=False, **options)
        result[name] = {"new_tokens": text.shape[1] - 16, "seconds": time.perf_counter() - began}
    result["peak"] = (process_memory("VmHWM") - before) / (count * 2 / 2**20)
    return result


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _facts(model: EarlyExitForCausalLM) -> dict[str, Any]:
    config: Any = model.backbone.config
    return {
        "model": type(model.backbone).__name__,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "parameters": _parameters(model),
        "added": _parameters(model) - _parameters(model.backbone),
        "exits": model.exit_names[:-1],
    }


def _stored(path: str | None) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).is_file() else {}


def format_results(results: Mapping[str, Any]) -> str:
    """Formats the numbers for the terminal."""
    header = ["", "layers a token", "same tokens %", *(f"tokens/s, {t['threads']} threads" for t in results["threads"])]
    rows = [
        [
            name,
            f"{work['layers_per_token']:.2f}",
            f"{100 * work['same_text']:.0f}",
            *(f"{t['tokens_per_second'][name]:.1f}" for t in results["threads"]),
        ]
        for name, work in results["work"].items()
    ]
    return format_table(header, rows)


if __name__ == "__main__":
    run_script(main)
