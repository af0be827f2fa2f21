"""The command `build`, and the summary of an artifact, which other commands show too."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import JmpDeployError, fail
from ..engine.known_faults import warnings
from . import checked, flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..core.artifact import Artifact
    from ..core.images import Preprocess
    from ..core.manifest import EngineFacts, Fp32, Jmp, Large, Macs, Model, Quantization
    from ..jmp.models import LoadedModel

SHOWN_MORE = 5
"""Rows of the ranking behind the last layer that stays in FP16."""
NARROW_TYPES = ("INT8", "FLOAT8E4M3FN")
"""Types of quantized weights, as ONNX calls them."""
SHOWN_PLACES = 4
"""Parts of a model of which it is said why they stay in FP32."""


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _build,
        "build",
        "make an engine: weights -> JMP -> ONNX -> precision -> check -> plugin -> engine",
        (
            "build deit_s",
            "build deit_s --dense                          # the baseline",
            "build deit_s --schedule paper --strategy merge",
            "build dinov2_s --weights dinov2_s.safetensors --batch 1,8,64",
            "build vit_base_patch16_224 --keep-rate 0.7 --blocks 3,6,9 --precision fp32",
            "build deit_s --fp32 attention:0-3              # where an engine's attention is wrong",
            "build deit_s --precision int8 --calib photos/ --max-drop 0.3",
            "build deit_s --precision int8 --calib-cache artifacts/deit_s/calibration.json",
            "build deit_s --precision fp8 --calib photos/ --targets sm_89,sm_120",
        ),
    )
    flags.add_model(parser)
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="artifact folder (artifacts/MODEL)",
    )
    parser.add_argument(
        "--weights",
        metavar="auto|pretrained|random|PATH",
        help="auto takes pretrained ones, or random ones (for timing only) where the hub cannot be "
        "reached; PATH is .safetensors or what a trainer saved with torch.save (auto)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp16", "bf16", "int8", "fp8", "fp32"),
        help="int8 quantizes the linear layers, keeps the rest in FP16 and needs --calib "
        "(--int8-attention: attention too); fp8 does so with attention's products, for GPUs from "
        "compute capability 8.9 on; bf16 reaches as far as FP32 and is coarser than FP16 (fp16)",
    )
    parser.add_argument(
        "--fp32",
        action="append",
        metavar="KIND[:BLOCKS]",
        help="what computes in FP32 all the same: attention (the scores, so that it is not one "
        "fused kernel) or mlp, in all blocks or in some, as attention:0-3,11; may be repeated. "
        "Tensors too large for FP16 do by themselves",
    )
    parser.add_argument(
        "--schedule",
        metavar="NAME|LIST|FILE",
        help="which blocks reduce, and to how many patch tokens: spread, spread:50 (percent of the "
        "FLOPs), paper, 3:138,6:97,9:68, r18@2-10, a .json file, as `tune` writes it, or one that "
        "comes with the package: dinov2_s-75, -62, -50, -40 (spread)",
    )
    parser.add_argument(
        "--keep-rate",
        type=flags.number(0, 1, above=True),
        metavar="R",
        help="with --blocks: keep ceil(R*M) in each",
    )
    parser.add_argument("--blocks", type=flags.integers, metavar="I,J,..", help="0-based")
    parser.add_argument(
        "--tau",
        type=flags.tau,
        help="similarity from which a token is merged rather than pruned (the schedule's: 0.8 for "
        "spread, 0.7 for what is written out, or what its file says)",
    )
    parser.add_argument(
        "--granularity",
        choices=("token", "sample"),
        help="decide per token or for all tokens of an image at once (token)",
    )
    parser.add_argument(
        "--strategy",
        choices=("jmp", "merge", "prune"),
        help="jmp uses tau; merge and prune do only that (jmp)",
    )
    parser.add_argument(
        "--no-proportional",
        dest="proportional",
        action="store_false",
        help="do not weigh tokens in attention by the patches that they stand for",
    )
    parser.add_argument("--dense", action="store_true", help="no JMP: the baseline")
    flags.add_img_size(parser)
    flags.add_own_model(parser)
    parser.add_argument(
        "--batch",
        type=_batch,
        metavar="N|MIN,OPT,MAX",
        help="images per inference: one size, or a range and what to tune for (1,8,32)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "tensorrt", "rtx", "none"),
        help="builder; auto takes TensorRT where a GPU is, else TensorRT-RTX ahead of time (auto)",
    )
    parser.add_argument(
        "--targets",
        type=flags.words,
        metavar="sm_86,..",
        help="GPUs of a TensorRT-RTX engine (the one that is here, else all that it knows)",
    )
    parser.add_argument(
        "--workspace",
        dest="workspace_mb",
        type=flags.positive,
        metavar="MIB",
        help="limit of the builder's scratch memory",
    )
    parser.add_argument(
        "--embed-plugin",
        action="store_true",
        help="put the plugin into the engine, for runtimes that are told to allow host code "
        "(engine_host_code_allowed; Triton: version-compatible=true). jmp_deploy never allows it: "
        "run, bench and compare do not open such an engine, and it stays unchecked",
    )
    parser.add_argument(
        "--fold-normalization",
        action="store_true",
        help="put mean, standard deviation and 1/255 into the patch embedding, so that raw 0-255 "
        "RGB goes in: for DeepStream, which knows one scale",
    )
    parser.add_argument(
        "--softmax",
        action="store_true",
        help="append a softmax in FP32, so that probabilities come out of a classifier rather than "
        "logits",
    )
    parser.add_argument(
        "--output",
        metavar="WHAT",
        help="pooled: what the model gives; dense: the features of every patch [B, M, C], those of "
        "merged and pruned patches restored; dense:3,6,9,11: of these blocks, counted from 0, "
        "through the model's last norm (raw:3,6,9,11: without); or several: dense,pooled (pooled)",
    )
    parser.add_argument(
        "--inline",
        action="store_true",
        help="write model.inlined.onnx too: the portable model without local functions, for "
        "OpenVINO and other engines and tools that know none",
    )
    flags.add_images(parser, "photos for the check (those that scikit-image and scikit-learn ship)")
    parser.add_argument(
        "--seed", type=flags.seed, help="of random weights and of the calibration sample (0)"
    )
    group = parser.add_argument_group(
        "INT8 and FP8",
        "The FP16 twin is built too; where a GPU is, both are checked and timed, and INT8 or\n"
        "FP8 is model.engine if it is right, 5 % faster at the opt batch and not 5 % slower at\n"
        "batch 1.",
    )
    group.add_argument(
        "--calib",
        dest="quantize.calib",
        metavar="DIR|sample",
        help="images like those that the model will see; sample takes crops of the photos that "
        "scikit-image and scikit-learn ship (a demonstration)",
    )
    group.add_argument(
        "--calib-images",
        dest="quantize.images",
        type=flags.positive,
        metavar="N",
        help="images to draw (256)",
    )
    group.add_argument(
        "--calib-method",
        dest="quantize.method",
        metavar="max|entropy|percentile[:P]",
        help="how ranges are chosen; percentile is 99.999, entropy is for INT8 alone (the model "
        "family's recipe)",
    )
    group.add_argument(
        "--calib-cache",
        dest="quantize.cache",
        type=Path,
        metavar="FILE",
        help="calibration.json of an earlier build of this model and schedule: no images needed, "
        "the same model again",
    )
    group.add_argument(
        "--int8-attention",
        dest="quantize.attention",
        action="store_true",
        help="attention's two products in INT8 too, as one kernel: heads of 16, 32 or 64 columns, "
        "at most 512 tokens. It costs accuracy, and what it gains nobody has measured: build both "
        "and `bench` one `--against` the other; --max-drop keeps the worst in FP16 (FP16)",
    )
    group.add_argument(
        "--max-drop",
        dest="quantize.max_drop",
        type=flags.number(0, 100, above=True),
        metavar="POINTS",
        help="measure what each layer costs and keep the worst in FP16 until the estimated drop "
        "holds, e.g. 0.3 (keep what the model family's recipe says)",
    )
    group.add_argument(
        "--force-int8",
        "--force-fp8",
        dest="quantize.force",
        action="store_true",
        help="use the INT8 or FP8 engine even if it is not that much faster than FP16",
    )


def _batch(text: str) -> tuple[int, int, int]:
    numbers = flags.integers(text)
    if len(numbers) == 1:
        numbers = numbers * 3
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor MIN,OPT,MAX in rising order")
    return numbers[0], numbers[1], numbers[2]


def _build(given: argparse.Namespace) -> int:
    from ..pipeline import BuildOptions, build
    from ..quantize.stage import QuantizeOptions

    if sum(("schedule" in given, "keep_rate" in given or "blocks" in given, "dense" in given)) > 1:
        raise JmpDeployError(
            "--schedule, --keep-rate with --blocks, and --dense exclude each other", "choose one"
        )
    out = given.out or Path("artifacts") / (_folder(given.model) + "-dense" * ("dense" in given))
    quantize = flags.fill(QuantizeOptions, given, "quantize.")
    own = flags.own_model(given)
    rebuild = _from_anywhere(given, out)
    asked = flags.fill(BuildOptions, given, out=out, quantize=quantize, own=own, rebuild=rebuild)
    with show.Progress() as progress:
        made = build(
            asked,
            on_stage=progress.stage,
            on_progress=progress.steps,
            on_model=lambda loaded: progress.say(found_out(loaded)),
        )
    show.show(given, summary(made), made.to_json())
    if not made.check.ok:
        fail(
            "the portable model does not agree with PyTorch within tolerance; the artifact is kept",
            f"look closer with `python -m jmp_deploy compare {shlex.quote(str(out))}`",
            1,
        )
    checked.refuse(checked.verdict_on(made))
    return 0 if made.check.ok else 1


def _from_anywhere(given: argparse.Namespace, out: Path) -> str:
    """The command as it was typed; where a path in it is relative, with the folder it starts from.

    Paths within the words are left as they are: which words are paths is argparse's secret.
    """
    command = shlex.join(given.typed)
    weights, schedule = getattr(given, "weights", "auto"), getattr(given, "schedule", "")
    calib = getattr(given, "quantize.calib", "sample")
    named = {
        *(out, getattr(given, "quantize.cache", None), *getattr(given, "images", ())),
        None if weights in ("auto", "pretrained", "random") else weights,
        None if calib == "sample" else calib,
        schedule if schedule.endswith(".json") else None,
    }
    if all(Path(path).is_absolute() for path in named if path is not None):
        return command
    return f"cd {shlex.quote(str(Path.cwd()))} && {command}"


def _folder(name: str) -> str:
    """A name for an artifact's folder: of a path its last part, else the name without slashes."""
    if name.startswith("local-dir:") or Path(name).exists():
        path = Path(name.removeprefix("local-dir:")).resolve()
        return path.name.split(".")[0] if path.is_file() else path.name
    return name.replace("/", "_").replace(":", "_")


