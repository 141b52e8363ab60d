"""What a file says of itself, in the metadata of the ONNX format: strings by name, each a JSON value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erde_hub.errors import CheckpointError


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
        input_size: Shape of one input without the batch.
        preprocessing: ``mean, std, size, interpolation, crop_pct`` of images, None where the model has none.
        quantization: ``"int8"``, or None for float.
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
    quantization: str | None = None

    @property
    def num_early_exits(self) -> int:
        """Number of exits before the classifier."""
        return len(self.exit_names) - 1

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
            values["id2label"] = {int(i): str(label) for i, label in values["id2label"].items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the metadata of {source} are damaged ({error}): export the model again") from error
        return cls(**values)


def _finite(value: Any) -> Any:
    """JSON has no infinity, and readers in other languages refuse Python's spelling: ``"inf"`` stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return value
