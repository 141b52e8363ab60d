"""Training with the Trainer of transformers: a loss over all exits for it, and a Trainer that knows exits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainingArguments

from erde_hub.backbones.transformers_preprocessing import as_preprocessing
from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.losses import ExitLoss, LossKey, create_loss
from erde_hub.losses.exit_weights import check_exit_weights, weights_per_exit
from erde_hub.tasks import REGRESSION

from ._checks import all_exits, check_loss, exit_names
from ._loss_inputs import LossInputs
from ._setup import adopt_class_names, teacher_normalization

#: What a checkpoint holds of a loss that learns, next to the optimizer's state.
LOSS_FILE = "loss.safetensors"


def all_exits_loss(
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, exit_weights: str | Sequence[float] = "uniform"
) -> Callable[..., Tensor]:
    """Returns a ``compute_loss_func`` for transformers' Trainer: the weighted sum of a loss over all exits.

    Class weights and label smoothing of your own would otherwise be computed from the last exit alone, and the early
    exits would learn nothing. Where samples exit early, in evaluation, it is the loss of their answers.

    Args:
        criterion: Mean loss of one exit from logits (N, K) and labels.
        exit_weights: One number per exit, or a preset (:func:`~erde_hub.losses.exit_weights_preset`).

    Raises:
        ConfigError: Weights that do not fit the number of exits.

    Example:
        >>> import torch
        >>> weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]), label_smoothing=0.1)
        >>> loss = all_exits_loss(weighted)  # Trainer(model, args, ..., compute_loss_func=loss)
    """
    weights = check_exit_weights(exit_weights)

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if isinstance(criterion, nn.Module):
            criterion.to(labels.device)
        if outputs.exit_logits is None:
            return criterion(outputs.logits, labels)
        factors = weights_per_exit(weights, len(outputs.exit_logits))
        losses = [w * criterion(logits, labels) for w, logits in zip(factors, outputs.exit_logits, strict=True)]
        loss = torch.stack(losses).sum()
        # With gradient accumulation this batch is a part of what the mean is taken over.
        return loss if num_items_in_batch is None else loss * (labels.numel() / num_items_in_batch)

    return compute


class EarlyExitTrainer(Trainer):
    """transformers' Trainer for a model with exits: any loss over exits, a teacher where the loss has one.

    Evaluation runs every exit: ``predictions`` are a tuple of logits (N, K), shallow to deep, and ``compute_metrics``
    is called for each exit. Its values are reported with the exit's name in front (``eval_layer1_accuracy``), those of
    the last exit with their plain names as well; ``eval_loss`` is the model's own loss. Checkpoints, resuming, PEFT and
    logging are the Trainer's; the terms of the loss are logged next to it.

    :class:`~erde_hub.training.Distiller` resumes bit for bit, reads this library's data, and has ``dedier`` and losses
    over tokens; take this class where a project uses the Trainer already.

    Args:
        model: An :class:`~erde_hub.EarlyExitWrapper`, or a PEFT model around one. It takes the class names of the
            training set (``features`` of a ``datasets.Dataset``) and the preprocessing of an image processor that is
            given as ``processing_class``.
        args: The Trainer's; ``label_smoothing_factor`` is handed to the loss.
        loss: A loss or its key.
        teacher: The model that the loss learns from; run in eval mode, without gradients, on the same batch, which is
            normalised with the teacher's own mean and std.
        **kwargs: Everything else that the Trainer takes; ``compute_metrics`` is the accuracy where it is not given, for
            a regression the mean absolute error.

    Raises:
        InputTypeError: A model without exits.
        ConfigError: Loss, teacher and model do not go together, the loss keeps a weight per sample, or the classes of
            the training set are not the model's.

    Example:
        Trainer and data are those of transformers; what is new is in the second line::

            trainer = EarlyExitTrainer(model, TrainingArguments("runs/vit"), train_dataset=train, eval_dataset=test,
                                       loss="erde", teacher=teacher)
            trainer.train()
            trainer.evaluate()  # {"eval_loss": ..., "eval_vit.layers.3_accuracy": ..., "eval_accuracy": ...}
    """

    #: The loss is a mean over the batch, which the Trainer divides by the steps of accumulation.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        loss: ExitLoss | LossKey = "ce",
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(model, "exit_names"):
            raise InputTypeError(f"{type(model).__name__} has no exits: wrap it by EarlyExitWrapper")
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func does not go with EarlyExitTrainer, whose loss is loss=: leave it out")
        super().__init__(model, args, **kwargs)
        config: Any = model.config
        regression = config.problem_type == REGRESSION
        self.loss = create_loss(loss) if isinstance(loss, str) else loss
        if self.loss.reads_index:
            raise ConfigError(
                f"{type(self.loss).__name__} keeps a weight per training sample and renews it between epochs from"
                " answers to the whole training set. The Trainer hands on no number of a sample and draws augmented"
                " ones only: train it with erde_hub.training.Distiller"
            )
        pairs = check_loss(self.loss, model, teacher, self.args.label_smoothing_factor, regression)
        self.loss_inputs = LossInputs(self.loss, model, teacher, pairs, self.args.seed)
        self.label_smoother = None
        self.loss.to(self.args.device)
        self._adopt(config)
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self.teacher_normalization = teacher_normalization(teacher, config.preprocessing)
        self._metric: Callable[..., dict[str, float]] = kwargs.get("compute_metrics") or (
            _mean_absolute_error if regression else _accuracy
        )
        self.compute_metrics = self._metrics_per_exit
        self._terms: dict[str, Tensor] = {}
        self._batches = 0
        self._stepped = True  # the optimizer since the last batch

    def _adopt(self, config: Any) -> None:
        processor: Any = self.processing_class
        if hasattr(processor, "image_mean") and (found := as_preprocessing(processor)) is not None:
            config.preprocessing = found
        features: Any = getattr(self.train_dataset, "features", None) or {}
        names = getattr(features.get("labels", features.get("label")), "names", None)
        if names is not None:
            adopt_class_names(config, names)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In train mode the loss over all exits, else the model's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, inputs = inputs["labels"], {name: value for name, value in inputs.items() if name != "labels"}
        epochs = max(1, math.ceil(self.state.num_train_epochs))
        self.loss.set_epoch(min(int(self.state.epoch or 0) + 1, epochs), epochs)
        with self.loss_inputs.watching():
            outputs = model(**inputs)
            teacher_logits = None
            if self.teacher is not None:
                if self.teacher_normalization is not None:
                    inputs["pixel_values"] = self.teacher_normalization(inputs["pixel_values"])
                with torch.no_grad(), self.accelerator.autocast():
                    teacher_logits = all_exits(self.teacher, inputs)
            features = self.loss_inputs.of(inputs)
        result = self.loss(outputs.exit_logits, teacher_logits, labels, **features)
        for name, value in result.terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + value
        self._batches += 1
        return (result.loss, outputs) if return_outputs else result.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer, which knows no parameters of a loss: their gradients are averaged over the processes here."""
        if self._stepped:
            self.loss.zero_grad()
        loss = super().training_step(*args, **kwargs)
        self.loss_inputs.average_gradients(self.accelerator)
        self._stepped = self.accelerator.sync_gradients
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with a group for the parameters of the loss."""
        new, own = self.optimizer is None, self.loss_inputs.parameters()
        optimizer = super().create_optimizer(model)
        if new and own:
            optimizer.add_param_group({"params": own, "weight_decay": self.args.weight_decay})
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and (state := self.loss.state_dict()):
            save_file(state, Path(output_dir) / LOSS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.loss.state_dict():
            load_model(self.loss, Path(checkpoint) / LOSS_FILE)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer, with the mean of each term of the loss since the last time."""
        if "loss" in logs and self._batches:
            logs = {**logs, **{name: float(value) / self._batches for name, value in self._terms.items()}}
            self._terms, self._batches = {}, 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Runs every exit; the predictions are a tuple of logits (N, K), shallow to deep."""
        ignored = ["logits", "exit_index", *(ignore_keys or ())]
        return super().prediction_step(model, {**inputs, "output_all_exits": True}, prediction_loss_only, ignored)

    def _metrics_per_exit(self, given: EvalPrediction) -> dict[str, float]:
        metrics: dict[str, float] = {}
        own: dict[str, float] = {}
        for name, logits in zip(exit_names(self.model), given.predictions, strict=True):
            own = self._metric(EvalPrediction(logits, given.label_ids, given.inputs, given.losses))
            metrics |= {f"{name}_{key}": value for key, value in own.items()}
        return metrics | own


def _accuracy(given: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(given.predictions, axis=-1) == given.label_ids))}


def _mean_absolute_error(given: EvalPrediction) -> dict[str, float]:
    targets = np.reshape(given.label_ids, np.shape(given.predictions))
    return {"mae": float(np.mean(np.abs(given.predictions - targets)))}
