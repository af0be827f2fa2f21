"""What commands print: tables for people, JSON for programs, progress for those who wait.

rich is imported when something is shown, so that `--help` need not wait for it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..core.errors import printable, say
from ..core.files import atomic_path, json_text, write_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import TaskID
    from rich.table import Table
    from rich.text import Text

    from ..core.manifest import Weights

RANDOM_WARNING = (
    "RANDOM WEIGHTS: this artifact can be timed, inspected and compared with PyTorch; "
    "what it answers means nothing."
)


def show(given: argparse.Namespace, parts: Iterable[RenderableType], value: Any) -> None:
    """Prints for people, and writes JSON if asked; with `--json -` people get standard error."""
    from rich.console import Group

    to_stdout = given.json == "-"
    # crop: a command that mends something must be readable to its end on a narrow terminal too
    console(stderr=to_stdout).print(Group(*parts), crop=False)
    if given.json is None:
        return
    text = json_text(_finite(value))
    if to_stdout:
        sys.stdout.write(text)
    else:
        write_bytes(Path(given.json), text.encode())


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def console(*, stderr: bool = False) -> Console:
    """A console for people; what we print is never taken for markup, or by the terminal for more
    than text: class names, file names and hints come from others."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return Plain(stderr=stderr, highlight=False, markup=False, soft_wrap=False)


# --- words and tables ----------------------------------------------------------------------------


def styled(words: str, style: str) -> Text:
    """Words in a colour."""
    from rich.text import Text

    return Text(printable(words), style)


def warnings(result: dict[str, Any]) -> list[Text]:
    """The lines that a result's "warnings" come to."""
    return [styled(f"warning: {words}", "bold yellow") for words in result["warnings"]]


def table(title: str, *columns: str, frame: bool = True, wrap: bool = True) -> Table:
    """An empty table.

    Args:
        title: "" for none.
        columns: their heads; ">" in front of one is for numbers, which stand at the right.
        frame: without one, eight columns fit into 80 characters.
        wrap: whether columns behind the first may break their lines.
    """
    from rich import box
    from rich.table import Table

    bare: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    made = Table(title=title or None, title_justify="left", **({} if frame else bare))
    for index, name in enumerate(columns):
        made.add_column(
            name.removeprefix(">"),
            justify="right" if name.startswith(">") else "left",
            overflow="ellipsis" if name.startswith(">") else "fold",
            no_wrap=index > 0 and not wrap,
        )
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: a name and what is to be said of it."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def number(value: float | None, spec: str = ".3g") -> str:
    """A figure; JSON has no infinity, so a null that is there was one."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, spec)


def weights(origin: Weights) -> str:
    """Where weights came from, in words."""
    if origin.kind == "pretrained":
        return f"pretrained ({origin.source})"
    if origin.kind == "file":
        return f"{origin.path} (sha256 {str(origin.sha256)[:12]}...)"
    if origin.kind == "python":
        return f"of {origin.source} (sha256 {str(origin.sha256)[:12]}...)"
    why = f"; no pretrained ones: {origin.reason}" if origin.reason else ""
    return f"RANDOM (seed {origin.seed}{why})"


@contextmanager
def plot(target: Path) -> Iterator[Any]:
    """Axes of matplotlib to draw on; written, in the format that the name says, at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, which="both", alpha=0.25)
    yield axes
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".").lower() or "png")


# --- progress ------------------------------------------------------------------------------------

LABELS = {
    "weights": "loading weights",
    "patch": "patching JMP into the model",
    "export": "exporting to ONNX",
    "calibrate": "calibrating on images",
    "int8": "quantizing to INT8, and FP16 for the twin",
    "fp8": "quantizing to FP8, and FP16 for the twin",
    "magnitudes": "measuring how large every tensor grows",
    "fp16": "converting to FP16",
    "bf16": "converting to BF16",
    "check": "checking ONNX against PyTorch",
    "fuse": "replacing reductions by the plugin",
    "inline": "writing the reductions out",
    "plugin": "compiling the plugin (the first time only)",
    "engine": "building the engine",
    "twin engine": "building the FP16 twin's engine",
    "engine check": "checking the engine on the GPU against PyTorch",
    "timing": "timing the quantized engine against FP16",
}
"""Stages of a build, in words."""
REDRAW_EVERY = 0.2
LINE_EVERY = 20.0
"""Seconds between two states of a stage on a terminal, and elsewhere."""


