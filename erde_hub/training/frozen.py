"""Exits on a frozen backbone: what the heads read is computed once, and they learn from it in minutes on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub._progress import passing_bar
from erde_hub.data.augment import epoch_order
from erde_hub.engine.features import last_linears
from erde_hub.engine.modes import evaluating
from erde_hub.errors import ConfigError, NonFiniteLossError
from erde_hub.heads import ExitHead
from erde_hub.heads.base import GlobalPool, TokenPool
from erde_hub.losses import ExitLoss
from erde_hub.modeling.attach import new_layers

from ._checks import check_finite, check_loss
from ._meter import StepMeter, describe_non_finite
from ._setup import create_optimizer
from .arguments import DistillationArguments
from .distiller import TrainResult
from .features import exit_heads
from .schedules import create_schedule

#: Settings of a training that this one does not have, and their values that ask for nothing.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "gradient_accumulation_steps": (1,),
    "ema_decay": (0.0,),
    "mixed_precision": (None, "no"),
    "report_to": (None,),
}


def pooling_of(head: ExitHead) -> nn.Module | None:
    """Returns the layer without weights with which a head begins and which makes one vector of a sample.

    Returns:
        None where the head reads vectors.

    Raises:
        ConfigError: The head has layers with weights before it pools, as ``fc`` on maps: whole maps would have to be
            kept.
    """
    if head.spec.format == "NC":
        return None
    first = next((module for module in head.modules() if not list(module.children())), head)
    if not isinstance(first, (GlobalPool, TokenPool)):
        raise ConfigError(
            f"{type(head).__name__} does not begin with a pooling, so that its inputs are too large to be kept: choose"
            " the head linear or mlp"
        )
    return first


@torch.no_grad()
def collect_head_inputs(
    model: Any, batches: Iterable[Mapping[str, Tensor]], flip: bool = False, progress: bool = True
) -> dict[str, Tensor]:
    """Runs a network once over all samples and keeps what its exits read, pooled.

    Args:
        model: An :class:`~erde_hub.EarlyExitWrapper`.
        batches: Mappings of inputs and ``labels``, from a :class:`~erde_hub.data.images.BatchLoader`.
        flip: Also run every image mirrored; the samples are then twice as many.
        progress: Show a progress bar.

    Returns:
        ``labels`` (N,), for each early exit by its name the vectors (N, D) that its head reads after pooling, and for
        the last exit the vectors that its last linear layer reads where that layer is trained, otherwise its logits.

    Raises:
        ConfigError: See :func:`pooling_of`; or the classifier that is trained is more than a linear layer.
    """
    heads = exit_heads(model)
    kept: dict[str, list[Tensor]] = {name: [] for name in (*model.exit_names, "labels")}
    classifier = _trained_classifier(model)
    *early, last = model.exit_names

    def keep(name: str, tensor: Tensor) -> None:
        kept[name].append(tensor.float().cpu())

    with ExitStack() as stack, evaluating(model):
        for name, head in zip(early, heads, strict=True):
            pool = pooling_of(head)
            if pool is None:
                handle = head.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
            else:
                handle = pool.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
            stack.callback(handle.remove)
        if classifier is not None:
            handle = classifier.register_forward_pre_hook(lambda _, args: keep(last, args[0]))
            stack.callback(handle.remove)
        for batch in passing_bar(batches, "features of the frozen backbone", shown=progress):
            inputs = {key: value.to(model.device) for key, value in batch.items() if key not in ("labels", "index")}
            for mirrored in (False, True) if flip else (False,):
                if mirrored:
                    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
                logits = model(**inputs, output_all_exits=True).exit_logits[-1]
                kept["labels"].append(batch["labels"])
                if classifier is None:
                    keep(last, logits)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def train_heads(
    model: Any, inputs: Mapping[str, Tensor], args: DistillationArguments, loss: ExitLoss, progress: bool = True
) -> TrainResult:
    """Trains the exits of a frozen network on what :func:`collect_head_inputs` kept.

    Args:
        model: Changed in place: its heads, and its last linear layer if that requires gradients.
        inputs: Of its exits.
        args: Epochs, batch size, steps, optimizer, schedule, ``max_grad_norm``, ``label_smoothing`` and seed.
        loss: Without a teacher.
        progress: Show a progress bar.

    Raises:
        ConfigError: A setting that this training does not have, such as ``ema_decay``; or a loss with a teacher.
        NonFiniteLossError: The loss became NaN or infinite; the step is not taken.
    """
    for name, off in _WITHOUT.items():
        if getattr(args, name) not in off:
            raise ConfigError(
                f"{name}={getattr(args, name)!r}: exits that are trained on kept features have none; leave it"
                " out, or train in the network (Distiller with freeze_backbone; --finetune_training of attach)"
            )
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    heads = exit_heads(model)
    check_loss(loss, model, None, args.label_smoothing, inputs["labels"].is_floating_point())
    classifier, device, labels = _trained_classifier(model), model.device, inputs["labels"]
    batch_size = min(args.batch_size, len(labels))
    per_epoch = len(labels) // batch_size
    steps = min(args.epochs * per_epoch, args.max_steps or args.epochs * per_epoch)
    optimizer = create_optimizer(model, [], args)
    schedule = create_schedule(args, optimizer, steps, per_epoch)
    history: list[dict[str, Any]] = []
    meter = StepMeter()
    model.heads.train()
    with _reading_vectors(heads):
        for step in passing_bar(range(steps), "training the exits", shown=progress):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0:
                order = torch.from_numpy(epoch_order(len(labels), args.seed, epoch))
            rows = order[batch * batch_size : (batch + 1) * batch_size]
            *early, last = (inputs[name][rows].to(device) for name in model.exit_names)
            logits = [head(vectors) for head, vectors in zip(heads, early, strict=True)]
            logits.append(last if classifier is None else classifier(last))
            targets = labels[rows].to(device)
            result = loss(logits, None, targets)
            meter.add(step + 1, result, logits, targets)
            if bad := meter.first_bad_batch():
                message = describe_non_finite(*bad, model.exit_names)
                raise NonFiniteLossError(f"{message}. Try a lower lr or max_grad_norm")
            result.loss.backward()
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(step + 1)
            if batch + 1 == per_epoch or step + 1 == steps:
                history.append({"epoch": epoch + 1, "train": meter.collect().average()})
                meter.restart()
    check_finite(model, steps)
    model.eval()
    seconds = time.perf_counter() - started
    return TrainResult("completed", steps, steps, list(model.exit_names), history, seconds=seconds)


def _trained_classifier(model: Any) -> nn.Linear | None:
    """The linear layer that gives the backbone's logits, where it is trained, else None.

    Raises:
        ConfigError: A layer before it has no trained weights either, so that its outputs are still to change.
    """
    new = new_layers(model.backbone)
    if not new and not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        return None
    classifier = list(last_linears(model).values())[-1]
    for name, layer in new.items():
        if layer is not classifier:
            raise ConfigError(
                f"{name} of the backbone has no trained weights and comes before its last linear layer, of which the"
                " inputs are kept: train in the network (Distiller with freeze_backbone=True)"
            )
    return classifier if classifier.weight.requires_grad else None


@contextmanager
def _reading_vectors(heads: Sequence[ExitHead]) -> Iterator[None]:
    """Heads take what their pooling would have returned."""
    pools = [pool for pool in map(pooling_of, heads) if pool is not None]
    for pool in pools:
        pool.forward = lambda x, mask=None: x
    try:
        yield
    finally:
        for pool in pools:
            del pool.forward