def found_out(loaded: LoadedModel) -> list[str]:
    """What a build is about to work on, in lines, before the long work starts."""
    spec, count = loaded.preprocess, int(loaded.model.num_classes)
    names = f", {', '.join(loaded.class_names[:3])}, ..." if loaded.class_names else ""
    gives = f"{count} class{'es' * (count != 1)}{names}" if count else "features"
    return [
        f"model: {loaded.name}, {spec.channels}x{spec.height}x{spec.width}, {gives}",
        f"weights: {show.weights(loaded.origin)}",
        *(f"  {note}" for note in loaded.origin.notes),
        f"images: {images_words(spec)}",
    ]


def images_words(spec: Preprocess) -> str:
    """Preprocessing in words."""
    edge = f"{spec.resize}" if spec.resize_width is None else f"{spec.resize}x{spec.resize_width}"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (spec.mean, spec.std))
    return (
        f"resized to {edge} ({spec.interpolation}, {spec.crop_mode}), cropped to "
        f"{spec.height}x{spec.width}, mean {mean}, std {std}"
    )


def rows_of(made: Artifact) -> list[tuple[str, str]]:
    """What an artifact is: names and words."""
    jmp, check = made.jmp, made.check
    rows = [
        ("artifact", str(made.folder)),
        ("model", f"{made.model.name} at {_pixels(made.preprocess)} pixels"),
        ("weights", "\n".join((show.weights(made.weights), *made.weights.notes))),
        ("images", images_words(made.preprocess)),
        ("precision", _precision(made)),
        *fp32_rows(made.fp32),
        *(quantization_rows(made.precision, made.quantization) if made.quantization else ()),
        ("outputs", _outputs(made.model)),
        ("batch", "min {}, opt {}, max {}".format(*made.batch)),
        ("GMACs", _gmacs(made.macs)),
    ]
    if jmp:
        steps = ", ".join(f"{block}:{keep}" for block, keep in jmp.schedule)
        rows += [("schedule", f"{jmp.schedule_name} ({steps})"), ("decision", _decision(jmp))]
        rows += [("expected", jmp.expected)] if jmp.expected else []
    else:
        rows.append(("schedule", "none: dense baseline"))
    verdict = "ok" if check.ok else "OUTSIDE TOLERANCE"
    words = f"{verdict}: ONNX Runtime against PyTorch on {len(check.images)} photos"
    sizes = ", ".join(f"{name} {entry.bytes / 1e6:.1f}" for name, entry in made.files.items())
    if check.not_finite:
        words += f": NaN or infinity first in {check.not_finite}"
    rows += [
        ("check", f"{words}: {_agreements(check.pairs)}"),
        ("engine", _engine(made.engine) if made.engine else f"none: {made.no_engine}"),
        *([("engine check", _engine_checks(made.engine))] if made.engine else []),
        ("sizes (MB)", sizes),
    ]
    return rows


