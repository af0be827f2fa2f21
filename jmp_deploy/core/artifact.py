"""An artifact: a folder of files, and its manifest, which says what they are.

`Artifact` is that manifest as typed parts, read and checked once: types, ranges, plain file names,
printable strings, format version. Everything that is known of an artifact is asked of it; whether
its files are still the ones that were built is asked with `verify`, before they are opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from .. import __version__
from .errors import ArtifactError, one_line
from .files import sha256, write_json
from .images import Preprocess
from .outputs import OUTPUTS

if TYPE_CHECKING:
    from msgspec import Meta
    from numpy.typing import NDArray
else:
    try:
        from msgspec import Meta
    except ImportError:  # a bare GPU machine (scripts/gpu_check.sh), which reads no manifest

        def Meta(**limits: Any) -> None:
            """Limits that nobody asks for there."""


FILE = "manifest.json"
FORMAT = 3
MAX_BYTES = 64 << 20
"""Of a manifest: a thousand class names take 40 kB."""

PORTABLE = "model.onnx"
DEPLOYABLE = "model.trt.onnx"
ENGINE = "model.engine"
REFERENCE = "reference.npz"
TIMING_CACHE = "timing.cache"
BUILD_LOG = "build.log"
TWIN_BUILD_LOG = "build.fp16.log"
CALIBRATION = "calibration.json"
TWIN_DEPLOYABLE = "model.fp16.trt.onnx"
TWIN_ENGINE = "model.fp16.engine"
"""The FP16 twin of an INT8 artifact. Where FP16 is as fast, it is `model.engine` instead, and the
INT8 engine has the name below."""
INT8_ENGINE = "model.int8.engine"
LISTED = (
    *(PORTABLE, DEPLOYABLE, ENGINE, REFERENCE, CALIBRATION),
    *(TWIN_DEPLOYABLE, TWIN_ENGINE, INT8_ENGINE),
)
"""The files that a manifest can name: those whose content is promised."""

Granularity = Literal["token", "sample"]
Selection = Literal["importance", "distinct"]
Strategy = Literal["jmp", "merge", "prune"]
Precision = Literal["fp16", "fp32", "int8"]
Flavour = Literal["tensorrt", "rtx"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Count = Annotated[int, Meta(ge=1, le=1 << 40)]
Bytes = Annotated[int, Meta(ge=0)]
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
        output: its name.
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

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ValueError(f"output {self.output!r} is none of {', '.join(OUTPUTS)}")


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
class Jmp:
    """The reductions: see `jmp.schedule.Schedule` and `jmp.node.TokenReduce`.

    Attributes:
        schedule: (block, patch tokens kept), in block order.
    """

    schedule_name: str
    schedule: tuple[tuple[Annotated[int, Meta(ge=0)], Count], ...]
    tau: float
    selection: Selection = "importance"
    merge_weight: Annotated[float, Meta(ge=0, le=1)] = 1.0
    last_prefix_only: bool = False
    strategy: Strategy = "jmp"
    granularity: Granularity = "token"
    proportional: bool = True

    def __post_init__(self) -> None:
        blocks = [block for block, _ in self.schedule]
        if not blocks or blocks != sorted(set(blocks)):
            raise ValueError(f"schedule {blocks} is not in the order of its blocks")

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return _plain(self)


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
    """

    targets: tuple[Target, ...] = ()
    workspace_mb: Count | None = None


