"""Rounds of DEDIER: between epochs an early read-out of the student predicts the whole training set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from erde_hub.data.base import LabelledData
from erde_hub.data.loader import network_inputs
from erde_hub.engine.modes import evaluating
from erde_hub.errors import ConfigError
from erde_hub.heads import ExitHead, FeatureSpec, create_head
from erde_hub.heads.base import ToNCHW
from erde_hub.losses import ReadoutWeight

from ._checks import all_exits
from ._launch import is_sharded, share_buffers
from ._setup import create_loader
from .arguments import DistillationArguments
from .features import ExitFeatures

logger = logging.getLogger(__name__)


class ConvReadout(ExitHead):
    """Two 3x3 convolutions with batch norm and ReLU to twice the channels, global pooling, one linear layer.

    The auxiliary head of DEDIER's released code, with Kaiming's initialisation.
    """

    def __init__(self, spec: FeatureSpec, num_labels: int) -> None:
        super().__init__(spec, num_labels)
        width = 2 * spec.width
        layers: list[nn.Module] = [ToNCHW()] if spec.format == "NHWC" else []
        for inputs in (spec.width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(width, num_labels)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Feature in the format of ``spec`` to (N, num_labels)."""
        return self.fc(self.layers(x))


class ReadoutRounds:
    """Renews the weights of a :class:`~erde_hub.losses.ReadoutWeight` at the end of the epochs that are due.

    Images are read without augmentation, by the student in eval mode, with the batch-norm statistics of rank 0 in every
    process. The read-out "head" sees the detached feature that the exit's own head reads: the student is not trained by
    it. Everything random is a function of the run's seed and the epoch, and the global generators stay as they were, so
    a resumed run does the same.

    Args:
        weight: The weights to renew.
        student: The student.
        data: The training split and the number of classes.
        args: Batch size and seed.
        accelerator: The processes.

    Raises:
        ConfigError: The training set is a stream, or the student has no early exits whose features could be read.
    """

    def __init__(
        self,
        weight: ReadoutWeight,
        student: nn.Module,
        data: LabelledData,
        args: DistillationArguments,
        accelerator: Accelerator,
    ) -> None:
        train: Any = data.train
        if train.num_samples is None:
            raise ConfigError(
                "'dedier' keeps a weight per training sample, and streamed data have no known number of them: load"
                " them without streaming"
            )
        self.weight, self.train, self.args, self.accelerator = weight, train, args, accelerator
        self.num_classes = data.num_classes
        self.features = ExitFeatures(student) if weight.readout_source == "head" else None
        weight.allocate(int(train.indices.max()) + 1)

    def end_epoch(self, student: nn.Module, epoch: int, epochs: int) -> dict[str, float] | None:
        """Runs a round if one is due and another epoch follows; returns the read-out's errors and the weights.

        Args:
            student: The student, or what FSDP and DeepSpeed made of it.
            epoch: The epoch that ends, from 0.
            epochs: Epochs of the training.
        """
        if epoch % self.weight.readout_every or epoch + 1 >= epochs:
            return None
        summary = self.run(student, epoch)
        logger.info(
            "read-out after epoch %d: wrong on %.1f %%, mean weight %.2f",
            epoch + 1,
            100 * summary["wrong"],
            summary["mean_weight"],
        )
        return summary

    def run(self, student: nn.Module, epoch: int) -> dict[str, float]:
        """Predicts the whole training set with the read-out and renews the weights."""
        if not is_sharded(self.accelerator):
            share_buffers(student, self.accelerator)
        none = torch.zeros(0, dtype=torch.int64)  # of a process without samples
        parts: list[tuple[Tensor, ...]] = [(none, torch.zeros(0, self.num_classes), none)]
        with evaluating(student):
            head = None if self.features is None else self._train_head(self.features, student, epoch)
            with torch.no_grad():
                for batch in create_loader(self.train, self.args, self.accelerator, train=False):
                    if len(batch["labels"]):
                        logits = self._predict(student, head, network_inputs(batch, self.accelerator.device))
                        parts.append((batch["index"], logits.float().cpu(), batch["labels"]))
        return self.weight.update(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _predict(self, student: nn.Module, head: nn.Module | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits of the read-out: those of the student's exit, or of the trained head."""
        if self.features is None or head is None:
            with self.accelerator.autocast():
                return all_exits(student, inputs)[self.weight.readout_exit]
        feature = self._feature(self.features, student, inputs)
        with self.accelerator.autocast():
            return head(feature)

    def _feature(self, features: ExitFeatures, student: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns what the head of the exit reads, detached and in the backbone's own layout."""
        with torch.no_grad(), features.watching(), self.accelerator.autocast():
            all_exits(student, inputs)
            feature = features.take(channels_last=False)[self.weight.readout_exit]
        if feature is None:
            raise ConfigError(f"exit {self.weight.readout_exit} of {type(student).__name__} was not reached")
        return feature.detach()

    def _train_head(self, features: ExitFeatures, student: nn.Module, epoch: int) -> nn.Module:
        """Trains a new head by cross-entropy on the detached feature."""
        weight, accelerator = self.weight, self.accelerator
        spec = features.heads[weight.readout_exit].spec
        with _own_generators(self.args.seed, epoch):
            head = new_readout(spec, self.num_classes).to(accelerator.device)
            optimizer = torch.optim.AdamW(head.parameters(), lr=weight.readout_lr)
            loader = create_loader(self.train, self.args, accelerator, train=True)  # without augmentation
            for pass_ in range(weight.readout_epochs):
                loader.set_epoch(epoch * weight.readout_epochs + pass_)
                for batch in loader:
                    feature = self._feature(features, student, network_inputs(batch, accelerator.device))
                    with accelerator.autocast():
                        logits = head(feature)
                    F.cross_entropy(logits.float(), batch["labels"].to(accelerator.device)).backward()
                    if accelerator.num_processes > 1:
                        for parameter in head.parameters():
                            parameter.grad = accelerator.reduce(parameter.grad, "mean")
                    optimizer.step()
                    optimizer.zero_grad()
            share_buffers(head, accelerator)
        return head.eval()


def new_readout(spec: FeatureSpec, num_labels: int) -> ExitHead:
    """Returns an untrained auxiliary head for a feature: convolutions on maps, one hidden layer on tokens."""
    if spec.format in ("NCHW", "NHWC"):
        return ConvReadout(spec, num_labels)
    return create_head("mlp", spec, num_labels)


@contextmanager
def _own_generators(seed: int, epoch: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed * 100_003 + epoch)
        yield
