"""The command line: a thin shell over the modules, and the one place that turns errors into text.

Exit codes: 0 success; 1 a check failed (the artifact is kept); 2 usage or environment.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, cli_accuracy
from .errors import JmpDeployError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

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
        options = make_parser().parse_args(arguments)
        options.rebuild = shlex.join(["python", "-m", "jmp_deploy", *arguments])
        return int(options.handler(options))
    except SystemExit as exit_:  # argparse: --help, --version, wrong usage
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-written is left behind", None, 130)
    except JmpDeployError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        extra = EXTRAS.get(name)
        hint = f'pip install "jmp-deploy[{extra}]"' if extra else f"pip install {name}"
        return _fail(f"this command needs {name}, which is not installed", hint, 2)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("out of memory", "try a smaller model, image size or batch", 2)
    except Exception as error:  # a bug of ours, or a library's: one line for the user all the same
        if os.environ.get("JMP_DEPLOY_DEBUG"):
            traceback.print_exc()
        reason = str(error).strip().split("\n")[0]
        return _fail(
            f"unexpected {type(error).__name__}: {reason}",
            "set JMP_DEPLOY_DEBUG=1 to see where it comes from",
            2,
        )


def make_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="jmp_deploy",
        description="TensorRT engines of timm vision transformers that do a third less work "
        "(JMP: joint merging and pruning of tokens).",
        epilog="Start with `python -m jmp_deploy doctor`, then with "
        "`python -m jmp_deploy build deit_s`.",
    )
    parser.add_argument("--version", action="version", version=f"jmp_deploy {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_build, _add_run, _add_compare, _add_inspect, _add_report):
        add(commands)
    _add_doctor(commands)
    _add_plugin(commands)
    cli_accuracy.add_commands(commands, _command)
    return parser


def _command(
    commands: Any, name: str, handler: Any, summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  python -m jmp_deploy {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON too; - for standard output"
    )
    return parser


def _add_build(commands: Any) -> None:
    parser = _command(
        commands,
        "build",
        _build,
        "make an engine: weights -> JMP -> ONNX -> precision -> check -> plugin -> engine",
        (
            "build deit_s",
            "build deit_s --dense                          # the baseline",
            "build deit_s --schedule paper --strategy merge",
            "build dinov2_s --weights dinov2_s.safetensors --batch 1,8,64",
            "build vit_base_patch16_224 --keep-rate 0.7 --blocks 3,6,9 --precision fp32",
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="deit_s, dinov2_s, ... or any timm name")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="artifact folder (artifacts/MODEL)"
    )
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="auto|pretrained|random|PATH",
        help="auto takes pretrained ones, or random ones (for timing only) where the hub cannot be "
        "reached; PATH is .safetensors or a .pth of plain tensors (auto)",
    )
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16", help="(fp16)")
    parser.add_argument(
        "--schedule",
        metavar="NAME|LIST|FILE",
        help="which blocks reduce, and to how many patch tokens: spread, paper, 3:138,6:97,9:68, "
        "r18@2-10 or a .json file (spread)",
    )
    parser.add_argument(
        "--keep-rate", type=float, metavar="R", help="with --blocks: keep ceil(R*M) in each"
    )
    parser.add_argument("--blocks", type=_integers, metavar="I,J,..", help="0-based")
    parser.add_argument(
        "--tau",
        type=float,
        default=0.7,
        help="similarity from which a token is merged rather than pruned (0.7)",
    )
    parser.add_argument(
        "--granularity",
        choices=("token", "sample"),
        default="token",
        help="decide per token or for all tokens of an image at once (token)",
    )
    parser.add_argument(
        "--strategy",
        choices=("jmp", "merge", "prune"),
        default="jmp",
        help="jmp uses tau; merge and prune do only that (jmp)",
    )
    parser.add_argument(
        "--no-proportional",
        action="store_true",
        help="do not weigh tokens in attention by the patches that they stand for",
    )
    parser.add_argument("--dense", action="store_true", help="no JMP: the baseline")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="(the model's own)")
    parser.add_argument(
        "--batch",
        type=_batch,
        default=(1, 8, 32),
        metavar="N|MIN,OPT,MAX",
        help="images per inference: one size, or a range and what to tune for (1,8,32)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "tensorrt", "rtx", "none"),
        default="auto",
        help="builder; auto takes TensorRT where a GPU is, else TensorRT-RTX ahead of time (auto)",
    )
    parser.add_argument(
        "--targets",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="sm_86,..",
        help="GPUs of a TensorRT-RTX engine (the one that is here, else all that it knows)",
    )
    parser.add_argument(
        "--workspace", type=_positive, metavar="MIB", help="limit of the builder's scratch memory"
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help="photos for the check (those that scikit-image and scikit-learn ship)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights (0)")


def _add_run(commands: Any) -> None:
    parser = _command(
        commands,
        "run",
        _run,
        "run an artifact on images: top classes, or features of a model without a classifier",
        ("run artifacts/deit_s photo.jpg", "run artifacts/dinov2_s photos/ --json features.json"),
    )
    _add_artifact(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument(
        "--backend",
        choices=("auto", "engine", "onnxruntime"),
        default="auto",
        help="auto takes the engine where a GPU is, else ONNX Runtime (auto)",
    )
    parser.add_argument("--topk", type=_positive, default=5, metavar="K", help="classes (5)")
    parser.add_argument(
        "--allow-random", action="store_true", help="run an artifact with random weights"
    )


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _compare,
        "compare PyTorch, ONNX Runtime and the engine on the same images; exit 1 outside tolerance",
        (
            "compare artifacts/deit_s",
            "compare artifacts/deit_s --backends torch,engine --images photos/ --json -",
        ),
    )
    _add_artifact(parser)
    parser.add_argument(
        "--backends",
        type=_backends,
        metavar="A,B,..",
        help="of torch, onnxruntime, engine; the first is the reference (all that run here)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help="files or folders (the artifact's reference images)",
    )
    parser.add_argument(
        "--weights", metavar="PATH", help="if they are not where the build had them"
    )


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        _inspect,
        "show what is in an artifact, an ONNX model (as the TensorRT parser sees it) or an engine",
        ("inspect artifacts/deit_s", "inspect artifacts/deit_s/model.trt.onnx --json -"),
    )
    parser.add_argument("path", type=Path, metavar="DIR|FILE")


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        _report,
        "summarise an artifact: FLOPs, sizes, times, agreement, what this machine could not do",
        ("report artifacts/deit_s", "report artifacts/deit_s --compare compare.json"),
    )
    _add_artifact(parser)
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="a result of `compare --json FILE` to include"
    )


def _add_doctor(commands: Any) -> None:
    _command(
        commands,
        "doctor",
        _doctor,
        "tell what is installed, found and usable here, and the command that mends each gap",
        ("doctor", "doctor --json doctor.json"),
    )


def _add_plugin(commands: Any) -> None:
    parser = _command(
        commands,
        "plugin",
        _plugin,
        "build the TensorRT plugin (`build` does it by itself), or say where it is",
        ("plugin build", "plugin build --arch sm_87,sm_110 --force", "plugin path"),
    )
    parser.add_argument("action", choices=("build", "path"))
    parser.add_argument(
        "--arch",
        type=lambda text: text.split(","),
        metavar="sm_87,..",
        help="GPU architectures (all that the compiler knows of 75, 80, 86, 87, 89, 90, 110, 120)",
    )
    parser.add_argument("--force", action="store_true", help="build even if it is there")


def _add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="artifact folder made by `build`")


def _build(options: argparse.Namespace) -> int:
    from . import render
    from .build import BuildOptions, build
    from .progress import Stages

    given = [options.keep_rate is not None or options.blocks is not None, bool(options.schedule)]
    if all(given) or (options.dense and any(given)):
        raise JmpDeployError(
            "--schedule, --keep-rate with --blocks, and --dense exclude each other", "choose one"
        )
    name = options.model.replace("/", "_") + ("-dense" if options.dense else "")
    out = options.out or Path("artifacts") / name
    with Stages(_console(stderr=True)) as stages:
        data = build(
            BuildOptions(
                model=options.model,
                out=out,
                weights=options.weights,
                precision=options.precision,
                schedule=options.schedule or "spread",
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
    _show(options, render.artifact(data, str(out)), data)
    if not data["check"]["ok"]:
        return _fail(
            "the portable model does not agree with PyTorch within tolerance; the artifact is kept",
            f"look closer with `python -m jmp_deploy compare {shlex.quote(str(out))}`",
            1,
        )
    return 0


def _run(options: argparse.Namespace) -> int:
    from . import render
    from .predict import predict

    records, backend, reason = predict(
        options.dir,
        options.images,
        backend=options.backend,
        topk=options.topk,
        allow_random=options.allow_random,
    )
    _show(options, render.predictions(records, backend, reason), records)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from . import render
    from .compare import compare_artifact
    from .images import find_images

    images = find_images(options.images) if options.images else []
    result = compare_artifact(
        options.dir, backends=options.backends, images=images, weights=options.weights
    )
    _show(options, render.comparison(result), result)
    return 0 if result["ok"] else 1


def _inspect(options: argparse.Namespace) -> int:
    from . import render
    from .inspection import inspect_path

    result = inspect_path(options.path)
    _show(options, render.inspection(result), result)
    return 0


def _report(options: argparse.Namespace) -> int:
    import json

    from . import manifest, render

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
    _show(options, render.report(data, str(options.dir), compared), value)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    checks = doctor.collect()
    _show(options, doctor.render(checks), doctor.as_json(checks))
    return 0


def _plugin(options: argparse.Namespace) -> int:
    from . import plugin, render

    if options.action == "build":
        with _console(stderr=True).status("compiling the plugin"):
            path = plugin.build_plugin(options.arch, force=options.force)
    else:
        path = plugin.plugin_library(build=False)
    info = {"path": str(path), **plugin.plugin_info(path)}
    rows = [(name, _plain(value)) for name, value in info.items()]
    _show(options, render.facts(rows), info)
    return 0


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _show(options: argparse.Namespace, pretty: RenderableType, value: Any) -> None:
    """Prints for people, and writes JSON if asked; with `--json -` people get standard error."""
    import json

    from .files import write_bytes

    to_stdout = options.json == "-"
    _console(stderr=to_stdout).print(pretty)
    if options.json is None:
        return
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n"
    if to_stdout:
        sys.stdout.write(text)
    else:
        write_bytes(Path(options.json), text.encode())


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=False)


def _fail(message: str, hint: str | None, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 3,6,9") from error


def _batch(text: str) -> tuple[int, int, int]:
    numbers = _integers(text)
    if len(numbers) == 1:
        numbers = numbers * 3
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor MIN,OPT,MAX in rising order")
    return numbers[0], numbers[1], numbers[2]


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _backends(text: str) -> list[str]:
    known = ("torch", "onnxruntime", "engine")
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    if len(set(names)) < 2:
        raise argparse.ArgumentTypeError("two different backends at least")
    return names
