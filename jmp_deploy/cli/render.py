"""Tables for people. Everything here has a JSON twin; nothing here computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..engine.predict import Predictions

RANDOM_WARNING = (
    "RANDOM WEIGHTS: this artifact can be timed, inspected and compared with PyTorch; "
    "what it answers means nothing."
)


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: a name and what is to be said of it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def artifact(data: dict[str, Any], folder: str) -> RenderableType:
    """The summary that ends `build` and opens `inspect` and `report`."""
    macs, jmp, check, engine = data["macs"], data["jmp"], data["check"], data["engine"]
    rows = [
        ("artifact", folder),
        ("model", f"{data['model']['name']} at {data['model']['image_size']} pixels"),
        ("weights", weights(data["weights"])),
        ("precision", precision(data)),
        ("batch", "min {}, opt {}, max {}".format(*data["batch"])),
        ("GMACs", _gmacs(macs)),
    ]
    if jmp:
        steps = ", ".join(f"{block}:{keep}" for block, keep in jmp["schedule"])
        rows.append(("schedule", f"{jmp['schedule_name']} ({steps})"))
        rows.append(("decision", _decision(jmp)))
    else:
        rows.append(("schedule", "none: dense baseline"))
    pair = check["pairs"][0]
    verdict = "ok" if check["ok"] else "OUTSIDE TOLERANCE"
    rows.append(
        (
            "check",
            f"{verdict}: ONNX Runtime against PyTorch on {len(check['images'])} photos: "
            f"{agreement(pair)}",
        )
    )
    if engine:
        rows.append(("engine", engine_line(engine)))
    else:
        rows.append(("engine", f"none: {data['no_engine']}"))
    if data.get("int8"):
        rows[4:4] = int8(data["int8"])
    sizes = ", ".join(f"{name} {entry['bytes'] / 1e6:.1f}" for name, entry in data["files"].items())
    rows.append(("sizes (MB)", sizes))
    parts: list[RenderableType] = [facts(rows)]
    if data.get("int8") and data["int8"].get("sensitivity"):
        from . import sensitivity_view

        parts.append(sensitivity_view.table(data["int8"]["sensitivity"]))
    if data["weights"]["kind"] == "random":
        parts.append(Text(RANDOM_WARNING, style="bold red"))
    for warning in (data.get("int8") or {"images": {"warnings": ()}})["images"]["warnings"]:
        parts.append(Text(f"calibration: {warning}", "yellow"))
    return Group(*parts)


def precision(data: dict[str, Any]) -> str:
    """Which numbers compute what, in words."""
    name = str(data["precision"]).upper()
    if not data.get("int8"):
        return f"{name}, inputs and outputs FP32"
    found = data["int8"]
    return (
        f"{name} in {found['layers_int8']} of {found['layers']} weighted layers "
        f"({found['macs_share']:.0%} of the MACs), FP16 in the rest, inputs and outputs FP32"
    )


def int8(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of a summary that INT8 adds."""
    images = found["images"]
    source = "crops of the sample photos: a DEMONSTRATION, no promise for other images"
    if not images["demonstration"]:
        source = f"images of {images['source']}"
    how = f"{found['method']}, {images['count']} {source}"
    if found["from_cache"]:
        how += f"; ranges from {found['from_cache']}"
    weights_, values = found["weights_bytes"], found["activations_bytes"]
    rows = [
        ("calibration", how),
        (
            "bytes (MB)",
            f"weights {weights_.get('INT8', 0) / 1e6:.1f} INT8 and "
            f"{weights_.get('FLOAT16', 0) / 1e6:.1f} FP16; inputs of the weighted layers, per "
            f"image, {values['int8'] / 1e6:.2f}, in FP16 {values['fp16'] / 1e6:.2f}",
        ),
        ("kept in FP16", _kept(found)),
    ]
    if speed := found.get("speed"):
        sizes = ", ".join(f"{k.upper()} {n / 1e6:.1f} MB" for k, n in found["engine_bytes"].items())
        rows.append(("INT8 or FP16", f"{speed['why']}; engines: {sizes}"))
    return rows


