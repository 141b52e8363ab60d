"""The command line of every script: dataclasses in, one YAML file and flags on top, errors that fit on a screen.

transformers' ``HfArgumentParser`` turns dataclass fields into flags. The keys of a file are read as if they were flags,
so that both have the same types and the same errors, and become defaults; the flags are parsed on top.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import importlib
import itertools
import math
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from erde_hub.allocator import keep_freed_memory
from erde_hub.errors import ConfigError, ErdeError, nearest
from erde_hub.training._launch import lost_process_named
from erde_hub.training.arguments import OTHER_NAMES, nearest_argument

from .arguments import plain_text
from .messages import resume_command
from .phases import Interrupted

#: The configurations that come with the package.
CONFIGS = Path(__file__).parents[1] / "configs"

_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "BOOL", str: "TEXT"}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling per flag, and its default as it would be typed."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [o for o in action.option_strings if "-" not in o[2:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "; default: ..." in a help text says what happens where nothing is set; a default that is set says more.
        text, _, unset = (action.help or "").partition("; default: ")
        given = action.default
        if given in (None, [], {}, argparse.SUPPRESS) or action.nargs == 0:
            return f"{text} [default: {unset}]" if unset else text
        return f"{text} [default: {plain_text(given).replace('%', '%%')}]"


class _KeyValues(argparse.Action):
    """``--student_kwargs width=16 act_layer=relu`` adds to what the file says, key by key; ``none`` clears it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        merged: dict[str, Any] = dict(getattr(namespace, self.dest) or {})
        for text in values:
            key, equals, value = text.partition("=")
            if text == "none":
                merged = {}
            elif not equals or not key:
                parser.error(f"argument {option_string}: {text!r} is not KEY=VALUE (example: {option_string} width=16)")
            else:
                merged[key] = parse_scalar(value)
        setattr(namespace, self.dest, merged)


