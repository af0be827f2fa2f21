"""The command `package`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.errors import JmpDeployError
from . import flags, show

NAMES = ("jetson", "triton", "deepstream", "isaac-ros", "cpp")


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _package,
        "package",
        "make a bundle for a Jetson or a serving stack, or check one",
        (
            "package artifacts/deit_s --for jetson",
            "package artifacts/deit_s --for triton --tensorrt 10.3 -o bundles/deit_s",
            "package artifacts/l4 --for triton --also artifacts/h100     # by GPU",
            "package bundles/deit_s.tar --verify -o deit_s       # checks, then unpacks",
        ),
    )
    parser.add_argument(
        "path", type=Path, metavar="DIR|BUNDLE", help="artifact folder; with --verify a bundle"
    )
    parser.add_argument("--for", dest="target", choices=NAMES, help="what the bundle is for")
    parser.add_argument(
        "--verify", action="store_true", help="check a bundle, folder or .tar; exit 1 if not whole"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder to make, DIR.tar beside it (bundles/ARTIFACT-TARGET); with --verify, where a "
        ".tar is unpacked to",
    )
    parser.add_argument(
        "--tensorrt", metavar="VERSION", help="of the target: an engine of another is refused"
    )
    parser.add_argument(
        "--no-engine",
        dest="with_engine",
        action="store_false",
        help="leave the engine out: it is built on the target (always so for jetson)",
    )
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        metavar="DIR",
        help="triton: the same model with an engine for another kind of GPU (may be repeated)",
    )
    parser.add_argument(
        "--no-wheel", dest="with_wheel", action="store_false", help="leave jmp_deploy out"
    )
    parser.add_argument(
        "--workspace",
        dest="workspace_mb",
        type=flags.positive,
        metavar="MIB",
        help="limit of the builder's scratch memory on the target (jetson: 1024)",
    )
    parser.add_argument("--allow-random", action="store_true", help="pack random weights too")


def _package(given: argparse.Namespace) -> int:
    from ..core.artifact import Artifact
    from ..package import bundle

    if ("verify" in given) == ("target" in given):
        raise JmpDeployError(
            "package needs either --for TARGET or --verify",
            f"--for {'|'.join(NAMES)} makes a bundle of an artifact, --verify checks a bundle",
        )
    if "verify" in given:
        made = bundle.verify_bundle(given.path, given.out)
        words = "whole: every file is as it was packed"
        rows = [("bundle", str(given.path)), ("files", str(len(made.files))), ("check", words)]
        rows += [("unpacked to", str(given.out))] if given.out and given.path.is_file() else []
    else:
        artifact = Artifact.read(given.path)
        name = f"{artifact.folder.resolve().name}-{given.target}"
        out = given.out or Path("bundles") / name
        made = bundle.make_bundle(artifact, flags.fill(bundle.BundleOptions, given, out=out))
        size = sum(made.files.values()) / 1e6
        library = any(path.endswith(".so") for path in made.files)
        rows = [
            ("bundle", f"{made.folder} and {made.tar}"),
            ("files", f"{len(made.files)}, {size:.1f} MB"),
            ("plugin", "compiled library and sources" if library else "sources"),
            ("next", f"{made.folder}/README.md"),
        ]
    value = {"folder": str(made.folder), "tar": str(made.tar), "files": made.files}
    show.show(given, [show.facts(rows)], value)
    return 0
