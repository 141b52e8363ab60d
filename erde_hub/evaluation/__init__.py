"""Records of all exits, and everything that is computed from them: metrics, sweeps, figures, reports."""

from __future__ import annotations

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install
from erde_hub.fingerprint import model_fingerprint
from erde_hub.records import ExitRecords

from .calibrated import calibrate_records
from .collecting import collect_exit_records
from .curve import CurveArea, area_difference, curve_area, lowest_cost
from .drift import Drift, check_records_of, compare_records
from .groups import group_accuracies, group_metrics, slice_metrics
from .metrics import calibration_error, exit_metrics
from .plots import plot_curves, plot_frontier
from .ranking import aurc, auroc, eefp
from .report import build_results, describe_data, describe_model
from .results_file import load_results, save_results, validate_results
from .set_plots import plot_sets, set_curves
from .sweep import (
    accuracy_at_cost,
    default_thresholds,
    exit_scores,
    fine_thresholds,
    pareto_front,
    per_exit_metrics,
    route_records,
    sweep_thresholds,
    write_sweep_csv,
)
from .widths import regression_per_exit, sweep_widths

__all__ = [
    "CurveArea",
    "Drift",
    "ExitRecords",
    "accuracy_at_cost",
    "area_difference",
    "aurc",
    "auroc",
    "build_results",
    "calibrate_records",
    "calibration_error",
    "check_records_of",
    "collect_exit_records",
    "compare_records",
    "curve_area",
    "default_thresholds",
    "describe_data",
    "describe_model",
    "eefp",
    "exit_metrics",
    "exit_scores",
    "fine_thresholds",
    "group_accuracies",
    "group_metrics",
    "load_results",
    "lowest_cost",
    "model_fingerprint",
    "pareto_front",
    "per_exit_metrics",
    "plot_curves",
    "plot_frontier",
    "plot_sets",
    "regression_per_exit",
    "route_records",
    "save_results",
    "set_curves",
    "slice_metrics",
    "sweep_thresholds",
    "sweep_widths",
    "validate_results",
    "write_sweep_csv",
]
