"""Every exit's logits on a data set, collected once and read by everything else.

Calibrators, policies, threshold searches, sweeps and figures are functions of these records and need no network.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._arguments import check_flag
from ._files import replacing
from ._tables import html_table
from .errors import (
    ConfigError,
    DataError,
    InputTypeError,
    MissingDependencyError,
    RecordsError,
    RepeatedSamplesWarning,
    ShapeError,
    unknown_argument,
    unknown_name,
)
from .tasks import REGRESSION, check_class_labels, check_targets, refuse_regression

#: Fewest calibration samples; below, no number means anything.
MIN_SAMPLES = 20
#: Label of samples without one.
UNLABELLED = -100
#: Samples that a message names.
_NAMED = 5
#: Numbers, and rows, that are computed with at a time, so that a large set needs no second copy of itself.
_CELLS, _ROWS = 1 << 22, 8192


@dataclass(frozen=True, eq=False)
class ExitRecords:
    """Logits of every exit on a data set, with all that later steps need to know about them.

    Attributes:
        logits: Raw logits, shallow to deep; the last exit is the backbone's own classifier. float32 on the CPU.
        labels: Class indices; real numbers where ``problem_type`` is ``"regression"``. None, or -100 for every sample,
            where samples of classes have no labels; these are then -100.
        index: Stable sample index within the data set and split, so that overlaps with other records can be found.
        exit_names: One per exit.
        cumulative_macs: Multiply-accumulates per sample up to and including each exit, heads on the way included.
        class_names: One per class, or target.
        fingerprint: Hash of the weights that gave the logits; empty where unknown.
        features: The input of each exit's last linear layer, where asked for; widths differ between exits.
        info: Notes of the caller, such as the data set's name, fingerprint and split.
        problem_type: ``"regression"`` where ``logits`` are real numbers; None for classes.

    Shape:
        logits: (E, N, K). labels, index: (N,); labels of a regression: (N, K). features: E tensors (N, D_e).

    Raises:
        ShapeError: Shapes or lengths disagree, or there is no exit, no sample or no class.
        InputTypeError: Logits are not floating point, or labels (unless of a regression) or indices not integers.
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
    problem_type: str | None = None

    FORMAT: ClassVar[str] = "erde_hub.exit_records/1"

    def __post_init__(self) -> None:
        logits, index = self.logits, self.index
        labels = self.labels
        if logits.ndim != 3 or 0 in logits.shape:
            raise ShapeError(f"logits must be (exits, samples, classes), none of them 0, got {tuple(logits.shape)}")
        exits, samples, classes = logits.shape
        if self.problem_type not in (None, REGRESSION):
            raise unknown_name("problem_type", self.problem_type, [REGRESSION])
        regression = self.problem_type == REGRESSION
        if labels is None and not regression:
            labels = torch.full((samples,), UNLABELLED)
        if not logits.is_floating_point():
            raise InputTypeError(f"logits must be floating point, got {logits.dtype}")
        for name, values in (("index", index),) if regression else (("labels", labels), ("index", index)):
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
        if regression:
            labels = check_targets(labels, samples, classes)
        else:
            if not bool((labels == UNLABELLED).all()):
                check_class_labels(labels, len(labels), classes)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise InputTypeError(f"index must hold integers, got {index.dtype}")
        put = object.__setattr__
        put(self, "logits", logits.detach().to("cpu", torch.float32))
        put(self, "labels", labels.detach().to("cpu", torch.float32 if regression else torch.int64))
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

    @property
    def num_outputs(self) -> int:
        """Number of logits of an exit: classes, or targets of a regression."""
        return self.logits.shape[2]

    @property
    def labelled(self) -> bool:
        """The samples have labels."""
        return self.problem_type == REGRESSION or bool((self.labels != UNLABELLED).any())

    @cached_property
    def equal_rows(self) -> int:
        """Number of samples whose logits of all exits are exactly those of another sample."""
        return self.num_samples - len(_row_hashes(self.logits).unique())

    def require_classes(self, what: str, labels: bool = True) -> None:
        """Checks that ``what`` can read probabilities and, unless ``labels`` is False, labels off these records.

        Raises:
            ConfigError: The records are of a regression.
            RecordsError: The samples have no labels.
        """
        refuse_regression(self.problem_type, what, "use sweep_widths, IntervalWidthPolicy or ConformalRegressor")
        if labels and not self.labelled:
            raise RecordsError(f"{what} needs labels, these records have none: collect them on labelled samples")

    def require_regression(self, what: str) -> None:
        """Raises :class:`~erde_hub.errors.ConfigError` where ``what`` would take classes for real numbers."""
        if self.problem_type != REGRESSION:
            raise ConfigError(
                f"{what} is for real numbers, these records are of {self.num_classes} classes: collect those of a model"
                " with problem_type='regression'"
            )

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        kind = "targets" if self.problem_type == REGRESSION else "classes"
        return (
            f"ExitRecords({self.num_samples} samples, {self.num_classes} {kind}, exits {', '.join(self.exit_names)}"
            f"{'' if self.features is None else ', with features'})"
        )

    def _repr_html_(self) -> str:
        rows = [(name, f"{macs / 1e6:.1f}") for name, macs in zip(self.exit_names, self.cumulative_macs, strict=True)]
        return html_table(("exit", "MMACs"), rows, repr(self))

    def to_pandas(self) -> Any:
        """Returns a ``pandas.DataFrame`` with one row per sample and exit, exit by exit.

        Columns are ``index``, ``exit``, ``exit_index`` and ``macs``. Of classes also ``label`` and ``correct`` (absent
        without labels), ``prediction``, ``confidence`` (the largest probability) and ``entropy`` in nats; of a
        regression ``label_0``, ``output_0`` and so on, one per target.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas as pd  # noqa: PLC0415 - nothing else needs it
        except ImportError as error:
            raise MissingDependencyError("to_pandas needs pandas: install it with `pip install pandas`") from error
        frames = []
        for e, logits in enumerate(self.logits):
            columns: dict[str, Any] = {"index": self.index, "exit": self.exit_names[e], "exit_index": e}
            columns["macs"] = self.cumulative_macs[e]
            if self.problem_type == REGRESSION:
                columns |= {f"label_{d}": values for d, values in enumerate(self.labels.T)}
                columns |= {f"output_{d}": values for d, values in enumerate(logits.T)}
            else:
                columns["prediction"] = logits.argmax(-1)
                if self.labelled:
                    columns |= {"label": self.labels, "correct": columns["prediction"] == self.labels}
                parts = [logits[rows].log_softmax(-1) for rows in row_chunks(*logits.shape)]
                columns["confidence"] = torch.cat([part.amax(-1).exp() for part in parts])
                columns["entropy"] = torch.cat([torch.special.entr(part.exp()).sum(-1) for part in parts])
            frames.append(pd.DataFrame({key: v.numpy() if isinstance(v, Tensor) else v for key, v in columns.items()}))
        return pd.concat(frames, ignore_index=True)

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
            problem_type=self.problem_type,
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
            "problem_type": self.problem_type,
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
                problem_type=facts.get("problem_type"),
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


def check_kind(records: object, name: str = "records") -> None:
    """Raises :class:`InputTypeError` where something else is given for records, such as the path of their file."""
    if not hasattr(records, "require_classes"):
        raise InputTypeError(
            f"{name} must be ExitRecords, as collect_exit_records and ExitRecords.load return them, got {records!r:.80}"
        )


def row_chunks(samples: int, width: int) -> Iterator[slice]:
    """Yields slices of rows that hold a few million numbers at most, of ``width`` numbers a row."""
    size = max(1, min(_ROWS, _CELLS // max(width, 1)))
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def check_fit_data(fit: Callable[..., Any], records: ExitRecords, checks: Mapping[str, Any]) -> ExitRecords:
    """Calls :func:`check_calibration_data` with the arguments in ``**checks`` of a fit, and returns its records.

    Raises:
        UnknownArgumentError: The fit takes no such argument.
    """
    allowed = list(inspect.signature(check_calibration_data).parameters)[1:]
    own = [name for name in inspect.signature(fit).parameters if name not in ("records", "checks")]
    for name in checks:
        if name not in allowed:
            raise unknown_argument(fit.__qualname__, name, [*own, *allowed])
    return check_calibration_data(records, **checks)


def check_calibration_data(
    records: ExitRecords, training_index: Any | None = None, allow_missing_classes: bool = False
) -> ExitRecords:
    """Checks that records of classes are suitable for a fit: held out, large enough, all classes present.

    Returns:
        The records with each sample index once, see :func:`distinct_samples`.

    Raises:
        ConfigError: They are of a regression.
        DataError: They overlap training data, are fewer than ``MIN_SAMPLES``, or lack a class.
        InputTypeError: They are no records, or ``training_index`` does not hold whole numbers.
    """
    check_kind(records)
    check_flag("allow_missing_classes", allow_missing_classes)
    records.require_classes("a calibrator, a threshold search or a policy for classes")
    records = check_held_out(records, training_index)
    counts = torch.bincount(records.labels, minlength=records.num_classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing and not allow_missing_classes:
        raise DataError(
            f"the class {records.class_names[missing[0]]!r} has no sample"
            f"{f' ({len(missing)} of {records.num_classes} have none)' if len(missing) > 1 else ''}: collect more, or"
            " pass allow_missing_classes=True"
        )
    return records


def check_held_out(records: ExitRecords, training_index: Any | None = None) -> ExitRecords:
    """Checks that records, of classes or real numbers, are held out and large enough for a fit.

    Args:
        records: Of classes or real numbers.
        training_index: Numbers of the samples that were trained on, where known.

    Returns:
        The records with each sample index once, see :func:`distinct_samples`.

    Raises:
        DataError: They overlap training data, or are fewer than ``MIN_SAMPLES``.
        InputTypeError: They are no records, or ``training_index`` does not hold whole numbers.
    """
    check_kind(records)
    if records.info.get("split") == "train":
        raise DataError(
            "these records are of the training split, on which exits look better than they are: collect them on"
            " validation images"
        )
    if training_index is not None:
        seen = torch.isin(records.index, _sample_numbers(training_index))
        if seen.any():
            first = records.index[seen][:_NAMED].tolist()
            more = ", ..." if int(seen.sum()) > len(first) else ""
            raise DataError(
                f"{int(seen.sum())} of {records.num_samples} samples were trained on (index"
                f" {', '.join(map(str, first))}{more}): remove them from the data, or with records.select(...)"
            )
    records = distinct_samples(records)
    if records.num_samples < MIN_SAMPLES:
        raise DataError(
            f"{records.num_samples} samples are too few to calibrate on: at least {MIN_SAMPLES} are needed; give the"
            " data set a validation split of its own, or more samples, of which a tenth is held out"
        )
    return records


def distinct_samples(records: ExitRecords) -> ExitRecords:
    """Returns records with each sample index once: copies of a sample are no independent samples.

    The first row of each index is kept, and a :class:`~erde_hub.errors.RepeatedSamplesWarning` gives the number of the
    others. Rows with equal logits under different indices are kept: they may be copies, or different samples that look
    alike to the model; the warning gives their number too.
    """
    order = records.index.argsort(stable=True)
    ordered = records.index[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    repeated = records.num_samples - int(first.sum())
    if repeated:
        index = [int(i) for i in ordered[~first].unique()[:_NAMED]]
        warnings.warn(
            f"{repeated} of {records.num_samples} rows repeat a sample index (such as {', '.join(map(str, index))}):"
            f" each sample counts once, so that {int(first.sum())} are used",
            RepeatedSamplesWarning,
            stacklevel=3,
        )
        records = records.select(order[first].sort().values)
    if records.equal_rows:
        warnings.warn(
            f"{records.equal_rows} of {records.num_samples} samples have exactly the logits of another sample under a"
            " different index: if they are copies, they count more than once, and guarantees look better than they are",
            RepeatedSamplesWarning,
            stacklevel=3,
        )
    return records


def _row_hashes(logits: Tensor) -> Tensor:
    """Returns one integer per sample, equal for equal float32 logits of all exits: (E, N, K) to (N,) int64."""
    exits, samples, classes = logits.shape
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (exits, 1, classes), generator=generator) * 2 + 1
    parts = []
    for rows in row_chunks(samples, exits * classes):
        bits = logits[:, rows].contiguous().view(torch.int32).long()
        parts.append((bits * factors).sum((0, 2)))  # integers wrap around, so that the order of the sum is immaterial
    return torch.cat(parts)


def _sample_numbers(training_index: Any) -> Tensor:
    found = None
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.as_tensor(training_index).cpu()
    mask = found is not None and found.dtype == torch.bool
    if found is None or (len(found.flatten()) and (mask or found.is_floating_point() or found.is_complex())):
        raise InputTypeError(
            f"training_index must hold the numbers of samples, such as [0, 5, 17], got {training_index!r:.80}"
            f"{'; of a mask take mask.nonzero()' if mask else ''}"
        )
    return found.long()
