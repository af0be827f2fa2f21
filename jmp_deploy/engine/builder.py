"""Deployable ONNX -> engine, with TensorRT or TensorRT-RTX.

The builder runs in a process of its own (`worker.py`), for three reasons: what PyTorch
holds in memory is given back before a Jetson starts to build; a builder that aborts or is killed
ends in an error message, not in a dead process; and TensorRT-RTX's ONNX parser looks for
"libtensorrt_rtx.so" by a name that its wheel lacks and ends the whole process if it finds none, so
the worker is started with a folder on LD_LIBRARY_PATH in which that name exists.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from ..core.device import FP8_FROM, gpus
from ..core.errors import EngineError, engine_errors, install_command
from ..core.files import atomic_path
from ..core.manifest import EngineFacts, EngineOptions, Flavour, Precision
from ..core.paths import IMPORT_ROOT, cache_dir
from .api import FLAVOURS, MODULES, compute_capabilities, installed, load

TARGETS = ["75", "80", "86", "87", "88", "89", "90", "100", "101", "103", "110", "120", "121"]
"""Compute capabilities that TensorRT 10 and later were made for."""
EVENT = "@jmp "
"""Prefix of the worker's lines that are meant for us; anything else is the builder's log."""

Progress = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps in all)."""


@dataclass(frozen=True)
class Choice:
    """A builder and why it was picked; `flavour` is None where none can work here."""

    flavour: Flavour | None
    reason: str


@dataclass(frozen=True)
class EngineSpec:
    """What to build.

    Attributes:
        batch: (min, opt, max) images; the three of the optimization profile.
        image: shape of one input: (channels, height, width).
        options: targets and limits.
        precision: of the model.
    """

    batch: tuple[int, int, int]
    image: tuple[int, ...]
    options: EngineOptions = field(default_factory=EngineOptions)
    precision: Precision = "fp16"


def choose(preference: str = "auto") -> Choice:
    """Picks the builder: "auto", "tensorrt", "rtx" or "none".

    Raises:
        EngineError: the one asked for cannot work here.
    """
    if preference == "none":
        return Choice(None, "no engine was asked for (--engine none)")
    verdicts = {flavour: _obstacle(flavour) for flavour in FLAVOURS}
    if preference != "auto":
        if obstacle := verdicts[preference]:
            raise EngineError(f"cannot build with {preference}: {obstacle[0]}", obstacle[1])
        return Choice(cast("Flavour", preference), "asked for")
    if verdicts["tensorrt"] is None:
        return Choice("tensorrt", f"TensorRT is installed and {gpus()[0].name} is here")
    if verdicts["rtx"] is None:
        return Choice("rtx", f"TensorRT: {verdicts['tensorrt'][0]}")
    reasons = "; ".join(f"{flavour}: {why[0]}" for flavour, why in verdicts.items() if why)
    return Choice(None, reasons)


def refuse_targets(choice: Choice, targets: Sequence[str], precision: Precision = "fp16") -> None:
    """Raises EngineError, before anything is built, for targets that a builder cannot build for, or
    that lack a precision."""
    for_precision(EngineOptions(tuple(targets)), choice.flavour, precision)
    if not targets or choice.flavour is None:
        return
    if choice.flavour != "rtx":
        raise EngineError(
            f"the builder here is TensorRT ({choice.reason}), which builds for the GPU at hand",
            "leave out --targets, or add --engine rtx",
        )
    known = _known_targets()
    if strange := [name for name in targets if name not in known]:
        raise EngineError(
            f"TensorRT-RTX cannot build for {', '.join(strange)}", f"it knows {', '.join(known)}"
        )


def for_precision(
    options: EngineOptions, flavour: Flavour | None, precision: Precision
) -> EngineOptions:
    """The options of an artifact's engines. Where FP8 is built ahead of time for all GPUs, those
    are all that have it.

    Raises:
        EngineError: a target, or the GPU that an engine is built for, has no FP8.
    """
    if precision != "fp8" or not (flavour or options.targets):
        return options
    here = gpus()[:1]
    names = {name: _capability(name) for name in options.targets}
    if not names and here:
        names = {here[0].name: list(here[0].compute_capability)}
    if lacking := [name for name, capability in names.items() if capability < [*FP8_FROM]]:
        raise EngineError(
            f"{', '.join(lacking)}: no FP8 there; it begins with compute capability "
            "{}.{} (Ada, Hopper, Blackwell, Thor)".format(*FP8_FROM),
            "use --precision int8, which every GPU has"
            + (", or --targets with those that have FP8" if options.targets else ""),
        )
    if names or flavour != "rtx":
        return options
    able = (name for name in _known_targets() if _capability(name) >= [*FP8_FROM])
    return replace(options, targets=tuple(able))