@dataclass(frozen=True)
class EngineFacts:
    """What `model.engine` is.

    Attributes:
        why: why this builder.
        version: of that TensorRT.
        precision: of the numbers that it computes with.
        bytes: of the plan.
        targets: architectures that it runs on.
        layers, plugin_layers: of the network, and how many of them are our plugin.
        seconds: that the build took.
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
    layers: Annotated[int, Meta(ge=0)] = 0
    plugin_layers: Annotated[int, Meta(ge=0)] = 0


@dataclass(frozen=True)
class Speed:
    """Which of two engines `model.engine` is; times in ms and FP16's over INT8's, if measured."""

    engine: Literal["int8", "fp16"]
    why: str
    ratio: float | None = None
    ms: dict[str, float] | None = None


@dataclass(frozen=True)
class Int8:
    """How a model was quantized.

    Attributes:
        images: what it was calibrated on: {"count", "source", "demonstration", "warnings", ...}.
        keep_fp16: layer -> why it stays in FP16.
        macs_share: of the model's MACs that INT8 does.
        weights_bytes, activations_bytes: by data type; activations per image.
        sensitivity: what `--max-drop` measured.
        force: INT8 is wanted though it may be no faster (`--force-int8`).
        speed, engine_bytes: of the two engines.
    """

    method: str
    images: dict[str, Any]
    keep_fp16: dict[str, str]
    equalized: tuple[str, ...] = ()
    recipe: str | None = None
    from_cache: str | None = None
    sensitivity: dict[str, Any] | None = None
    layers: Annotated[int, Meta(ge=0)] = 0
    layers_int8: Annotated[int, Meta(ge=0)] = 0
    macs_share: float = 0.0
    force: bool = False
    weights_bytes: dict[str, Bytes] = field(default_factory=dict)
    activations_bytes: dict[str, Bytes] = field(default_factory=dict)
    speed: Speed | None = None
    engine_bytes: dict[str, Bytes] | None = None


@dataclass(frozen=True)
class Check:
    """Portable ONNX against PyTorch: `pairs` as `compare.measures.Pair` has them."""

    ok: bool
    images: tuple[str, ...]
    pairs: tuple[dict[str, Any], ...]
    runtime_ms: dict[str, float]


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


class Reference(NamedTuple):
    """Input images [B, 3, H, W], PyTorch's outputs for them [B, D], and the images' names."""

    images: NDArray[Any]
    output: NDArray[Any]
    names: NDArray[Any]


@dataclass(frozen=True)
class Artifact:
    """A folder that `build` made, by its manifest.

    Attributes:
        folder: where it lies.
        precision: of the models: INT8 for linear layers and FP16 for the rest, say. What a
            backend computes with is its own (`backends.Backend.precision`).
        batch: (min, opt, max) images of the engine's profile.
        rebuild: the command that makes it anew.
        class_names, synsets: one per output, or None where unknown.
        multi_label: each class is a question of its own (sigmoid), not one of many (softmax).
        no_engine: why there is none.
        files: by name, with size and digest.
    """

    folder: Path
    model: Model
    weights: Weights
    preprocess: Preprocess
    precision: Precision
    batch: Triple
    macs: Macs
    check: Check
    rebuild: str
    jmp: Jmp | None = None
    int8: Int8 | None = None
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    synsets: tuple[str, ...] | None = None
    engine: EngineFacts | None = None
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    no_engine: str | None = None
    stages: tuple[Stage, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    files: dict[FileName, FileEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least, best, most = self.batch
        if not least <= best <= most:
            raise ValueError(f"batch {least}, {best}, {most} is not min <= opt <= max")

    @staticmethod
    def read(folder: Path | str) -> Artifact:
        """Reads and checks the manifest of an artifact folder (not yet its files: see `verify`).

        Raises:
            ArtifactError: no folder, no manifest, or one that this version cannot read.
        """
        import msgspec

        folder = Path(folder)
        path = folder / FILE
        if not folder.is_dir():
            raise ArtifactError(
                f"no such artifact folder: {folder}",
                "make one with `python -m jmp_deploy build MODEL`",
            )
        again = "build the artifact again"
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ArtifactError(f"{path} is too large for a manifest", again)
            data = msgspec.json.decode(path.read_bytes())
            found = data.get("format") if isinstance(data, dict) else None
            if found != FORMAT:
                shown = found if isinstance(found, int) else "unknown"
                raise ArtifactError(
                    f"{path} has format {shown}, jmp_deploy {__version__} reads {FORMAT}",
                    f"{again} with this version",
                )
            _refuse_odd_strings(data, path)
            return msgspec.convert({**data, "folder": folder}, Artifact)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{folder} has no {FILE}: it is not an artifact, or its build did not end",
                "make one with `python -m jmp_deploy build MODEL -o DIR`",
            ) from error
        except (OSError, msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise ArtifactError(f"{path} cannot be read: {reason}", again) from error

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input image."""
        return self.preprocess.channels, self.preprocess.height, self.preprocess.width

    @property
    def is_random(self) -> bool:
        """Whether the weights are random: good for timing, meaningless in what they answer."""
        return self.weights.kind == "random"

    def path(self, name: str) -> Path:
        """Where one of its files lies."""
        return self.folder / name

    def verified(self, name: str) -> Path:
        """The same, after `verify`."""
        self.verify(name)
        return self.path(name)

    def verify(self, *names: str) -> None:
        """Checks that files are there and are the ones that were built.

        Args:
            names: files to check; none means all that the manifest names.

        Raises:
            ArtifactError: a file is missing or altered; expected, found and the way to rebuild.
        """
        hint = f"build it again: {self.rebuild}"
        for name in names or self.files:
            entry, path = self.files.get(name), self.path(name)
            if entry is None:
                raise ArtifactError(f"{self.folder} was built without {name}", hint)
            if not path.is_file():
                raise ArtifactError(f"{path} is missing", hint)
            found = path.stat().st_size
            if found != entry.bytes:
                raise ArtifactError(
                    f"{path} has {found} bytes, the manifest says {entry.bytes}", hint
                )
            digest = sha256(path)
            if digest != entry.sha256:
                raise ArtifactError(
                    f"{path} is not the file that was built: sha256 {digest[:12]}..., the manifest "
                    f"says {entry.sha256[:12]}...",
                    hint,
                )

    def reference(self) -> Reference:
        """The images and PyTorch's outputs that travel with the artifact, verified.

        Raises:
            ArtifactError: the file is missing, altered, or holds something else.
        """
        import numpy as np

        path = self.verified(REFERENCE)
        try:
            with np.load(path, allow_pickle=False) as archive:
                found = Reference(*(archive[name] for name in Reference._fields))
        except Exception as error:  # a broken archive raises anything from zipfile, zlib, numpy
            raise ArtifactError(
                f"{path} cannot be read: {one_line(error)}", f"build it again: {self.rebuild}"
            ) from error
        return found

    def to_json(self) -> dict[str, Any]:
        """The manifest, as builtin types."""
        found = _plain(self)
        del found["folder"]
        return {"format": FORMAT, **found}

    def write(self, names: list[str] | None = None) -> Artifact:
        """Writes the manifest with size and digest of `names`, all of them in the folder; None
        takes those of `LISTED` that are there. Returns what was written.

        Raises:
            ArtifactError: it cannot be written, or would be refused when it is read.
        """
        if names is None:
            names = [name for name in LISTED if self.path(name).is_file()]
        entries = {
            name: FileEntry(sha256(self.path(name)), self.path(name).stat().st_size)
            for name in sorted(names)
        }
        written = replace(self, files=entries)
        _refuse_odd_strings(written.to_json(), self.path(FILE))
        write_json(self.path(FILE), written.to_json())
        return written


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: lists for tuples, null for what is not finite."""
    import msgspec

    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(value, enc_hook=str))
    return found


def tool_versions() -> dict[str, str]:
    """Versions of what takes part in a build, as far as installed."""
    versions = {"jmp_deploy": __version__}
    for name in (
        "torch",
        "timm",
        "onnx",
        "onnxruntime",
        "onnx-graphsurgeon",
        "onnxconverter-common",
        "polygraphy",
        "numpy",
        "pillow",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _refuse_odd_strings(value: Any, path: Path) -> None:
    """What a manifest says reaches terminals: a string with control characters is none of ours."""
    for text in _strings(value):
        if not text.isprintable():
            shown = re.sub(r"[^ -~]", "?", text)[:40]
            raise ArtifactError(
                f"{path} would hold or holds a string that cannot be printed: {shown!r}",
                "use names and paths without control characters, and build the artifact again",
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