def _kept(found: dict[str, Any]) -> str:
    """Layers by the reason for which they stay in FP16, one reason a line."""
    layers: dict[str, list[str]] = {}
    for name, reason in found["keep_fp16"].items():
        # With --max-drop every layer has a reason of its own: they stand in the ranking.
        shared = "by --max-drop (ranking below)" if found.get("sensitivity") else reason
        layers.setdefault(shared, []).append(name)
    lines = [f"{', '.join(_by_block(names))}: {reason}" for reason, names in layers.items()]
    return "\n".join([*lines, "attention products, LayerNorm, GELU, Softmax, residuals: by design"])


def _by_block(names: Sequence[str]) -> list[str]:
    """ "blocks.0.fc2", "blocks.1.fc2", "head" -> "fc2 of blocks 0, 1", "head"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        kinds.setdefault(parts[-1], []).append(parts[1] if len(parts) == 3 else "")
    return [
        f"{kind} of block{'s' if len(blocks) > 1 else ''} {_runs(blocks)}" if blocks[0] else kind
        for kind, blocks in kinds.items()
    ]


def _runs(numbers: Sequence[str]) -> str:
    """ "0", "1", "2", "5" -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def weights(origin: dict[str, Any]) -> str:
    """Where weights came from, in words."""
    if origin["kind"] == "pretrained":
        return f"pretrained ({origin['source']})"
    if origin["kind"] == "file":
        return f"{origin['path']} (sha256 {origin['sha256'][:12]}...)"
    why = f"; no pretrained ones: {origin['reason']}" if "reason" in origin else ""
    return f"RANDOM (seed {origin['seed']}{why})"


def engine_line(engine: dict[str, Any]) -> str:
    """How an engine was made, in words."""
    plugins = engine["plugin_layers"]
    return (
        f"{engine['builder']} {engine['version']} for {', '.join(engine['targets'])}, "
        f"{engine['bytes'] / 1e6:.1f} MB in {engine['seconds']:.1f} s, "
        f"{plugins} plugin layer{'s' if plugins != 1 else ''} ({engine['why']})"
    )


def agreement(pair: dict[str, Any]) -> str:
    """The figures of a pair of backends, in words."""
    words = f"cosine {pair['cosine']:.6f}, largest difference {pair['max_abs']:.2g}"
    if pair["top1_agreement"] is not None:
        words += f", top-1 agreement {pair['top1_agreement']:.0%}"
    return words


def predictions(result: Predictions) -> RenderableType:
    """The table of `run`."""
    title = f"run with {result.backend} ({result.reason})"
    table = Table(title=title, title_justify="left")
    table.add_column("image", overflow="fold")
    table.add_column(result.output.heading)
    for record in result.records:
        table.add_row(record["image"], result.output.words(record))
    return table


def inspection(result: dict[str, Any]) -> RenderableType:
    """The tables of `inspect`."""
    parts: list[RenderableType] = []
    if result["kind"] == "artifact":
        parts.append(artifact(result["manifest"], result["path"]))
        parts.append(Text("all files are as they were built", "green"))
    if onnx := result.get("onnx"):
        operators = ", ".join(f"{count} {name}" for name, count in onnx["operators"].items())
        stored = ", ".join(f"{n / 1e6:.1f} MB {kind}" for kind, n in onnx["weights_bytes"].items())
        parts.append(
            facts(
                [
                    ("ONNX", f"{onnx['form']}, opsets {onnx['opset']}"),
                    ("operators", operators),
                    ("weights", stored),
                ]
            )
        )
        if onnx["reductions"]:
            parts.append(_reductions(onnx["reductions"]))
    if network := result.get("network"):
        parts.append(_network(network))
    if engine := result.get("engine"):
        parts.append(
            facts(
                [
                    ("engine", f"{engine['builder']} {engine['version']}"),
                    ("device memory", f"{engine['device_memory'] / 1e6:.1f} MB"),
                    ("layers", str(len(engine["layers"]))),
                ]
            )
        )
    for part, reason in result["missing"].items():
        parts.append(Text(f"no {part}: {reason}", "yellow"))
    return Group(*parts)


