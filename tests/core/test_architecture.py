"""Who may import whom: docs/architecture.md's table, held against the code."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jmp_deploy.core.paths import PACKAGE

MAY_IMPORT = {
    "core": set(),
    "plugin": {"core"},
    "jmp": {"core", "plugin"},
    "engine": {"core", "plugin"},
    "export": {"core", "jmp"},
    "quantize": {"core", "jmp", "export"},
    "tune": {"core", "jmp", "export"},
    "compare": {"core", "jmp", "export", "engine"},
    "bench": {"core", "jmp", "export", "engine"},
    "validate": {"core", "engine"},
    "__main__": {"cli"},
}
"""Room -> rooms that it may import. `pipeline` may import every room but cli, cli everything."""
EVERYTHING = {*MAY_IMPORT, "pipeline"}
HEAVY = {"torch", "timm", "onnx", "onnx_graphsurgeon", "onnxscript", "rich"}
"""Packages, and below the rooms whose modules may import them at once."""
MAY_BE_HEAVY = {"jmp": HEAVY - {"rich"}, "export": HEAVY - {"rich"}, "quantize": HEAVY - {"rich"}}
MAY_BE_HEAVY |= {"cli": {"rich"}}


@cache
def imports(source: str, module: tuple[str, ...]) -> list[tuple[tuple[str, ...], bool]]:
    """(what is imported, as a path; whether at module level) by a module's source."""
    return list(_imports(ast.parse(source), module))


def _imports(tree: ast.Module, module: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], bool]]:
    for node in ast.walk(tree):
        at_once = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((tuple(alias.name.split(".")), at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from (((*base, alias.name), at_once) for alias in node.names)


def room(path: tuple[str, ...]) -> str:
    """The room of ("jmp_deploy", "core", "files"), or the module itself where it is in none."""
    return path[1] if len(path) > 1 else ""


def violations(sources: dict[tuple[str, ...], str]) -> list[str]:
    """Imports that the table forbids, and circles of modules."""
    found, graph = [], defaultdict(set)
    for module, source in sources.items():
        ours = room(module)
        allowed = MAY_IMPORT.get(ours, EVERYTHING) | {ours}
        for target, at_once in imports(source, module):
            name = f"{'.'.join(module)} imports {'.'.join(target)}"
            if target[0] != "jmp_deploy":
                if target[0] in HEAVY - MAY_BE_HEAVY.get(ours, set()) and at_once:
                    found.append(f"{name} at once")
                if target[0] == "rich" and ours != "cli":
                    found.append(name)
                continue
            if room(target) not in allowed and (PACKAGE / room(target)).exists():
                found.append(name)
            hit = target if target in sources else target[:-1]
            if hit != module and hit in sources and len(hit) > 1:
                graph[module].add(hit)
    return found + [f"a circle through {'.'.join(module)}" for module in _circular(graph)]


def _circular(graph: dict[Any, set[Any]]) -> list[Any]:
    """Modules that reach themselves."""

    def reach(start):
        seen, todo = set(), [*graph[start]]
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        return seen

    return [module for module in list(graph) if module in reach(module)]


@pytest.fixture(scope="module")
def sources() -> dict[tuple[str, ...], str]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        # a package's own relative imports count from one level below its name
        found[parts] = path.read_text("utf-8")
    return found


def test_imports_keep_to_the_table(sources):
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core/files", "from ..plugin import library"),
        ("core/files", "def f():\n    from ..engine.runtime import Engine"),
        ("engine/runtime", "from ..jmp.node import TokenReduce"),
        ("validate/data", "from ..compare import measures"),
        ("pipeline", "from .cli import show"),
        ("engine/runtime", "import torch"),
        ("compare/measures", "import onnx"),
        ("bench/measure", "def f():\n    import rich.table"),
        ("core/files", "from . import artifact"),  # which imports files
    ],
)
def test_a_planted_import_is_found(sources, module, line):
    place = ("jmp_deploy", *module.split("/"))
    assert violations({**sources, place: f"{sources[place]}\n{line}\n"}) != []


def test_every_room_stands_in_the_table_and_in_the_documentation():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == {*MAY_IMPORT, "cli"} - {"__main__"}
    text = (Path(PACKAGE.parent) / "docs" / "architecture.md").read_text("utf-8")
    for name in rooms:
        assert f"`{name}/`" in text, name
