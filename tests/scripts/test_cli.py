"""The command line: file and flags, precedence, types, and misses that help."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erde_hub.errors import ConfigError, DataError
from erde_hub.scripts import distill
from erde_hub.scripts.common import command_line
from erde_hub.scripts.common.arguments import StudentArguments


@dataclass
class Data:
    dataset: str = field(default="digits", metadata={"help": "name or folder"})
    streaming: bool = field(default=False, metadata={"help": "read as it comes"})
    exits: list[str] | None = field(default=None, metadata={"help": "names"})


@dataclass
class Training:
    epochs: int = field(default=3, metadata={"help": "passes over the data (epochs)"})
    learning_rate: float = field(default=0.1, metadata={"help": "peak step size"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many (optimizer steps)"})
    channels_last: bool = field(default=True, metadata={"help": "memory format"})
    precision: Literal["no", "bf16"] = field(default="no", metadata={"help": "arithmetic"})
    threshold: list[float] | None = field(default=None, metadata={"help": "in nats"})
    student_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "creation arguments"})


def parse(*argv: str) -> tuple[Data, Training]:
    return command_line.parse_arguments({"data": Data, "training": Training}, "A recipe.", list(argv))[:2]


@pytest.fixture
def write(tmp_path):
    def _write(text: str) -> str:
        path = tmp_path / "file.yaml"
        path.write_text(text)
        return str(path)

    return _write


def test_defaults_without_arguments():
    data, training = parse()
    assert (data, training) == (Data(), Training())


def test_flag_wins_over_file_and_file_over_default(write):
    path = write("epochs: 7\nlearning_rate: 0.5\n")
    _, training = parse("--config", path, "--epochs", "9")
    assert (training.epochs, training.learning_rate, training.max_steps) == (9, 0.5, None)
    _, training = parse("--epochs", "9", f"--config={path}")
    assert training.epochs == 9


@given(
    in_file=st.none() | st.integers(-(10**6), 10**6),
    as_flag=st.none() | st.integers(0, 10**6),
    rate=st.floats(1e-12, 1e12),
    style=st.sampled_from(["{!r}", "{:e}", "{:g}"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_precedence_and_number_spellings(write, in_file, as_flag, rate, style):
    text = style.format(rate)
    path = write(f"learning_rate: {text}\n" + ("" if in_file is None else f"epochs: {in_file}\n"))
    _, training = parse("--config", path, *([] if as_flag is None else ["--epochs", str(as_flag)]))
    assert isinstance(training.learning_rate, float)
    assert training.learning_rate == float(text)
    assert training.epochs == next(v for v in (as_flag, in_file, 3) if v is not None)


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("learning_rate: 1e-3", "learning_rate", 0.001),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 4", "max_steps", 4),
        ("max_steps: null", "max_steps", None),
        ("channels_last: off", "channels_last", False),
        ("precision: bf16", "precision", "bf16"),
        ("precision: no", "precision", "no"),
        ("threshold: 0.5", "threshold", [0.5]),
        ("threshold: [1e-1, 2]", "threshold", [0.1, 2.0]),
        ("threshold: [-1e-3, -.5]", "threshold", [-0.001, -0.5]),
        ("threshold: []", "threshold", []),
        (
            "student_kwargs: {width: 16, drop: 1e-1, act: relu}",
            "student_kwargs",
            {"width": 16, "drop": 0.1, "act": "relu"},
        ),
    ],
)
def test_file_values_get_the_type_of_the_field(write, text, key, expected):
    value = getattr(parse("--config", write(text))[1], key)
    assert value == expected
    assert type(value) is type(expected)


def test_exits_take_names_a_number_or_one_word(write):
    assert parse("--config", write("exits: [layer1, layer2]"))[0].exits == ["layer1", "layer2"]
    assert parse("--config", write("exits: 3"))[0].exits == ["3"]
    assert parse("--exits", "layer1", "layer3")[0].exits == ["layer1", "layer3"]


def test_mappings_are_added_to_key_by_key(write):
    path = write("student_kwargs: {width: 16, act: relu}")
    _, training = parse("--config", path, "--student_kwargs", "width=8", "scale=1e-2", "flag=true", "shape=[1, 2]")
    assert training.student_kwargs == {"width": 8, "act": "relu", "scale": 0.01, "flag": True, "shape": [1, 2]}
    assert parse("--config", path)[1].student_kwargs == {"width": 16, "act": "relu"}


@pytest.mark.parametrize(
    ("flags", "kwargs"),
    [
        ([], {"width": 16}),
        (["--student_architecture", "other"], {}),
        (["--student-architecture", "other"], {}),
        (["--student_architecture=other", "--student_kwargs", "depth=3"], {"depth": 3}),
        (["--student_architecture", "elsewhere/usual"], {"width": 16}),
        (["--student_kwargs", "none"], {}),
        (["--student_kwargs", "none", "depth=3"], {"depth": 3}),
    ],
)
def test_another_network_does_not_get_the_arguments_of_the_configured_one(write, flags, kwargs):
    path = write("student_architecture: some/usual\nstudent_kwargs: {width: 16}")
    student, _ = command_line.parse_arguments({"s": StudentArguments}, "A recipe.", ["--config", path, *flags])
    assert student.student_kwargs == kwargs


def test_booleans_as_flags():
    assert parse("--streaming")[0].streaming is True
    assert parse("--streaming", "false")[0].streaming is False
    assert parse("--no_channels_last")[1].channels_last is False
    assert parse("--channels_last", "false")[1].channels_last is False


#: Eight levels of ten aliases each: a few hundred characters that stand for a hundred million values.
ALIAS_BOMB = "\n".join(
    [
        "student_kwargs:",
        "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"  a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 8)),
    ]
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rat: 1", ["'learning_rat'", "did you mean 'learning_rate'?", "file.yaml"]),
        ("epochs: many", ["'epochs' in", "invalid int value: 'many'", "file.yaml"]),
        ("epochs: 1.5", ["'epochs'", "invalid int value", "1.5"]),
        ("epochs: true", ["'epochs'", "invalid int value", "true"]),
        ("learning_rate: fast", ["'learning_rate'", "invalid float value", "'fast'"]),
        ("channels_last: 2", ["'channels_last'", "2", "true/false"]),
        ("precision: bf17", ["'bf17'", "'precision'", "bf16"]),
        ("dataset: [a, b]", ["'dataset'", "one value", "['a', 'b']"]),
        ("epochs: {a: 1}", ["'epochs'", "no mapping"]),
        ("epochs: null", ["'epochs'", "invalid int value", "null"]),
        ("student_kwargs: [1]", ["'student_kwargs'", "mapping", "['1']"]),
        ("epochs: 1\nepochs: 2", ["'epochs' occurs twice", "file.yaml"]),
        ("- epochs", ["file.yaml", "list"]),
        ("epochs: [", ["file.yaml", "not a YAML file"]),
        (ALIAS_BOMB, ["file.yaml", "more than 10,000 values", "aliases"]),
        ("student_kwargs: &a {inner: *a}", ["file.yaml", "more than 10,000 values"]),
        ("student_kwargs: {a: " + "[" * 2000 + "]" * 2000 + "}", ["file.yaml", "nested too deep"]),
    ],
)
def test_bad_files_name_key_value_and_file(write, text, parts):
    with pytest.raises(ConfigError) as error:
        parse("--config", write(text))
    for part in parts:
        assert part in str(error.value)


def test_a_few_aliases_are_taken(write):
    path = write("student_kwargs: {a: &sizes [16, 32], b: *sizes, c: {d: *sizes}}")
    assert parse("--config", path)[1].student_kwargs == {"a": [16, 32], "b": [16, 32], "c": {"d": [16, 32]}}


@pytest.mark.parametrize(
    "text",
    ["2026-13-45", "9" * 5000, "a: b: c", "*a", "!!python/object/apply:os.getcwd []"],
    ids=["date", "number", "colons", "alias", "code"],
)
def test_what_is_no_value_of_yaml_is_text(text):
    assert command_line.parse_scalar(text) == text


def test_a_flag_holds_no_alias_bomb():
    bomb = "[&a [x, x, x, x, x, x, x, x, x, x], " + ", ".join(
        f"&{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise("abcdefg")
    )
    with pytest.raises(ConfigError, match="more than 10,000 values"):
        parse("--student_kwargs", f"width={bomb}]")


def test_missing_file_names_the_nearest_config():
    with pytest.raises(ConfigError, match=r"digit\.yaml: cannot be read .*did you mean 'digits'"):
        parse("--config", "recipes/configs/digit.yaml")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learning_rat", "1"], ["'--learning_rat'", "did you mean '--learning_rate'?"]),
        (["--learn", "1"], ["'--learn'"]),
        (["--learning-rat=1"], ["did you mean '--learning_rate'?"]),
        (["--epochs", "x"], ["--epochs", "'x'"]),
        (["--precision", "bf17"], ["--precision", "bf17", "bf16"]),
        (["--student_kwargs", "width"], ["'width' is not KEY=VALUE"]),
        (["stray"], ["'stray'"]),
    ],
)
def test_bad_flags_end_with_code_2_and_one_message(capsys, argv, parts):
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 2
    for part in parts:
        assert part in message


def test_abbreviations_of_config_are_refused_too(capsys, write):
    with pytest.raises(SystemExit):
        parse("--conf", write("epochs: 7"))
    assert "did you mean '--config'?" in capsys.readouterr().err


def test_promoted_mapping_replaces_keys_and_a_flag_wins(write):
    @dataclass
    class Teacher(Training):
        teacher_training: dict[str, Any] = field(default_factory=dict, metadata={"help": "overrides"})

    path = write("epochs: 7\nlearning_rate: 0.5\nteacher_training: {epochs: 20, learning_rate: 1e-2}")
    argv = ["--config", path, "--learning_rate", "3"]
    training, name = command_line.parse_arguments({"t": Teacher}, "A recipe.", argv, promote="teacher_training")
    assert name == "file"
    assert (training.epochs, training.learning_rate) == (20, 3.0)
    path = write("teacher_training: {epoch: 20}")
    with pytest.raises(ConfigError, match=r"'epoch' in 'teacher_training' of .*file\.yaml; did you mean 'epochs'"):
        command_line.parse_arguments({"t": Teacher}, "A recipe.", ["--config", path], promote="teacher_training")


def test_help_shows_units_defaults_and_one_spelling(capsys, write):
    with pytest.raises(SystemExit) as ended:
        parse("--config", write("epochs: 7"), "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "(epochs) [default: 7]" in " ".join(text.split())
    assert "--learning_rate" in text
    assert "--learning-rate" not in text
    assert "None" not in text


def test_help_shows_defaults_as_they_are_typed(capsys, write):
    path = write("student_kwargs: {width: 16, act: relu}\nthreshold: [0.5, 1]\nlearning_rate: 1e-5")
    with pytest.raises(SystemExit):
        parse("--config", path, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("[default: width=16 act=relu]", "[default: 0.5 1]", "[default: 1e-05]", "[default: true]"):
        assert shown in text
    assert "False" not in text


def test_help_keeps_the_lines_of_the_description(capsys):
    with pytest.raises(SystemExit):
        command_line.parse_arguments({"data": Data}, "What it does.\n\n    a command\n    another one\n", ["--help"])
    assert "What it does.\n\n    a command\n    another one\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["distill", "train_teacher", "evaluate", "export_onnx"])
def test_help_speaks_no_python(capsys, monkeypatch, script):
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"erde_hub.scripts.{script}").main()
    text = capsys.readouterr().out
    assert not re.search(r"[{[]'|\bFalse|\bTrue|\bNone\b|map_teacher_exits|exit_weights_preset", text)
    assert not re.search(r"\(default:|; default:", text)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learning_rate", "unknown argument '--learning_rate'; did you mean '--lr'?"),
        ("--kl-wieght=1", "unknown argument '--kl-wieght=1'; did you mean '--kl_weight'?"),
        ("--no_progres_bar", "unknown argument '--no_progres_bar'"),
    ],
)
def test_a_misspelt_flag_is_refused_before_anything_is_loaded(capsys, monkeypatch, flag, message):
    monkeypatch.setattr("sys.argv", ["distill.py", flag])
    monkeypatch.setattr(distill.recipe, "load_data", lambda *args, **kwargs: pytest.fail("data were loaded"))
    with pytest.raises(SystemExit) as ended:
        distill.main()
    assert ended.value.code == 2
    assert f"distill.py: error: {message}" in capsys.readouterr().err


def test_a_recipe_runs_from_another_folder(tmp_path):
    recipes = Path(__file__).parents[2] / "recipes"
    done = subprocess.run(
        [sys.executable, str(recipes / "distill.py"), "--config", "nowhere.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(recipes.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("distill.py: ConfigError: --config nowhere.yaml: cannot be read")


def test_which_file_the_settings_come_from(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert command_line.base_config(["--epochs", "3"]).name == "digits.yaml"
    assert command_line.base_config(["--dataset", "digits"]).name == "digits.yaml"
    base = command_line.base_config(["--dataset=path/to/folder", "--epochs", "3"])
    assert base.name == "own_images.yaml"
    assert command_line.describe_settings(base, []) == "settings: own_images.yaml of erde_hub, as there is no --config"
    assert command_line.describe_settings(base, ["--config", "a.yaml"]) == "settings: a.yaml"
    assert command_line.describe_settings(base, ["--config", "svhn_resnet18_resnet10"]).endswith("resnet10.yaml")


def test_a_packaged_configuration_is_found_by_its_name_and_an_own_file_wins(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits.yaml"):
        assert command_line.find_config(name) == command_line.CONFIGS / "digits.yaml"
    checkout = Path(__file__).parents[2] / "recipes" / "configs"
    assert checkout.resolve() == command_line.CONFIGS
    assert command_line.find_config("recipes/configs/digits.yaml") == Path("recipes/configs/digits.yaml")
    Path("digits.yaml").write_text("epochs: 1")
    assert command_line.find_config("digits.yaml") == Path("digits.yaml")


def test_modules_of_ones_own_are_imported_first(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    (tmp_path / "my_plugins.py").write_text("print('registered')")
    monkeypatch.setattr("sys.argv", ["distill.py", "--import", "my_plugins", "--epochs", "2"])
    seen = []
    command_line.run_script(lambda: seen.append(command_line.parse_arguments({"t": Training}, "")[0].epochs))
    assert seen == [2]
    assert "registered" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["distill.py", "--import", "no_such_module"])
    with pytest.raises(SystemExit) as ended:
        command_line.run_script(lambda: None)
    assert ended.value.code == 2
    assert "--import no_such_module: No module named" in capsys.readouterr().err


def test_ctrl_c_between_two_trainings_has_its_exit_code(capsys):
    for resumable in (True, False):
        with pytest.raises(SystemExit) as ended, command_line.clean_errors(resumable):
            raise KeyboardInterrupt
        assert ended.value.code == 130
        assert ("--resume" in capsys.readouterr().err) is resumable


def test_sigterm_where_nothing_trains_says_how_to_go_on(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def wait_for_the_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(SystemExit) as ended, command_line.clean_errors(resumable=True):
        wait_for_the_signal()
    assert ended.value.code == 143
    assert re.search("continue with .*--resume", capsys.readouterr().err)
    assert signal.getsignal(signal.SIGTERM) == before


def test_clean_errors_hide_the_traceback_of_typed_errors_only(capsys):
    with pytest.raises(SystemExit) as ended, command_line.clean_errors():
        raise DataError("no column 'img'")
    assert ended.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith("DataError: no column 'img'")
    with pytest.raises(ZeroDivisionError), command_line.clean_errors():
        1 / 0  # noqa: B018
