"""What a file says of itself, in the metadata of the ONNX format: strings by name, each a JSON value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from erde_hub._arguments import plain_threshold
from erde_hub.errors import CheckpointError, ThresholdError
from erde_hub.preprocessing import check_preprocessing
from erde_hub.stored_sets import StoredSets

#: Characters of a name.
_LONGEST_TEXT = 1000
_TEXT_INPUTS = (("input_ids", "attention_mask"), ("input_ids", "attention_mask", "token_type_ids"))


@dataclass(frozen=True)
class FileInfo:
    """The part of a config that a runtime needs.

    Attributes:
        erde_hub_version: Version that wrote the file.
        policy: Key of the policies table.
        threshold: The model's stored threshold, one number per early exit.
        threshold_range: Smallest and largest threshold that the policy takes.
        exit_names: Shallow to deep, classifier last.
        cumulative_macs: MACs per sample of what leaves at each exit.
        id2label: Class names.
        input_size: Shape of one input without the batch; of texts the number of tokens that costs are counted at.
        preprocessing: ``mean, std, size, interpolation, crop_pct`` of images, None where the model has none.
        prediction_sets: The model's stored sets, None where it has none.
        quantization: ``"int8"``, or None for float.
        input_names: Inputs of the graph, ``threshold`` aside.
        batch_size: 1 where nothing in the file has another shape than for one sample, texts being as long as
            ``input_size`` says; None for batches of any size.
        max_length: Most tokens of a text, None where any number.
        vocab_size: Number of tokens that a text model knows.
        pad_token_id: The one that shorter texts are padded with.
        tokenizer: The text of a ``tokenizer.json`` with truncation and padding, None where the file has none.
    """

    erde_hub_version: str
    policy: str
    threshold: list[float]
    threshold_range: list[float]
    exit_names: list[str]
    cumulative_macs: list[int]
    id2label: dict[int, str]
    input_size: list[int]
    preprocessing: dict[str, Any] | None = None
    prediction_sets: StoredSets | None = None
    quantization: str | None = None
    input_names: tuple[str, ...] = ("pixel_values",)
    batch_size: int | None = None
    max_length: int | None = None
    vocab_size: int | None = None
    pad_token_id: int | None = None
    tokenizer: str | None = field(default=None, repr=False)

    @property
    def reads_texts(self) -> bool:
        """Whether the file takes token ids."""
        return self.input_names[0] == "input_ids"

    @property
    def num_early_exits(self) -> int:
        """Number of exits before the classifier."""
        return len(self.exit_names) - 1

    def check_threshold(self, threshold: Any) -> list[float]:
        """Returns one number per early exit.

        Raises:
            ThresholdError: NaN, out of the policy's range, or of the wrong length.
        """
        plain, early = plain_threshold(threshold), self.num_early_exits
        values: list[float] = plain if isinstance(plain, list) else [plain] * early
        if len(values) != early:
            raise ThresholdError(f"got {len(values)} thresholds for {early} early exits: give one number, or {early}")
        low, high = self.threshold_range
        for value in values:
            if math.isnan(value) or not low <= value <= high:
                raise ThresholdError(
                    f"threshold {value!r} is not allowed for policy {self.policy!r}: give a number in"
                    f" [{low:g}, {high:g}]"
                )
        return values

    def to_metadata(self) -> dict[str, str]:
        """Returns what the file stores."""
        return {name: json.dumps(_finite(value), allow_nan=False) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: str) -> FileInfo:
        """Reads what a file stores.

        Args:
            metadata: Strings by name; names that this version does not know are left alone.
            source: The file, for the message.

        Raises:
            CheckpointError: Not written by erde_hub, or damaged.
        """
        fields = dataclasses.fields(cls)
        missing = [f.name for f in fields if f.name not in metadata and f.default is dataclasses.MISSING]
        if missing:
            raise CheckpointError(
                f"{source} was not written by erde_hub: its metadata lack {', '.join(missing)}; write it with"
                " erde_hub.export.export_onnx(model, path)"
            )
        try:
            values = {f.name: json.loads(metadata[f.name]) for f in fields if f.name in metadata}
            values["threshold"] = [float(t) for t in values["threshold"]]
            values["threshold_range"] = [float(t) for t in values["threshold_range"]]
            values["input_names"] = tuple(values.get("input_names", cls.input_names))
            values["id2label"] = {int(i): str(label) for i, label in values["id2label"].items()}
            if values.get("preprocessing") is not None:
                values["preprocessing"] = check_preprocessing(values["preprocessing"])
            if values.get("prediction_sets") is not None:
                values["prediction_sets"] = StoredSets.from_dict(values["prediction_sets"], len(values["exit_names"]))
            info = cls(**values)
            wrong = info._wrong_field()
        except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"the metadata of {source} are damaged ({error}): export the model again") from error
        if wrong is not None:
            raise CheckpointError(
                f"the metadata of {source} are damaged ({wrong}={getattr(info, wrong)!r:.200}): export the model again"
            )
        return info

    def _wrong_field(self) -> str | None:
        """Name of a field that has no value which an export writes, or that contradicts another one."""
        low, high = self.threshold_range
        exits, macs, size, prepared = self.exit_names, self.cumulative_macs, self.input_size, self.preprocessing
        texts = self.input_names in _TEXT_INPUTS
        right = {
            "erde_hub_version": _is_text(self.erde_hub_version),
            "policy": _is_text(self.policy),
            "threshold_range": low <= high,
            "exit_names": isinstance(exits, list) and all(map(_is_text, exits)) and 1 < len({*exits}) == len(exits),
            "threshold": len(self.threshold) == len(exits) - 1 and all(low <= t <= high for t in self.threshold),
            "cumulative_macs": _are_integers(macs, 0) and len(macs) == len(exits) and sorted(macs) == macs,
            "id2label": len(self.id2label) > 1 and sorted(self.id2label) == [*range(len(self.id2label))],
            "input_size": _are_integers(size, 1),
            "preprocessing": prepared is None or [len(prepared["mean"]), *prepared["size"]] == size,
            "quantization": self.quantization in (None, "int8"),
            "input_names": texts or self.input_names == ("pixel_values",),
            "batch_size": self.batch_size is None or (type(self.batch_size) is int and self.batch_size == 1),
            "max_length": self.max_length is None or (texts and _are_integers([self.max_length], 1)),
            "vocab_size": _are_integers([self.vocab_size], 1) if texts else self.vocab_size is None,
            "pad_token_id": _are_integers([self.pad_token_id], 0) if texts else self.pad_token_id is None,
            "tokenizer": self.tokenizer is None or (texts and isinstance(self.tokenizer, str)),
        }
        return next((name for name, is_right in right.items() if not is_right), None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_TEXT


def _are_integers(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value < 2**63 for value in values)


def _finite(value: Any) -> Any:
    """JSON has no infinity, and readers in other languages refuse Python's spelling: ``"inf"`` stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return value
