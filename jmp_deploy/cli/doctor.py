"""What this machine has and what it can do, with the command that mends each gap.

Runs with the base install alone; in seconds, of which trying the imports takes most. `probes` does
the looking.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..backends import BACKENDS
from ..core.errors import one_line
from . import flags, probes, show
from .probes import Check

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["CAN", "Check", "as_json", "collect", "render"]

CAN = "this machine can"
"""Area of the closing checks: status "ok" is yes, "missing" is no."""


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    flags.add_command(
        commands,
        _doctor,
        "doctor",
        "tell what is installed, found and usable here, and the command that mends each gap",
        ("doctor", "doctor --json doctor.json"),
    )


def _doctor(given: argparse.Namespace) -> int:
    checks = collect()
    show.show(given, [render(checks)], as_json(checks))
    return 0


def collect() -> list[Check]:
    """Looks at everything; never raises. The last checks, of area `CAN`, are the summary."""
    checks: list[Check] = []
    for area, probe in probes.AREAS.items():
        checks += _guarded(area, probe)
    return [*checks, *_guarded(CAN, lambda: _abilities(checks))]


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The report for programs: every check, and the summary by name as {"yes", "reason"}."""
    return {
        "checks": [asdict(check) for check in checks if check.area != CAN],
        "can": {
            check.name: {"yes": check.status == "ok", "reason": check.found, "fix": check.fix}
            for check in checks
            if check.area == CAN
        },
    }


def render(checks: Sequence[Check]) -> RenderableType:
    """The report for people: a table per area, then the commands that mend the gaps.

    Print it with `console.print(..., crop=False)`: a command longer than the terminal is wide is
    left to the terminal to wrap, so that it can be copied whole.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "yes": "green"}
    parts: list[RenderableType] = []
    for area in dict.fromkeys(check.area for check in checks):
        table = Table.grid(padding=(0, 2))
        table.add_column(width=9)
        table.add_column(min_width=22, no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            if check.area == area:
                word: str = check.status
                if area == CAN:
                    word = "yes" if check.status == "ok" else "no"
                table.add_row(
                    Text(f"  {word}", styles.get(word, "red")), check.name, Text(check.found)
                )
        parts += [Text(area, "bold"), table, Text("")]
    fixes: dict[str, list[str]] = {}
    for check in checks:
        if check.fix and check.area != CAN:
            fixes.setdefault(check.fix, []).append(check.name)
    if fixes:
        parts.append(Text("to mend it", "bold"))
    # Export comes last: where PyTorch is not, that is a device, which needs none of it.
    absent = {c.fix for c in checks if c.name in probes.EXPORT_NEEDS and c.status == "missing"}
    for command in sorted(fixes, key=lambda command: command in absent):
        names = fixes[command]
        label = f"{len(names)} of the above" if len(names) > 4 else ", ".join(names)
        label = "to export models here" if command in absent else label
        parts.append(Text(f"  {label}:", "dim"))
        parts.append(Text(f"    {command}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def _guarded(area: str, probe: Callable[[], Iterator[Check]]) -> list[Check]:
    # A look at a strange machine may fail in ways that nobody foresaw; the rest of the report
    # still helps, and the reason is what somebody will need to see.
    found: list[Check] = []
    try:
        found.extend(probe())
    except Exception as error:
        reason = f"could not be looked at: {one_line(error) or type(error).__name__}"
        found.append(Check(area, area, "warn", reason))
    # Versions, names and messages of others may hold what a terminal would obey.
    return [
        replace(c, found=one_line(c.found), fix=one_line(c.fix) if c.fix else None) for c in found
    ]


def _abilities(checks: Sequence[Check]) -> Iterator[Check]:
    """Yes or no to each thing that one may want here, and why."""
    known = {check.name: check for check in checks}

    def lacking(names: Sequence[str]) -> list[Check]:
        unknown = Check("", "", "missing", "not looked at")
        found = [replace(known.get(name, unknown), name=name) for name in names]
        return [check for check in found if check.status in ("missing", "unfit")]

    def verdict(name: str, gaps: Sequence[Check], yes: str) -> Check:
        if not gaps:
            return Check(CAN, name, "ok", yes)
        reason = "; ".join(f"{gap.name}: {gap.found}" for gap in gaps[:3])
        if len(gaps) > 3:
            reason += f"; and {len(gaps) - 3} more"
        fixes = {gap.fix for gap in gaps if gap.fix}
        return Check(CAN, name, "missing", reason, fixes.pop() if len(fixes) == 1 else None)

    def version(name: str) -> str:
        return f"{name} {known[name].found.split(';')[0]}" if name in known else name

    export = [*probes.EXPORT_NEEDS, "onnxruntime", "polygraphy"]
    yield verdict("export models", lacking(export), f"{version('PyTorch')}, {version('timm')}")

    built = known.get("plugin library")
    compiled = built is not None and built.status == "ok"
    plugin = [] if compiled else lacking(["C++ compiler", "plugin toolchain"])
    where = f"built: {built.found}" if built is not None and compiled else "by itself, once"
    yield verdict("build the plugin", plugin, where)

    gpu = lacking(["GPU"])
    tensorrt = lacking(["TensorRT"])
    rtx = lacking(["TensorRT-RTX"])
    common = [*lacking(["polygraphy"]), *plugin]
    yes = f"{version('TensorRT')}, for this GPU"
    yield verdict("build with TensorRT", [*tensorrt, *gpu, *common], yes)
    yes = f"{version('TensorRT-RTX')}, ahead of time: for RTX GPUs, none needed here"
    yield verdict("build with TensorRT-RTX", [*rtx, *common], yes)

    runner = "TensorRT" if not tensorrt or rtx else "TensorRT-RTX"
    gaps = [*gpu, *(tensorrt if runner == "TensorRT" else rtx), *lacking(["cuda-bindings"])]
    if runner == "TensorRT-RTX" and not gpu and "TensorRT-RTX:" in known["GPU"].found:
        gaps.append(known["GPU"])
    yield verdict("run engines", gaps, f"with {version(runner)}")

    for backend in BACKENDS:
        if backend.ability:
            yes = version(backend.packages[0])
            yield verdict(backend.ability, lacking(backend.packages), yes)
