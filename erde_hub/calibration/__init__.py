"""From records to a model that one can trust: calibrated probabilities, and thresholds for a budget or a guarantee."""

from __future__ import annotations

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install
from erde_hub._registry import Registry
from erde_hub.records import check_calibration_data

from .base import Calibrator
from .choice import ThresholdChoice, attainable_confidence, samples_without_loss
from .laplace import LaplaceCalibrator
from .mie import MIECalibrator
from .temperature import TemperatureCalibrator
from .thresholds import choose_threshold

__all__ = [
    "Calibrator",
    "LaplaceCalibrator",
    "MIECalibrator",
    "TemperatureCalibrator",
    "ThresholdChoice",
    "attainable_confidence",
    "calibrator_name",
    "check_calibration_data",
    "choose_threshold",
    "create_calibrator",
    "get_calibrator",
    "list_calibrators",
    "register_calibrator",
    "samples_without_loss",
]

_CALIBRATORS: Registry[Calibrator] = Registry("calibrator")
register_calibrator = _CALIBRATORS.register
create_calibrator = _CALIBRATORS.create
get_calibrator = _CALIBRATORS.get
list_calibrators = _CALIBRATORS.names

register_calibrator("temperature", TemperatureCalibrator, "one temperature per exit", "arXiv 1706.04599")
register_calibrator("mie", MIECalibrator, "cost-weighted ensemble of the exits so far", "arXiv 2302.06359")
register_calibrator("laplace", LaplaceCalibrator, "last-layer Laplace, also as an ensemble", "arXiv 2302.06359")


def calibrator_name(calibrator: Calibrator) -> str | None:
    """Returns the name of a calibrator in the table, None for a class that is not in it."""
    return next((entry.name for entry in _CALIBRATORS.entries() if entry.cls is type(calibrator)), None)
