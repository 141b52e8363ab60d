"""Running every exit over a data set, once, on one process or many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from erde_hub._arguments import check_flag
from erde_hub.engine.features import capture_inputs, last_linears
from erde_hub.engine.modes import evaluating
from erde_hub.errors import ConfigError, DataError, InputTypeError, ShapeError
from erde_hub.fingerprint import model_fingerprint
from erde_hub.records import UNLABELLED, ExitRecords
from erde_hub.tasks import REGRESSION, check_targets

#: Keyword inputs of the model that batches may hold; everything else in a batch is left alone.
_INPUTS = ("pixel_values", "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_IMAGES = ("image", "images", "img", "x", "inputs")
_LABELS = ("labels", "label", "targets", "target", "y")
_INDICES = ("index", "idx", "indices")


def collect_exit_records(
    model: nn.Module,
    dataloader: Iterable[Any],
    features: bool = False,
    progress: bool = True,
    accelerator: Any | None = None,
    autocast_dtype: torch.dtype | None = None,
    info: Mapping[str, str] | None = None,
    labels: bool = True,
) -> ExitRecords:
    """Runs every exit once over a data set.

    The model is put into eval mode for the run; afterwards every module is in the mode it was in before.

    Args:
        model: An :class:`~erde_hub.EarlyExitWrapper`, or a module with ``exit_names``, ``exit_table()`` and
            ``model(pixel_values, output_all_exits=True).exit_logits``; may be inside a distributed wrapper.
        dataloader: Batches are dicts (``pixel_values`` or a column such as ``image``; ``labels``; optionally ``index``)
            or tuples (x, y) and (x, y, index). Without an index, samples are numbered as they come. Labels of a
            regression are floats (N, D), or (N,) where D is 1.
        features: Also record the input of each exit's last linear layer.
        progress: Show a progress bar on the main process.
        accelerator: The ``Accelerator`` of a run with several processes, where each sees its part of the data: every
            process returns all records, ordered by index, samples that were seen twice kept once.
        autocast_dtype: Run the model under autocast in this dtype; logits are stored in float32 all the same.
        info: Stored with the records.
        labels: Record labels too. False takes batches without them, also a tensor of images alone, and ignores those
            that there are; such records serve :func:`~erde_hub.evaluation.compare_records`.

    Raises:
        DataError: The loader is empty, a batch has no inputs or no labels, or several processes run without an index.
        InputTypeError: A batch is neither a dict nor a tuple, labels are not integers (of a regression: floats), or an
            argument is of another type.
        ShapeError: The exits disagree with each other, the labels or the class names.
        LabelError: A label lies outside the model's classes.
        RecordsError: A logit is NaN or infinite.
        ConfigError: ``features`` where an exit ends in no linear layer, or where its last one does not give its logits.
    """
    _check_options(dataloader, features, accelerator, autocast_dtype, info)
    core = _unwrapped(model, accelerator)
    # A distributed wrapper synchronises buffers in every forward, which hangs when processes have unequal numbers of
    # batches; sharded models, on the other hand, only run through their wrapper.
    replicas = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    runner = core if isinstance(model, replicas) else model
    device = next((t.device for t in (*core.parameters(), *core.buffers())), torch.device("cpu"))
    main = accelerator is None or accelerator.is_local_main_process
    cast = torch.autocast(device.type, autocast_dtype) if autocast_dtype is not None else contextlib.nullcontext()
    regression = getattr(getattr(core, "config", None), "problem_type", None) == REGRESSION
    if regression and not check_flag("labels", labels):
        raise ConfigError("labels=False is for classes; records of a regression need their labels")
    parts = _Parts(regression)
    taps = last_linears(core) if features else {}
    # Not inference_mode: what a backbone caches in eval mode, or a data set on first use, would be refused by autograd.
    with evaluating(core), torch.no_grad(), cast, capture_inputs(taps) as seen:
        for batch in tqdm(dataloader, desc="collecting exits", unit="batch", disable=not (progress and main)):
            inputs, targets, index = _read(batch, labels)
            on_device = {key: value.to(device, non_blocking=True) for key, value in inputs.items()}
            seen.clear()
            logits = _exit_logits(runner, on_device)
            if targets is None:
                targets = torch.full(logits.shape[1:2], UNLABELLED)
            missing = [name for name in taps if name not in seen]
            if missing:
                raise ConfigError(f"features=True, but the last linear layer of exit {missing[0]!r} did not run")
            if features and not parts.count and not regression:
                _check_features(taps, seen, logits)
            parts.add(logits, targets, index, [seen[name] for name in taps])
    everything = parts.finish(with_features=features, accelerator=accelerator)
    return ExitRecords(
        **everything,
        exit_names=list(core.exit_names),
        cumulative_macs=_macs(core),
        class_names=_class_names(core, everything["logits"].shape[-1]),
        fingerprint=model_fingerprint(model, accelerator),
        info=dict(info or {}),
        problem_type=REGRESSION if regression else None,
    )


def _macs(core: Any) -> list[int]:
    """Cost up to each exit without the calibrator, which raw logits have not passed."""
    macs, calibrator = core.exit_table().cumulative_macs, getattr(core, "calibrator", None)
    if calibrator is None:
        return list(macs)
    return [total - own for total, own in zip(macs, calibrator.cumulative_macs, strict=True)]


class _Parts:
    """What one process has seen so far."""

    def __init__(self, regression: bool) -> None:
        self.regression = regression
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.index: list[Tensor] = []
        self.features: list[list[Tensor]] = []
        self.numbered = True  # the loader gave no index, rows are numbered as they come
        self.count = 0

    def add(self, logits: Tensor, labels: Tensor, index: Tensor | None, features: list[Tensor]) -> None:
        samples = logits.shape[1]
        if self.regression:
            labels = check_targets(labels, samples, logits.shape[2])
        elif tuple(labels.shape) != (samples,):
            raise ShapeError(f"labels of a batch must be ({samples},) for its logits, got {tuple(labels.shape)}")
        if index is not None and tuple(index.shape) != (samples,):
            raise ShapeError(f"index of a batch must be ({samples},) for its logits, got {tuple(index.shape)}")
        if self.count and (index is None) != self.numbered:
            raise DataError("some batches have an index and some have none: give all of them one, or none")
        self.numbered = index is None
        self.logits.append(logits)
        self.labels.append(labels.cpu())
        self.index.append(torch.arange(self.count, self.count + samples) if index is None else index.cpu())
        self.features.append([f.float().cpu() for f in features])
        self.count += samples

    def finish(self, with_features: bool, accelerator: Any | None) -> dict[str, Any]:
        found: dict[str, Any] | None = None
        if self.count:
            columns = [list(column) for column in zip(*self.features, strict=True)]
            found = {
                "logits": _join(self.logits, 1),
                "labels": torch.cat(self.labels),
                "index": torch.cat(self.index),
                "features": [_join(column, 0) for column in columns] if with_features else None,
            }
        if accelerator is None:
            return _some([found])[0]
        several = accelerator.num_processes > 1
        if several and self.count and self.numbered:
            raise DataError(
                "records of several processes need a stable sample number to be put in order: give batches an 'index'"
                " column, or collect on one process"
            )
        parts = _some(gather_object([found]) if several else [found])
        index = torch.cat([part["index"] for part in parts])
        order = index.argsort(stable=True)
        if several:  # samplers repeat samples so that every process gets the same number
            ordered = index[order]
            order = order[torch.cat([torch.tensor([True]), ordered[1:] != ordered[:-1]])]
        return {
            "logits": torch.cat([part["logits"] for part in parts], 1)[:, order],
            "labels": torch.cat([part["labels"] for part in parts])[order],
            "index": index[order],
            "features": [torch.cat(column)[order] for column in zip(*(part["features"] for part in parts), strict=True)]
            if with_features
            else None,
        }


def _some(parts: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    found = [part for part in parts if part is not None]
    if not found:
        raise DataError("the dataloader gave no samples: check the split and drop_last")
    return found


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenates and frees each part, so that the peak of memory is near one copy."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    joined = parts[0].new_empty(shape)
    start = 0
    for i, part in enumerate(parts):
        joined.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
        parts[i] = part.new_empty(0)
    return joined


def _check_options(dataloader: object, features: object, accelerator: object, dtype: object, info: object) -> None:
    check_flag("features", features)
    for name, fits, wanted, value in (
        ("dataloader", hasattr(dataloader, "__iter__"), "batches, such as a DataLoader", dataloader),
        ("accelerator", accelerator is None or hasattr(accelerator, "unwrap_model"), "an Accelerator", accelerator),
        ("autocast_dtype", dtype is None or isinstance(dtype, torch.dtype), "a dtype, such as torch.bfloat16", dtype),
        ("info", info is None or isinstance(info, Mapping), "a dict of notes", info),
    ):
        if not fits:
            raise InputTypeError(f"{name} must be {wanted}, got {value!r:.80}")


def _unwrapped(model: nn.Module, accelerator: Any | None) -> Any:
    core: Any = model if accelerator is None else accelerator.unwrap_model(model)
    if isinstance(core, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        core = core.module
    missing = [name for name in ("exit_names", "exit_table") if not hasattr(core, name)]
    if missing:
        raise InputTypeError(
            f"{type(core).__name__} has no {missing[0]}: wrap it with erde_hub.EarlyExitWrapper to give it exits"
        )
    return core


def _read(batch: Any, labelled: bool) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Splits a batch into model inputs, labels (None where they are not read) and sample index."""
    if isinstance(batch, Tensor) and not labelled:
        batch = (batch,)
    if isinstance(batch, Mapping):
        inputs = {key: batch[key] for key in _INPUTS if key in batch}
        image = next((key for key in _IMAGES if key in batch), None)
        if not inputs and image is not None:
            inputs = {"pixel_values": batch[image]}
        label = next((key for key in _LABELS if key in batch), None)
        index_key = next((key for key in _INDICES if key in batch), None)
        columns = ", ".join(map(repr, batch))
        if not inputs:
            raise DataError(f"a batch has no images among its columns {columns}: call the column 'pixel_values'")
        if label is None and labelled:
            raise DataError(f"a batch has no labels among its columns {columns}: call the column 'labels'")
        labels = None if label is None else batch[label]
        index = None if index_key is None else batch[index_key]
    elif isinstance(batch, (tuple, list)):
        if len(batch) not in (2, 3) and not (len(batch) == 1 and not labelled):
            raise DataError(
                f"a batch must be (x, y) or (x, y, index), got {len(batch)} parts: labels missing? Where there"
                " are none, pass labels=False"
            )
        labels = batch[1] if len(batch) > 1 else None
        inputs, index = {"pixel_values": batch[0]}, batch[2] if len(batch) == 3 else None
    else:
        raise InputTypeError(
            f"a batch must be a dict or a tuple (x, y), got {type(batch).__name__}: labels are needed next to the"
            " images; where there are none, pass labels=False"
        )
    for key, value in inputs.items():
        if not isinstance(value, Tensor):
            raise InputTypeError(f"{key} of a batch must be a tensor, got {type(value).__name__}")
    targets = torch.as_tensor(labels) if labelled else None
    return inputs, targets, None if index is None else torch.as_tensor(index)


