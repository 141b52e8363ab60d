"""Records of all exits, and everything that is computed from them: metrics, sweeps, pictures, reports."""

from __future__ import annotations

from .metrics import calibration_error, exit_metrics
from .plots import plot_frontier
from .records import ExitRecords, collect_exit_records, model_fingerprint
from .report import (
    build_results,
    describe_data,
    describe_model,
    load_results,
    save_results,
    validate_results,
)
from .sweep import (
    accuracy_at_cost,
    exit_scores,
    fine_thresholds,
    pareto_front,
    per_exit_metrics,
    route_records,
    step_thresholds,
    sweep_thresholds,
    write_sweep_csv,
)

__all__ = [
    "ExitRecords",
    "accuracy_at_cost",
    "build_results",
    "calibration_error",
    "collect_exit_records",
    "describe_data",
    "describe_model",
    "exit_metrics",
    "exit_scores",
    "fine_thresholds",
    "load_results",
    "model_fingerprint",
    "pareto_front",
    "per_exit_metrics",
    "plot_frontier",
    "route_records",
    "save_results",
    "step_thresholds",
    "sweep_thresholds",
    "validate_results",
    "write_sweep_csv",
]