class Progress:
    """Stages of long work, and how far each is: bars on a terminal, lines elsewhere (logs, CI).

    A context manager. Within it, `stage` begins a stage; `update`, where the share that is done is
    known, or `steps` say how far it is.

    Args:
        stage: the first one.
        transient: leaves nothing behind: no bar, no line.
        remaining: say how long it will take.
        auto_refresh: whether a thread redraws by itself, also while something is timed.
    """

    def __init__(
        self,
        stage: str = "",
        *,
        transient: bool = False,
        remaining: bool = False,
        auto_refresh: bool = True,
    ) -> None:
        from rich import progress

        self.console = console(stderr=True)
        self.lines = not self.console.is_terminal and not transient
        self.bar = progress.Progress(
            progress.SpinnerColumn(finished_text="[green]ok"),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            *((progress.TimeRemainingColumn(),) if remaining else ()),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=transient,
            auto_refresh=auto_refresh,
        )
        self.began = time.monotonic()
        self.task: TaskID | None = None
        self.label = self.line = ""
        if stage:
            self.stage(stage)

    def __enter__(self) -> Progress:
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

    def stage(self, name: str) -> None:
        """Ends the stage before and begins this one."""
        self.finish()
        self.label, self.started = LABELS.get(name, name), time.monotonic()
        self.phase: str | None = None
        self.words, self.shown = "", 0.0
        self.task = self.bar.add_task(self.label, total=None)

    def steps(self, phase: str, done: int, total: int) -> None:
        """Steps of TensorRT's outermost phase; those nested in it are too many to show."""
        if self.task is None:
            return
        if self.phase is None:
            self.phase = phase
        if phase == self.phase and total:
            self.bar.update(self.task, completed=done, total=total)
        if done >= total and phase == self.phase:
            self.phase = None

    def update(self, words: str, share: float, detail: str = "") -> None:
        """What is being done, the share of the stage that is done, and what changes often."""
        assert self.task is not None
        self.bar.update(self.task, description=words + detail, completed=share, total=1.0)
        now, every = time.monotonic(), LINE_EVERY if self.lines else REDRAW_EVERY
        self.line = f"{now - self.began:5.0f} s  {share:4.0%}  {words}{detail}"
        if words != self.words or now - self.shown > every:
            self.words, self.shown = words, now
            self.bar.refresh()
            self._say()

    def finish(self) -> None:
        """Ends the stage well; one with shares says itself how far it came."""
        if self.task is not None and not self.words:
            self.bar.update(self.task, completed=1, total=1)
            self.line = f"{self.label}: {time.monotonic() - self.started:.1f} s"
        self._say()
        self.task = None

    def say(self, lines: Iterable[str]) -> None:
        """Prints what was found out on the way."""
        for line in lines:
            self.console.print(line, soft_wrap=True)

    def _say(self) -> None:
        """Prints the line that is due, once."""
        if self.lines and self.line:
            self.console.print(self.line)
        self.line = ""


@contextmanager
def nearing(kept: str) -> Iterator[Callable[[str, float, float | None], None]]:
    """Progress of work that looks for the smallest distance and can be resumed.

    Args:
        kept: what an interrupted run leaves, in words.

    Returns:
        As a context, what to call with the phase, the share that is done, and the best distance.
    """
    try:
        with Progress("loading") as progress:

            def update(phase: str, share: float, best: float | None) -> None:
                progress.update(phase, share, "" if best is None else f", best distance {best:.5f}")

            yield update
            progress.update("done", 1.0)
    except KeyboardInterrupt:
        say(f"{kept}: go on with --resume")
        raise
