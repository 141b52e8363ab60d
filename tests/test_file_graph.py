"""No file of the package imports, by any detour, a file that imports it.

Unlike ``lint-imports``, which compares packages, this looks at single files. Every import counts: at the top, inside
functions and under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules(package: Path) -> dict[str, Path]:
    """Files by the name under which they are imported; a package stands for its ``__init__.py``."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def ancestors(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def imported(module: str, path: Path, files: dict[str, Path]) -> Iterator[str]:
    """Modules that the import statements of a file name."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = [*ancestors(package), package][-node.level] if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in files else base


def edges(package: Path, ignored: frozenset[tuple[str, str]] = frozenset()) -> dict[str, set[str]]:
    """What every file imports.

    Importing a module runs the ``__init__.py`` of the packages around it, so these count too, except those around the
    importer itself, which have begun to run before it.
    """
    files = modules(package)
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        for target in imported(module, path, files):
            if target in files and target != module and (module, target) not in ignored:
                graph[module] |= {target, *ancestors(target)} - {module, *(set(ancestors(module)) - {target})}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def leftovers() -> frozenset[tuple[str, str]]:
    """Imports that pyproject.toml still lets pass."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    lines = [line for contract in contracts for line in contract.get("ignore_imports", [])]
    return frozenset(tuple(line.split(" -> ")) for line in lines)


def test_no_file_imports_itself_by_a_detour():
    graph = edges(ROOT / "erde_hub", leftovers())
    assert len(graph) > 100, "the package was not found"
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "from .b import x", "b": "from .c import x", "c": ""}, set()),
        ({"a": "from .b import x", "b": "from .c import x", "c": "from .a import x"}, {"p.a", "p.b", "p.c"}),
        ({"a": "from . import b", "b": "def f():\n    import p.a"}, {"p.a", "p.b"}),
        ({"a": "from .b import x", "b": "if TYPE_CHECKING:\n    from p.a import X"}, {"p.a", "p.b"}),
        ({"q/__init__": "from .m import x", "q/m": "import p.a", "a": "from . import q"}, {"p.a", "p.q", "p.q.m"}),
        ({"q/__init__": "from ..a import x", "q/m": "", "a": "from .q.m import x"}, {"p.a", "p.q"}),
        ({"__init__": "from .a import x", "a": "from . import version"}, {"p", "p.a"}),
        ({"__init__": "from .a import x", "a": "from .b import x", "b": ""}, set()),
    ],
    ids=["line", "three", "function", "annotation", "package", "around", "name_of_parent", "parent"],
)  # fmt: skip
def test_circles_are_found(tmp_path, files, expected):
    for name, text in {"__init__": "", **files}.items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert set(circle(edges(tmp_path / "p"))) == expected
