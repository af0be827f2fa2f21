"""Third-party packages: whether they are here and can be imported, and the command that mends one.

Loads none of them into this process: versions come from metadata, and an import that may crash or
hang is tried in a process of its own. `doctor` asks beforehand, the command line after the fact.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .device import jetson_linux
from .errors import (
    BrokenPackageError,
    MissingPackageError,
    constraints,
    install_command,
    one_line,
)
from .paths import IMPORT_ROOT

TRIAL_SECONDS = 300  # the first import of PyTorch from a cold disk takes a minute on a small board


@dataclass(frozen=True)
class Package:
    """A Python package that we use.

    Attributes:
        name: what people call it.
        module: what is imported.
        extra: the extra of ours that brings it.
        distributions: what may have installed it, as pip names it.
        attribute: what the module must have to be more than a leftover of itself.
        optional: why a machine may well do without it.
    """

    name: str
    module: str
    extra: str
    distributions: tuple[str, ...]
    attribute: str = "__name__"
    optional: str = ""


PACKAGES = (
    Package("PyTorch", "torch", "export", ("torch",)),
    Package("torchvision", "torchvision", "export", ("torchvision",)),
    Package("timm", "timm", "export", ("timm",)),
    Package("safetensors", "safetensors", "export", ("safetensors",)),
    Package("onnx", "onnx", "export", ("onnx",)),
    Package("onnxscript", "onnxscript", "export", ("onnxscript",)),
    Package("onnx-graphsurgeon", "onnx_graphsurgeon", "export", ("onnx-graphsurgeon",)),
    Package(
        "onnxruntime",
        "onnxruntime",
        "runtime",
        ("onnxruntime", "onnxruntime-gpu"),
        attribute="InferenceSession",
    ),
    Package("polygraphy", "polygraphy", "runtime", ("polygraphy",)),
    Package("cuda-bindings", "cuda.bindings.driver", "runtime", ("cuda-bindings",)),
    Package(
        "pycuda", "pycuda", "pycuda", ("pycuda",), optional="only to hand over buffers of pycuda"
    ),
)
TENSORRT = Package(
    "TensorRT",
    "tensorrt",
    "tensorrt",
    ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    attribute="Logger",
)
TENSORRT_RTX = Package(
    "TensorRT-RTX",
    "tensorrt_rtx",
    "rtx",
    ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    attribute="Logger",
)
PAIR = ("torch", "torchvision")

_MARK = "JMP_DEPLOY_IMPORT "  # of our lines among what the packages may print
_KNOWN = {p.module.partition(".")[0]: p for p in (*PACKAGES, TENSORRT, TENSORRT_RTX)}


class Trial(NamedTuple):
    """What came of an import: the module's own version, or why it failed and what mends that."""

    version: str = ""
    trouble: str = ""
    fix: str | None = None


# --- What is installed ---------------------------------------------------------------------------


def importable(module: str) -> bool:
    """Whether there is such a module; says nothing of whether its import succeeds."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):  # the parent package is absent, or half removed
        return False
    except Exception:  # the parent package is there and broken, which an import will tell
        return True
    # tensorrt-stubs leaves a folder `tensorrt` without code, which Python takes for a namespace
    return spec is not None and spec.origin is not None


def installed_version(distribution: str) -> str | None:
    """The version in the metadata, with the build where the package says it: "0.29.1+cu130"."""
    try:
        found = importlib.metadata.distribution(distribution)
        version = found.version
    except Exception:  # absent, or metadata that are cut off
        return None
    if version and "+" not in version and distribution in PAIR:
        # The wheels of the index name their build only here; two builds may not go together.
        try:
            text = Path(str(found.locate_file(f"{distribution}/version.py"))).read_text("utf-8")
        except (OSError, ValueError):
            text = ""
        build = re.search(rf"^__version__.*['\"]{re.escape(version)}(\+[\w.]+)", text, re.MULTILINE)
        version += build[1] if build else ""
    return version


def unmet(distribution: str) -> list[str]:
    """What a package asks for by its metadata and does not find: ["torch>=2.14.0"]."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # part of no base install; an import will tell
        return []
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            wanted = Requirement(line)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            version = installed_version(wanted.name)
            fits = version is not None and wanted.specifier.contains(version, prereleases=True)
        except (InvalidRequirement, ValueError):
            continue
        if applies and not fits:
            found.append(f"{wanted.name}{wanted.specifier}")
    return found


def cure(distribution: str) -> str:
    """The command that mends a package which is installed and does not work."""
    if distribution in PAIR:
        if jetson_linux() is not None:
            return "install torch and torchvision together, from NVIDIA's index for this JetPack"
        return f"python -m pip install --force-reinstall torch torchvision{constraints()}"
    if wanted := unmet(distribution):
        return f"python -m pip install {' '.join(map(shlex.quote, wanted))}"
    return f"python -m pip install --force-reinstall --no-deps {shlex.quote(distribution)}"


# --- Imports that fail ---------------------------------------------------------------------------


