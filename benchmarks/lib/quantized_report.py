"""The files of `benchmarks/quantized.py`: JSON, Markdown, and a plot of each ranking."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jmp_deploy.core.files import atomic_path, write_bytes, write_json
from jmp_deploy.quantize.sensitivity import summary

RANKED = 15
BARS = 20


def line(row: dict[str, Any], tasks: list[str], seconds: float) -> str:
    """One line for people who wait."""
    parts = [f"{row['form']:<6}{row['precision']:<11}"]
    for name in tasks:
        values = row[name]
        parts.append(
            f"{name} {values['accuracy']['reduced']:.2f} ({values['accuracy']['difference']:+.2f}) "
            f"cos {values['cosine']['mean']:.5f}"
        )
    return "  ".join([*parts, f"{seconds:.0f} s"])


def table(result: dict[str, Any]) -> str:
    """Markdown: one table for each task, what is quantized, and the rankings."""
    images = result["calibration"]
    lines = [
        f"Model `{result['model']}`, part `{result['part']}`, seed {result['seed']}, judged by "
        f"{_judge(result)}; JMP with schedule `{result['schedule']}`. ONNX Runtime "
        f"{result['tools']['onnxruntime']} on a CPU, no GPU. Differences in points with paired "
        "95 % bootstrap intervals.",
    ]
    if result["weights"]["kind"] == "random":
        lines += ["", "**Random weights: these figures mean nothing.**"]
    if images:
        overlap = ", which are of the same photos as the task `photos`" * images["demonstration"]
        source = "crops of the sample photos" if images["demonstration"] else images["source"]
        lines += ["", f"Calibration: {images['count']} images, {source}{overlap}; no labels."]
    for name, sizes in result["data"].items():
        lines += [
            "",
            f"### {name}: {sizes['judged']} images judged, {sizes['train']} for the probe",
            "",
            "| form | precision | accuracy % | against dense FP32 | beyond its FP16 | expected | "
            "k-NN beyond its FP16 | agreement with its FP16 % | cosine to dense FP32 | to its FP16 "
            "| worst |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_row(row, row[name]) for row in result["rows"] if name in row]
    lines += [
        "",
        "`expected`: beyond its FP16, with the luck of single images averaged out "
        "(`jmp_deploy/quantize/sensitivity.py`, from the margins and the confidence of the "
        "classifier).",
        "",
        "### What is quantized",
        "",
        "| form | precision | layers | MACs | weights, MB (8 bits + FP16) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        if "layers_quantized" in row:
            sizes = row["weights_bytes"]
            narrow = sizes.get("INT8", 0) + sizes.get("FLOAT8E4M3FN", 0)
            lines.append(
                f"| {row['form']} | {row['precision']} | {row['layers_quantized']} of "
                f"{row['layers']} | {row['macs_share']:.1%} | {narrow / 1e6:.1f} + "
                f"{sizes.get('FLOAT16', 0) / 1e6:.1f} |"
            )
    lines += _alone(result["alone"])
    for form, found in result["sensitivity"].items():
        lines += ["", f"### Sensitivity, {form}", "", summary(found) + ".", ""]
        lines += _ranking(found)
    return "\n".join(lines) + "\n"


def write(output: Path, result: dict[str, Any], *, plots: bool = False) -> list[Path]:
    """Writes OUTPUT.json and OUTPUT.md, with `plots` OUTPUT-FORM.png if matplotlib is there."""
    # not with_suffix: "int8-0.3" has a dot of its own
    written = [output.parent / f"{output.name}{end}" for end in (".json", ".md")]
    write_json(written[0], result)
    write_bytes(written[1], table(result).encode())
    for form, found in result["sensitivity"].items() if plots else ():
        path = output.parent / f"{output.name}-{form}.png"
        why = plot(found, path)
        if why is None:
            written.append(path)
        else:
            print(why)
    return written


def plot(found: dict[str, Any], target: Path) -> str | None:
    """Draws the ranking; returns why not, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title = found["precision"].upper()
    figure = Figure(figsize=(9.6, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    whole = max(found["all_quantized"]["noise"], 1e-300)
    layers = sorted(found["ranking"], key=lambda row: -row["noise"])[:BARS]
    for axes, rows, heading in (
        (left, layers, f"layers, each alone in {title}"),
        (right, found["groups"], "kinds and blocks, each alone"),
    ):
        names = [row["name"] for row in rows]
        colours = ["#c2792d" if row.get("kept") else "#1f6f9f" for row in rows]
        axes.barh(names, [100 * row["noise"] / whole for row in rows], color=colours)
        axes.invert_yaxis()
        axes.set_xlabel(f"% of the noise of all in {title}")
        axes.set_title(heading, fontsize=11)
        axes.tick_params(labelsize=8)
        axes.grid(True, axis="x", alpha=0.25)
    if any(row["kept"] for row in layers):
        left.bar([0], [0], color="#c2792d", label="stays in FP16")
        left.bar([0], [0], color="#1f6f9f", label=title)
        left.legend(frameon=False, loc="lower right")
    figure.suptitle(summary(found), fontsize=9)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".").lower() or "png")
    return None


def _judge(result: dict[str, Any]) -> str:
    if result["judge"] == "probe":
        return "a probe and nearest neighbours on dense FP32 features"
    return "its own classifier"


def _row(row: dict[str, Any], values: dict[str, Any]) -> str:
    beyond = values.get("beyond_fp16")
    cells = [
        row["form"],
        row["precision"],
        f"{values['accuracy']['reduced']:.2f}",
        _interval(values["accuracy"]),
        _interval(beyond["accuracy"]) if beyond else "",
        f"{-beyond['expected']['points']:+.2f}" if beyond else "",
        _interval(beyond["knn"]) if beyond and "knn" in beyond else "",
        f"{beyond['agreement']:.2f}" if beyond else "",
        f"{values['cosine']['mean']:.5f}",
        f"{beyond['cosine']['mean']:.5f}" if beyond else "",
        f"{(beyond or values)['cosine_worst']:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _interval(value: dict[str, float]) -> str:
    return f"{value['difference']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})"


def _alone(found: dict[str, dict[str, float]]) -> list[str]:
    """What each layer costs alone, by kind; of INT8 those in FP16 by the recipe too."""
    if not found:
        return []
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    lines = [
        "",
        "### Signal-to-noise ratio of the output, dB, each layer alone",
        "",
        f"| layer | {' | '.join(found)} |",
        f"| --- | {' | '.join('---' for _ in found)} |",
    ]
    for name in names:
        cells = [f"{values[name]:.1f}" if name in values else "" for values in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ranking(found: dict[str, Any]) -> list[str]:
    title = found["precision"].upper()
    lines = [
        f"Points: {found['measure']}; on {found['images']} calibration images, the ranking on "
        f"{found['screened_on']}.",
        "",
        f"| rank | layer | points alone | of the noise of all in {title} | of the MACs | stays |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    whole = max(found["all_quantized"]["noise"], 1e-300)
    for rank, row in enumerate(found["ranking"][:RANKED], 1):
        least = "" if row["measured"] else "< "
        lines.append(
            f"| {rank} | {row['name']} | {least}{row['points']:.3f} | {least}"
            f"{row['noise'] / whole:.1%} | {row['macs_share']:.1%} | "
            f"{'FP16' if row['kept'] else title} |"
        )
    groups = ", ".join(f"{row['name']} {row['noise'] / whole:.1%}" for row in found["groups"])
    return [*lines, "", f"Kinds and blocks, each alone, share of the noise: {groups}."]
