"""What has to happen before torch is imported: how its threads wait, and the refusal of misspelt flags.

The flags are fields of dataclasses and arguments of losses; their names are read from the source text. What is found
here may be more than one recipe takes: its own parser has the last word. Only the standard library is imported.
"""

from __future__ import annotations

import ast
import difflib
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

# Threads of OpenMP sleep where they wait for each other. By default they spin for a while, which beside another program
# that wants the same cores makes training ten times slower. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def refuse_unknown_flags(script: str) -> None:
    """Ends the program with exit code 2 if a flag is none that any of the recipes takes.

    Args:
        script: ``__file__`` of the recipe, whose own dataclasses count too.
    """
    spec = find_spec("erde_hub")  # finds the package without running it
    if spec is None or spec.origin is None:
        return
    package = Path(spec.origin).parent
    training = [package / "training" / "arguments.py", package / "scripts" / "common" / "arguments.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (Path(script), *training)]
    losses = [ast.parse(path.read_text(encoding="utf-8")) for path in (package / "losses").glob("*.py")]
    known = {"help", "config", *_fields(trees), *_arguments(losses)}
    for flag in sys.argv[1:]:
        name = flag[2:].partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            refuse(Path(script).name, unknown_flag(flag, known, _other_names(trees)))


def unknown_flag(flag: str, known: Collection[str], other_names: Mapping[str, str]) -> str:
    """Says that there is no such flag, and which one is meant, by another trainer's name or by spelling."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    meant = other_names.get(name)
    close = [meant] if meant in known else difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    hint = f"; did you mean {'--' + str(close[0])!r}?" if close and flag.startswith("-") else ""
    return f"unknown argument {flag!r}{hint}"


def refuse(program: str, message: str) -> NoReturn:
    """Ends the program with one message and exit code 2."""
    print(f"{program}: error: {message}\n(--help lists all flags)", file=sys.stderr)
    raise SystemExit(2)


def _fields(trees: list[ast.Module]) -> Iterator[str]:
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        yield from (
            entry.target.id
            for entry in node.body
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
        )


def _arguments(trees: list[ast.Module]) -> Iterator[str]:
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        if node.name == "__init__":
            yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))


def _other_names(trees: list[ast.Module]) -> dict[str, str]:
    for node in (node for tree in trees for node in tree.body if isinstance(node, ast.Assign)):
        if any(isinstance(target, ast.Name) and target.id == "OTHER_NAMES" for target in node.targets):
            return ast.literal_eval(node.value)
    return {}
