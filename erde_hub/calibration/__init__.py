"""From records to a model that one can trust: thresholds for a budget or with a guarantee."""

from __future__ import annotations

from ._checks import check_calibration_data
from .choice import ThresholdChoice, attainable_confidence, samples_without_loss
from .thresholds import choose_threshold

__all__ = [
    "ThresholdChoice",
    "attainable_confidence",
    "check_calibration_data",
    "choose_threshold",
    "samples_without_loss",
]
