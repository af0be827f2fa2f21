"""What a manifest says of an artifact, as typed parts with their ranges; `artifact.py` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from .outputs import OUTPUTS, Dense, known_output

if TYPE_CHECKING:
    from msgspec import Meta
else:
    try:
        from msgspec import Meta
    except ImportError:  # a bare GPU machine (scripts/gpu_check.sh), which reads no manifest

        def Meta(**limits: Any) -> None:
            """Limits that nobody asks for there."""


Granularity = Literal["token", "sample"]
Selection = Literal["importance", "distinct"]
Strategy = Literal["jmp", "merge", "prune"]
Precision = Literal["fp16", "bf16", "fp32", "int8", "fp8"]
Narrow = Literal["int8", "fp8"]
"""Precisions of 8 bits, of which only some layers are: the rest is FP16."""
Flavour = Literal["tensorrt", "rtx"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Count = Annotated[int, Meta(ge=1, le=1 << 40)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
Natural = Annotated[int, Meta(ge=0, le=1 << 40)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Target = Annotated[str, Meta(pattern="^sm_[0-9]{2,3}$")]
Triple = tuple[Count, Count, Count]


@dataclass(frozen=True)
class Model:
    """Which model it is.

    Attributes:
        name: timm's.
        image_size: height in pixels; `Preprocess` has the width too.
        output: its name; of several the first: what the model itself gives, where that is one.
        also: the names of the others, features of patches.
        asked_for: what the user called it.
        settings: arguments of `timm.create_model` where the model is not as timm makes it by its
            name: classes, channels, pooling, ...
        function: "package.module:function" of the user's Python that made it, if one did.
    """

    name: str
    image_size: Count
    output: str
    asked_for: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    function: str = ""
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.outputs:
            if known_output(name) is None:
                raise ValueError(
                    f"output {name!r} is none of {', '.join(OUTPUTS)}, dense_N and raw_N"
                )
        if len(set(self.outputs)) < len(self.outputs):
            raise ValueError(f"outputs {', '.join(self.outputs)} are not all different")

    @property
    def outputs(self) -> tuple[str, ...]:
        """All of them."""
        return (self.output, *self.also)

    @property
    def restores(self) -> bool:
        """Whether features of patches are among them, so that every patch is restored."""
        return any(isinstance(known_output(name), Dense) for name in self.outputs)


@dataclass(frozen=True)
class Jmp:
    """The reductions: see `jmp.schedule.Schedule` and `jmp.node.TokenReduce`.

    Attributes:
        schedule: (block, patch tokens kept), in block order.
        caution: what is known against it for this model, or "".
        expected: what of the accuracy it was measured to keep, where that is published, or "".
    """

    schedule_name: str
    schedule: tuple[tuple[Natural, Count], ...]
    tau: float
    selection: Selection = "importance"
    merge_weight: Annotated[float, Meta(ge=0, le=1)] = 1.0
    last_prefix_only: bool = False
    strategy: Strategy = "jmp"
    granularity: Granularity = "token"
    proportional: bool = True
    caution: str = ""
    expected: str = ""

    def __post_init__(self) -> None:
        blocks = [block for block, _ in self.schedule]
        if not blocks or blocks != sorted(set(blocks)):
            raise ValueError(f"schedule {blocks} is not in the order of its blocks")

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return plain(self)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recovered:
    """What `recover` wrote into a checkpoint beside the weights: for what, from what, how much.

    Attributes:
        model: timm's name.
        jmp: the reduction that the weights are for.
        image_size: (height, width).
        train: "small" (norms, biases, layer scales) or "all".
        steps, best_step: of Adam; the weights are those after the latter.
        images, judged: different ones in all, and those of them that it never saw and was judged
            by.
        images_sha256: of their pixels.
        weights_sha256: of the dense model's tensors.
        before, after, gain: 1 - cosine to the dense model on the images that judged, and how much
            smaller it became, image by image.
        version: of jmp_deploy.
    """

    model: str
    jmp: Jmp
    image_size: tuple[Count, Count]
    train: Literal["small", "all"]
    steps: Count
    best_step: Natural
    batch: Count
    learning_rate: float
    seed: Natural
    images: Count
    judged: Count
    images_sha256: Digest
    weights_sha256: Digest
    before: Interval
    after: Interval
    gain: Interval
    version: str

    def in_words(self) -> str:
        """For people."""
        gain = self.gain
        return (
            f"recovered for {self.jmp.schedule_name}: 1 - cosine to the dense model "
            f"{self.before.value:.5f} -> {self.after.value:.5f} on {self.judged} images that it "
            f"never saw (gain {gain.low:.5f} to {gain.high:.5f})"
        )

    def caution(self, jmp: Jmp | None) -> str:
        """A warning where a model is built otherwise than the weights are meant, or ""."""
        ways = ("schedule", "tau", "selection", "merge_weight", "granularity", "proportional")
        if jmp and all(getattr(jmp, way) == getattr(self.jmp, way) for way in ways):
            return ""
        other = f"another reduction ({jmp.schedule_name})" if jmp else "a dense model"
        return (
            f"the weights were recovered for {self.jmp.schedule_name}, this is {other}: what they "
            "gain holds there alone"
        )


@dataclass(frozen=True)
class Weights:
    """Where the weights come from.

    Attributes:
        path, sha256: of a file; of a model that the user's Python made, sha256 over its tensors.
        source, tag: of pretrained ones.
        seed: of random ones.
        key: of the state in a file that holds several.
        notes: what was inferred from the file or decided about it, in sentences.
        fallback_for, reason: what was wanted before random ones were taken, and why it failed.
        recovered: what `recover` did to those of a file.
    """

    kind: Literal["pretrained", "file", "random", "python"]
    path: str | None = None
    sha256: Digest | None = None
    source: str | None = None
    tag: str | None = None
    seed: int | None = None
    fallback_for: str | None = None
    reason: str | None = None
    key: str = ""
    notes: tuple[str, ...] = ()
    recovered: Recovered | None = None

    def __post_init__(self) -> None:
        needed = {
            "file": ("path", "sha256"),
            "pretrained": ("source",),
            "random": ("seed",),
            "python": ("sha256",),
        }
        for name in needed.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"weights of kind {self.kind} without {name}")

    @property
    def identity(self) -> tuple[Any, ...]:
        """What says which weights they are, wherever they were found."""
        return self.kind, self.sha256, self.source, self.tag, self.seed, self.key


@dataclass(frozen=True)
class Large:
    """A tensor of the ONNX, where it stands, and its largest magnitude on the check's photos."""

    tensor: str
    place: str
    largest: float


