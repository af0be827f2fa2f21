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

from . import cli_accuracy, cli_bench, cli_validate, interrupt, output
from .arguments import make_parser
from .errors import BrokenPackageError, JmpDeployError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Never raises, never shows a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = make_parser(
            cli_accuracy.add_commands, cli_bench.add_commands, cli_validate.add_commands
        )
        options = parser.parse_args(arguments)
        options.rebuild = shlex.join(["python", "-m", "jmp_deploy", *arguments])
        with interrupt.remembered():
            return HANDLERS[options.command](options)
    except KeyboardInterrupt:
        return output.fail("interrupted; nothing half-written is left behind", None, 130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return output.fail("out of memory", "try a smaller model, image size or batch", 2)
    except (Exception, SystemExit) as error:
        return _explain(error)


def _explain(error: BaseException) -> int:
    """Ends the command with what went wrong; a failed import is behind many an error."""
    from .packages import import_failure

    failure: JmpDeployError | None = import_failure(error)
    if isinstance(error, JmpDeployError) and not isinstance(failure, BrokenPackageError):
        failure = error  # who misses a package has said what for
    elif isinstance(error, SystemExit) and not failure:  # argparse: --help, wrong usage
        return error.code if isinstance(error.code, int) else 2
    elif os.environ.get("JMP_DEPLOY_DEBUG"):
        traceback.print_exception(error)
    if failure:
        return output.fail(failure.message, failure.hint, failure.exit_code)
    # a bug of ours, or a library's: one line for the user all the same
    return output.fail(
        f"unexpected {type(error).__name__}: {one_line(error)}",
        "set JMP_DEPLOY_DEBUG=1 to see where it comes from",
        2,
    )


def _build(options: argparse.Namespace) -> int:
    from . import render
    from .build import DEFAULT_SCHEDULE, BuildOptions, build
    from .build_int8 import Int8Options
    from .progress import Stages

    given = [options.keep_rate is not None or options.blocks is not None, bool(options.schedule)]
    if all(given) or (options.dense and any(given)):
        raise JmpDeployError(
            "--schedule, --keep-rate with --blocks, and --dense exclude each other", "choose one"
        )
    name = options.model.replace("/", "_") + ("-dense" if options.dense else "")
    out = options.out or Path("artifacts") / name
    with Stages(output.console(stderr=True)) as stages:
        data = build(
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
    output.show(options, render.artifact(data, str(out)), data)
    if not data["check"]["ok"]:
        return output.fail(
            "the portable model does not agree with PyTorch within tolerance; the artifact is kept",
            f"look closer with `python -m jmp_deploy compare {shlex.quote(str(out))}`",
            1,
        )
    return 0


def _run(options: argparse.Namespace) -> int:
    from . import render
    from .predict import Options, predict

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
    output.show(options, table, [*result.records, *result.skipped])
    for entry in result.skipped:
        print(f"skipped: {entry['error']}", file=sys.stderr)
    if not result.ok:
        total = len(result.records) + len(result.skipped)
        return output.fail(f"{len(result.skipped)} of {total} images cannot be read", None, 1)
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
    from . import manifest
    from .progress import Stages
    from .rebuild import rebuild_engine, why_rebuild

    data = manifest.read(folder)
    reason = why_rebuild(folder, data)
    if reason is None:
        return
    print(f"the engine is made anew: {reason}", file=sys.stderr)
    with Stages(output.console(stderr=True)) as stages:
        stages.stage("engine")
        rebuild_engine(folder, data, on_progress=stages.progress)


def _compare(options: argparse.Namespace) -> int:
    from . import compare_view
    from .compare import compare_artifact
    from .images import find_images

    images = find_images(options.images) if options.images else []
    with output.console(stderr=True).status("comparing"):
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
    output.show(options, compare_view.comparison(result), result)
    return 0 if result["ok"] else 1


def _inspect(options: argparse.Namespace) -> int:
    from . import render
    from .inspection import inspect_path

    result = inspect_path(options.path)
    output.show(options, render.inspection(result), result)
    return 0


def _report(options: argparse.Namespace) -> int:
    import json

    from . import compare_view, manifest, render

    data = manifest.read(options.dir)
    manifest.verify(options.dir, data)
    compared = None
    if options.compare:
        try:
            compared = json.loads(options.compare.read_text(encoding="utf-8"))
            compared["pairs"], compared["skipped"], compared["tolerance"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JmpDeployError(
                f"{options.compare} is not a result of `compare --json`: {error}"
            ) from error
    value = {"manifest": data, "compare": compared}
    table = compare_view.comparison(compared) if compared else None
    output.show(options, render.report(data, str(options.dir), compared, table), value)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    checks = doctor.collect()
    output.show(options, doctor.render(checks), doctor.as_json(checks))
    return 0


def _plugin(options: argparse.Namespace) -> int:
    from . import plugin, render

    if options.action == "build":
        with output.console(stderr=True).status("compiling the plugin"):
            path = plugin.build_plugin(options.arch, force=options.force)
    else:
        path = plugin.plugin_library(build=False)
    info = {"path": str(path), **plugin.plugin_info(path)}
    rows = [(name, _plain(value)) for name, value in info.items()]
    output.show(options, render.facts(rows), info)
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
    **cli_accuracy.HANDLERS,
    **cli_bench.HANDLERS,
    **cli_validate.HANDLERS,
}
