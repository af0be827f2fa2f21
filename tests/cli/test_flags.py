"""Flags and the options that they fill: each is written once, and none goes nowhere."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path

import pytest

from jmp_deploy.backends.predict import Options, predict
from jmp_deploy.bench.bench import BenchOptions
from jmp_deploy.bench.measure import Settings
from jmp_deploy.bench.table import SETTINGS, TableOptions
from jmp_deploy.cli import flags
from jmp_deploy.cli.main import COMMANDS, make_parser
from jmp_deploy.compare.compare import compare_artifact
from jmp_deploy.jmp.models import OwnModel
from jmp_deploy.jmp.visualize import VisualizeOptions
from jmp_deploy.package.bundle import BundleOptions
from jmp_deploy.pipeline import BuildOptions
from jmp_deploy.plugin.library import build_plugin
from jmp_deploy.quantize.stage import QuantizeOptions
from jmp_deploy.recover.recover import RecoverOptions
from jmp_deploy.tune.tune import TuneOptions
from jmp_deploy.validate.state import merge
from jmp_deploy.validate.validate import ValidateOptions

FILLED = {
    "build": [(BuildOptions, ""), (QuantizeOptions, "quantize."), (OwnModel, "own.")],
    "run": [(Options, ""), (predict, "")],
    "compare": [(compare_artifact, "")],
    "inspect": [],
    "report": [],
    "doctor": [],
    "plugin": [(build_plugin, "")],
    "package": [(BundleOptions, "")],
    "tune": [(TuneOptions, ""), (OwnModel, "own.")],
    "recover": [(RecoverOptions, ""), (OwnModel, "own.")],
    "visualize": [(VisualizeOptions, ""), (OwnModel, "own.")],
    "bench": [(BenchOptions, ""), (Settings, "settings."), (TableOptions, "")],
    "validate": [(ValidateOptions, "")],
    "merge": [(merge, "")],
}
"""Command -> the options classes and functions that `fill` calls, and the flags' prefix."""
READ = {
    "run": {"folder", "rebuild"},
    "inspect": {"path"},
    "report": {"folder", "compare", "html", "bench", "pictures"},
    "plugin": {"action"},
    "package": {"path", "verify", "out"},
    "tune": {"plot"},
    "bench": {"times", "plot", "table"},
}
"""Command -> flags that its handler reads itself."""
MADE = {
    "build": {"quantize", "own", "rebuild"},
    "run": {"path", "options"},
    "plugin": {"on_progress"},
    "package": {"out"},
    "tune": {"curve", "own"},
    "recover": {"own"},
    "visualize": {"own"},
    "bench": {
        *("settings", "backend"),
        *("settings.warm_seconds", "settings.rounds", "settings.visit_seconds"),
    },
}
"""Command -> fields that no flag sets: the handler makes them, or their default serves."""


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = make_parser()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {a.dest: a for a in parser._actions if a.dest not in ("help", "json")}


def defaults(name: str) -> dict[str, object]:
    """Field -> default, of all that a command fills; Parameter.empty where there is none."""
    found: dict[str, object] = {}
    for made, prefix in FILLED[name]:
        for field, parameter in signature(made).parameters.items():
            found.setdefault(prefix + field, parameter.default)
        if is_dataclass(made):
            names = {prefix + field.name for field in fields(made)}
            assert names <= set(found)
    return found


def test_every_command_is_looked_at():
    assert set(commands()) == set(FILLED)
    assert len(COMMANDS) == len(set(COMMANDS)) == len(FILLED) - 1  # validate brings merge


@pytest.mark.parametrize("name", FILLED)
def test_a_flag_is_a_field_and_a_field_is_a_flag(name):
    given, filled = set(flags_of(commands()[name])), set(defaults(name))
    read, made = READ.get(name, set()), MADE.get(name, set())
    assert given - filled - read == set(), "flags that go nowhere"
    assert filled - given - made == set(), "fields that no flag sets"
    assert read <= given and made <= filled and not made & given - read, "the lists above are old"


@pytest.mark.parametrize("name", FILLED)
def test_defaults_stand_in_the_options_alone_and_the_help_says_the_same(name):
    told = 0
    for dest, action in flags_of(commands()[name]).items():
        default = defaults(name).get(dest, Parameter.empty)
        if action.default not in (None, argparse.SUPPRESS):
            assert dest in READ.get(name, set()), f"{dest}: its default stands twice"
        if action.nargs == 0 or not isinstance(default, (str, int, float, Path, tuple)):
            continue
        if default == ():
            continue
        words = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = re.search(r"\(([^()]*)\)$", action.help)
        assert shown, f"{name}: the help of {dest} does not say its default, {words}"
        said = re.split("[; ]", shown[1])[0]
        same = said == words or (isinstance(default, float) and said == f"{default:g}")
        assert same, (dest, shown[1], words)
        told += 1
    expected = {"build": 9, "run": 2, "compare": 1, "tune": 5, "visualize": 2, "bench": 6}
    assert told >= expected.get(name, 0)


def test_the_help_of_bench_tells_both_defaults_of_seconds():
    words = flags_of(commands()["bench"])["settings.seconds"].help
    assert f"({Settings().seconds:g}; {SETTINGS.seconds:g} with --table)" in words


def test_what_is_not_given_is_the_options_default():
    given = make_parser().parse_args(["build", "deit_s"])
    assert flags.fill(BuildOptions, given, out=Path("a")) == BuildOptions("deit_s", Path("a"))
    assert flags.fill(QuantizeOptions, given, "quantize.") == QuantizeOptions()
    given = make_parser().parse_args(["bench", "a"])
    assert flags.fill(BenchOptions, given) == BenchOptions(Path("a"))
    assert flags.fill(Settings, given, "settings.") == Settings()


def test_what_is_given_is_in_the_options():
    words = ["build", "deit_s", "--images", "a", "b", "--no-proportional", "--workspace", "512"]
    words += ["--calib", "c", "--calib-images", "8", "--force-int8", "--batch", "4"]
    given = make_parser().parse_args(words)
    made = flags.fill(
        BuildOptions, given, out=Path("o"), quantize=flags.fill(QuantizeOptions, given, "quantize.")
    )
    assert made.images == (Path("a"), Path("b")), "a tuple, as the options say"
    assert made.proportional is False and made.workspace_mb == 512 and made.batch == (4, 4, 4)
    assert made.quantize == QuantizeOptions(calib="c", images=8, force=True)
    words = ["bench", "a", "--no-energy", "--seconds", "2", "--num-warm-iter", "3"]
    given = make_parser().parse_args([*words, "--backend", "torch,engine", "-b", "1,8"])
    made = flags.fill(BenchOptions, given, settings=flags.fill(Settings, given, "settings."))
    assert made.energy_seconds == 0.0 and made.settings == Settings(warm_iterations=3, seconds=2.0)
    assert made.backends == ("torch", "engine") and made.batches == (1, 8)
    given = make_parser().parse_args(["run", "a", "x", "--no-cuda-graph", "--no-manifest"])
    assert flags.fill(Options, given) == Options(cuda_graph=False, use_manifest=False)


def test_help_waits_for_nothing_heavy():
    code = "from jmp_deploy.cli.main import make_parser; make_parser().format_help(); import sys; "
    code += (
        "print(sorted({'rich', 'numpy', 'PIL', 'msgspec', 'urllib.request'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
