"""Every exit's logits on a data set, collected once and read by everything else.

Calibrators, policies, threshold searches, sweeps and pictures are functions of these records and need no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from erde_hub._files import replacing
from erde_hub.errors import ConfigError, DataError, InputTypeError, RecordsError, ShapeError
from erde_hub.fitted import last_linears

from .metrics import check_labels

#: Keyword inputs of the model that batches may hold; everything else in a batch is left alone.
_INPUTS = ("pixel_values", "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_IMAGES = ("image", "images", "img", "x", "inputs")
_LABELS = ("labels", "label", "targets", "target", "y")
_INDICES = ("index", "idx", "indices")

#: Parts of a model that read the logits and do not change them: records stay valid when these are fitted later.
_READERS = ("policy", "calibrator")


@dataclass(frozen=True, eq=False)
class ExitRecords:
    """Logits of every exit on a data set, with all that later steps need to know about them.

    Attributes:
        logits: Raw logits, shallow to deep; the last exit is the backbone's own classifier. float32 on the CPU.
        labels: Class indices.
        index: Stable sample index within the data set and split, so that overlaps with other records can be found.
        exit_names: One per exit.
        cumulative_macs: Multiply-accumulates per sample up to and including each exit, heads on the way included.
        class_names: One per class.
        fingerprint: Hash of the weights that gave the logits; empty where unknown.
        features: The input of each exit's last linear layer, where asked for; widths differ between exits.
        info: Notes of the caller, such as the data set's name, fingerprint and split.

    Shape:
        logits: (E, N, K). labels, index: (N,). features: E tensors (N, D_e).

    Raises:
        ShapeError: Shapes or lengths disagree, or there is no exit, no sample or no class.
        InputTypeError: Logits are not floating point, or labels or indices not integers.
        LabelError: A label lies outside the classes.
        RecordsError: A logit or feature is NaN or infinite (the message names exit and row), or costs are negative or
            fall with depth.
    """

    logits: Tensor
    labels: Tensor
    index: Tensor
    exit_names: list[str]
    cumulative_macs: list[int]
    class_names: list[str]
    fingerprint: str = ""
    features: list[Tensor] | None = None
    info: dict[str, str] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "erde_hub.exit_records/1"

    def __post_init__(self) -> None:
        logits, labels, index = self.logits, self.labels, self.index
        if logits.ndim != 3 or 0 in logits.shape:
            raise ShapeError(f"logits must be (exits, samples, classes), none of them 0, got {tuple(logits.shape)}")
        exits, samples, classes = logits.shape
        if not logits.is_floating_point():
            raise InputTypeError(f"logits must be floating point, got {logits.dtype}")
        for name, values in (("labels", labels), ("index", index)):
            if tuple(values.shape) != (samples,):
                raise ShapeError(f"{name} must be ({samples},) as the logits have it, got {tuple(values.shape)}")
        for name, count, length in (
            ("exit_names", len(self.exit_names), exits),
            ("cumulative_macs", len(self.cumulative_macs), exits),
            ("class_names", len(self.class_names), classes),
            ("features", exits if self.features is None else len(self.features), exits),
        ):
            if count != length:
                raise ShapeError(f"{name} has {count} entries, the logits {tuple(logits.shape)} need {length}")
        check_labels(labels, classes)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise InputTypeError(f"index must hold integers, got {index.dtype}")
        put = object.__setattr__
        put(self, "logits", logits.detach().to("cpu", torch.float32))
        put(self, "labels", labels.detach().to("cpu", torch.int64))
        put(self, "index", index.detach().to("cpu", torch.int64))
        put(self, "exit_names", [str(name) for name in self.exit_names])
        put(self, "class_names", [str(name) for name in self.class_names])
        put(self, "cumulative_macs", [int(macs) for macs in self.cumulative_macs])
        put(self, "info", {str(key): str(value) for key, value in self.info.items()})
        if self.features is not None:
            put(self, "features", [f.detach().to("cpu", torch.float32) for f in self.features])
        macs = self.cumulative_macs
        if macs[0] < 0 or any(later < earlier for earlier, later in pairwise(macs)):
            raise RecordsError(f"cumulative_macs must not be negative nor fall with depth, got {macs}")
        for e, name in enumerate(self.exit_names):
            _check_finite("logits", name, self.logits[e], self.index)
            if self.features is not None:
                if self.features[e].ndim != 2 or len(self.features[e]) != samples:
                    raise ShapeError(
                        f"features of exit {name!r} must be ({samples}, width), got {tuple(self.features[e].shape)}"
                    )
                _check_finite("features", name, self.features[e], self.index)

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return self.logits.shape[0]

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.logits.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.logits.shape[2]

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return (
            f"ExitRecords({self.num_samples} samples, {self.num_classes} classes, exits {', '.join(self.exit_names)}"
            f"{'' if self.features is None else ', with features'})"
        )

    def select(self, indices: Tensor | Sequence[int]) -> ExitRecords:
        """Returns the records of some rows, in the order given.

        Args:
            indices: Row numbers (not values of ``index``), or a boolean mask (N,).

        Raises:
            InputTypeError: Neither integers nor booleans.
            ShapeError: Not one-dimensional, empty, a mask of another length, or a row that does not exist.
        """
        rows = torch.as_tensor(indices).cpu()
        if rows.dtype == torch.bool:
            if tuple(rows.shape) != (self.num_samples,):
                raise ShapeError(f"a mask must be ({self.num_samples},), got {tuple(rows.shape)}")
            rows = rows.nonzero().squeeze(1)
        if rows.ndim != 1 or len(rows) == 0:
            raise ShapeError(f"select takes at least one row number, in one dimension, got shape {tuple(rows.shape)}")
        if rows.is_floating_point() or rows.is_complex():
            raise InputTypeError(f"select takes row numbers or a boolean mask, got {rows.dtype}")
        rows = rows.long()
        outside = rows[(rows < -self.num_samples) | (rows >= self.num_samples)]
        if len(outside):
            raise ShapeError(f"row {int(outside[0])} does not exist: there are {self.num_samples} samples")
        rows = rows % self.num_samples
        return ExitRecords(
            logits=self.logits[:, rows],
            labels=self.labels[rows],
            index=self.index[rows],
            exit_names=self.exit_names,
            cumulative_macs=self.cumulative_macs,
            class_names=self.class_names,
            fingerprint=self.fingerprint,
            features=None if self.features is None else [f[rows] for f in self.features],
            info=self.info,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file; an earlier file of that name survives if writing fails.

        Raises:
            CheckpointWriteError: The file cannot be written.
        """
        tensors = {"logits": self.logits, "labels": self.labels, "index": self.index}
        tensors.update({f"features.{e}": f for e, f in enumerate(self.features or [])})
        facts = {
            "exit_names": self.exit_names,
            "cumulative_macs": self.cumulative_macs,
            "class_names": self.class_names,
            "fingerprint": self.fingerprint,
            "info": self.info,
        }
        metadata = {"format": self.FORMAT, "records": json.dumps(facts)}
        with replacing(path) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitRecords:
        """Reads what :meth:`save` wrote.

        Raises:
            RecordsError: There is no such file, it is damaged, or it holds something else.
        """
        name = Path(path).name
        if not Path(path).is_file():
            raise RecordsError(f"there are no records at {os.fspath(path)!r}: write them with ExitRecords.save")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != cls.FORMAT:
                    raise RecordsError(
                        f"{name} is a safetensors file of format {metadata.get('format')!r}, not {cls.FORMAT!r}"
                    )
                # A mapped file gives unaligned tensors, which alone changes sums in the last bits: copy.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a dict
            facts = json.loads(metadata["records"])
            features = [tensors[f"features.{e}"] for e in range(sum(key.startswith("features.") for key in tensors))]
            return cls(
                logits=tensors["logits"],
                labels=tensors["labels"],
                index=tensors["index"],
                exit_names=facts["exit_names"],
                cumulative_macs=facts["cumulative_macs"],
                class_names=facts["class_names"],
                fingerprint=facts["fingerprint"],
                features=features or None,
                info=facts["info"],
            )
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise RecordsError(f"{name} is damaged or no file of exit records: {error}") from error


