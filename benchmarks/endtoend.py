"""Dense against JMP, the whole model: what of the FLOPs' promise arrives.

On a GPU: PyTorch in FP16 with fused attention (SDPA), each model in one CUDA graph, reductions by
our CUDA kernel. Without a GPU: the exported ONNX models in FP32 on ONNX Runtime. Dense and JMP
models take turns in one process; ratios are taken pair by pair, medians with quartiles are reported
beside the ratio that the FLOPs allow, and beside that of the same model with its tokens cut off
instead of reduced: what the engine makes of the FLOPs, without what a reduction costs. Once more so
without the sizes in the attention, which then has no mask: what proportional attention costs.

    python benchmarks/endtoend.py                         # what is here: GPU, or CPU
    python benchmarks/endtoend.py --schedules paper -b 1,8,32 --seconds 60
    python benchmarks/endtoend.py --models deit_s,dinov2_s --img-size 518 -o results/518
    python benchmarks/endtoend.py --backend onnxruntime   # the CPU, though there is a GPU

Weights are random unless named: they change which tokens stay, not how many.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib import command, report, timing
from jmp_deploy.core.errors import ModelError

BATCHES = {"torch": "1,8,64,256", "onnxruntime": "1,8,32"}
ROUNDS = 400


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="benchmarks/endtoend.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--models", default="deit_s", help="comma list of short or timm names (deit_s)")
    add("--schedules", default="paper;spread", help="separated by ; (paper;spread)")
    add("-b", "--batch-size", help=f"comma list (GPU {BATCHES['torch']}, CPU 1,8,32)")
    add("--img-size", type=int, help="pixels, if not the model's own")
    add("--weights", default="random", help="random or a checkpoint's path (random)")
    add("--backend", choices=("auto", "torch", "onnxruntime"), default="auto", help="(auto)")
    add("--seconds", type=float, default=20, help="per model and batch (20)")
    add(
        "--sessions",
        type=int,
        default=4,
        help="the time is divided among so many sets of models, each loaded anew (4)",
    )
    add("--threads", type=int, default=0, help="of ONNX Runtime (all cores)")
    add("-o", "--output", type=Path, help="without suffix: writes .json, .md and .png")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    options = parser().parse_args(arguments)
    return command.exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and writes; returns the JSON's content."""
    import torch

    backend = options.backend
    if backend == "auto":
        backend = "torch" if torch.cuda.is_available() else "onnxruntime"
    if backend == "torch" and not torch.cuda.is_available():
        raise report.NeedsGpuError(
            "PyTorch finds no GPU: its CUDA graphs cannot be timed",
            "--backend onnxruntime measures the exported models on the CPU",
        )
    if backend == "onnxruntime":
        print("measuring the exported ONNX models in FP32 on ONNX Runtime, on the CPU")
    batches = _batches(options.batch_size or BATCHES[backend])
    facts = report.machine()
    base = options.output or report.default_output("endtoend", facts)
    rows: list[dict[str, Any]] = []
    result = {"machine": facts, "backend": backend, "weights": options.weights, "rows": rows}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            contenders = _contenders(backend, name, options, Path(folder))
            for batch in batches:
                try:
                    rows += _measure(name, contenders, batch, options)
                except torch.cuda.OutOfMemoryError:
                    print(f"{name}, batch {batch}: out of GPU memory, left out", file=sys.stderr)
                    torch.cuda.empty_cache()
                report.write(base, result, table(result))  # a cut run leaves what it has
    for path in report.write(base, result, table(result), lambda plt, to: plot(result, plt, to)):
        print(f"written    {path}")
    return result


@dataclass(frozen=True)
class Contender:
    """One model that is timed.

    Attributes:
        kind: "dense", "jmp", "cut": of each reduction only the number of tokens is left; or "bare":
            cut, and no sizes in the attention.
        schedule: as it was written on the command line, None for dense.
        macs: multiply-accumulates per image.
        timer: batch -> Timer, warmed up.
    """

    kind: str
    schedule: str | None
    macs: int
    timer: Callable[[int], timing.Timer]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.schedule}"


