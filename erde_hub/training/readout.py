"""Rounds of DEDIER: between epochs an early read-out of the student predicts the whole training set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from erde_hub.calibration import LaplaceCalibrator
from erde_hub.data.base import LabelledData
from erde_hub.data.loader import network_inputs
from erde_hub.engine.features import capture_inputs, last_linear
from erde_hub.engine.modes import evaluating
from erde_hub.errors import ConfigError
from erde_hub.heads import ExitHead, FeatureSpec, create_head
from erde_hub.heads.base import ToNCHW
from erde_hub.losses import ExitLoss, ReadoutWeight
from erde_hub.losses.dedier import probability_margin
from erde_hub.prediction_sets import AVCSClassifier
from erde_hub.records import MIN_SAMPLES, ExitRecords

from ._checks import all_exits
from ._launch import is_sharded, share_buffers
from ._setup import create_loader
from .arguments import DistillationArguments
from .features import ExitFeatures, exit_heads

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
    a resumed run does the same. Another ``readout_confidence`` than "softmax" is fitted on the validation split, anew
    in every round.

    Args:
        weight: The weights to renew.
        student: The student.
        data: The training split, the number of classes, and the validation split where the confidence is fitted.
        args: Batch size and seed.
        accelerator: The processes.

    Raises:
        ConfigError: The training set is a stream, the student has no early exits whose features could be read, or the
            confidence is fitted and there are too few validation samples.
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
        self.validation: Any = data.validation if weight.readout_confidence != "softmax" else None
        if self.validation is not None and (self.validation.num_samples or 0) < MIN_SAMPLES:
            raise ConfigError(
                f"readout_confidence={weight.readout_confidence!r} is fitted on the validation split, which has"
                f" {self.validation.num_samples} samples: give at least {MIN_SAMPLES}, or take 'softmax'"
            )
        self.num_classes = data.num_classes
        self.features = ExitFeatures(student) if weight.readout_source == "head" else None
        laplace = weight.readout_confidence == "laplace"
        self.layer = _linear_of(exit_heads(student)[weight.readout_exit]) if laplace else None
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
        with evaluating(student):
            head = None if self.features is None else self._train_head(self.features, student, epoch)
            index, logits, labels, features = self._read(self.train, student, head)
            if self.validation is None:
                return self.weight.update(index, logits[:, -1], labels)
            held_out = self._read(self.validation, student, head)
        confidence = self._confidence(self._records(*held_out), logits, features)
        return self.weight.update(index, logits[:, -1], labels, confidence)

    def _read(self, split: Any, student: nn.Module, head: nn.Module | None) -> list[Tensor]:
        """Predicts a split, this process's part of it.

        Shape:
            Returns index (N,), logits (N, E, K) of the exits up to the read-out, labels (N,) and features (N, D) of the
            read-out's last layer, D = 0 where they are not needed.
        """
        layer = self.layer if head is None or self.layer is None else _linear_of(head)
        layers = {} if layer is None else {"feature": layer}
        none = torch.zeros(0, dtype=torch.int64)  # of a process without samples
        parts: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), capture_inputs(layers) as seen:
            for batch in create_loader(split, self.args, self.accelerator, train=False):
                if len(batch["labels"]):
                    logits = self._predict(student, head, network_inputs(batch, self.accelerator.device))
                    feature = seen.get("feature", logits.new_zeros(len(logits), 0))
                    parts.append((batch["index"], logits.float().cpu(), batch["labels"], feature.float().cpu()))
        if not parts:
            return [none, torch.zeros(0, 1, self.num_classes), none, torch.zeros(0, 0)]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def _predict(self, student: nn.Module, head: nn.Module | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns logits (N, E, K): of the student's exits up to the read-out, or of the trained head alone."""
        if self.features is None or head is None:
            with self.accelerator.autocast():
                return torch.stack(list(all_exits(student, inputs)[: self.weight.readout_exit + 1]), 1)
        feature = self._feature(self.features, student, inputs)
        with self.accelerator.autocast():
            return head(feature)[:, None]

    def _records(self, index: Tensor, logits: Tensor, labels: Tensor, features: Tensor) -> ExitRecords:
        """Returns held-out records of all processes; Laplace sees the read-out alone, sets the exits before it too."""
        parts = gather_object([(index, logits, labels, features)])
        index, logits, labels, features = (torch.cat(c) for c in zip(*(p for p in parts if len(p[0])), strict=True))
        logits = logits[:, -1:] if self.layer is not None else logits
        exits = logits.shape[1]
        return ExitRecords(
            logits=logits.transpose(0, 1).contiguous(),
            labels=labels,
            index=index,
            exit_names=[str(e) for e in range(exits)],
            cumulative_macs=[0] * exits,
            class_names=[str(k) for k in range(self.num_classes)],
            features=None if self.layer is None else [features],
        )

    def _confidence(self, held_out: ExitRecords, logits: Tensor, features: Tensor) -> Tensor:
        """Returns the confidence of the read-out, fitted on held-out rows.

        Shape:
            logits: (N, E, K). features: (N, D). Returns (N,) in [0, 1].
        """
        if not len(logits):
            return logits.new_zeros(0)
        if self.layer is not None:
            laplace = LaplaceCalibrator.fit(held_out, seed=self.args.seed, allow_missing_classes=True)
            return probability_margin(laplace.calibrate(logits[None, :, -1], [features])[0])
        sets = AVCSClassifier.fit(held_out, seed=self.args.seed).sets(logits.transpose(0, 1))
        size = sets[-1].sum(-1)
        return torch.where(size > 0, 1 - (size - 1) / max(self.num_classes - 1, 1), 0.0)

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


def _linear_of(head: nn.Module) -> nn.Linear:
    layer = last_linear(head)
    if layer is None:
        raise ConfigError(f"readout_confidence='laplace' needs a linear layer, and {type(head).__name__} has none")
    return layer


def readout_rounds(
    loss: ExitLoss, student: nn.Module, data: LabelledData, args: DistillationArguments, accelerator: Accelerator
) -> list[ReadoutRounds]:
    """Returns the rounds of a loss, one per weight that a read-out renews."""
    weights = [weight for weight in loss.sample_weights if isinstance(weight, ReadoutWeight)]
    return [ReadoutRounds(weight, student, data, args, accelerator) for weight in weights]


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
