"""Sets of predictions with a stated error rate, nested over the exits, for classes and for real numbers.

An anytime-valid confidence sequence (AVCS) may be read at whichever exit a sample takes: the sets of all exits hold
the truth at once with probability 1 - alpha, under the model's own uncertainty, and later sets lie inside earlier ones.
Split conformal sets hold it at one exit that is fixed beforehand, with a guarantee that needs no model.
"""

from __future__ import annotations

from erde_hub import _needs_torch  # noqa: F401 - without it, an error that says what to install
from erde_hub.stored_sets import StoredSets

from .base import SetMetrics
from .classes import (
    AVCSClassifier,
    ConformalClassifier,
    avcs_ratios,
    avcs_sets,
    concentrations,
    dirichlet_draws,
    probability_before,
    running_intersection,
    search_relu_thresholds,
    set_metrics,
)
from .intervals import (
    BayesianLinearRegression,
    ConformalRegressor,
    avcs_quadratics,
    avcs_terms,
    draw_weights,
    intersect_intervals,
    interval_metrics,
    solve_intervals,
    with_constant,
)

__all__ = [
    "AVCSClassifier",
    "BayesianLinearRegression",
    "ConformalClassifier",
    "ConformalRegressor",
    "SetMetrics",
    "StoredSets",
    "avcs_quadratics",
    "avcs_ratios",
    "avcs_sets",
    "avcs_terms",
    "concentrations",
    "dirichlet_draws",
    "draw_weights",
    "intersect_intervals",
    "interval_metrics",
    "probability_before",
    "running_intersection",
    "search_relu_thresholds",
    "set_metrics",
    "solve_intervals",
    "with_constant",
]
