"""Rounds of DEDIER: between epochs an early read-out of the student answers for the whole training set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erde_hub.data.loader import network_inputs
from erde_hub.errors import ConfigError
from erde_hub.heads import ExitHead, FeatureSpec, create_head
from erde_hub.heads.base import ToNCHW
from erde_hub.losses import ReadoutWeight

from ._checks import all_exits
from ._launch import share_buffers
from .features import ExitFeatures

if TYPE_CHECKING:
    from .distiller import Distiller

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
    process. The read-out "head" sees the detached feature
    that the exit's own head reads: nothing of the student is trained or frozen by it. Everything random is a function
    of the run's seed and the epoch, and the global generators stay as they were, so a resumed run does the same.

    Raises:
        ConfigError: The training set is a stream, or the student has no early exits whose features could be read.
    """

    def __init__(self, weight: ReadoutWeight, student: nn.Module, train: Any) -> None:
        if train.num_samples is None:
            raise ConfigError(
                "'dedier' keeps a weight per training sample, and streamed data have no known number of them: load"
                " them without streaming"
            )
        self.weight, self.train = weight, train
        self.tap = ExitFeatures(student) if weight.readout_source == "head" else None
        weight.allocate(int(train.indices.max()) + 1)

    def end_epoch(self, distiller: Distiller) -> dict[str, float] | None:
        """Runs a round if one is due and another epoch follows; returns what the read-out got wrong and the weights."""
        epoch = distiller.position.epoch
        if epoch % self.weight.readout_every or epoch + 1 >= distiller.epochs:
            return None
        summary = self.run(distiller, epoch)
        logger.info(
            "read-out after epoch %d: wrong on %.1f %%, mean weight %.2f",
            epoch + 1,
            100 * summary["wrong"],
            summary["mean_weight"],
        )
        return summary

    def run(self, distiller: Distiller, epoch: int) -> dict[str, float]:
        """Lets the read-out answer for the whole training set and renews the weights."""
        student: Any = distiller._wrapped if distiller.sharded else distiller.student
        if not distiller.sharded:
            share_buffers(student, distiller.accelerator)
        training = student.training
        student.eval()
        try:
            head = self._train_head(distiller, student, epoch)
            parts: list[tuple[Tensor, Tensor, Tensor]] = []
            with torch.no_grad():
                for batch in distiller._loader(self.train, train=False):
                    if len(batch["labels"]):
                        logits = self._answers(distiller, student, head, batch)
                        parts.append((batch["index"], logits.float().cpu(), batch["labels"]))
        finally:
            student.train(training)
        classes = distiller.data.num_classes
        if parts:
            index, logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        else:  # more processes than samples
            none = torch.zeros(0, dtype=torch.int64)
            index, logits, labels = none, torch.zeros(0, classes), none
        return self.weight.update(index, logits, labels)

    def _answers(
        self, distiller: Distiller, student: nn.Module, head: nn.Module | None, batch: dict[str, Tensor]
    ) -> Tensor:
        inputs = network_inputs(batch, distiller.accelerator.device)
        exit_ = self.weight.readout_exit
        if head is None:
            with distiller.accelerator.autocast():
                return all_exits(student, inputs)[exit_]
        feature = self._feature(distiller, student, inputs)
        with distiller.accelerator.autocast():
            return head(feature)

    def _feature(self, distiller: Distiller, student: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the head of the exit reads, detached and in the backbone's own layout."""
        tap = self.tap
        if tap is None:
            raise ConfigError("features are read for readout_source='head' only")
        with torch.no_grad(), tap.watching(), distiller.accelerator.autocast():
            all_exits(student, inputs)
            feature = tap.take(channels_last=False)[self.weight.readout_exit]
        if feature is None:
            raise ConfigError(f"exit {self.weight.readout_exit} of {type(student).__name__} was not reached")
        return feature.detach()

    def _train_head(self, distiller: Distiller, student: nn.Module, epoch: int) -> nn.Module | None:
        """Trains a new head by cross-entropy on the detached feature; None where an exit of the student answers."""
        if self.tap is None:
            return None
        weight, accelerator = self.weight, distiller.accelerator
        spec = self.tap.heads[weight.readout_exit].spec
        with _generators_of_their_own(distiller.args.seed, epoch):
            head = new_readout(spec, distiller.data.num_classes).to(accelerator.device)
            optimizer = torch.optim.AdamW(head.parameters(), lr=weight.readout_lr)
            loader = distiller._loader(self.train, train=True)  # without augmentation
            for pass_ in range(weight.readout_epochs):
                loader.set_epoch(epoch * weight.readout_epochs + pass_)
                for batch in loader:
                    feature = self._feature(distiller, student, network_inputs(batch, accelerator.device))
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
def _generators_of_their_own(seed: int, epoch: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed * 100_003 + epoch)
        yield
