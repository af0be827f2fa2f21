"""From features to rows, and from rows to a JSON file, a Markdown table and a plot."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from benchmarks.lib import measures
from jmp_deploy.core.files import atomic_path, write_bytes, write_json
from jmp_deploy.jmp.schedule import Schedule

if TYPE_CHECKING:
    from benchmarks.lib.data import Task
    from benchmarks.lib.features import Features
    from benchmarks.lib.methods import Method


class Judge:
    """One task with its probe; call it with a schedule and a method for the measures.

    Keeps the per-image results of every call, for paired comparisons between methods.
    """

    def __init__(self, task: Task, source: Features, part: str, seed: int) -> None:
        self.task = task
        self.source = source
        self.seed = seed
        self.samples = getattr(task, part)
        self.dense = source.dense(self.samples)
        self.head = source.logits(self.dense)
        train = source.dense(task.train)
        self.probe = measures.fit_probe(train, task.train.labels)
        self.kept: list[dict[str, NDArray[Any]]] = []

    def __call__(self, schedule: Schedule, method: Method) -> dict[str, Any]:
        reduced = self.source.reduced(self.samples, schedule, method)
        labels = self.samples.labels
        over: dict[str, Any] = {"seed": self.seed, "pictures": self.samples.pictures}
        result = measures.compare(self.dense, reduced, labels, self.probe, **over)
        logits = self.source.logits(reduced)
        if self.head is not None and logits is not None:
            result["head"] = measures.compare(self.head, logits, labels, None, **over)
        guess = self.probe.probabilities(reduced).argmax(1)
        self.kept.append(
            {
                "accuracy": 100.0 * (guess == labels),
                "cosine": (measures.unit(self.dense) * measures.unit(reduced)).sum(1),
            }
        )
        return result


def comparisons(judges: list[Judge], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JMP minus every other method at the same budget, over the same images."""
    found = []
    ours = {row["budget"]: i for i, row in enumerate(rows) if row["method"] == "jmp"}
    for index, row in enumerate(rows):
        mine = ours.get(row["budget"])
        if mine is None or mine == index:
            continue
        entry: dict[str, Any] = {"budget": row["budget"], "against": row["method"]}
        for judge in judges:
            over: dict[str, Any] = {"seed": judge.seed, "pictures": judge.samples.pictures}
            entry[judge.task.name] = {
                key: measures.paired(judge.kept[mine][key], judge.kept[index][key], **over)
                for key in ("accuracy", "cosine")
            }
        found.append(entry)
    return found


def print_row(row: dict[str, Any], tasks: list[str], seconds: float) -> None:
    """One line for people who wait."""
    parts = [f"{row['method']:<22} {row['share']:6.1%}"]
    for name in tasks:
        accuracy = row[name]["accuracy"]
        parts.append(
            f"{name} {accuracy['reduced']:.2f} ({accuracy['difference']:+.2f}) "
            f"cos {row[name]['cosine']['mean']:.5f}"
        )
    print("  ".join([*parts, f"{seconds:.0f} s"]), flush=True)


