"""Records as a calibrator sees them."""

from __future__ import annotations

import dataclasses

from erde_hub.calibration import Calibrator, calibrator_name
from erde_hub.errors import RecordsError
from erde_hub.records import ExitRecords


def calibrate_records(records: ExitRecords, calibrator: Calibrator) -> ExitRecords:
    """Returns records whose logits are calibrated; sweeps, metrics and thresholds then describe the calibrated model.

    The cost of each exit includes the calibrator.

    Args:
        records: Raw; with features where the calibrator reads them.
        calibrator: Fitted, on other samples.

    Raises:
        RecordsError: The records are calibrated already, or lack features.
        ShapeError: Another number of exits.
    """
    if "calibrator" in records.info:
        raise RecordsError(f"these records are calibrated already ({records.info['calibrator']}): use the raw ones")
    name = calibrator_name(calibrator) or type(calibrator).__name__
    logits = calibrator.calibrate(records.logits, records.features)
    macs = [macs + own for macs, own in zip(records.cumulative_macs, calibrator.cumulative_macs, strict=True)]
    return dataclasses.replace(records, logits=logits, cumulative_macs=macs, info=records.info | {"calibrator": name})