class ScriptParser(HfArgumentParser):
    """``HfArgumentParser`` with mappings (``KEY=VALUE``), no abbreviations, and misses that name the nearest flag."""

    shares_fields = False

    def __init__(self, dataclass_types: Mapping[str, type], description: str) -> None:
        usage = "%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]"
        super().__init__(description=description, usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse takes no -1e-3
        self.add_argument(
            "--config",
            metavar="FILE.yaml",
            help="settings from a file, or from one that comes with the package (--config digits); a flag wins over it",
        )
        self.add_argument(
            "--import", dest="plugins", metavar="MODULE", nargs="+", help="Python modules that register losses or heads"
        )
        for title, cls in dataclass_types.items():
            group, hints = self.add_argument_group(title), get_type_hints(cls)
            for field in dataclasses.fields(cls):
                if field.init and not (self.shares_fields and f"--{field.name}" in self._option_string_actions):
                    self._add_field(group, copy.copy(field), hints[field.name])

    def _add_field(self, group: Any, field: dataclasses.Field[Any], kind: Any) -> None:
        shown = next((k for k in (*get_args(kind), kind) if k is not type(None)), kind)
        field.type = kind
        if get_origin(kind) is dict:
            field.type = str
            field.metadata = {"nargs": "+", "action": _KeyValues, "metavar": "KEY=VALUE", **field.metadata}  # type: ignore[assignment]
        self._parse_dataclass_field(group, field)
        action = self._option_string_actions[f"--{field.name}"]
        if action.choices is None:
            action.metavar = action.metavar or _METAVARS.get(get_args(shown)[0] if get_args(shown) else shown)
        if f"--no_{field.name}" in self._option_string_actions:
            self._option_string_actions[f"--no_{field.name}"].help = f"the same as --{field.name} false"

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line instead of a page of usage."""
        print(f"{self.prog}: error: {message}\n(--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)


class _FileReader(ScriptParser):
    """Reads the keys of a file as if they were flags; errors name key and file."""

    where = ""
    shares_fields = True  # what other scripts read may hold parts of what this one reads

    def read(self, values: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """Returns the values by key, with the types of the fields.

        Args:
            values: Texts, lists of texts and mappings, as :class:`_ConfigLoader` gives them.
            where: The file, for errors.
        """
        fields = {action.dest: action for action in self._actions if action.dest not in ("help", "config", "plugins")}
        read: dict[str, Any] = {}
        for key, value in values.items():
            if key not in fields:
                hint = nearest_argument(str(key), fields)
                raise ConfigError(f"unknown key {key!r} in {where}{hint} (--help lists all keys)")
            self.where = f"{key!r} in {where}"
            if isinstance(fields[key], _KeyValues) != isinstance(value, dict):
                kind = "a mapping like {width: 16}" if isinstance(fields[key], _KeyValues) else "no mapping"
                raise ConfigError(f"{self.where} must be {kind}, got {value!r}")
            if isinstance(value, dict):
                read[key] = _typed(value)
            elif value not in ("", "~", "null") or fields[key].default is not None:
                read[key] = self._read_flag(key, value if isinstance(value, list) else [value])
        return read

    def _read_flag(self, key: str, texts: list[Any]) -> Any:
        if not texts and any(action.dest == key and action.nargs == "+" for action in self._actions):
            return []
        for action in self._actions:
            action.required = False
        if self.get_default(key) in (True, False):  # YAML's other words
            texts = [{"on": "true", "off": "false"}.get(text, text) for text in texts]
        namespace, further = self.parse_known_args([f"--{key}", *map(str, texts)])
        if further:
            self.error(f": one value is allowed, got {texts}")
        return getattr(namespace, key)

    def error(self, message: str) -> NoReturn:
        """Raises :class:`ConfigError` with the part of the message that does not speak of flags."""
        raise ConfigError(f"{self.where}: {message.partition(': ')[2]}")


class _ConfigLoader(yaml.BaseLoader):
    """Leaves every value the text that it is, and refuses a key that occurs twice, of which YAML keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _ScalarLoader(yaml.SafeLoader):
    """Reads ``1e-3`` as the number that YAML 1.1, which wants a dot in it, reads as text."""


#: More values than any configuration has, an alias counted as often as it is used.
_MAX_VALUES = 10_000

_ScalarLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _load_yaml(text: str, loader_class: type[Any]) -> Any:
    """Reads a document, unless its aliases (``*name``) stand for far more than was written.

    Raises:
        ConfigError: They do, it names itself inside of itself, or it is nested too deep to be read.
        yaml.YAMLError: It is none.
    """
    loader = loader_class(text)
    try:
        node = loader.get_single_node()
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise ConfigError(f"it holds more than {_MAX_VALUES:,} values, with those that aliases (*name) repeat")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise ConfigError("it is nested too deep") from error
    finally:
        loader.dispose()


def _count_values(node: Any, counted: dict[int, float]) -> float:
    """Returns how many values a node stands for; infinitely many where it holds itself."""
    if id(node) not in counted:
        counted[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = itertools.chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
        counted[id(node)] = 1 + sum(_count_values(entry, counted) for entry in pairs)
    return counted[id(node)]


def parse_arguments(
    dataclass_types: Mapping[str, type],
    description: str,
    argv: Sequence[str] | None = None,
    default_config: str | Path | None = None,
    promote: str | None = None,
    ignored: Sequence[type] = (),
) -> tuple[Any, ...]:
    """Reads ``--config FILE.yaml`` and the flags into one instance of each dataclass.

    Args:
        dataclass_types: Their fields are the flags and the keys of the file, by the title under which ``--help`` lists
            them; no name may occur twice.
        description: First lines of ``--help``.
        argv: The flags; those of the process if None.
        default_config: The file where ``--config`` is not given.
        promote: A mapping in the file whose entries replace the keys of the same name (a flag still wins), so that
            ``train_teacher.py`` reads the teacher's half of a distillation's file.
        ignored: Further dataclasses whose fields may stand in the file, for other scripts to read.

    Returns:
        The instances, in the order of ``dataclass_types``, and last the name of the configuration (the file's stem).

    Raises:
        ConfigError: The file is not there, is not a mapping, or has a key or a value that no field takes. A wrong flag
            ends the program with exit code 2 instead, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ScriptParser(dataclass_types, description)
    given = _given("--config", argv)
    path = find_config(given[0]) if given else default_config
    if path is not None:
        reader = _FileReader({**dataclass_types, **{cls.__name__: cls for cls in ignored}}, "")
        raw = load_config(path)
        values = reader.read(raw, str(path))
        if promote and raw.get(promote):
            values |= reader.read(raw[promote], f"{promote!r} of {path}")
        values = {key: value for key, value in values.items() if f"--{key}" in parser._option_string_actions}
        _drop_arguments_of_other_networks(values, argv)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    parser.set_defaults(config=None if path is None else shown_path(path))
    known = parser._option_string_actions  # a misspelt flag is named before what is missing for want of it
    misspelt = [flag for flag in argv if flag.startswith("--") and flag.partition("=")[0] not in known]
    namespace, unknown = (None, misspelt) if misspelt else parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown_flag(unknown[0], [o[2:] for o in known if "-" not in o[2:]]))
    settings = vars(namespace)
    instances = [
        cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls) if field.init})
        for cls in dataclass_types.values()
    ]
    return (*instances, Path(path).stem if path is not None else Path(parser.prog).stem)


def _drop_arguments_of_other_networks(values: dict[str, Any], argv: Sequence[str]) -> None:
    """Removes the file's ``X_kwargs`` where a flag names another ``X_architecture``: they belong to the file's network.

    A folder or repository whose last part has the same name holds the same network.
    """
    for key in [key for key in values if key.endswith("_architecture")]:
        given = _given(f"--{key}", argv)
        if given and PurePath(given[0]).name != PurePath(values[key]).name:
            values.pop(key.removesuffix("architecture") + "kwargs", None)


def base_config(argv: Sequence[str] | None = None) -> Path:
    """Returns the file that is read where ``--config`` is not given: that of the digits, or for other data the general.

    What suits the digits (a network a quarter as wide, a small step) is no answer to ``--dataset path/to/folder``.
    """
    dataset = _given("--dataset", sys.argv[1:] if argv is None else argv)
    return CONFIGS / ("digits.yaml" if dataset in ([], ["digits"]) else "own_images.yaml")


def describe_settings(base: Path, argv: Sequence[str] | None = None) -> str:
    """One line that says which file the settings come from that no flag gave."""
    return f"settings: {named_config(argv) or f'{base.name} of erde_hub, as there is no --config'}"


def named_config(argv: Sequence[str] | None = None) -> str | None:
    """Returns the file that ``--config`` names, as messages show it; None where there is no such flag."""
    given = _given("--config", sys.argv[1:] if argv is None else argv)
    return shown_path(find_config(given[0])) if given else None


def shown_path(path: str | Path) -> str:
    """Returns a path as short as it can be written from here; of a packaged configuration the name of the file."""
    if Path(path).parent == CONFIGS:
        return Path(path).name
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def find_config(name: str | Path) -> Path:
    """Returns the file that ``--config`` names: a path, or the name of a packaged configuration, ``digits`` say."""
    packaged = CONFIGS / f"{str(name).removesuffix('.yaml')}.yaml"
    return packaged if packaged.parent == CONFIGS and packaged.is_file() and not Path(name).is_file() else Path(name)


def load_config(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file without a look at what its keys mean; every value stays the text that it is.

    Raises:
        ConfigError: No such file, no mapping, a key that occurs twice, or far more values than a configuration has.
    """
    path = Path(path)
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"), _ConfigLoader)
    except OSError as error:
        hint = nearest(path.stem, (known.stem for known in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}){hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, it holds a {type(values).__name__}")
    return values or {}


def parse_scalar(text: str) -> Any:
    """Reads ``16``, ``0.1``, ``1e-3``, ``true``, ``[1, 2]`` or plain text, as the value of ``KEY=VALUE``."""
    try:
        return _load_yaml(text, _ScalarLoader)
    except ConfigError as error:
        raise ConfigError(f"the value {text!r:.60} cannot be used: {error}") from error
    except (yaml.YAMLError, ValueError):  # what looks like a date or a number and is none, such as 2026-13-45
        return text


def _typed(value: Any) -> Any:
    """Gives the texts inside a mapping of the file the types that they have as ``KEY=VALUE``."""
    if isinstance(value, dict):
        return {key: _typed(entry) for key, entry in value.items()}
    return [_typed(entry) for entry in value] if isinstance(value, list) else parse_scalar(value)


def _unknown_flag(flag: str, known: list[str]) -> str:
    """Says that there is no such flag, and which one is meant, by another trainer's name or by spelling."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    meant = OTHER_NAMES.get(name)
    close = [meant] if meant in known else difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    hint = f"; did you mean {'--' + str(close[0])!r}?" if close and flag.startswith("-") else ""
    return f"unknown argument {flag!r}{hint}"


def _given(flag: str, argv: Sequence[str]) -> list[str]:
    """Returns the values of one flag, in either spelling (``--a_b``, ``--a-b``), without a look at the others."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(flag, "--" + flag[2:].replace("_", "-"), dest="values", nargs="*", default=[])
    return finder.parse_known_args(argv)[0].values


def run_script(main: Callable[[], None], resumable: bool = False) -> None:
    """Runs a script as a program, which may set up its process as the library does not; see :func:`clean_errors`."""
    keep_freed_memory()
    with clean_errors(resumable), lost_process_named():
        import_plugins(_given("--import", sys.argv[1:]))
        main()


def import_plugins(names: Sequence[str]) -> None:
    """Imports modules that add to the tables of losses, heads, policies or calibrators, also from this folder.

    Raises:
        ConfigError: There is no such module.
    """
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--import {name}: {error}; it is looked for here and among what is installed") from error


class _Terminated(KeyboardInterrupt):
    """SIGTERM where no training is running, which ends the program as Ctrl-C does."""


@contextmanager
def clean_errors(resumable: bool = False) -> Iterator[None]:
    """Turns the library's typed errors into one message and exit code 2; everything else keeps its traceback.

    Args:
        resumable: The script has ``--resume``, which a program that is stopped says.
    """

    def terminate(number: int, frame: types.FrameType | None) -> NoReturn:
        raise _Terminated

    name = Path(sys.argv[0]).name
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Interrupted as stop:
        print(f"{name}: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    except KeyboardInterrupt as stop:  # between two trainings, or the second Ctrl-C in one
        how = f"; what is finished is kept: continue with {resume_command()}" if resumable else ""
        print(f"\n{name}: interrupted{how}", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from stop
    except ErdeError as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        if before is not None:  # set by something that is not Python
            signal.signal(signal.SIGTERM, before)
