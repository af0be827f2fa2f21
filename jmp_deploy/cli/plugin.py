"""The command `plugin`."""

from __future__ import annotations

import argparse
from typing import Any

from ..plugin.toolchain import DEVICES
from . import flags, show


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _plugin,
        "plugin",
        "build the TensorRT plugin (`build` does it by itself), or say where it is",
        (
            "plugin build",
            "plugin build --arch sm_87,sm_110 --force",
            "plugin build --for thor                       # on a workstation, for a Jetson",
            "plugin path",
        ),
    )
    parser.add_argument("action", choices=("build", "path"))
    parser.add_argument(
        "--arch",
        dest="archs",
        type=flags.words,
        metavar="sm_87,..",
        help="GPU architectures, or all for those of a release (those of the GPUs here; without a "
        "GPU sm_75 and sm_80, on aarch64 sm_87)",
    )
    parser.add_argument(
        "--for",
        dest="device",
        choices=tuple(DEVICES),
        help="compile for a Jetson: "
        + "; ".join(f"{name}, {device.title}" for name, device in DEVICES.items())
        + ". Needs g++-aarch64-linux-gnu and the CUDA runtime of aarch64 (JMP_AARCH64_CUDA)",
    )
    parser.add_argument("--force", action="store_true", help="build even if it is there")


def _plugin(given: argparse.Namespace) -> int:
    from ..plugin.library import build_plugin, plugin_info, plugin_library

    if given.action == "build":
        with show.Progress("compiling the plugin", transient=True):
            path = flags.fill(build_plugin, given)
    else:
        path = plugin_library(build=False)
    info = {"path": str(path), **plugin_info(path)}
    show.show(given, [show.facts((name, _plain(value)) for name, value in info.items())], info)
    return 0


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
