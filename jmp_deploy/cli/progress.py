"""Progress of long work: bars on a terminal, lines elsewhere (logs, CI)."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

LABELS = {
    "weights": "loading weights",
    "patch": "patching JMP into the model",
    "export": "exporting to ONNX",
    "calibrate": "calibrating INT8 on images",
    "int8": "quantizing to INT8, and FP16 for the twin",
    "fp16": "converting to FP16",
    "check": "checking ONNX against PyTorch",
    "fuse": "replacing reductions by the plugin",
    "plugin": "compiling the plugin (the first time only)",
    "engine": "building the engine",
    "twin engine": "building the FP16 twin's engine",
    "timing": "timing INT8 against FP16",
}


LINE_EVERY = 20.0
"""Seconds between lines where there is no terminal."""

D = TypeVar("D", bound="Display")


class Display:
    """A context manager around bars; those who draw them have an `update` or the like.

    Args:
        console: where to.
        columns: behind the bar.
        before: in front of the words.
        auto_refresh: whether a thread redraws by itself.
    """

    def __init__(
        self,
        console: Console,
        *columns: ProgressColumn,
        before: tuple[ProgressColumn, ...] = (),
        auto_refresh: bool = True,
    ) -> None:
        self.console = console
        self.bar = Progress(
            *before,
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *columns,
            console=console,
            disable=not console.is_terminal,
            auto_refresh=auto_refresh,
        )
        self.started = time.monotonic()

    def __enter__(self: D) -> D:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        self.bar.stop()

    def finish(self) -> None:
        """Called when the work ended well."""


class Stages(Display):
    """A context manager whose `stage` and `progress` a build calls."""

    def __init__(self, console: Console) -> None:
        spinner = SpinnerColumn(finished_text="[green]ok")
        super().__init__(console, TimeElapsedColumn(), before=(spinner,))
        self.task: object = None
        self.label = ""
        self.phase: str | None = None

    def stage(self, name: str) -> None:
        """Ends the stage before and begins this one."""
        self.finish()
        self.label, self.started, self.phase = LABELS.get(name, name), time.monotonic(), None
        self.task = self.bar.add_task(self.label, total=None)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Steps of TensorRT's outermost phase; those nested in it are too many to show."""
        if self.phase is None:
            self.phase = phase
        if phase == self.phase and total:
            self.bar.update(self.task, completed=done, total=total)  # type: ignore[arg-type]
        if done >= total and phase == self.phase:
            self.phase = None

    def finish(self) -> None:
        """Ends the stage."""
        if self.task is None:
            return
        seconds = time.monotonic() - self.started
        self.bar.update(self.task, completed=1, total=1)  # type: ignore[arg-type]
        if not self.console.is_terminal:
            self.console.print(f"{self.label}: {seconds:.1f} s")
        self.task = None
