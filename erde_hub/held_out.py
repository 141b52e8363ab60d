"""What records must be before anything is fitted on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from erde_hub.errors import DataError

if TYPE_CHECKING:
    from erde_hub.evaluation import ExitRecords

#: Fewest calibration samples; below, no number means anything.
MIN_SAMPLES = 20
#: Samples that were trained on which a message names.
_NAMED = 5


def check_calibration_data(
    records: ExitRecords, training_index: Any | None = None, allow_missing_classes: bool = False
) -> None:
    """Refuses records that nothing that reads classes should be fitted on.

    Raises:
        ConfigError: They are of a regression.
        DataError: They overlap training data, are fewer than ``MIN_SAMPLES``, or lack a class.
    """
    records.require_classes("a calibrator, a threshold search or a policy for classes")
    check_held_out(records, training_index)
    counts = torch.bincount(records.labels, minlength=records.num_classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing and not allow_missing_classes:
        raise DataError(
            f"the class {records.class_names[missing[0]]!r} has no sample"
            f"{f' ({len(missing)} of {records.num_classes} have none)' if len(missing) > 1 else ''}: collect more, or"
            " pass allow_missing_classes=True"
        )


def check_held_out(records: ExitRecords, training_index: Any | None = None) -> None:
    """Refuses records that nothing should be fitted on, whatever they hold.

    Args:
        records: Of classes or real numbers.
        training_index: Numbers of the samples that were trained on, where known.

    Raises:
        DataError: They overlap training data, or are fewer than ``MIN_SAMPLES``.
    """
    if records.info.get("split") == "train":
        raise DataError(
            "these records are of the training split, on which exits look better than they are: collect them on"
            " validation images"
        )
    if training_index is not None:
        seen = torch.isin(records.index, torch.as_tensor(training_index, dtype=torch.int64))
        if seen.any():
            first = records.index[seen][:_NAMED].tolist()
            more = ", ..." if int(seen.sum()) > len(first) else ""
            raise DataError(
                f"{int(seen.sum())} of {records.num_samples} samples were trained on (index"
                f" {', '.join(map(str, first))}{more}): leave them out of the data, or with records.select(...)"
            )
    if records.num_samples < MIN_SAMPLES:
        raise DataError(f"{records.num_samples} samples are too few to calibrate on: at least {MIN_SAMPLES} are needed")