def summary(made: Artifact) -> list[RenderableType]:
    """What ends `build` and opens `inspect` and `report`."""
    parts: list[RenderableType] = [show.facts(rows_of(made))]
    if (found := made.quantization) and found.sensitivity:
        parts += ranking(found.sensitivity)
    if made.is_random:
        parts.append(show.styled(show.RANDOM_WARNING, "bold red"))
    for warning in found.images["warnings"] if found else ():
        parts.append(show.styled(f"calibration: {warning}", "yellow"))
    if made.jmp and made.jmp.caution:
        parts.append(show.styled(f"schedule: {made.jmp.caution}", "yellow"))
    if (recovered := made.weights.recovered) and (words := recovered.caution(made.jmp)):
        parts.append(show.styled(f"weights: {words}", "yellow"))
    parts += [show.styled(text, "yellow") for text in known_faults(made)]
    return parts


def known_faults(made: Artifact) -> list[str]:
    """What is known against the TensorRT that built an artifact's engine."""
    engine = made.engine
    if engine is None or (made.fp32 and "attention" in made.fp32.asked):
        return []
    return warnings(engine.flavour, engine.version, engine.targets, engine.precision)


def fp32_rows(found: Fp32 | None) -> list[tuple[str, str]]:
    """The row of a summary that says what stays in FP32, if anything does."""
    if found is None or not (found.asked or found.large or found.weights):
        return []
    lines = [f"--fp32 {word}" for word in found.asked]
    by_place: dict[str, Large] = {}
    for one in found.large:
        if one.place not in by_place or one.largest > by_place[one.place].largest:
            by_place[one.place] = one
    lines += [
        f"{place}: {one.tensor} reaches {one.largest:.3g} on the check's photos, and FP16 ends at "
        "65504"
        for place, one in list(by_place.items())[:SHOWN_PLACES]
    ]
    if (left := len(by_place) - SHOWN_PLACES) > 0:
        lines.append(f"... and {left} more parts")
    if found.weights:
        names = ", ".join(found.weights[:SHOWN_PLACES])
        lines.append(f"weights beyond 65504: {names}")
    return [("kept in FP32", "\n".join([*lines, f"{len(found.nodes)} operators in all"]))]


