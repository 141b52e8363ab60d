"""A network with two exits and three classes of coloured images, small enough to train in a blink."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from erde_hub import EarlyExitWrapper
from erde_hub.data.images import ImageData, image_data_from_arrays
from erde_hub.outputs import EarlyExitOutput
from erde_hub.training import DistillationArguments
from tests.fakes.networks import resnet8

CLASSES = ["red", "green", "blue"]


def make_data(rows=96, seed=0) -> ImageData:
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % 3
    images = rng.integers(0, 120, size=(rows, 8, 8, 3))
    images[np.arange(rows), :, :, labels] += 60
    return image_data_from_arrays("colours", {"train": (images.astype(np.uint8), labels)}, CLASSES)


class TinyExits(nn.Module):
    exit_names = ("early", "classifier")

    def __init__(self, width=8, classes=3, dropout=0.5, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.num_classes = classes
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
            self.early = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(width, classes)
            )
            self.deep = nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.classifier = nn.Linear(width, classes)

    def forward(self, images, output_all_exits=False):
        if not (self.training or output_all_exits):
            raise AssertionError("the loop must ask for every exit")
        features = self.stem(images)
        logits = (self.early(features), self.classifier(self.deep(features)))
        return EarlyExitOutput(logits=logits[-1], exit_logits=logits)


def network(width=4, seed=0, exits=("layer1", "layer2"), **kwargs) -> EarlyExitWrapper:
    torch.manual_seed(seed)
    return resnet8(len(CLASSES), width, 8, exits, id2label=CLASSES, **kwargs)


def make_args(**changes) -> DistillationArguments:
    defaults = {
        "epochs": 2, "batch_size": 8, "lr": 0.05, "augment": "none", "progress_bar": False, "mixed_precision": "no",
    }  # fmt: skip
    return DistillationArguments(**{**defaults, **changes})


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert a.keys() == b.keys()
    assert not different, different
