"""Shows the stages of a build: bars on a terminal, a line for each elsewhere (logs, CI)."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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


class Stages:
    """A context manager whose `stage` and `progress` a build calls."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            SpinnerColumn(finished_text="[green]ok"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: object = None
        self.label = ""
        self.started = 0.0
        self.phase: str | None = None

    def __enter__(self) -> Stages:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        self.bars.stop()

    def stage(self, name: str) -> None:
        """Ends the stage before and begins this one."""
        self._finish()
        self.label, self.started, self.phase = LABELS.get(name, name), time.monotonic(), None
        self.task = self.bars.add_task(self.label, total=None)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Steps of TensorRT's outermost phase; those nested in it are too many to show."""
        if self.phase is None:
            self.phase = phase
        if phase == self.phase and total:
            self.bars.update(self.task, completed=done, total=total)  # type: ignore[arg-type]
        if done >= total and phase == self.phase:
            self.phase = None

    def _finish(self) -> None:
        if self.task is None:
            return
        seconds = time.monotonic() - self.started
        self.bars.update(self.task, completed=1, total=1)  # type: ignore[arg-type]
        if not self.console.is_terminal:
            self.console.print(f"{self.label}: {seconds:.1f} s")
        self.task = None
