"""Gives a network that you have already exits for your data; its backbone stays as it is.

    erde-hub attach --model resnet18 --dataset path/to/folder
    erde-hub attach --model resnet18 --weights my.pth --dataset path/to/folder --output_dir runs/mine
    erde-hub attach --model path/to/bert --dataset fancyzhx/ag_news --finetune

The model is a timm name, or a folder or Hub repository of timm or transformers. What the exits read is computed once
and kept, so that they are trained in minutes on a CPU. A last layer for another number of classes than the data have is
replaced and trained too; several new layers, as on a published RoBERTa, are trained in the network, which takes longer.
--finetune then trains the whole network, whose exits learn from the last one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.hf_argparser import HfArg

from erde_hub._files import replacing
from erde_hub.data.images import BatchLoader
from erde_hub.engine.features import last_linears
from erde_hub.errors import ConfigError
from erde_hub.fingerprint import model_fingerprint
from erde_hub.heads import list_heads
from erde_hub.losses import create_loss
from erde_hub.modeling.attach import new_layers
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import DataArguments, ExitArguments, changed_arguments
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.exit_times import measure_exits
from erde_hub.scripts.latency import format_latency
from erde_hub.training import DistillationArguments, create_accelerator, open_run_folder
from erde_hub.training.frozen import collect_head_inputs, pooling_of, train_heads

logger = logging.getLogger(__name__)

#: Bytes of features that are kept for later runs.
FEATURES_KEPT = 10 * 2**30


@dataclass
class AttachArguments:
    """The network, and what is trained of it."""

    model: str = HfArg(help="timm name, or a folder or Hub repository of timm or transformers")
    weights: str | None = HfArg(
        default=None, help="file with your weights of a timm network: .safetensors, or .pth of a state dict"
    )
    model_kwargs: dict[str, Any] = HfArg(
        default_factory=dict, help="creation arguments of a timm network, e.g. width=32"
    )
    preprocessing: dict[str, Any] = HfArg(
        default_factory=dict,
        help="how images are prepared, where it is not as timm or the folder says: mean=[0.5,0.5,0.5] std=[0.5,0.5,0.5]"
        " size=[224,224] interpolation=bicubic crop_pct=0.9 crop_mode=center",
    )
    new_classifier: bool = HfArg(
        default=False, help="train a new last layer also where that of the weights has as many classes as the data"
    )
    finetune: bool = HfArg(default=False, help="then train the whole network, with self-distillation")
    finetune_training: dict[str, Any] = HfArg(
        default_factory=lambda: {"epochs": 5, "lr": 5e-4, "batch_size": 32}, help="training arguments of --finetune"
    )
    self_weight: float = HfArg(default=1.0, help="factor of the divergence of the exits from the last one")
    self_temperature: float = HfArg(default=1.0, help="softens both sides of that divergence")
    measure_latency: bool = HfArg(
        default=True, help="measure the milliseconds of every exit for a second: torch, one thread; latency does more"
    )


@dataclass
class AttachExits(ExitArguments):
    """Exits whose heads pool first, so that little has to be kept of a sample."""

    head: str = HfArg(default="mlp", help=f"head of every early exit; it has to pool first: {', '.join(list_heads())}")


@dataclass
class AttachTraining(DistillationArguments):
    """Training, with defaults that suit heads."""

    epochs: int = HfArg(default=20, help="passes over the features of the training split")
    batch_size: int = HfArg(default=256, help="samples per step")
    lr: float = HfArg(default=3e-3, help="highest learning rate of the schedule")
    optimizer: str = HfArg(default="adamw", help="a name of timm's create_optimizer_v2")
    weight_decay: float = HfArg(default=0.05, help="weight decay; biases and norm layers get none")
    channels_last: bool = HfArg(default=True, help="store images and convolutions as NHWC")


def main() -> None:
    """Network, data, exits, features, heads, report."""
    started = time.perf_counter()
    sections = {"network": AttachArguments, "data": DataArguments, "exits": AttachExits, "training": AttachTraining}
    own, data_args, exits, args, _ = parse_arguments(sections, __doc__ or "")
    accelerator = create_accelerator(args)
    if accelerator.num_processes > 1:
        raise ConfigError("attach runs in one process: start it without `accelerate launch`")
    recipe.configure_logging(True)
    tuning = changed_arguments("finetune_training", args, own.finetune_training)

    # The network as it is, and the data in the form that it reads
    network = recipe.open_network(own.model, own.weights, own.model_kwargs)
    data = recipe.load_data(data_args, recipe.inputs_of(network, own.model, own.preprocessing))
    if data.streamed:
        raise ConfigError("the features of a stream cannot be kept: leave --streaming out")
    args.channels_last = args.channels_last and data.kind == "image"
    network, new = recipe.fit_classifier(network, own.model, data, own.new_classifier)

    # Exits; the backbone is frozen but for a last layer that is new
    torch.manual_seed(args.seed)
    model = recipe.add_exits(network, data, exits, backbone_kwargs=own.model_kwargs or None)
    for head in model.heads.active:
        pooling_of(head)  # refuses one whose inputs are too large to be kept
    model.backbone.requires_grad_(False)
    layers: list[Any] = []
    if new:
        classifier = list(last_linears(model).values())[-1]
        layers = [classifier, *(layer for layer in new_layers(network).values() if layer is not classifier)]
        for layer in layers:
            layer.reset_parameters()
            layer.requires_grad_(True)
    loss = create_loss("self", self_weight=own.self_weight, self_temperature=own.self_temperature)

    name = Path(own.model.partition(":")[2] or own.model).name
    folder = open_run_folder(args.output_dir, f"{name}-exits", resume=args.resume, overwrite=args.overwrite_output_dir)
    args.output_dir = str(folder)
    public = {"model": name, "weights": own.weights and Path(own.weights).name}
    settings = recipe.settings_dict(name, own, data_args, exits, args) | public
    run = recipe.Run(accelerator, data, args, settings, started)
    print(f"{recipe.describe_data(data)}\nrun: {folder}{recipe.describe_load(accelerator.device)}")
    print(f"\n{recipe.describe_networks({'network': model})}")
    print(f"last layer: {'new, it is trained' if new else 'that of the weights, it stays as it is'}")
    if len(layers) > 1:
        print(f"{len(layers)} new layers are trained, so that the network runs in every epoch (--epochs {args.epochs})")

    results = recipe.finished_before(run, folder)
    if results is None:
        # What the exits read, once for every image; heads on it
        if len(layers) < 2:
            inputs = cached_inputs(run, model, data_args.cache_dir)
            result = train_heads(model, inputs, args, loss, args.progress_bar)
        else:  # new layers before the last one: what that reads is not known yet
            model.freeze_backbone()
            for layer in layers:
                layer.requires_grad_(True)
            whole = replace(args, batch_size=min(args.batch_size, len(data.train)))
            result = recipe.train_network(run, folder / "exits", model, loss, args=whole, role="exits")
        if own.finetune:
            model.unfreeze_backbone()
            tuning.output_dir, tuning.channels_last = args.output_dir, args.channels_last
            result = recipe.train_network(run, folder, model, loss, args=tuning, role="network")

        # Records of every exit, the threshold from those of validation, and the checkpoint with its report on test
        records = {split: recipe.collect(run, model, split) for split in ("validation", "test")}
        choice: Mapping[str, Any] = recipe.GIVEN_THRESHOLD
        if exits.threshold is None:
            choice = recipe.store_default_threshold(model, records["validation"])
        latency = measured_times(model) if own.measure_latency else None
        results = recipe.report(run, folder, model, ("self", loss), result, records, choice, latency=latency)
    print(f"\n{recipe.format_results(results)}\n")
    if results.get("latency"):
        print(f"{format_latency(results['latency'], None)}\n")
    print(f"{recipe.how_to_load(folder, data_args.dataset)}")


def measured_times(model: EarlyExitWrapper) -> dict[str, Any] | None:
    """Returns how long each exit takes with torch and one CPU thread, as `erde-hub latency` does; None where it cannot.

    What cannot be measured is said, and ends no run.
    """
    try:
        return measure_exits(model, ["torch"], [1], seconds=1.0)
    except ConfigError as error:
        logger.warning("the milliseconds were not measured: %s", error)
        return None


def cached_inputs(run: recipe.Run, model: EarlyExitWrapper, cache_dir: str | None) -> dict[str, Tensor]:
    """Returns what the exits read of the training images, from a file where an earlier run has computed it."""
    data, args = run.data, run.args
    augment = args.augment or data.augment
    flip = data.kind == "image" and "flip" in augment
    known = [
        model_fingerprint(model.backbone), str(model.backbone), model.config.backbone_kwargs,
        data.fingerprint, data.preprocessing, model.exit_names, flip,
        hashlib.sha256(torch.as_tensor(data.train.indices).numpy().tobytes()).hexdigest(),
        [str(next(iter(head.children()))) for head in model.heads.active],
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]
    cache = cached_assets_path("erde_hub", namespace="features") if cache_dir is None else Path(cache_dir) / "features"
    file = cache / f"{key}.safetensors"
    if file.is_file():
        os.utime(file)
        print(f"features of the frozen backbone: read from {file}")
        return load_file(file)
    model.to(run.accelerator.device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    batches = BatchLoader(data.train, 64, channels_last=args.channels_last)
    inputs = collect_head_inputs(model, batches, flip, args.progress_bar)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file(inputs, temporary)
        remove_oldest(cache, FEATURES_KEPT)
    except (OSError, SafetensorError) as error:  # costs time on the next run, nothing else
        logger.warning("the features could not be kept in %s: %s", cache, error)
    return inputs


def remove_oldest(cache: Path, limit: int) -> None:
    """Deletes the features that were used longest ago, until those that are left have at most that many bytes."""
    files = sorted(cache.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    size = sum(file.stat().st_size for file in files)
    while size > limit:
        size -= files[0].stat().st_size
        files.pop(0).unlink(missing_ok=True)


if __name__ == "__main__":
    run_script(main, resumable=True)
