"""Who may import whom: the table in scripts/architecture.py, held against the code."""

from __future__ import annotations

import importlib.util
import re

import pytest

from jmp_deploy.core.paths import IMPORT_ROOT, PACKAGE

HEAVY = {"torch", "timm", "onnx", "onnx_graphsurgeon", "onnxscript", "rich"}
"""Packages that no module imports at once, but for those of the rooms below."""
MAY_BE_HEAVY = {room: HEAVY - {"rich"} for room in ("jmp", "export", "quantize", "recover")}
MAY_BE_HEAVY |= {"cli": {"rich"}}


@pytest.fixture(scope="module")
def architecture():
    path = IMPORT_ROOT / "scripts" / "architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources(architecture):
    return architecture.read_sources()


def violations(architecture, sources) -> list[str]:
    """Imports that the table forbids, and circles of modules."""
    found = [f"a circle: {'.'.join(m)}" for m in architecture.circles(architecture.graph(sources))]
    everything = {*architecture.MAY_IMPORT, "pipeline"}
    for module, source in sources.items():
        ours = architecture.room(module)
        allowed = architecture.MAY_IMPORT.get(ours, everything) | {ours}
        for target, at_once in architecture.imports(source, module):
            name = f"{'.'.join(module)} imports {'.'.join(target)}"
            if target[0] == "jmp_deploy":
                theirs = architecture.room(target)
                if theirs not in allowed and (
                    (PACKAGE / theirs).is_dir() or (PACKAGE / f"{theirs}.py").is_file()
                ):
                    found.append(name)
            elif target[0] in HEAVY - MAY_BE_HEAVY.get(ours, set()) and at_once:
                found.append(f"{name} at once")
            elif target[0] == "rich" and ours != "cli":
                found.append(name)
    return found


def test_imports_keep_to_the_table(architecture, sources):
    assert violations(architecture, sources) == []


def test_what_is_imported_is_there(architecture, sources):
    """Imports within functions too, which neither a start of the program nor mypy looks at.

    Of tests, benchmarks and scripts as well: a test that imports a name of before a move fails
    only when it runs, which some do on a GPU alone.
    """
    around = {
        path.relative_to(IMPORT_ROOT).with_suffix("").parts: path.read_text("utf-8")
        for folder in ("tests", "benchmarks", "scripts", "examples", "calibration")
        for path in (IMPORT_ROOT / folder).rglob("*.py")
    }
    for module, source in {**sources, **around}.items():
        for target, _ in architecture.imports(source, module):
            if target[0] != "jmp_deploy" or target in sources or (*target, "__init__") in sources:
                continue
            holder = next(
                (sources[m] for m in (target[:-1], (*target[:-1], "__init__")) if m in sources), ""
            )
            assert re.search(rf"\b{target[-1]}\b", holder), f"{module} imports {target}"


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
def test_a_planted_import_is_found(architecture, sources, module, line):
    place = ("jmp_deploy", *module.split("/"))
    planted = {**sources, place: f"{sources[place]}\n{line}\n"}
    assert len(violations(architecture, planted)) > len(violations(architecture, sources))


def test_the_documentation_shows_what_there_is(architecture, sources):
    rooms = set(architecture.rooms(sources))
    assert rooms == {*architecture.MAY_IMPORT, "cli", "pipeline"} - {"__main__"}
    text = architecture.DOCUMENT.read_text("utf-8")
    for room in rooms - {"pipeline"}:
        assert f"`{room}/`" in text, room
    drawn = text.split(architecture.START)[1].split(architecture.END)[0]
    assert drawn == architecture.drawing(sources), "python scripts/architecture.py --write"