def _pixels(spec: Preprocess) -> str:
    return f"{spec.height}" if spec.height == spec.width else f"{spec.height}x{spec.width}"


def _precision(made: Artifact) -> str:
    """Which numbers compute what, in words."""
    name, found = made.precision.upper(), made.quantization
    if not found:
        return f"{name}, inputs and outputs FP32"
    return (
        f"{name} in {found.layers_quantized} of {found.layers} {_layers(found)} "
        f"({found.macs_share:.0%} of the MACs), FP16 in the rest, inputs and outputs FP32"
    )


def _outputs(model: Model) -> str:
    from ..core.outputs import output_named

    found = map(output_named, model.outputs)
    return ", ".join(f"{output.name} [{', '.join(output.axes)}]" for output in found)


def _gmacs(macs: Macs) -> str:
    model, dense = macs.model, macs.dense
    if model == dense:
        return f"{dense / 1e9:.3f}"
    return (
        f"{model / 1e9:.3f}, dense {dense / 1e9:.3f}: {model / dense - 1:+.1%}; "
        f"the FLOPs promise {dense / model:.2f}x"
    )


def _decision(jmp: Jmp) -> str:
    kept = {"importance": "most important", "distinct": "most distinct"}[jmp.selection]
    others = f"merge where similarity >= {jmp.tau:g}, else prune, per {jmp.granularity}"
    if jmp.strategy != "jmp":
        others = f"{jmp.strategy} only"
    if jmp.merge_weight != 1 and jmp.strategy != "prune":
        others += f"; {jmp.merge_weight:.0%} of a merged token's content counts"
    last = "; the last block computes only what the head reads" if jmp.last_prefix_only else ""
    return f"keep the {kept} tokens, of the others {others}{last}"


