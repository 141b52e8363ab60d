"""What the scripts share: data, networks, training that resumes, and the report of a run.

A run is a folder. Its files say how far it came, so every step asks the folder first: a finished network is loaded, an
unfinished training is resumed, a report that is missing or half written is made again.
"""

from __future__ import annotations

from .default_threshold import GIVEN_THRESHOLD, THRESHOLD_RULE, choose_default_threshold, store_default_threshold
from .messages import (
    configure_logging,
    describe_data,
    describe_load,
    describe_networks,
    format_results,
    how_to_load,
    run_name,
    settings_dict,
)
from .networks import (
    add_exits,
    build_model,
    build_student,
    check_architecture,
    create_backbone,
    existing_preprocessing,
    load_model,
    preprocessing_of,
    pretrained_preprocessing,
)
from .own_network import fit_classifier, inputs_of, open_network
from .phases import (
    Interrupted,
    Run,
    check_measurable,
    check_trainable,
    collect,
    finished,
    finished_before,
    groups_of,
    load_data,
    load_data_of,
    train_network,
)
from .reporting import draw_figures, draw_sets, report, write_report
from .run_data import extend_fitted_on, is_other_data, rows_fitted_on, rows_trained_on, save_fitted_on
from .teacher import TeacherPlan, train_static_student

__all__ = [
    "GIVEN_THRESHOLD",
    "THRESHOLD_RULE",
    "Interrupted",
    "Run",
    "TeacherPlan",
    "add_exits",
    "build_model",
    "build_student",
    "check_architecture",
    "check_measurable",
    "check_trainable",
    "choose_default_threshold",
    "collect",
    "configure_logging",
    "create_backbone",
    "describe_data",
    "describe_load",
    "describe_networks",
    "draw_figures",
    "draw_sets",
    "existing_preprocessing",
    "extend_fitted_on",
    "finished",
    "finished_before",
    "fit_classifier",
    "format_results",
    "groups_of",
    "how_to_load",
    "inputs_of",
    "is_other_data",
    "load_data",
    "load_data_of",
    "load_model",
    "open_network",
    "preprocessing_of",
    "pretrained_preprocessing",
    "report",
    "rows_fitted_on",
    "rows_trained_on",
    "run_name",
    "save_fitted_on",
    "settings_dict",
    "store_default_threshold",
    "train_network",
    "train_static_student",
    "write_report",
]