def _contenders(
    backend: str, name: str, options: argparse.Namespace, folder: Path
) -> list[Contender]:
    """The dense model first, then three per schedule."""
    from jmp_deploy.export.export import export_onnx
    from jmp_deploy.jmp.families import family_of
    from jmp_deploy.jmp.models import load_model
    from jmp_deploy.jmp.patch import model_shape, patch
    from jmp_deploy.jmp.schedule import macs, parse

    made = []
    specs = options.schedules.split(";")
    kinds = ("jmp", "cut", "bare")
    wanted = [("dense", None), *((kind, spec) for spec in specs for kind in kinds)]
    for index, (kind, spec) in enumerate(wanted):
        loaded = load_model(name, options.weights, img_size=options.img_size)
        model = loaded.model.eval().requires_grad_(False)
        shape = model_shape(model)
        steps = None if spec is None else parse(spec, shape)
        if steps is not None:
            reduce = "cuda" if backend == "torch" else "reference"
            patch(model, steps, backend=reduce, proportional=kind != "bare")
            if kind != "jmp":
                model.blocks.reduce = cut_tokens
        size = family_of(model).patch_embed(model).img_size
        if backend == "torch":
            timer = _torch_timer(model, size)
        else:
            path = folder / f"{index}.onnx"
            if kind == "cut":
                cut_in_onnx(folder / f"{index - 1}.onnx", path)
            else:
                export_onnx(model, path, image_size=size)
            if kind == "bare":
                cut_in_onnx(path, path)
            timer = _onnx_timer(path, size, options.threads)
        cost = macs(shape) if steps is None else macs(shape, steps)
        made.append(Contender(kind, spec, cost, timer))
    return made


def cut_tokens(x: Any, qkv: Any, size: Any, attributes: Any) -> tuple[Any, Any, Any]:
    """In a reduction's place: the first P + K tokens stay as they are, the others are dropped."""
    places = attributes.num_prefix + attributes.num_keep
    size = size[:, :places].expand(x.shape[0], places)
    return x[:, :places], size, size.log()


def cut_in_onnx(source: Path, target: Path) -> None:
    """The same of an exported model: its reductions get the body of `cut_tokens`."""
    from jmp_deploy.export import body, graph

    proto = graph.load_model(source)
    cut = body.function("""
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  prefix = Constant <value_int: int = @num_prefix> ()
  keep = Constant <value_int: int = @num_keep> ()
  places_s = Add (prefix, keep)
  places = Unsqueeze (places_s, zero)
  y = Slice (x, zero, places, one)
  out_size = Slice (size, zero, places, one)
  log_size = Log (out_size)
""")
    del proto.functions[:]
    proto.functions.append(cut)
    graph.save_model(proto, target)