def _known_targets() -> list[str]:
    """What TensorRT-RTX can build for."""
    return [f"sm_{major}{minor}" for major, minor in compute_capabilities(load("rtx"))]


def build_engine(
    model: Path,
    target: Path,
    flavour: Flavour,
    spec: EngineSpec,
    *,
    plugin: Path | None = None,
    timing_cache: Path | None = None,
    log: Path | None = None,
    on_progress: Progress | None = None,
) -> EngineFacts:
    """Builds an engine from a deployable model and writes it to `target`, whole or not at all.

    Args:
        model: deployable ONNX.
        target: the engine, a plain TensorRT plan.
        flavour: "tensorrt" or "rtx".
        spec: profile, targets and limits.
        plugin: our plugin library; needed if the model has reductions.
        timing_cache: file that is read if it exists, and written.
        log: file for the builder's messages, kept when the build fails too.

    Returns:
        What was built; why this builder, and which plugin, is the caller's to say.

    Raises:
        EngineError: the parser refused the model, or the build failed; with the builder's words.
    """
    options = spec.options
    with atomic_path(target) as temporary:
        made = _try_again(
            {
                "action": "build",
                "flavour": flavour,
                "model": str(model),
                "engine": str(temporary),
                "plugin": str(plugin) if plugin else None,
                "batch": spec.batch,
                "image": spec.image,
                "targets": [_capability(name) for name in options.targets],
                "use_gpu": flavour == "rtx" and not options.targets and bool(gpus()),
                "workspace_mb": options.workspace_mb,
                "embed_plugin": options.embed_plugin and plugin is not None,
                # Without a GPU nothing is timed; a cache would only fill the log with errors.
                "timing_cache": str(timing_cache) if timing_cache and gpus() else None,
            },
            log=log,
            on_progress=on_progress,
        )
    made["targets"] = tuple(made["targets"])
    embedded = options.embed_plugin and plugin is not None
    return EngineFacts(flavour=flavour, precision=spec.precision, embeds_plugin=embedded, **made)


def parse_network(model: Path, flavour: str, *, plugin: Path | None = None) -> dict[str, Any]:
    """The network as the TensorRT parser sees it; needs no GPU with TensorRT-RTX.

    Returns:
        {"version", "layers": [{"name", "type", "outputs": [{"name", "dtype", "shape"}]}], ...}

    Raises:
        EngineError: the parser refused the model.
    """
    request = {"action": "parse", "flavour": flavour, "model": str(model)}
    return _work({**request, "plugin": str(plugin) if plugin else None})


def inspect_engine(path: Path, flavour: str, *, plugin: Path | None = None) -> dict[str, Any]:
    """Layers, formats and memory of a built engine. An engine opens only where a GPU is.

    Raises:
        EngineError: no GPU, or the engine does not fit this machine.
    """
    if not gpus():
        raise EngineError(
            f"{path} cannot be opened: an engine can only be deserialized where a GPU is",
            "inspect the artifact's folder or its model.trt.onnx instead, or run this on the "
            "target device",
        )
    request = {"action": "inspect", "flavour": flavour, "engine": str(path)}
    return _work({**request, "plugin": str(plugin) if plugin else None})


