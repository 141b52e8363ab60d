"""What records must be before anything is fitted on them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erde_hub._arguments import check_flag
from erde_hub.errors import DataError, InputTypeError, unknown_argument

if TYPE_CHECKING:
    from erde_hub.evaluation import ExitRecords

#: Fewest calibration samples; below, no number means anything.
MIN_SAMPLES = 20
#: Samples that were trained on which a message names.
_NAMED = 5


def check_kind(records: object, name: str = "records") -> None:
    """Raises :class:`InputTypeError` where something else is given for records, such as the path of their file."""
    if not hasattr(records, "require_classes"):
        raise InputTypeError(
            f"{name} must be ExitRecords, as collect_exit_records and ExitRecords.load return them, got {records!r:.80}"
        )


def check_fit_data(fit: Callable[..., Any], records: ExitRecords, checks: Mapping[str, Any]) -> None:
    """Calls :func:`check_calibration_data` with what a fit takes for it in ``**checks``.

    Raises:
        UnknownArgumentError: The fit takes no such argument.
    """
    allowed = list(inspect.signature(check_calibration_data).parameters)[1:]
    own = [name for name in inspect.signature(fit).parameters if name not in ("records", "checks")]
    for name in checks:
        if name not in allowed:
            raise unknown_argument(fit.__qualname__, name, [*own, *allowed])
    check_calibration_data(records, **checks)


def check_calibration_data(
    records: ExitRecords, training_index: Any | None = None, allow_missing_classes: bool = False
) -> None:
    """Refuses records that nothing that reads classes should be fitted on.

    Raises:
        ConfigError: They are of a regression.
        DataError: They overlap training data, are fewer than ``MIN_SAMPLES``, or lack a class.
        InputTypeError: They are no records, or ``training_index`` does not hold whole numbers.
    """
    check_kind(records)
    check_flag("allow_missing_classes", allow_missing_classes)
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
                f" {', '.join(map(str, first))}{more}): leave them out of the data, or with records.select(...)"
            )
    if records.num_samples < MIN_SAMPLES:
        raise DataError(f"{records.num_samples} samples are too few to calibrate on: at least {MIN_SAMPLES} are needed")


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