def _check_finite(kind: str, exit_name: str, values: Tensor, index: Tensor) -> None:
    bad = (~values.isfinite()).any(-1).nonzero()
    if len(bad):
        row = int(bad[0])
        raise RecordsError(
            f"{kind} of exit {exit_name!r} are NaN or infinite in row {row} (sample index {int(index[row])}),"
            f" {len(bad)} of {len(values)} rows are affected: look at that sample, or run in float32"
        )


def collect_exit_records(
    model: nn.Module,
    dataloader: Iterable[Any],
    features: bool = False,
    progress: bool = True,
    accelerator: Any | None = None,
    autocast_dtype: torch.dtype | None = None,
    info: Mapping[str, str] | None = None,
) -> ExitRecords:
    """Runs every exit once over a data set.

    The model is put into eval mode for the run; afterwards every module is in the mode it was in before.

    Args:
        model: An :class:`~erde_hub.EarlyExitWrapper`, or a module with ``exit_names``, ``exit_table()`` and
            ``model(pixel_values, output_all_exits=True).exit_logits``; may be inside a distributed wrapper.
        dataloader: Batches are dicts (``pixel_values`` or a column such as ``image``; ``labels``; optionally ``index``)
            or tuples (x, y) and (x, y, index). Without an index, samples are numbered as they come.
        features: Also record the input of each exit's last linear layer.
        progress: Show a progress bar on the main process.
        accelerator: The ``Accelerator`` of a run with several processes, where each sees its share of the data: every
            process returns all records, ordered by index, samples that were seen twice kept once.
        autocast_dtype: Run the model under autocast in this dtype; logits are stored in float32 all the same.
        info: Stored with the records.

    Raises:
        DataError: The loader is empty, a batch has no inputs or no labels, or several processes run without an index.
        InputTypeError: A batch is neither a dict nor a tuple, or labels are not integers.
        ShapeError: The exits disagree with each other, the labels or the class names.
        LabelError: A label lies outside the model's classes.
        RecordsError: A logit is NaN or infinite.
        ConfigError: ``features`` where an exit ends in no linear layer.
    """
    core = _unwrapped(model, accelerator)
    # A distributed wrapper synchronises buffers in every forward, which hangs when processes have unequal numbers of
    # batches; sharded models, on the other hand, only run through their wrapper.
    replicas = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    runner = core if isinstance(model, replicas) else model
    device = next((t.device for t in (*core.parameters(), *core.buffers())), torch.device("cpu"))
    main = accelerator is None or accelerator.is_local_main_process
    cast = torch.autocast(device.type, autocast_dtype) if autocast_dtype is not None else contextlib.nullcontext()
    parts = _Parts()
    taps = last_linears(core) if features else {}
    # Not inference_mode: what a backbone caches in eval mode, or a data set on first use, would be refused by autograd.
    with _evaluating(core), torch.no_grad(), cast, _recording(taps) as seen:
        for batch in tqdm(dataloader, desc="collecting exits", unit="batch", disable=not (progress and main)):
            inputs, labels, index = _read(batch)
            on_device = {key: value.to(device, non_blocking=True) for key, value in inputs.items()}
            seen.clear()
            logits = _exit_logits(runner, on_device)
            missing = [name for name in taps if name not in seen]
            if missing:
                raise ConfigError(f"features=True, but the last linear layer of exit {missing[0]!r} did not run")
            parts.add(logits, labels, index, [seen[name] for name in taps])
    everything = parts.finish(with_features=features, accelerator=accelerator)
    return ExitRecords(
        **everything,
        exit_names=list(core.exit_names),
        cumulative_macs=list(core.exit_table().cumulative_macs),
        class_names=_class_names(core, everything["logits"].shape[-1]),
        fingerprint=model_fingerprint(model, accelerator),
        info=dict(info or {}),
    )


