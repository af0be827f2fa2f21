"""The command line: a thin shell over the modules, and the one place that turns errors into text.

Exit codes: 0 success; 1 a check failed (the artifact is kept); 2 usage or environment.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core import interrupt
from ..core.errors import JmpDeployError, install_command
from . import bench, show, tune, validate
from .flags import make_parser

EXTRAS = {
    "torch": "export",
    "torchvision": "export",
    "timm": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_graphsurgeon": "export",
    "onnxconverter_common": "export",
    "safetensors": "export",
    "huggingface_hub": "export",
    "polygraphy": "runtime",
    "onnxruntime": "runtime",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
}
"""Package that is missing -> extra of ours that installs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Never raises, never shows a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = make_parser(tune.add_commands, bench.add_commands, validate.add_commands)
        options = parser.parse_args(arguments)
        options.rebuild = shlex.join(["python", "-m", "jmp_deploy", *arguments])
        with interrupt.remembered():
            return HANDLERS[options.command](options)
    except SystemExit as exit_:  # argparse: --help, --version, wrong usage
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        return show.fail("interrupted; nothing half-written is left behind", None, 130)
    except JmpDeployError as error:
        return show.fail(error.message, error.hint, error.exit_code)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        extra = EXTRAS.get(name)
        hint = install_command(extra) if extra else f"pip install {name}"
        return show.fail(f"this command needs {name}, which is not installed", hint, 2)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return show.fail("out of memory", "try a smaller model, image size or batch", 2)
    except Exception as error:  # a bug of ours, or a library's: one line for the user all the same
        if os.environ.get("JMP_DEPLOY_DEBUG"):
            traceback.print_exc()
        reason = str(error).strip().split("\n")[0]
        return show.fail(
            f"unexpected {type(error).__name__}: {reason}",
            "set JMP_DEPLOY_DEBUG=1 to see where it comes from",
            2,
        )


def _build(options: argparse.Namespace) -> int:
    from ..pipeline import DEFAULT_SCHEDULE, BuildOptions, build
    from ..quantize.int8 import Int8Options
    from . import render
    from .progress import Stages

    given = [options.keep_rate is not None or options.blocks is not None, bool(options.schedule)]
    if all(given) or (options.dense and any(given)):
        raise JmpDeployError(
            "--schedule, --keep-rate with --blocks, and --dense exclude each other", "choose one"
        )
    name = options.model.replace("/", "_") + ("-dense" if options.dense else "")
    out = options.out or Path("artifacts") / name
    with Stages(show.console(stderr=True)) as stages:
        made = build(
            BuildOptions(
                model=options.model,
                out=out,
                weights=options.weights,
                precision=options.precision,
                int8=Int8Options(
                    calib=options.calib,
                    images=options.calib_images,
                    method=options.calib_method,
                    cache=options.calib_cache,
                    max_drop=options.max_drop,
                    force=options.force_int8,
                ),
                schedule=options.schedule or DEFAULT_SCHEDULE,
                keep_rate=options.keep_rate,
                blocks=options.blocks,
                tau=options.tau,
                granularity=options.granularity,
                strategy=options.strategy,
                proportional=not options.no_proportional,
                dense=options.dense,
                img_size=options.img_size,
                batch=options.batch,
                engine=options.engine,
                targets=options.targets,
                workspace_mb=options.workspace,
                images=tuple(options.images),
                seed=options.seed,
                rebuild=options.rebuild,
            ),
            on_stage=stages.stage,
            on_progress=stages.progress,
        )
    data = made.to_json()
    show.show(options, render.artifact(data, str(out)), data)
    if not made.check.ok:
        return show.fail(
            "the portable model does not agree with PyTorch within tolerance; the artifact is kept",
            f"look closer with `python -m jmp_deploy compare {shlex.quote(str(out))}`",
            1,
        )
    return 0


def _run(options: argparse.Namespace) -> int:
    from ..backends.predict import Options, predict
    from . import render

    if options.rebuild_engine:
        _rebuild(options.dir)
    with _warnings_as_lines():
        result = predict(
            options.dir,
            options.images,
            Options(
                backend=options.backend,
                batch=options.batch,
                cuda_graph=not options.no_cuda_graph,
                use_manifest=not options.no_manifest,
                allow_random=options.allow_random,
            ),
            topk=options.topk,
        )
    table = render.predictions(result.records, result.backend, result.reason)
    show.show(options, table, [*result.records, *result.skipped])
    for entry in result.skipped:
        print(f"skipped: {entry['error']}", file=sys.stderr)
    if not result.ok:
        total = len(result.records) + len(result.skipped)
        return show.fail(f"{len(result.skipped)} of {total} images cannot be read", None, 1)
    return 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What the library warns of, without the line of our source where it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def _rebuild(folder: Path) -> None:
    """Makes the engine of an artifact anew where it does not fit."""
    from ..bench.int8 import settle
    from ..core import artifact
    from ..engine.stage import rebuild, why_rebuild
    from .progress import Stages

    found = artifact.read(folder)
    reason = why_rebuild(found)
    if reason is None:
        return
    print(f"the engine is made anew: {reason}", file=sys.stderr)
    with Stages(show.console(stderr=True)) as stages:
        rebuild(found, settle, on_stage=stages.stage, on_progress=stages.progress)


def _compare(options: argparse.Namespace) -> int:
    from ..compare.compare import compare_artifact
    from ..core.images import find_images
    from . import compare_view

    images = find_images(options.images) if options.images else []
    with show.console(stderr=True).status("comparing"):
        result = compare_artifact(
            options.dir,
            backends=options.backends,
            images=images,
            limit=options.limit,
            weights=options.weights,
            min_cosine=options.min_cosine,
            max_abs=options.max_abs,
            debug=options.debug,
        )
    show.show(options, compare_view.comparison(result), result)
    return 0 if result["ok"] else 1


def _inspect(options: argparse.Namespace) -> int:
    from . import render
    from .inspect import inspect_path

    result = inspect_path(options.path)
    show.show(options, render.inspection(result), result)
    return 0


def _report(options: argparse.Namespace) -> int:
    import json

    from ..core import artifact
    from . import compare_view, render

    found = artifact.read(options.dir)
    found.verify()
    compared = None
    if options.compare:
        try:
            compared = json.loads(options.compare.read_text(encoding="utf-8"))
            compared["pairs"], compared["skipped"], compared["tolerance"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JmpDeployError(
                f"{options.compare} is not a result of `compare --json`: {error}"
            ) from error
    data = found.to_json()
    value = {"manifest": data, "compare": compared}
    table = compare_view.comparison(compared) if compared else None
    show.show(options, render.report(data, str(options.dir), compared, table), value)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    checks = doctor.collect()
    show.show(options, doctor.render(checks), doctor.as_json(checks))
    return 0


def _plugin(options: argparse.Namespace) -> int:
    from ..plugin import library
    from . import render

    if options.action == "build":
        with show.console(stderr=True).status("compiling the plugin"):
            path = library.build_plugin(options.arch, force=options.force)
    else:
        path = library.plugin_library(build=False)
    info = {"path": str(path), **library.plugin_info(path)}
    rows = [(name, _plain(value)) for name, value in info.items()]
    show.show(options, render.facts(rows), info)
    return 0


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "build": _build,
    "run": _run,
    "compare": _compare,
    "inspect": _inspect,
    "report": _report,
    "doctor": _doctor,
    "plugin": _plugin,
    **tune.HANDLERS,
    **bench.HANDLERS,
    **validate.HANDLERS,
}