def report(
    data: dict[str, Any],
    folder: str,
    comparison_result: dict[str, Any] | None,
    comparison_table: RenderableType | None,
) -> Group:
    """The closing table of the quickstart: what was made, by what, and what could not be."""
    stages = Table(title="time", title_justify="left", expand=False)
    stages.add_column("stage")
    stages.add_column("seconds", justify="right")
    for stage in data["stages"]:
        stages.add_row(stage["name"], f"{stage['seconds']:.1f}")
    stages.add_row("all", f"{sum(stage['seconds'] for stage in data['stages']):.1f}", style="bold")
    tools = ", ".join(f"{name} {version}" for name, version in data["tools"].items())
    parts: list[RenderableType] = [artifact(data, folder), facts([("made with", tools)]), stages]
    missing = []
    if comparison_result and comparison_table:
        parts.append(comparison_table)
        missing = [f"run {name}: {why}" for name, why in comparison_result["skipped"].items()]
    if data["engine"] is None:
        missing.append(f"build an engine: {data['no_engine']}")
    lines = missing or ["nothing: every backend ran"]
    parts.append(facts([("this machine could not", "\n".join(lines))]))
    return Group(*parts)


def _network(network: dict[str, Any]) -> RenderableType:
    counts = Counter(layer["type"] for layer in network["layers"])
    rows = [
        ("parser", f"{network['builder']} {network['version']}"),
        ("layers", ", ".join(f"{count} {name}" for name, count in counts.most_common())),
    ]
    for word in ("inputs", "outputs"):
        rows.append((word, "; ".join(_tensor(tensor) for tensor in network[word])))
    table = Table(title="plugin layers in the network", title_justify="left")
    table.add_column("position", justify="right")
    table.add_column("layer")
    table.add_column("outputs")
    for index, layer in enumerate(network["layers"]):
        if layer["type"].startswith("PLUGIN"):
            shapes = "; ".join(_tensor(tensor) for tensor in layer["outputs"])
            table.add_row(str(index), layer["name"], shapes)
    return Group(facts(rows), table) if table.row_count else facts(rows)


def _reductions(reductions: Sequence[dict[str, Any]]) -> RenderableType:
    first = reductions[0]
    words = ", ".join(
        f"{name} {first[name]}"
        for name in ("num_prefix", "num_heads", "head_dim", "granularity", "importance")
    )
    table = Table(title=f"reductions ({words})", title_justify="left")
    table.add_column("node", no_wrap=True)
    for name in ("position", "keep", "tau"):
        table.add_column(name, justify="right")
    for reduction in reductions:
        table.add_row(
            reduction["name"],
            str(reduction["position"]),
            str(reduction["num_keep"]),
            f"{reduction['tau']:.4g}",
        )
    return table


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']} {tensor['shape']}"


def _gmacs(macs: dict[str, int]) -> str:
    model, dense = macs["model"], macs["dense"]
    if model == dense:
        return f"{dense / 1e9:.3f}"
    return (
        f"{model / 1e9:.3f}, dense {dense / 1e9:.3f}: {model / dense - 1:+.1%}; "
        f"the FLOPs promise {dense / model:.2f}x"
    )


def _decision(jmp: dict[str, Any]) -> str:
    kept = {"importance": "most important", "distinct": "most distinct"}[jmp["selection"]]
    others = f"merge where similarity >= {jmp['tau']:g}, else prune, per {jmp['granularity']}"
    if jmp["strategy"] != "jmp":
        others = f"{jmp['strategy']} only"
    if jmp["merge_weight"] != 1 and jmp["strategy"] != "prune":
        others += f"; {jmp['merge_weight']:.0%} of a merged token's content counts"
    last = "; the last block computes only what the head reads" if jmp["last_prefix_only"] else ""
    return f"keep the {kept} tokens, of the others {others}{last}"


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3g}"
