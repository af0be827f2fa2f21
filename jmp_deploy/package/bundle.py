"""Making a bundle from an artifact, and checking one.

A bundle is a folder, and the same as a .tar: the artifact without its engine (`artifact/`), the
engine where it fits, the plugin's sources and, where there is one for the target, its library, a
wheel of jmp_deploy, a photo, what the stack reads, a README, and SHA256SUMS, which `sha256sum -c`
checks too. Paths in it are relative; nothing in it is loaded by making or checking it.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .. import __version__
from ..core import artifact as parts
from ..core.artifact import Artifact
from ..core.errors import ArtifactError, CheckError, EngineError
from ..core.files import sha256, write_bytes
from ..core.images import as_picture
from ..plugin.library import OTHER_SOURCES, SOURCES, plugin_info, prebuilt_for, sources_dir
from .targets import ENGINE, TARGETS, engine_command, plans_of, plugin_command
from .wheel import write_wheel

SUMS = "SHA256SUMS"
JETSON_WORKSPACE_MB = 1024
"""The builder's scratch memory on a Jetson of 8 GB, which shares it with the GPU."""
MAX_FILE = 8 << 30
_LINE = re.compile(r"^([0-9a-f]{64})  (\S.*)$")


@dataclass(frozen=True)
class BundleOptions:
    """What a bundle is made for.

    Attributes:
        target: of TARGETS.
        out: folder to make; the .tar has its name.
        tensorrt: version of the target's TensorRT, such as "10.3": an engine of another is refused.
        with_engine: False leaves the engine to be built on the target.
        with_wheel: whether jmp_deploy itself goes along.
        allow_random: whether random weights may be packed.
        workspace_mb: limit of the builder's scratch memory on the target.
        also: folders of artifacts of the same model, with engines for other kinds of GPU.
    """

    target: str
    out: Path
    tensorrt: str | None = None
    with_engine: bool = True
    with_wheel: bool = True
    allow_random: bool = False
    workspace_mb: int | None = None
    also: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """What was made, or found: `files` by path with their bytes."""

    folder: Path
    tar: Path
    files: dict[str, int]


def make_bundle(artifact: Artifact, options: BundleOptions) -> Bundle:
    """Makes a bundle, whole or not at all.

    Raises:
        ArtifactError: the target folder exists, or a file of the artifact is missing or altered.
        EngineError: the engine does not fit the target, or there is none.
    """
    target = TARGETS[options.target]
    if artifact.model.restores and not target.takes_patches:
        raise ArtifactError(
            f"{artifact.folder} gives features of every patch, and the program of a bundle for "
            f"{target.title} is for one answer per image",
            "choose another --for, open model.engine with code of your own, or build without "
            "--output dense",
        )
    out, tar = options.out, options.out.with_name(options.out.name + ".tar")
    for path in (out, tar):
        if path.exists():
            raise ArtifactError(f"{path} exists already", "choose another folder with -o")
    if artifact.is_random and not options.allow_random:
        raise ArtifactError(
            f"{artifact.folder} has random weights: what it answers means nothing",
            "build it with --weights, or add --allow-random to try the target out",
        )
    with_engine = target.engine is not None and options.with_engine
    if with_engine:
        _refuse_engine(artifact, options, target.title)
    artifact.verify()
    others = _others(artifact, options, with_engine)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", artifact.folder.resolve().name).strip("_") or "model"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as temporary:
            folder = Path(temporary) / "bundle"
            _fill(folder, artifact, others, options, name, with_engine)
            files = {path: (folder / path).stat().st_size for path in _walk(folder)}
            folder_tar = Path(temporary) / "bundle.tar"
            _pack(folder, folder_tar, out.name)
            folder.chmod(0o755)
            folder.replace(out)
            folder_tar.replace(tar)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {out}: {error.strerror or error}", "choose another folder with -o"
        ) from error
    return Bundle(out, tar, files)