def _agreements(pairs: Sequence[dict[str, Any]]) -> str:
    """Those of the first two backends, for each output."""
    first = [pair for pair in pairs if pair.get("b") == pairs[0].get("b")]
    if len(first) == 1:
        return _agreement(*first)
    return "".join(f"\n  {pair['output']}: {_agreement(pair)}" for pair in first)


def _agreement(pair: dict[str, Any]) -> str:
    """The figures of a pair of backends, in words."""
    words = f"cosine {show.number(pair['cosine'], '.6f')}, "
    words += f"largest difference {show.number(pair['max_abs'], '.2g')}"
    if (agreement := pair.get("top1_agreement")) is not None:
        words += f", top-1 agreement {agreement:.0%}"
    return words


def _engine_checks(engine: EngineFacts) -> str:
    """What a built engine answered on GPUs, in words."""
    if not engine.checks:
        why = f" ({engine.unchecked})" if engine.unchecked else ""
        return f"not on a GPU yet, its ONNX alone was checked{why}"
    lines = []
    for check in engine.checks:
        verdict = "ok" if check.ok else f"OUTSIDE TOLERANCE: {'; '.join(check.problems)}"
        figures = f": {_agreements(check.pairs)}" if check.ok and check.pairs else ""
        lines.append(f"{verdict}: on {check.gpu} against PyTorch{figures}")
    return "\n".join(lines)


def _engine(engine: EngineFacts) -> str:
    """How an engine was made, in words."""
    plugins = engine.plugin_layers
    return (
        f"{engine.builder} {engine.version} for {', '.join(engine.targets)}, "
        f"{engine.bytes / 1e6:.1f} MB in {engine.seconds:.1f} s, "
        f"{plugins} plugin layer{'s' if plugins != 1 else ''}"
        f"{', plugin embedded' if engine.embeds_plugin else ''} ({engine.why})"
    )


# --- INT8 and FP8 --------------------------------------------------------------------------------


def _layers(found: Quantization) -> str:
    """What can be quantized, in words."""
    return "weighted layers and attentions" if found.attention else "weighted layers"