@dataclass(frozen=True)
class Fp32:
    """What computes in FP32 in a model of a coarser precision, LayerNorms aside.

    Attributes:
        asked: words of `--fp32`, as "attention:0-3".
        largest: of all tensors, where magnitudes were taken.
        large: tensors that come too near the end of FP16.
        weights: those beyond it.
        nodes: all that compute in FP32 for these reasons, by their names in the portable ONNX.
    """

    asked: tuple[str, ...] = ()
    largest: Large | None = None
    large: tuple[Large, ...] = ()
    weights: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image, of the model and of the same model without JMP."""

    model: Count
    dense: Count


@dataclass(frozen=True)
class PluginFile:
    """The plugin that an engine was built with; `sources` is the digest of what was compiled."""

    file: FileName
    sha256: Digest
    sources: str | None = None


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built, here and on the device that builds them anew.

    Attributes:
        targets: GPU architectures such as "sm_86" for TensorRT-RTX's ahead-of-time build; empty:
            the GPU at hand, or without one every architecture that TensorRT-RTX knows.
        workspace_mb: limit of the builder's scratch memory in MiB, or None for its default.
        embed_plugin: the engine carries the plugin's library.
    """

    targets: tuple[Target, ...] = ()
    workspace_mb: Count | None = None
    embed_plugin: bool = False


@dataclass(frozen=True)
class EngineCheck:
    """An engine on a GPU: its outputs for the images of `reference.npz`, against PyTorch's.

    Attributes:
        ok: within the tolerances of `compare`.
        gpu: name of the GPU.
        date: when, in UTC (ISO 8601).
        problems: what is outside, or why the engine does not run there, in words.
        pairs: as `compare.measures.Pair` has them; none where it does not run.
    """

    ok: bool
    gpu: str
    date: str
    problems: tuple[str, ...] = ()
    pairs: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class EngineFacts:
    """What `model.engine` is.

    Attributes:
        checks: on GPUs, one for each GPU's name; with none, only the ONNX was checked.
        unchecked: why there was none when it was built.
        why: why this builder.
        version: of that TensorRT.
        precision: of the numbers that it computes with.
        bytes: of the plan.
        targets: architectures that it runs on.
        layers, plugin_layers: of the network, and how many of them are our plugin.
        seconds: that the build took.
        typing: of the network: "weak" where a TensorRT before 10.6 refused it strongly typed.
        embeds_plugin: it carries the plugin's library: host code, which a runtime has to allow and
            `Engine` never does.
    """

    flavour: Flavour
    version: str
    targets: tuple[Target, ...]
    precision: Precision
    plugin: PluginFile | None = None
    builder: str = ""
    why: str = ""
    seconds: float = 0.0
    bytes: Bytes = 0
    layers: Natural = 0
    plugin_layers: Natural = 0
    checks: tuple[EngineCheck, ...] = ()
    unchecked: str = ""
    typing: Literal["strong", "weak"] = "strong"
    embeds_plugin: bool = False

    @property
    def is_off(self) -> bool:
        """Whether a check of it failed."""
        return not all(check.ok for check in self.checks)

    def check_on(self, gpu: str) -> EngineCheck | None:
        """Its check on GPUs of this name."""
        return next((check for check in self.checks if check.gpu == gpu), None)