def verify_bundle(path: Path, unpack_to: Path | None = None) -> Bundle:
    """Checks every file of a bundle, a folder or a .tar, against its checksums.

    Args:
        unpack_to: where a .tar is unpacked to, once it is found to be whole.

    Raises:
        ArtifactError: no bundle, or the folder to unpack to exists.
        CheckError: a file is missing, altered, or too many; nothing is unpacked then.
    """
    if path.is_dir():
        text, found = _read_sums(path / SUMS), {}
        for name in _listed(text):
            file = path / name
            if file.is_file() and not file.is_symlink():
                found[name] = (sha256(file), file.stat().st_size)
        return _checked(path, text, found)
    if unpack_to is not None and unpack_to.exists():
        raise ArtifactError(f"{unpack_to} exists already", "choose another folder with -o")
    try:
        with tarfile.open(path, "r:") as archive:
            members = _members(archive, path)
            sums = members.pop(SUMS, None)
            if sums is None or sums.size > 1 << 20:
                raise ArtifactError(f"{path} is not a bundle: no {SUMS} in it", _AGAIN)
            text = b"".join(_pieces(archive, sums)).decode("utf-8", errors="replace")
            found = {
                name: (_digest(archive, member), member.size) for name, member in members.items()
            }
            bundle = _checked(path, text, found, all_of_it=True)
            if unpack_to is not None:
                _unpack(archive, {**members, SUMS: sums}, unpack_to)
            return bundle
    except FileNotFoundError as error:
        raise ArtifactError(f"no such bundle: {path}", _AGAIN) from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read as a bundle's .tar: {error}", _AGAIN) from error


_AGAIN = "make it again with `python -m jmp_deploy package DIR --for TARGET`"


# --- Making --------------------------------------------------------------------------------------


def _refuse_engine(artifact: Artifact, options: BundleOptions, title: str) -> None:
    """An engine that the target cannot open."""
    hint = "add --no-engine: the bundle then says how it is built on the target"
    engine = artifact.engine
    if engine is None:
        raise EngineError(f"{artifact.folder} has no engine: {artifact.no_engine}", hint)
    if engine.flavour != "tensorrt":
        raise EngineError(
            f"{artifact.folder} has an engine of TensorRT-RTX, {title} runs those of TensorRT", hint
        )
    wanted = options.tensorrt
    if wanted and wanted.split(".")[:2] != engine.version.split(".")[:2]:
        raise EngineError(
            f"{artifact.folder} has an engine of TensorRT {engine.version}, "
            f"the target has {wanted}",
            hint,
        )


def _others(artifact: Artifact, options: BundleOptions, with_engine: bool) -> list[Artifact]:
    """The artifacts whose engines go along, each for a kind of GPU that no other is for."""
    if options.also and not (TARGETS[options.target].plans and with_engine):
        raise ArtifactError(
            "--also adds engines for other kinds of GPU, which triton takes, beside the first",
            "leave it out, or make a bundle for each kind of GPU",
        )
    others = [Artifact.read(folder) for folder in options.also]
    taken: dict[str, Path] = {}
    for other in [artifact, *others] if others else []:
        _refuse_engine(other, options, TARGETS[options.target].title)
        engine = other.engine
        assert engine is not None  # or it was refused
        if other.entry(parts.DEPLOYABLE) != artifact.entry(parts.DEPLOYABLE):
            raise ArtifactError(
                f"{other.folder} is not the model of {artifact.folder}: another {parts.DEPLOYABLE}",
                "copy the artifact to the other GPU, and `run DIR PHOTO --rebuild` there",
            )
        first, own = (
            (each.engine.version, each.batch, each.engine.embeds_plugin)
            for each in (artifact, other)
            if each.engine
        )
        if first != own:
            raise EngineError(
                f"{artifact.folder} and {other.folder} differ in TensorRT, batch or "
                f"--embed-plugin: {first} and {own}",
                "one server has one TensorRT and one configuration: build both alike",
            )
        archs = ", ".join(engine.targets)
        if len(engine.targets) != 1 or archs in taken:
            raise EngineError(
                f"{other.folder} has an engine for {archs or 'unknown GPUs'}"
                + (f", as {taken[archs]} has" if archs in taken else ""),
                "Triton chooses by the GPU: each engine has to be for a kind of its own",
            )
        taken[archs] = other.folder
        other.verify(parts.ENGINE)
    return others