def table(result: dict[str, Any]) -> str:
    """Markdown: one table for each task, the shares merged, and the paired comparisons."""
    parts = result["data"]
    lines = [
        f"Model `{result['model']}`, part `{result['part']}`, seed {result['seed']}; dense "
        f"{result['dense_gmacs']:.3f} GMACs. Differences to dense in points, with paired 95 % "
        "bootstrap intervals, over photos where images are crops of them.",
    ]
    if result["weights"]["kind"] == "random":
        lines += ["", "**Random weights: these figures mean nothing.**"]
    for name, sizes in parts.items():
        lines += [
            "",
            f"### {name}: {sizes['judged']} images judged, probe fitted to {sizes['train']}",
            "",
            "| method | FLOPs | GMACs | probe % | against dense | k-NN against dense | cosine "
            "(interval) | worst | agreement % | KL |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in result["rows"]:
            if name in row:
                lines.append(_line(row, row[name]))
    if result.get("shares"):
        lines += ["", "### What JMP does with the tokens that leave", ""]
        for budget, steps in result["shares"].items():
            words = ", ".join(
                f"{s['block']}: {s['keep']} stay, {s['merged_percent']:.1f} % merged, "
                f"{s['pruned_percent']:.1f} % pruned"
                for s in steps
            )
            lines.append(f"- {budget}: {words}")
    if result.get("comparisons"):
        lines += ["", "### JMP minus the others, paired (points of accuracy; cosine)", ""]
        for entry in result["comparisons"]:
            words = "; ".join(
                f"{name} {_interval(entry[name]['accuracy'], 2)}, cosine "
                f"{_interval(entry[name]['cosine'], 5)}"
                for name in parts
            )
            lines.append(f"- {entry['budget']:.0%}, {entry['against']}: {words}")
    notes = {row["method"].split(",")[0]: row["note"] for row in result["rows"]}
    lines += ["", *(f"- `{name}`: {note}" for name, note in notes.items())]
    return "\n".join(lines) + "\n"


def write(output: Path, result: dict[str, Any], *, plot: bool = False) -> list[Path]:
    """Writes OUTPUT.json and OUTPUT.md, with `plot` also OUTPUT.png if matplotlib is installed."""
    written = [output.with_suffix(".json"), output.with_suffix(".md")]
    write_json(written[0], result)
    write_bytes(written[1], table(result).encode())
    if plot:
        if find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed (pip install matplotlib)")
        else:
            written.append(_plot(output.with_suffix(".png"), result))
    return written


def _line(row: dict[str, Any], values: dict[str, Any]) -> str:
    accuracy, knn, cosine = values["accuracy"], values["knn"], values["cosine"]
    cells = [
        row["method"],
        f"{row['share']:.1%}",
        f"{row['gmacs']:.3f}",
        f"{accuracy['reduced']:.2f}",
        f"{accuracy['difference']:+.2f} ({accuracy['low']:+.2f} to {accuracy['high']:+.2f})",
        f"{knn['difference']:+.2f} ({knn['low']:+.2f} to {knn['high']:+.2f})",
        f"{cosine['mean']:.5f} ({cosine['low']:.5f} to {cosine['high']:.5f})",
        f"{values['cosine_worst']:.4f}",
        f"{values['agreement']:.2f}",
        f"{values['kl']:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _interval(value: dict[str, float], digits: int) -> str:
    mean, low, high = (f"{value[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _plot(path: Path, result: dict[str, Any]) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["data"])
    figure, panels = pyplot.subplots(
        2, len(names), figsize=(6 * len(names), 8), sharex=True, squeeze=False
    )
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    for column, name in enumerate(names):
        top, bottom = panels[0][column], panels[1][column]
        for index, method in enumerate(methods):
            rows = [row for row in result["rows"] if row["method"] == method and name in row]
            rows.sort(key=lambda row: row["gmacs"])
            cost = [row["gmacs"] for row in rows]
            style = {
                "label": method,
                "marker": "o",
                "markersize": 4,
                "linewidth": 2.5 if method == "jmp" else 1,
                "zorder": 3 if method == "jmp" else 2,
                "color": f"C{index % 10}",
                "linestyle": "-" if index < 10 else "--",
            }
            top.plot(cost, [row[name]["accuracy"]["difference"] for row in rows], **style)
            gap = [max(1 - row[name]["cosine"]["mean"], 1e-7) for row in rows]
            bottom.plot(cost, gap, **style)
        top.axhline(0, color="grey", linewidth=0.8)
        top.set_title(f"{name}, {result['data'][name]['judged']} images ({result['part']})")
        top.set_ylabel("probe accuracy against dense (points)")
        bottom.set_ylabel("1 - cosine to dense features")
        bottom.set_yscale("log")
        bottom.set_xlabel(f"GMACs (dense: {result['dense_gmacs']:.2f})")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{result['model']}, no training")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    return path
