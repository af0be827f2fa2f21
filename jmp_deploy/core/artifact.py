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
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from .errors import ArtifactError, one_line
from .files import read_arrays, read_json, sha256, write_json
from .images import Preprocess
from .manifest import (
    Check,
    EngineCheck,
    EngineFacts,
    EngineOptions,
    FileEntry,
    FileName,
    Fp32,
    Jmp,
    Loose,
    Macs,
    Model,
    Precision,
    Quantization,
    Stage,
    Triple,
    Weights,
    plain,
)
from .outputs import output_named

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "manifest.json"
FORMAT = 3
MAX_BYTES = 64 << 20
"""Of a manifest: a thousand class names take 40 kB."""
MOST_REFERENCE = 1 << 30
"""Bytes of a reference's arrays: four images of 518 pixels take 13 MB."""

PORTABLE = "model.onnx"
DEPLOYABLE = "model.trt.onnx"
INLINED = "model.inlined.onnx"
"""The portable model without local functions (`build --inline`)."""
ENGINE = "model.engine"
REFERENCE = "reference.npz"
TIMING_CACHE = "timing.cache"
BUILD_LOG = "build.log"
TWIN_BUILD_LOG = "build.fp16.log"
CALIBRATION = "calibration.json"
TWIN_DEPLOYABLE = "model.fp16.trt.onnx"
TWIN_ENGINE = "model.fp16.engine"
"""The FP16 twin of an INT8 or FP8 artifact. Where FP16 is as fast, it is `model.engine` instead,
and the quantized engine has the name below."""
QUANTIZED_ENGINES = {"int8": "model.int8.engine", "fp8": "model.fp8.engine"}
LISTED = (
    *(PORTABLE, DEPLOYABLE, INLINED, ENGINE, REFERENCE, CALIBRATION),
    *(TWIN_DEPLOYABLE, TWIN_ENGINE, *QUANTIZED_ENGINES.values()),
)
"""The files that a manifest can name: those whose content is promised."""