def _fill(
    folder: Path,
    artifact: Artifact,
    others: list[Artifact],
    options: BundleOptions,
    name: str,
    with_engine: bool,
) -> None:
    target = TARGETS[options.target]
    inner = folder / "artifact"
    inner.mkdir(parents=True)
    engines = (parts.ENGINE, parts.TWIN_ENGINE, *parts.QUANTIZED_ENGINES.values())
    for file in artifact.files:
        if file not in engines:
            shutil.copyfile(artifact.path(file), inner / file)
    workspace = options.workspace_mb or artifact.engine_options.workspace_mb
    if options.target == "jetson":
        workspace = workspace or JETSON_WORKSPACE_MB
    portable = replace(
        artifact,
        folder=inner,
        engine=None,
        no_engine="it is built on the target",
        # What is built there by jmp_deploy has to run in it.
        engine_options=replace(
            artifact.engine_options, targets=(), workspace_mb=workspace, embed_plugin=False
        ),
    )
    Artifact.from_json(_without_paths(portable.to_json()), inner).write()
    plans = plans_of([artifact, *others]) if others else {}
    if with_engine and target.engine:
        into = folder / target.engine(name)
        for source, plan in zip([artifact, *others], plans.values() or [ENGINE], strict=True):
            _copy(source.path(parts.ENGINE), into / plan)
    packed = None
    if artifact.jmp:
        for file in (*SOURCES, *OTHER_SOURCES, "CMakeLists.txt"):
            _copy(sources_dir() / file, folder / "plugin" / "src" / file)
        # A Jetson's driver takes its own CUDA only: one of each, and install.sh chooses.
        for major in (12, 13) if options.target == "jetson" else ():
            if library := prebuilt_for("aarch64", cuda=major):
                _copy_library(library, folder / "plugin" / f"cuda{major}")
        if options.target != "jetson" and (library := prebuilt_for("x86_64")):
            packed = _copy_library(library, folder / "plugin")
    if options.with_wheel:
        (folder / "wheel").mkdir()
        write_wheel(folder / "wheel")
    photo = as_picture(artifact.reference().images[0], artifact.preprocess)
    photo.save(folder / "photo.png")
    if options.target == "cpp":  # its runner reads no other
        photo.convert("RGB").save(folder / "photo.ppm")
    described = artifact if with_engine else portable
    texts = target.texts(portable, name, plans)
    texts["README.md"] = _readme(described, options, name, with_engine, packed, bool(plans))
    for path, text in texts.items():
        write_bytes(folder / path, text.encode())
    sums = "".join(f"{sha256(folder / path)}  {path}\n" for path in _walk(folder))
    write_bytes(folder / SUMS, sums.encode())


def _copy_library(library: Path, folder: Path) -> str:
    """Copies a compiled plugin with what is known of it; says what it is for."""
    _copy(library, folder / library.name)
    _copy(library.with_suffix(".json"), folder / f"{library.stem}.json")
    info = plugin_info(library)
    archs = ", ".join(f"sm_{arch}" for arch in info["architectures"])
    major = info["cuda"].split(".")[0]
    return f"{info['machine']}, drivers of CUDA {major} or newer, {archs} and newer GPUs"


def _readme(
    artifact: Artifact,
    options: BundleOptions,
    name: str,
    with_engine: bool,
    packed: str | None,
    several: bool,
) -> str:
    target = TARGETS[options.target]
    commands = [("that the bundle is whole", f"sha256sum --quiet -c {SUMS}")]
    if target.engine:
        commands += plugin_command(artifact, packed, several)
        if not with_engine:
            folder = target.engine(name)
            made = "" if folder == "." else f"mkdir -p {folder} && "
            inside = target.inside(artifact) if target.inside else ""
            plan = str(PurePosixPath(folder) / ENGINE)
            build = engine_command(artifact, plan, inside)
            commands.append(("the engine, on the kind of GPU that will run it", made + build))
    commands += target.commands(artifact, name)
    steps = "\n".join(
        f"{number}. {what[0].upper()}{what[1:]}:\n\n   ```\n   {command}\n   ```\n"
        for number, (what, command) in enumerate(commands, 1)
    )
    random = "\n**Random weights: what it answers means nothing.**\n" if artifact.is_random else ""
    return f"""# {artifact.model.name} for {target.title}
{random}
Made by jmp_deploy {__version__}. Input `images` [B, {", ".join(map(str, artifact.image_shape))}]
float32, outputs `{"`, `".join(artifact.model.outputs)}`,
batch {artifact.batch[0]} to {artifact.batch[2]}, {artifact.precision.upper()}.
What it is, and how its images are prepared: `artifact/manifest.json`.

It needs {target.needs(artifact)}

In this folder:

{steps}"""