def quantization_rows(precision: str, found: Quantization) -> list[tuple[str, str]]:
    """The rows of a summary that INT8 or FP8 adds."""
    title = precision.upper()
    images = found.images
    source = "crops of the sample photos: a DEMONSTRATION, no promise for other images"
    if not images["demonstration"]:
        source = f"images of {images['source']}"
    how = f"{found.method}, {images['count']} {source}"
    if found.from_cache:
        how += f"; ranges from {found.from_cache}"
    weights = {name: size / 1e6 for name, size in found.weights_bytes.items()}
    values = {name: size / 1e6 for name, size in found.activations_bytes.items()}
    narrow = sum(weights.get(kind, 0) for kind in NARROW_TYPES)
    rows = [
        ("calibration", how),
        (
            "bytes (MB)",
            f"weights {narrow:.1f} {title} and {weights.get('FLOAT16', 0):.1f} FP16; inputs of the "
            f"weighted layers, per image, {values.get(precision, 0):.2f}, in FP16 "
            f"{values.get('fp16', 0):.2f}",
        ),
        ("kept in FP16", _kept(precision, found)),
    ]
    if found.speed:
        sizes = found.engine_bytes or {}
        words = ", ".join(f"{name.upper()} {size / 1e6:.1f} MB" for name, size in sizes.items())
        rows.append((f"{title} or FP16", f"{found.speed.why}; engines: {words}"))
    return rows


def _kept(precision: str, found: Quantization) -> str:
    """Layers by the reason for which they stay in FP16, one reason a line."""
    layers: dict[str, list[str]] = {}
    for name, reason in found.keep_fp16.items():
        # With --max-drop every layer has a reason of its own: they stand in the ranking.
        shared = "by --max-drop (ranking below)" if found.sensitivity else reason
        layers.setdefault(shared, []).append(name)
    lines = [f"{', '.join(_by_block(names))}: {reason}" for reason, names in layers.items()]
    sizes = {"int8": "one query, or more than 512 tokens", "fp8": "fewer than 32 tokens"}[precision]
    products = f"attention of {sizes}" if found.attention else "attention products"
    return "\n".join([*lines, f"{products}, LayerNorm, GELU, Softmax, residuals: by design"])


def _by_block(names: Sequence[str]) -> list[str]:
    """ "blocks.0.fc2", "blocks.1.fc2", "head" -> "fc2 of blocks 0, 1", "head"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        found = re.fullmatch(r"[^.]+\.([0-9]{1,6})\.([^.]+)", name)
        kinds.setdefault(found[2] if found else name, []).append(found[1] if found else "")
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


def ranking(result: dict[str, Any]) -> list[RenderableType]:
    """What `--max-drop` found: what each layer costs, and what it came to.

    Args:
        result: of `sensitivity.choose`, or "sensitivity" of a manifest's "int8" or "fp8".
    """
    from ..quantize.sensitivity import summary as sentence

    rows = result["ranking"]
    last = max((i for i, row in enumerate(rows, 1) if row["kept"]), default=0)
    shown = rows[: last + SHOWN_MORE]
    whole, title = result["all_quantized"]["noise"], result["precision"].upper()
    columns = (">", "layer", ">points alone", ">of the noise", ">of the MACs", "stays")
    table = show.table("", *columns)
    for rank, row in enumerate(shown, 1):
        least = "" if row["measured"] else "< "
        table.add_row(
            str(rank),
            row["name"],
            f"{least}{row['points']:.3f}",
            f"{least}{_share(row['noise'], whole)}",
            f"{row['macs_share']:.1%}",
            "FP16" if row["kept"] else title,
            style="bold" if row["kept"] else None,
        )
    groups = ", ".join(
        f"{row['name']} {_share(row['noise'], whole)}"
        for row in sorted(result["groups"], key=lambda row: -row["noise"])[:6]
    )
    lines = [
        sentence(result),
        f"noise of kinds and blocks, each alone: {groups}",
        f"points: {result['measure']}; on {result['images']} images",
    ]
    if left := len(rows) - len(shown):
        lines.insert(0, f"... and {left} layers that cost less, in {title}")
    return [table, *lines]


def _share(noise: float, whole: float) -> str:
    return f"{noise / whole:.1%}" if whole > 0 else "-"