class Reference(NamedTuple):
    """Input images [B, 3, H, W], PyTorch's outputs for them, name -> [B, ...], and their names.

    In the file the model's first output is `output`; others have their own names.
    """

    images: NDArray[Any]
    outputs: dict[str, NDArray[Any]]
    names: NDArray[Any]

    @property
    def output(self) -> NDArray[Any]:
        """The first."""
        return next(iter(self.outputs.values()))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As the file has them."""
        first, *others = self.outputs
        further = {name: self.outputs[name] for name in others}
        return {"images": self.images, "output": self.outputs[first], "names": self.names} | further


@dataclass(frozen=True)
class Artifact:
    """A folder that `build` made, by its manifest.

    Attributes:
        folder: where it lies.
        precision: of the models: INT8 or FP8 for linear layers and FP16 for the rest, say. What a
            backend computes with is its own (`backends.Backend.precision`).
        batch: (min, opt, max) images of the engine's profile.
        rebuild: the command that makes it anew.
        class_names, synsets: one per output, or None where unknown.
        int8, fp8: how it was quantized, in an artifact of that precision.
        fp32: what computes in FP32 in a coarser precision; None in one of FP32.
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
    int8: Quantization | None = None
    fp8: Quantization | None = None
    fp32: Fp32 | None = None
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
        if not path.exists():
            raise ArtifactError(
                f"{folder} has no {FILE}: it is not an artifact, or its build did not end",
                "make one with `python -m jmp_deploy build MODEL -o DIR`",
            )
        again = "build the artifact again"
        data = read_json(path, dict[str, Any], what="manifest", hint=again, most=MAX_BYTES)
        if (found := data.get("format")) != FORMAT:
            shown = str(found)[:20] if isinstance(found, int) else "unknown"
            raise ArtifactError(
                f"{path} has format {shown}, jmp_deploy {__version__} reads {FORMAT}",
                f"{again} with this version",
            )
        refuse_odd_strings(data, path)
        try:
            msgspec.convert(data, Loose)
            return Artifact.from_json(data, folder)
        except msgspec.ValidationError as error:
            raise ArtifactError(f"{path} is not a manifest: {one_line(error)}", again) from error

    @staticmethod
    def from_json(data: dict[str, Any], folder: Path) -> Artifact:
        """What `to_json` gave, for an artifact that lies in `folder`.

        Raises:
            msgspec.MsgspecError: it is not that.
        """
        import msgspec

        return msgspec.convert({**data, "folder": folder}, Artifact)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input image."""
        return self.preprocess.channels, self.preprocess.height, self.preprocess.width

    @property
    def quantization(self) -> Quantization | None:
        """How it was quantized; None where it was not."""
        return self.int8 or self.fp8

    def with_quantization(self, found: Quantization) -> Artifact:
        """The same with another of these, under the name of its precision."""
        return replace(self, int8=found) if self.precision == "int8" else replace(self, fp8=found)

    @property
    def is_random(self) -> bool:
        """Whether the weights are random: good for timing, meaningless in what they answer."""
        return self.weights.kind == "random"

    @property
    def how_to_rebuild(self) -> str:
        """For the hint of an error; the command is the artifact's own claim, and is run by nobody
        but its reader."""
        return f"build it again; by its manifest it was made with: {self.rebuild}"

    def path(self, name: str) -> Path:
        """Where one of its files lies."""
        return self.folder / name

    def verified(self, name: str) -> Path:
        """The same, after `verify`."""
        self.verify(name)
        return self.path(name)

    def entry(self, name: str) -> FileEntry:
        """Size and digest of one of its files, by the manifest.

        Raises:
            ArtifactError: it was built without it.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.folder} was built without {name}", self.how_to_rebuild)
        return self.files[name]

    def verify(self, *names: str) -> None:
        """Checks that files are there and are the ones that were built.

        Args:
            names: files to check; none means all that the manifest names.

        Raises:
            ArtifactError: a file is missing or altered; expected, found and the way to rebuild.
        """
        hint = self.how_to_rebuild
        for name in names or self.files:
            entry, path = self.entry(name), self.path(name)
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
        path = self.verified(REFERENCE)
        arrays = read_arrays(path, what="reference", hint=self.how_to_rebuild, most=MOST_REFERENCE)
        stored = {"output": self.model.output, **{name: name for name in self.model.also}}
        names = ("images", *stored, "names")
        shapes = {name: arrays[name].shape for name in names if name in arrays}
        count = shapes.get("images", (0,))[:1]
        axes = {key: output_named(name).axes for key, name in stored.items()}
        fits = (
            len(shapes) == len(names)
            and shapes["images"] == (*count, *self.image_shape)
            and shapes["names"] == count
            and all(
                shapes[key][:1] == count and len(shapes[key]) == len(of) and min(shapes[key]) > 0
                for key, of in axes.items()
            )
            and all(arrays[name].dtype.kind == "f" for name in ("images", *stored))
            and arrays["names"].dtype.kind == "U"
        )
        if not fits:
            given = ", ".join(f"{key} {list(of)}" for key, of in axes.items())
            expected = f"images {['B', *self.image_shape]}, {given} and names ['B']"
            raise ArtifactError(
                f"{path} is not a reference: it holds {shapes}, expected {expected}",
                self.how_to_rebuild,
            )
        outputs = {name: arrays[key] for key, name in stored.items()}
        return Reference(arrays["images"], outputs, arrays["names"])

    def to_json(self) -> dict[str, Any]:
        """The manifest, as builtin types."""
        found = plain(self)
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
        written._store()
        return written

    def record(self, check: EngineCheck) -> Artifact:
        """Adds a check of the engine to the manifest, in place of an earlier one on that GPU.
        Nothing else in it changes; the files' digests stay those of the build.

        Raises:
            ArtifactError: it cannot be written, or the engine has become another meanwhile.
        """
        now = Artifact.read(self.folder)
        if now.engine is None or now.files.get(ENGINE) != self.files.get(ENGINE):
            raise ArtifactError(f"the engine of {self.folder} has been built anew meanwhile")
        kept = (one for one in now.engine.checks if one.gpu != check.gpu)
        checked = replace(now, engine=replace(now.engine, checks=(*kept, check)))
        checked._store()
        return checked

    def _store(self) -> None:
        refuse_odd_strings(self.to_json(), self.path(FILE))
        write_json(self.path(FILE), self.to_json())


def tool_versions() -> dict[str, str]:
    """Versions of what takes part in a build, as far as installed."""
    versions = {"jmp_deploy": __version__}
    for name in (
        "torch",
        "timm",
        "onnx",
        "onnxruntime",
        "onnx-graphsurgeon",
        "polygraphy",
        "numpy",
        "pillow",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def refuse_odd_strings(value: Any, path: Path) -> None:
    """What a manifest says reaches terminals: a string with control characters is none of ours.

    Raises:
        ArtifactError: there is one.
    """
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
