"""Every error is one of ours and also the builtin that a caller would catch."""

from __future__ import annotations

import inspect

import pytest

from erde_hub import errors
from erde_hub.errors import ErdeError, UnknownNameError, nearest, unknown_name

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, ErdeError) and cls is not ErdeError
]


@pytest.mark.parametrize("cls", CLASSES)
def test_each_also_inherits_a_builtin(cls):
    builtin = [base for base in cls.__mro__ if base.__module__ == "builtins" and base is not object]
    assert set(builtin) - {Exception, BaseException}
    assert cls.__doc__
    assert str(cls("says so")) == "says so"


def test_issue_2s_bad_input_is_a_value_error_or_a_type_error():
    inputs = "ConfigError UnknownNameError ExitPointError ThresholdError ShapeError LabelError RebuildError"
    inputs += " CheckpointError DataError RunExistsError LaunchError CheckpointWriteError"
    for name in inputs.split():
        assert issubclass(getattr(errors, name), ValueError), name
    assert issubclass(errors.InputTypeError, TypeError)


def test_nearest():
    assert nearest("entropi", ["margin", "entropy"]) == "; did you mean 'entropy'?"
    assert nearest("zzz", ["margin", "entropy"]) == ""
    assert nearest("nope", ["opt", "home", "root"]) == ""  # half the letters in common is no resemblance
    assert nearest("temp", ["laplace", "temperature"]) == "; did you mean 'temperature'?"
    assert nearest("t", ["temperature"]) == ""
    assert nearest("LAYER1", ["layer1", "head"]) == "; did you mean 'layer1'?"
    assert nearest("adamw", ["adam", "AdamW"]) == "; did you mean 'AdamW'?"
    assert nearest("", ["", "a"]) == ""
    assert nearest("a", []) == ""


def test_unknown_name_lists_a_few_and_counts_many():
    error = unknown_name("letter", "bb", ["b", "a"])
    assert type(error) is UnknownNameError
    assert str(error) == "unknown letter 'bb'; did you mean 'b'? (available: a, b)"
    assert str(unknown_name("letter", 3, ["b", "a"])) == "unknown letter 3 (available: a, b)"
    many = str(unknown_name("number", "number_7x", [f"number_{i}" for i in range(1000)]))
    assert "1000 names, among them" in many
    assert "'number_7'" in many
    assert len(many) < 300