def worker_environment(flavour: str) -> dict[str, str]:
    """The environment in which `flavour` is safe to use."""
    environment = dict(os.environ)
    # The worker finds this very package, however our caller came to import it.
    paths = [str(IMPORT_ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if flavour != "rtx":
        environment.pop("POLYGRAPHY_USE_TENSORRT_RTX", None)
        return environment
    environment["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    folders = [str(_unversioned_library())]
    if environment.get("LD_LIBRARY_PATH"):
        folders.append(environment["LD_LIBRARY_PATH"])
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(folders)
    return environment


def _obstacle(flavour: str) -> tuple[str, str] | None:
    """Why a flavour cannot build here, and what to do; None if it can."""
    if not installed(flavour):
        return f"{MODULES[flavour]} is not installed", install_command(flavour)
    if find_spec("polygraphy") is None:
        return "polygraphy is not installed", install_command(flavour)
    if flavour == "tensorrt" and not gpus():
        return (
            "no GPU is here to build on",
            f"use --engine rtx ({install_command('rtx')}), or build on the device",
        )
    return None


def _try_again(request: dict[str, Any], **options: Any) -> dict[str, Any]:
    """`_work`, a second time where TensorRT-RTX 1.7 lost a race of its own threads.

    Seen once in some hundred builds on a loaded machine: Myelin's "gThreadContext != nullptr".
    """
    try:
        return _work(request, **options)
    except EngineError as error:
        if "gThreadContext" not in error.message:
            raise
    return _work(request, **options)


def _work(
    request: dict[str, Any], *, log: Path | None = None, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Runs the worker and reads its events; its other output goes to the log."""
    command = [sys.executable, "-m", "jmp_deploy.engine.worker"]
    result: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    with (
        engine_errors(f"the {MODULES[request['flavour']]} process cannot be run"),
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise,
    ):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=worker_environment(request["flavour"]),
        )
        assert process.stdin and process.stdout
        try:
            with process.stdin as stdin:
                json.dump(request, stdin)
            for line in process.stdout:
                if not line.startswith(EVENT):
                    noise.write(line)
                    continue
                event = json.loads(line[len(EVENT) :])
                if event["event"] == "progress" and on_progress:
                    on_progress(event["phase"], event["done"], event["total"])
                elif event["event"] == "result":
                    result = event["value"]
                elif event["event"] == "error":
                    failure = event
            code = process.wait()
        except BrokenPipeError:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        noise.seek(0)
        text = noise.read()
    if log is not None:
        with atomic_path(log) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if code in (-signal.SIGINT, 130):  # Ctrl-C goes to both processes
        raise KeyboardInterrupt
    if failure is not None:
        words = f": {_builder_words(text)}" if failure["log_says_more"] else ""
        hint = failure["hint"] + (f"; the builder's log is {log}" if log else "")
        raise EngineError(failure["message"] + words, hint)
    if result is None or code != 0:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise EngineError(
            f"the {MODULES[request['flavour']]} process ended with {how}: {_builder_words(text)}",
            _obituary_hint(code, log),
        )
    return result


def _builder_words(text: str) -> str:
    """The line of a builder's log that says best what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("[E]").strip() for line in lines if line.startswith("[E]")]
    nodes = [line for line in errors if line.startswith("In node")]
    # Without a GPU every run complains of the missing driver, to no effect.
    others = [line for line in errors if "cudaError" not in line]
    return (nodes[:1] or others[-1:] or lines[-1:] or ["it said nothing"])[0]


def _obituary_hint(code: int, log: Path | None) -> str:
    if code in (-signal.SIGKILL, 137):
        return "most likely out of memory: try a smaller --batch or --workspace, or add swap"
    return "run `python -m jmp_deploy doctor`" + (f"; the builder's log is {log}" if log else "")


def _capability(name: str) -> list[int]:
    """ "sm_86" -> [8, 6]; raises EngineError for anything else."""
    found = re.fullmatch(r"(?:sm_)?([0-9]{1,2})([0-9])", name.lower())
    if found is None or f"{found[1]}{found[2]}" not in TARGETS:
        raise EngineError(
            f"unknown target {name!r:.40}",
            f"write targets as sm_86,sm_89; TensorRT knows {', '.join(TARGETS)}",
        )
    return [int(found[1]), int(found[2])]


def _unversioned_library() -> Path:
    """A folder of our cache where libtensorrt_rtx.so is a link to the wheel's library."""

    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("the libraries of TensorRT-RTX are not installed", install_command("rtx"))
    found = sorted(Path(next(iter(spec.submodule_search_locations))).glob("libtensorrt_rtx.so.*"))
    if not found:
        raise EngineError(
            "tensorrt_rtx_libs holds no libtensorrt_rtx.so.*",
            f"{install_command('rtx')} --force-reinstall",
        )
    folder = cache_dir() / "tensorrt_rtx"
    link = folder / "libtensorrt_rtx.so"
    if not (link.is_symlink() and link.resolve() == found[0].resolve()):
        with atomic_path(link) as temporary:
            temporary.unlink()
            temporary.symlink_to(found[0].resolve())
    return folder


def python_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Checks and normalises a list of targets."""
    return tuple(f"sm_{major}{minor}" for major, minor in (_capability(name) for name in names))