def _torch_timer(model: Any, size: tuple[int, int]) -> Callable[[int], timing.Timer]:
    import torch

    model.half().cuda()

    def timer(batch: int) -> timing.Timer:
        images = torch.randn(batch, 3, *size, device="cuda", dtype=torch.float16)

        def forward() -> Any:
            with torch.no_grad():
                return model(images)

        # About a millisecond of work per sample, so that the events' own time does not count.
        return timing.cuda(timing.captured([forward], max(1, 8 // batch)), max(1, 8 // batch))

    return timer


def _onnx_timer(path: Path, size: tuple[int, int], threads: int) -> Callable[[int], timing.Timer]:
    import numpy as np

    from jmp_deploy.core import ort
    from jmp_deploy.core.images import INPUT

    def timer(batch: int) -> timing.Timer:
        session = ort.session(path, ort.TAKES_TURNS, threads=threads)
        images = np.random.default_rng(0).standard_normal((batch, 3, *size)).astype(np.float32)
        for _ in range(3):
            session.run(None, {INPUT: images})
        return timing.wall(lambda: session.run(None, {INPUT: images}))

    return timer


def _measure(
    name: str, contenders: list[Contender], batch: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per schedule: dense and JMP in microseconds per batch, and their ratio."""
    taken: dict[str, list[float]] = {c.name: [] for c in contenders}
    # Where a model's memory came to lie is worth a percent or two either way, for all its life.
    for _ in range(options.sessions):
        timers = {c.name: c.timer(batch) for c in contenders}
        part = timing.interleave(timers, rounds=ROUNDS, seconds=options.seconds / options.sessions)
        for key, values in part.items():
            taken[key] += values
    dense, *others = contenders
    rows = []
    for contender, cut, bare in zip(others[::3], others[1::3], others[2::3], strict=True):
        mine = taken[contender.name]
        speedup, ceiling, bare_speedup = (
            timing.ratio(taken[dense.name], taken[c.name]) for c in (contender, cut, bare)
        )
        allowed = dense.macs / contender.macs
        row = {
            "model": name,
            "schedule": contender.schedule,
            "batch": batch,
            "dense_us": timing.summary(taken[dense.name]),
            "jmp_us": timing.summary(mine),
            "speedup": speedup,
            "cut_speedup": ceiling,
            "bare_speedup": bare_speedup,
            "allowed": round(allowed, 4),
            "share_of_allowed": round(speedup["median"] / allowed, 4),
            "images_per_second": round(batch * 1e6 / timing.summary(mine)["median"], 1),
        }
        print(
            f"{name} {contender.schedule} batch {batch}: {speedup['median']:.3f}x "
            f"({speedup['q1']:.3f}-{speedup['q3']:.3f}); tokens cut off {ceiling['median']:.3f}x, "
            f"no sizes either {bare_speedup['median']:.3f}x, FLOPs allow {allowed:.3f}x"
        )
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    what = {
        "torch": "PyTorch FP16, SDPA, CUDA graphs",
        "onnxruntime": "ONNX Runtime FP32, CPU",
    }[result["backend"]]
    head = ["model, schedule", "batch", "dense ms", "JMP ms", "speed-up", "quartiles"]
    head += ["tokens cut off", "no sizes either", "FLOPs allow", "reached"]
    rows = [
        [
            f"{row['model']} {row['schedule']}",
            str(row["batch"]),
            report.number(row["dense_us"]["median"] / 1e3),
            report.number(row["jmp_us"]["median"] / 1e3),
            f"{row['speedup']['median']:.3f}",
            f"{row['speedup']['q1']:.3f}-{row['speedup']['q3']:.3f}",
            f"{row['cut_speedup']['median']:.3f}",
            f"{row['bare_speedup']['median']:.3f}",
            f"{row['allowed']:.3f}",
            f"{row['share_of_allowed']:.1%}",
        ]
        for row in result["rows"]
    ]
    title = report.heading(f"Dense against JMP: {what}", result["machine"])
    return f"{title}\n{report.markdown(head, rows)}\n"


def plot(result: dict[str, Any], plt: Any, path: Path) -> None:
    """Speed-up over batch size, with quartiles; dashed: what the FLOPs allow."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for model, schedule in dict.fromkeys((r["model"], r["schedule"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["model"], r["schedule"]) == (model, schedule)]
        batches = [row["batch"] for row in rows]
        middle = [row["speedup"]["median"] for row in rows]
        below = [row["speedup"]["median"] - row["speedup"]["q1"] for row in rows]
        above = [row["speedup"]["q3"] - row["speedup"]["median"] for row in rows]
        line = axes.errorbar(
            batches, middle, [below, above], marker="o", capsize=3, label=f"{model} {schedule}"
        )
        axes.axhline(rows[0]["allowed"], color=line[0].get_color(), linestyle="--", linewidth=1)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(xscale="log", xlabel="batch", ylabel="speed-up over dense")
    axes.set_title("dashed: what the FLOPs allow", fontsize="small")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ModelError(f"--batch-size {text!r}: expected numbers from 1 up", "for example 1,8,32")
    return batches


if __name__ == "__main__":
    sys.exit(main())
