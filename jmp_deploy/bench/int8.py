"""Whether INT8 pays on this GPU: both engines in one run, in turns; which one the artifact gets.

INT8 ViTs are often no faster than FP16, or slower (NVIDIA/TensorRT #4273, #3186, #1604):
conversions around small matrix products eat what the products save. So the claim is measured where
it can be and withheld where it cannot.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..core import artifact, interrupt
from ..core.files import sha256
from ..core.images import INPUT

GAIN = 1.05
"""INT8 must be this much faster to replace FP16: less is within what clocks and other work on a
GPU do to a measurement, and not worth any accuracy."""
ROUNDS = 40
WARM_UP = 10

Run = Callable[[], float]
"""One inference; returns its time in milliseconds."""


def measure(
    runs: Mapping[str, Run], rounds: int = ROUNDS, warm_up: int = WARM_UP
) -> dict[str, Any]:
    """Times several engines in turns, so that clocks and temperature are the same for all.

    Returns:
        {name: median of one inference in ms}
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warm_up + rounds):
        interrupt.check()
        for name, run in runs.items():
            milliseconds = run()
            if index >= warm_up:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def decide(times: Mapping[str, float] | None, unknown: str, *, force: bool) -> dict[str, Any]:
    """Which engine becomes `model.engine`.

    Args:
        times: of `measure`, with "int8" and "fp16"; None where nothing could be measured.
        unknown: why not, in words.
        force: --force-int8.

    Returns:
        {"engine": "int8" | "fp16", "ratio": FP16's time over INT8's or None, "ms", "why"}
    """
    if times is None:
        why = f"speed unknown: {unknown}"
        return {"engine": "int8", "ratio": None, "ms": None, "why": why}
    ratio = times["fp16"] / times["int8"]
    figures = (
        f"INT8 {times['int8']:.3f} ms, FP16 {times['fp16']:.3f} ms, {ratio:.2f}x in one run on "
        "this GPU"
    )
    chosen = "int8" if ratio >= GAIN or force else "fp16"
    if ratio >= GAIN:
        why = figures
    elif force:
        why = f"{figures}: less than {GAIN:.2f}x, kept by --force-int8"
    else:
        why = (
            f"{figures}: less than {GAIN:.2f}x, so the FP16 engine is used (--force-int8 overrides)"
        )
    return {"engine": chosen, "ratio": ratio, "ms": dict(times), "why": why}


def time_engines(
    paths: Mapping[str, Path], facts: Mapping[str, dict[str, Any]], shape: tuple[int, ...]
) -> dict[str, float]:
    """Opens engines on the GPU that is here and times them on one batch that is already there.

    Untested: no GPU was at hand when this was written.

    Args:
        paths: name -> engine.
        facts: name -> the manifest's "engine" for it.
        shape: of the input, [B, 3, H, W].

    Raises:
        EngineError: an engine does not fit this GPU.
    """
    from polygraphy.cuda import DeviceArray

    from ..engine import backends

    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with ExitStack() as stack:
        # On the GPU once: copying a batch takes about as long as running it, and is the same for
        # both.
        on_gpu = stack.enter_context(DeviceArray(shape=shape, dtype=np.float32))
        on_gpu.copy_from(images)
        runs: dict[str, Run] = {}
        for name, path in paths.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent)))
            (folder / artifact.ENGINE).hardlink_to(path)
            entry = {"sha256": sha256(path), "bytes": path.stat().st_size}
            data = {"files": {artifact.ENGINE: entry}, "engine": facts[name], "rebuild": ""}
            runner = stack.enter_context(backends.open_runner(folder, data, "engine"))

            def run(runner: Any = runner) -> float:
                feed = {INPUT: on_gpu}
                runner.infer(feed, check_inputs=False, copy_outputs_to_host=False)
                return 1000 * float(runner.last_inference_time())

            runs[name] = run
        return measure(runs)