def model_fingerprint(model: nn.Module, accelerator: Any | None = None) -> str:
    """Hashes names, types, shapes and values of a model's weights and buffers.

    Parts that only read the logits (``policy``, ``calibrator``) are left out, so that fitting them on records does not
    make the records foreign. Every process returns the same string.
    """
    several = accelerator is not None and accelerator.num_processes > 1
    state = accelerator.get_state_dict(model) if several and accelerator is not None else model.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if name.split(".", 1)[0] in _READERS or not isinstance(value, Tensor):
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    found = [digest.hexdigest()[:32]]
    if several:
        broadcast_object_list(found)  # a sharded model gives its weights to the main process only
    return found[0]


class _Parts:
    """What one process has seen so far."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.index: list[Tensor] = []
        self.features: list[list[Tensor]] = []
        self.numbered = True  # the loader gave no index, rows are numbered as they come
        self.count = 0

    def add(self, logits: Tensor, labels: Tensor, index: Tensor | None, features: list[Tensor]) -> None:
        samples = logits.shape[1]
        if tuple(labels.shape) != (samples,):
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
        shares = _some(gather_object([found]) if several else [found])
        index = torch.cat([share["index"] for share in shares])
        order = index.argsort(stable=True)
        if several:  # samplers repeat samples so that every process gets the same number
            ordered = index[order]
            order = order[torch.cat([torch.tensor([True]), ordered[1:] != ordered[:-1]])]
        return {
            "logits": torch.cat([share["logits"] for share in shares], 1)[:, order],
            "labels": torch.cat([share["labels"] for share in shares])[order],
            "index": index[order],
            "features": [torch.cat(column)[order] for column in zip(*(s["features"] for s in shares), strict=True)]
            if with_features
            else None,
        }


def _some(shares: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    found = [share for share in shares if share is not None]
    if not found:
        raise DataError("the dataloader gave no samples: check the split and drop_last")
    return found


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenates and lets go of each part on the way, so that the peak stays near one copy."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    joined = parts[0].new_empty(shape)
    start = 0
    for i, part in enumerate(parts):
        joined.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
        parts[i] = part.new_empty(0)
    return joined


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # train() of a module may do more than set a flag: levit drops its caches
            if module.training != training:
                module.train(training)
        for module, training in modes:  # and wakes what was frozen inside it
            module.training = training


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


def _read(batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Splits a batch into model inputs, labels and sample index."""
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
        if label is None:
            raise DataError(f"a batch has no labels among its columns {columns}: call the column 'labels'")
        labels, index = batch[label], None if index_key is None else batch[index_key]
    elif isinstance(batch, (tuple, list)):
        if len(batch) not in (2, 3):
            raise DataError(f"a batch must be (x, y) or (x, y, index), got {len(batch)} parts; are the labels missing?")
        inputs, labels, index = {"pixel_values": batch[0]}, batch[1], batch[2] if len(batch) == 3 else None
    else:
        raise InputTypeError(
            f"a batch must be a dict or a tuple (x, y), got {type(batch).__name__}: labels are needed beside the images"
        )
    for key, value in inputs.items():
        if not isinstance(value, Tensor):
            raise InputTypeError(f"{key} of a batch must be a tensor, got {type(value).__name__}")
    return inputs, torch.as_tensor(labels), None if index is None else torch.as_tensor(index)


def _exit_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    exits = model(**inputs, output_all_exits=True).exit_logits
    return torch.stack([logits.float() for logits in exits]).cpu()


def _class_names(model: nn.Module, num_classes: int) -> list[str]:
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    if not id2label:
        return [str(k) for k in range(num_classes)]
    return [str(id2label[k]) for k in sorted(id2label)]


@contextlib.contextmanager
def _recording(taps: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Stores the input of each layer while the context is open."""
    seen: dict[str, Tensor] = {}

    def store(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach()

        return hook

    handles = [layer.register_forward_pre_hook(store(name)) for name, layer in taps.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