def _exit_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    exits = model(**inputs, output_all_exits=True).exit_logits
    return torch.stack([logits.float() for logits in exits]).cpu()


def _check_features(layers: Mapping[str, nn.Linear], features: Mapping[str, Tensor], logits: Tensor) -> None:
    """Checks that the layers whose inputs are recorded give the logits of their exits.

    Shape:
        features: (N, D_e) each. logits: (E, N, K).

    Raises:
        ConfigError: One does not.
    """
    for (name, layer), own in zip(layers.items(), logits, strict=True):
        if layer.weight.is_meta or features[name].ndim != 2:
            continue
        bias = None if layer.bias is None else layer.bias.float()
        found = F.linear(features[name].float(), layer.weight.float(), bias).cpu()
        room = 0.03 * float(own.abs().max()) + 1e-6  # of half precision
        if found.shape != own.shape or float((found - own).abs().max()) > room:
            raise ConfigError(
                f"features=True records what the last linear layer of exit {name!r} reads, and that layer"
                " does not give the exit's logits: end in a linear layer that does, or record without features"
            )


def _class_names(model: nn.Module, num_classes: int) -> list[str]:
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    if not id2label:
        return [str(k) for k in range(num_classes)]
    return [str(id2label[k]) for k in sorted(id2label)]