def _without_paths(value: Any) -> Any:
    """JSON without paths of this machine: of each, its last name is left."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    if value.startswith(("/", "~")):
        return Path(value).name
    try:
        words = shlex.split(value)
    except ValueError:
        words = value.split()
    absolute = re.compile(r"^([^/=]*=)?[~]?/.*$")
    if not any(absolute.match(word) for word in words):
        return value
    if words[0] == "cd" and words[2:3] == ["&&"]:  # into a folder of this machine
        words = words[3:]
    kept = [
        (match[1] or "") + Path(word).name if (match := absolute.match(word)) else word
        for word in words
    ]
    return shlex.join(kept)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _walk(folder: Path) -> list[str]:
    """Files of a bundle but for the checksums, as they are named in it."""
    paths = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(path for path in paths if path != SUMS)


def _pack(folder: Path, tar: Path, name: str) -> None:
    """The same bundle gives the same bytes: no times, no names of users."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in [SUMS, *_walk(folder)]:
            archive.add(folder / path, f"{name}/{path}", recursive=False, filter=plain)


# --- Checking ------------------------------------------------------------------------------------


def _read_sums(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArtifactError(
            f"{path.parent} is not a bundle: {path.name} cannot be read", _AGAIN
        ) from error


def _listed(text: str) -> dict[str, str]:
    """path -> sha256 of a bundle's checksums; paths that would leave the folder are refused."""
    found = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or not _is_inside(match[2]):
            raise ArtifactError(f"{SUMS} has a line that is not a checksum of a file here", _AGAIN)
        found[match[2]] = match[1]
    if not found:
        raise ArtifactError(f"{SUMS} is empty", _AGAIN)
    return found


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and ".." not in path.parts


def _checked(
    path: Path, text: str, found: dict[str, tuple[str, int]], *, all_of_it: bool = False
) -> Bundle:
    listed = _listed(text)
    missing = sorted(listed.keys() - found.keys())
    altered = sorted(
        name for name in listed.keys() & found.keys() if listed[name] != found[name][0]
    )
    foreign = sorted(found.keys() - listed.keys()) if all_of_it else []
    for what, names in (("missing", missing), ("altered", altered), ("foreign", foreign)):
        if names:
            raise CheckError(f"{path}: {len(names)} files {what}, first {names[0]}", _AGAIN)
    folder = path if path.is_dir() else path.with_suffix("")
    return Bundle(folder, path, {name: size for name, (_, size) in found.items()})


def _members(archive: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    """Files by their path below the one folder that a bundle's archive has."""
    found: dict[str, tarfile.TarInfo] = {}
    roots = set()
    for member in archive:
        name = PurePosixPath(member.name)
        good = _is_inside(member.name) and (member.isreg() or member.isdir())
        if not good or member.size > MAX_FILE:
            raise ArtifactError(f"{path} holds something that no bundle has", _AGAIN)
        roots.add(name.parts[:1])
        inner = "/".join(name.parts[1:])
        if len(roots) > 1 or inner in found:
            raise ArtifactError(f"{path} holds something that no bundle has", _AGAIN)
        if member.isreg():
            found[inner] = member
    return found


def _pieces(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    file: IO[bytes] | None = archive.extractfile(member)
    assert file is not None  # it is a regular file
    while piece := file.read(1 << 20):
        yield piece


def _digest(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(archive, member):
        digest.update(piece)
    return digest.hexdigest()


def _unpack(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as temporary:
        folder = Path(temporary) / "bundle"
        for name, member in members.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.writelines(_pieces(archive, member))
        folder.replace(out)
