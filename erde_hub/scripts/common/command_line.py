"""The command line of every recipe: dataclasses in, one YAML file and flags on top, errors that fit on a screen.

transformers' ``HfArgumentParser`` turns dataclass fields into flags, but its ``parse_yaml_file`` ignores the flags
and keeps ``learning_rate: 1e-3`` as the text that YAML says it is, and argparse accepts abbreviations. Here the file's
keys and types are checked against the fields, the file's values become defaults, and the flags are parsed on top.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import signal
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from erde_hub.allocator import keep_freed_memory
from erde_hub.errors import ConfigError, ErdeError, nearest
from erde_hub.training.arguments import OTHER_NAMES, nearest_argument

from .arguments import plain_text
from .phases import Interrupted


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of the description, and shows one spelling per flag and its default as it would be typed."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.strip().splitlines())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = [o for o in action.option_strings if not (o.startswith("--") and "-" in o[2:])]
        if not options or options == action.option_strings:
            return super()._format_action_invocation(action)
        shown = argparse.Action(
            options, action.dest, nargs=action.nargs, metavar=action.metavar, choices=action.choices
        )
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
            if text == "none":
                merged = {}
                continue
            key, equals, value = text.partition("=")
            if not equals or not key:
                parser.error(f"argument {option_string}: {text!r} is not KEY=VALUE (example: {option_string} width=16)")
            merged[key] = parse_scalar(value)
        setattr(namespace, self.dest, merged)


class RecipeParser(HfArgumentParser):
    """``HfArgumentParser`` with mappings (``KEY=VALUE``), no abbreviations, and misses that name the nearest flag."""

    def __init__(self, dataclass_types: Mapping[str, type], description: str) -> None:
        super().__init__(
            description=description,
            usage="%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="FILE.yaml", help="settings from a file; a flag wins over the file")
        for title, cls in dataclass_types.items():
            self._add_group(title, cls)

    def _add_group(self, title: str, cls: type) -> None:
        group = self.add_argument_group(title)
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                # A copy: HfArgumentParser writes the simplified type back into the field.
                copied = copy.copy(field)
                copied.type = hints[field.name]
                self._add_field(group, copied)

    def _add_field(self, group: Any, field: dataclasses.Field[Any]) -> None:
        kind = _without_none(field.type)
        if get_origin(kind) is not dict and kind is not dict:
            HfArgumentParser._parse_dataclass_field(group, field)
            shown = get_args(kind)[0] if get_origin(kind) is list else kind
            action = self._option_string_actions[f"--{field.name}"]
            action.metavar = action.metavar or _METAVARS.get(shown)
            if f"--no_{field.name}" in self._option_string_actions:
                self._option_string_actions[f"--no_{field.name}"].help = f"the same as --{field.name} false"
            return
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        hyphens = [f"--{field.name.replace('_', '-')}"] if "_" in field.name else []
        options = {"default": default, "metavar": "KEY=VALUE", **field.metadata}
        group.add_argument(f"--{field.name}", *hyphens, nargs="+", action=_KeyValues, **options)

    def flags(self) -> list[str]:
        """Returns the name of every flag, with underscores."""
        return [o[2:] for o in self._option_string_actions if o.startswith("--") and "-" not in o[2:]]

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line instead of a page of usage."""
        print(f"{self.prog}: error: {message}\n(--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)


#: In a checkout.
CONFIGS = Path(__file__).parents[3] / "recipes" / "configs"

#: A file that is longer is refused before it is parsed.
MAX_CONFIG_CHARACTERS = 100_000

_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "BOOL", str: "TEXT"}


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
        ignored: Further dataclasses whose fields may stand in the file, for other recipes to read.

    Returns:
        The instances, in the order of ``dataclass_types``, and last the name of the configuration (the file's stem).

    Raises:
        ConfigError: The file is not there, is not a mapping, or has a key or a value that no field takes. A wrong flag
            ends the program with exit code 2 instead, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = RecipeParser(dataclass_types, description)
    path = _given("--config", argv) or default_config
    if path is not None:
        values = read_config(path, [*dataclass_types.values(), *ignored])
        if promote and values.get(promote):
            values |= _check_types(values[promote], dataclass_types.values(), where=f"{promote!r} of {path}")
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
        parser.error(_unknown_flag(unknown[0], parser.flags()))
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
        if given is not None and PurePath(given).name != PurePath(values[key]).name:
            values.pop(key.removesuffix("architecture") + "kwargs", None)


def base_config(argv: Sequence[str] | None = None) -> Path:
    """Returns the file that is read where ``--config`` is not given: that of the digits, or for other data the general.

    What suits the digits (a network a quarter as wide, a small step) is no answer to ``--dataset path/to/folder``.
    """
    dataset = _given("--dataset", sys.argv[1:] if argv is None else argv)
    return CONFIGS / ("digits.yaml" if dataset in (None, "digits") else "own_images.yaml")


def describe_settings(base: Path, argv: Sequence[str] | None = None) -> str:
    """One line that says which file the settings come from that no flag gave."""
    given = _given("--config", sys.argv[1:] if argv is None else argv)
    return f"settings: {given}" if given else f"settings: {shown_path(base)}, as there is no --config"


def shown_path(path: str | Path) -> str:
    """Returns a path as short as it can be written from here."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_config(path: str | Path, dataclass_types: Iterable[type]) -> dict[str, Any]:
    """Reads a YAML file and checks its keys and types against the fields of the dataclasses.

    Raises:
        ConfigError: No such file, too long, no mapping, an alias, a key twice, an unknown key, or a value of the wrong
            type; the message names file, key and what is allowed.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CONFIG_CHARACTERS + 1)
        if len(text) > MAX_CONFIG_CHARACTERS:
            raise ConfigError(f"{path} is not a configuration: it has more than {MAX_CONFIG_CHARACTERS:,} characters")
        values = yaml.load(text, Loader=_ConfigLoader)
    except OSError as error:
        known = sorted(p.name for p in CONFIGS.glob("*.yaml"))
        hint = nearest(path.name, known)
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}){hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, it holds a {type(values).__name__}")
    return _check_types(values, dataclass_types, where=str(path))


def parse_scalar(text: str) -> Any:
    """Reads ``16``, ``0.1``, ``1e-3``, ``true``, ``[1, 2]`` or plain text, as the value of ``KEY=VALUE``."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return _numbers(value)


def run_script(main: Callable[[], None], resumable: bool = False) -> None:
    """Runs a script as a program, which may set up its process as the library does not; see :func:`clean_errors`."""
    keep_freed_memory()
    with clean_errors(resumable):
        main()


class _Terminated(KeyboardInterrupt):
    """SIGTERM where no training is running, which ends the program as Ctrl-C does."""


@contextmanager
def clean_errors(resumable: bool = False) -> Iterator[None]:
    """Turns the library's typed errors into one message and exit code 2; everything else keeps its traceback.

    Args:
        resumable: The recipe has ``--resume``, which a program that is stopped says.
    """

    def terminate(number: int, frame: types.FrameType | None) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Interrupted as stop:
        print(f"{Path(sys.argv[0]).name}: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    except KeyboardInterrupt as stop:  # between two trainings, or the second Ctrl-C in one
        how = "; what is finished is kept: continue with the same command and --resume" if resumable else ""
        print(f"\n{Path(sys.argv[0]).name}: interrupted{how}", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from stop
    except ErdeError as error:
        print(f"{Path(sys.argv[0]).name}: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        if before is not None:  # set by something that is not Python
            signal.signal(signal.SIGTERM, before)


class _ConfigLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML keeps the last, and aliases, which multiply what a file holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not read: write it out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _unknown_flag(flag: str, known: list[str]) -> str:
    """Says that there is no such flag, and which one is meant, by another trainer's name or by spelling."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    meant = OTHER_NAMES.get(name)
    close = [meant] if meant in known else difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    hint = f"; did you mean {'--' + str(close[0])!r}?" if close and flag.startswith("-") else ""
    return f"unknown argument {flag!r}{hint}"


def _given(flag: str, argv: Sequence[str]) -> str | None:
    """Returns the value of one flag, without a look at the others."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(flag, dest="value", nargs="?")
    return finder.parse_known_args(argv)[0].value


def _check_types(values: Mapping[Any, Any], dataclass_types: Iterable[type], where: str) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for cls in dataclass_types:
        resolved = get_type_hints(cls)
        hints |= {field.name: resolved[field.name] for field in dataclasses.fields(cls) if field.init}
    checked = {}
    for key, value in values.items():
        if key not in hints:
            hint = nearest_argument(str(key), hints)
            raise ConfigError(f"unknown key {key!r} in {where}{hint} (--help lists all keys)")
        checked[key] = _convert(value, hints[key], key, where)
    return checked


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        rest = [k for k in get_args(kind) if k is not type(None)]
        return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 - built at run time
    return kind


def _convert(value: Any, kind: Any, key: str, where: str) -> Any:
    """Checks one value of the file against the type of its field, and reads the numbers that YAML leaves as text."""
    inner = _without_none(kind)
    if value is None and inner is not kind:
        return None
    origin = get_origin(inner)
    if origin is list or inner is list:
        element = (get_args(inner) or (Any,))[0]
        return [_convert(v, element, key, where) for v in (value if isinstance(value, list) else [value])]
    if origin is dict or inner is dict:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise ConfigError(f"{key!r} in {where} must be a mapping like {{width: 16}}, got {value!r}")
        return _numbers(value)
    if origin is Literal:
        allowed = get_args(inner)
        if value not in allowed or isinstance(value, bool):
            hint = nearest(value, map(str, allowed)) if isinstance(value, str) else _bool_hint(value)
            raise ConfigError(f"{key!r} in {where} is {value!r}{hint} (allowed: {', '.join(map(str, allowed))})")
        return value
    if inner not in _SCALARS:
        return value
    accepted, expected = _SCALARS[inner]
    try:
        if not isinstance(value, accepted) or isinstance(value, bool) is not (inner is bool):
            raise TypeError
        return inner(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key!r} in {where} must be {expected}, got {value!r}{_bool_hint(value)}") from error


def _bool_hint(value: Any) -> str:
    return " (YAML reads yes, no, on and off as true and false: put text in quotes)" if isinstance(value, bool) else ""


#: Types of YAML that a field of each type takes, and what messages call it. YAML leaves 1e-3 as text.
_SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int, str), "a whole number"),
    float: ((int, float, str), "a number"),
    str: ((int, float, str), "text"),
}


def _numbers(value: Any) -> Any:
    """YAML 1.1 wants a dot in ``1.0e-3`` and reads ``1e-3`` as text; people do not."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and value:
        try:
            return float(value)
        except ValueError:
            return value
    return value
