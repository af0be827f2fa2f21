#!/usr/bin/env python3
"""What the code's own imports say of its structure.

    python scripts/architecture.py            figures: modules, lines, rooms, floors, circles
    python scripts/architecture.py --write    draws the picture in docs/architecture.md anew

Needs nothing but Python. `tests/core/test_architecture.py` holds the table of rooms, and the
picture, against the code.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
START, END = "<!-- drawn by scripts/architecture.py -->\n", "<!-- end of the drawing -->\n"

Module = tuple[str, ...]
"""("jmp_deploy", "core", "files")"""

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "plugin": {"core"},
    "jmp": {"core", "plugin"},
    "engine": {"core", "plugin"},
    "export": {"core", "jmp"},
    "quantize": {"core", "jmp", "export"},
    "tune": {"core", "jmp", "export"},
    "recover": {"core", "jmp"},
    "backends": {"core", "jmp", "export", "engine"},
    "compare": {"core", "jmp", "export", "engine", "backends"},
    "bench": {"core", "jmp", "export", "engine", "backends"},
    "validate": {"core", "backends"},
    "package": {"core", "plugin"},
    "__main__": {"cli"},
}
"""Room -> rooms that it may import. `pipeline` may import every room but cli, cli everything."""


def read_sources() -> dict[Module, str]:
    """Every module of the package and its source."""
    paths = sorted((ROOT / "jmp_deploy").rglob("*.py"))
    return {p.relative_to(ROOT).with_suffix("").parts: p.read_text("utf-8") for p in paths}


@cache
def imports(source: str, module: Module) -> list[tuple[Module, bool]]:
    """(what is imported, as a path; whether at module level) by a module's source."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        at_once = node in tree.body
        if isinstance(node, ast.Import):
            found += [(tuple(alias.name.split(".")), at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found += [((*base, alias.name), at_once) for alias in node.names]
    return found


def room(module: Module) -> str:
    """The room of a module, or its own name where it is in none."""
    return module[1] if len(module) > 1 else ""


def graph(sources: dict[Module, str]) -> dict[Module, set[Module]]:
    """Module -> modules of ours that it imports, at once or when it is called."""
    found: dict[Module, set[Module]] = defaultdict(set)
    for module, source in sources.items():
        for target, _ in imports(source, module):
            hit = target if target in sources else target[:-1]
            if hit in sources and hit != module:
                found[module].add(hit)
    return found


def circles(edges: dict[Module, set[Module]]) -> list[Module]:
    """Modules that reach themselves."""
    return [module for module in list(edges) if module in _reached(edges, module)]


def rooms(sources: dict[Module, str]) -> dict[str, set[str]]:
    """Room -> rooms that it imports."""
    names = {path.parent.name for path in (ROOT / "jmp_deploy").glob("*/__init__.py")}
    names.add("pipeline")
    found: dict[str, set[str]] = {name: set() for name in sorted(names)}
    for module, targets in graph(sources).items():
        if room(module) in names:
            found[room(module)] |= {room(t) for t in targets} & names - {room(module)}
    return found


def drawing(sources: dict[Module, str]) -> str:
    """The rooms as a Mermaid flowchart; an arrow that others imply is left out."""
    found = rooms(sources)
    lines = ["```mermaid", "flowchart BT"]
    for name, targets in found.items():
        implied = {far for near in targets for far in _reached(found, near)}
        lines += [f"  {name} --> {target}" for target in sorted(targets - implied)]
    return "\n".join([*lines, "```", ""])


def figures(sources: dict[Module, str]) -> dict[str, int]:
    """Numbers that say how tangled the code is."""
    edges = graph(sources)
    between = {(m, t) for m, targets in edges.items() for t in targets if room(m) != room(t)}
    return {
        "modules": len(sources),
        "lines": sum(source.count("\n") for source in sources.values()),
        "rooms": len([p for p in (ROOT / "jmp_deploy").glob("*/__init__.py")]),
        "floors": 1 + max(_floor(edges, module) for module in sources),
        "modules in circles": len(circles(edges)),
        "imports between rooms": len(between),
        "pairs of rooms": len({(room(m), room(t)) for m, t in between}),
    }


def _reached(edges: dict, start: object) -> set:
    seen: set = set()
    todo = [*edges.get(start, ())]
    while todo:
        if (node := todo.pop()) not in seen:
            seen.add(node)
            todo += edges.get(node, ())
    return seen


def _floor(edges: dict[Module, set[Module]], module: Module, above: frozenset = frozenset()) -> int:
    below = edges.get(module, set()) - above
    return 1 + max((_floor(edges, t, above | {module}) for t in below), default=-1)


def main() -> int:
    """Prints the figures; with --write draws the picture anew."""
    sources = read_sources()
    for name, number in figures(sources).items():
        print(f"{name:24}{number:7}")
    if "--write" in sys.argv[1:]:
        text = DOCUMENT.read_text("utf-8")
        before, rest = text.split(START)
        DOCUMENT.write_text(before + START + drawing(sources) + END + rest.split(END)[1], "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