@dataclass(frozen=True)
class SpeedAt:
    """Two engines at one batch size.

    Attributes:
        batch: images per inference.
        ms: of each by name, the GPU's median time for an inference.
        ratio, ci95: FP16's time over the quantized engine's, and its 95 % interval.
        cuda_graph: whether they were replayed as CUDA graphs.
    """

    batch: Count
    ms: dict[str, float]
    ratio: float
    ci95: tuple[float, float]
    cuda_graph: bool


@dataclass(frozen=True)
class Speed:
    """Which of two engines `model.engine` is.

    Attributes:
        ratio, ms: FP16's time over the quantized engine's at the opt batch, if measured, and both
            in ms.
        at: by batch size, the opt batch first.
    """

    engine: Literal["int8", "fp8", "fp16"]
    why: str
    ratio: float | None = None
    ms: dict[str, float] | None = None
    at: tuple[SpeedAt, ...] = ()


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized.

    Attributes:
        images: what it was calibrated on: {"count", "source", "demonstration", "warnings", ...}.
        keep_fp16: layer -> why it stays in FP16.
        attention: attention's products are among the layers: in FP8, and by `--int8-attention`.
        macs_share: of the model's MACs that the quantized layers do.
        weights_bytes, activations_bytes: by data type; activations per image.
        sensitivity: what `--max-drop` measured.
        force: it is wanted though it may be no faster (`--force-int8`, `--force-fp8`).
        speed, engine_bytes: of the two engines.
        other_checks: of the engine that is not `model.engine` (whose checks it has itself).
    """

    method: str
    images: dict[str, Any]
    keep_fp16: dict[str, str]
    attention: bool = False
    equalized: tuple[str, ...] = ()
    recipe: str | None = None
    from_cache: str | None = None
    sensitivity: dict[str, Any] | None = None
    layers: Natural = 0
    layers_quantized: Natural = 0
    macs_share: float = 0.0
    force: bool = False
    weights_bytes: dict[str, Bytes] = field(default_factory=dict)
    activations_bytes: dict[str, Bytes] = field(default_factory=dict)
    speed: Speed | None = None
    engine_bytes: dict[str, Bytes] | None = None
    other_checks: tuple[EngineCheck, ...] = ()


@dataclass(frozen=True)
class Check:
    """Portable ONNX against PyTorch.

    Attributes:
        pairs: as `compare.measures.Pair` has them.
        not_finite: where NaN or infinity first appears in the ONNX, in words; None if nowhere.
    """

    ok: bool
    images: tuple[str, ...]
    pairs: tuple[dict[str, Any], ...]
    runtime_ms: dict[str, float]
    not_finite: str | None = None


@dataclass(frozen=True)
class Stage:
    """A stage of the build and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class FileEntry:
    """A file as it was built."""

    sha256: Digest
    bytes: Bytes


@dataclass(frozen=True)
class _LoosePair:
    cosine: float | None
    max_abs: float | None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class _LooseCheck:
    pairs: Annotated[list[_LoosePair], Meta(min_length=1)]


@dataclass(frozen=True)
class Calibrated:
    """What is read of `Quantization.images`; `quantize.images` says more."""

    count: Count
    source: str
    demonstration: bool
    warnings: list[str]


@dataclass(frozen=True)
class _LooseRank:
    name: str
    kept: bool
    measured: bool
    points: float
    noise: float
    macs_share: float


@dataclass(frozen=True)
class _LooseGroup:
    name: str
    noise: float


@dataclass(frozen=True)
class _LooseWhole:
    noise: float
    points: float


@dataclass(frozen=True)
class _LooseSensitivity:
    ranking: list[_LooseRank]
    groups: list[_LooseGroup]
    all_quantized: _LooseWhole
    precision: Narrow
    measure: str
    images: Count
    flips: float | None
    drop: float
    budget: float
    macs_share: float


@dataclass(frozen=True)
class _LooseQuantization:
    images: Calibrated
    sensitivity: _LooseSensitivity | None = None


@dataclass(frozen=True)
class Loose:
    """What is read of those parts of a manifest that are kept as what other rooms made."""

    check: _LooseCheck
    int8: _LooseQuantization | None = None
    fp8: _LooseQuantization | None = None


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: lists for tuples, null for what is not finite."""
    import msgspec

    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(value, enc_hook=str))
    return found