def import_failure(error: BaseException | None) -> MissingPackageError | None:
    """What to tell of an error, or its cause, that came out of an import; None if none did.

    The error may be of any type: a missing shared library is an OSError, two builds that do not
    go together are a RuntimeError or an AttributeError.

    Returns:
        BrokenPackageError for a package that is installed, else MissingPackageError.
    """
    while error is not None:
        if failure := _import_failure(error):
            return failure
        error = error.__cause__
    return None


def _import_failure(error: BaseException) -> MissingPackageError | None:
    ours = {_top(__name__), "__main__", *sys.stdlib_module_names}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    bodies = [frame for frame in frames if frame.f_code.co_name == "<module>"]
    # of modules that were being imported, not of what exec and eval ran
    bodies = [frame for frame in bodies if not frame.f_code.co_filename.startswith("<")]
    inside = [_top(str(frame.f_globals.get("__name__", ""))) for frame in bodies]
    inside = [name for name in inside if name not in ours]
    named = _top(error.name or "") if isinstance(error, ImportError) else ""
    if isinstance(error, ModuleNotFoundError) and named and not importable(named):
        return _missing(named, inside[-1] if inside else "")
    module = inside[-1] if inside else named
    return _broken(module, error) if module and module not in ours else None


def _missing(module: str, importer: str) -> MissingPackageError:
    known = _KNOWN.get(module)
    name = known.distributions[0] if known else module
    if module in sys.stdlib_module_names or module.removeprefix("_") in sys.stdlib_module_names:
        return MissingPackageError(
            f"this Python ({sys.executable}) was built without its module {module}",
            "use another Python",
        )
    if known:
        hint = install_command(known.extra)
    else:  # module and distribution may differ in name (yaml, PyYAML); who imports it knows
        wanted = unmet(_distribution(importer)) if importer else []
        hint = f"python -m pip install {' '.join(map(shlex.quote, wanted or [name]))}"
    return MissingPackageError(f"this command needs {name}, which is not installed", hint)


def _broken(module: str, error: BaseException) -> BrokenPackageError:
    name = _distribution(module)
    lines = importlib.metadata.requires(name) or [] if installed_version(name) else []
    asked = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in lines}
    known = [p.distributions[0] for p in PACKAGES if p.extra == "export"]
    known = [d for d in known if d in asked]
    beside = [f"{d} {installed_version(d) or '(missing)'}" for d in known or asked & {"numpy"}]
    what = " beside ".join([f"{name} {installed_version(name) or ''}".strip(), *beside])
    if wanted := unmet(name):
        what += f" (it asks for {', '.join(wanted)})"
    why = one_line(error) or type(error).__name__
    return BrokenPackageError(one_line(f"cannot import {what}: {why}"), one_line(cure(name)))


def _distribution(module: str) -> str:
    """What has installed a module, as pip names it."""
    known = _KNOWN[module].distributions if module in _KNOWN else ()
    for name in known:
        if installed_version(name):
            return name
    try:
        return importlib.metadata.packages_distributions()[module][0]
    except Exception:  # a folder without metadata, or metadata that are cut off
        return known[0] if known else module


# --- Imports that are tried ----------------------------------------------------------------------


def try_imports(packages: Sequence[Package]) -> dict[str, Trial]:
    """Imports them in another process, which may crash or hang: name -> what came of it.

    As long as all goes well one process imports one after the other, for they need each other;
    what comes after a failure is tried in a fresh one.
    """
    found: dict[str, Trial] = {}
    while waiting := [package for package in packages if package.name not in found]:
        trials, end = _import_in_turn(waiting)
        found |= {package.name: trial for package, trial in zip(waiting, trials, strict=False)}
        if len(trials) < len(waiting) and not (trials and trials[-1].trouble):
            broken = waiting[len(trials)]
            found[broken.name] = Trial("", end, cure(_distribution(_top(broken.module))))
    return found


def _import_in_turn(packages: Sequence[Package]) -> tuple[list[Trial], str]:
    """(what came of each until the first that failed, how the process ended)."""
    root = str(IMPORT_ROOT)
    modules = [(package.module, package.attribute) for package in packages]
    code = f"import sys; sys.path.append({root!r}); from {__name__} import report_imports as report"
    command = [sys.executable, "-c", f"{code}; report({modules!r})"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TRIAL_SECONDS
        )
        printed, end = done.stdout, f"its import ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        printed, end = error.stdout or b"", f"its import did not end within {TRIAL_SECONDS} s"
    lines = printed.decode(errors="replace").splitlines()
    marked = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]
    return [Trial(**json.loads(line)) for line in marked], end


def report_imports(modules: Sequence[tuple[str, str]]) -> None:
    """Imports modules in turn until one fails, and prints what came of each as a line of JSON."""
    for name, attribute in modules:
        try:
            module = importlib.import_module(name)
            getattr(module, attribute)
            trial = Trial(str(getattr(module, "__version__", "")))
        except BaseException as error:
            failure = import_failure(error) or _broken(_top(name), error)
            trial = Trial("", failure.message, failure.hint)
        print(f"\n{_MARK}{json.dumps(trial._asdict())}", flush=True)
        if trial.trouble:
            return


def _top(module: str) -> str:
    return module.partition(".")[0]
