"""The engine stage: deployable ONNX -> the engines of an artifact.

One stage for `build`, for `run --rebuild` and for both engines of an INT8 or FP8 artifact. Its
options stand in the manifest, so that an engine is made anew as it was made before.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..core import artifact as files
from ..core import interrupt
from ..core.artifact import Artifact
from ..core.device import gpus
from ..core.errors import ArtifactError, EngineError, JmpDeployError, engine_errors, in_words
from ..core.files import make_writable_dir, sha256, staging_dir
from ..core.manifest import EngineCheck, EngineOptions, PluginFile, Precision, Speed, Stage
from . import api, builder, fit
from .fit import EngineFile

Settle = Callable[[Mapping[str, EngineFile], Artifact, "Clock"], Speed]
"""Decides between the engines "int8" or "fp8", and "fp16" (`bench.twin.settle`)."""
CheckEngine = Callable[[EngineFile, Artifact], EngineCheck]
"""Runs an engine that was just built on the GPU that is here (`compare.check.check_engine`)."""


class Clock:
    """Announces each stage of a build and keeps how long it took."""

    def __init__(self, on_stage: Callable[[str], None] = lambda name: None) -> None:
        self.on_stage = on_stage
        self.stages: list[Stage] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        interrupt.check()
        self.on_stage(name)
        started = time.monotonic()
        yield
        interrupt.check()
        self.stages.append(Stage(name, round(time.monotonic() - started, 2)))


def make_engines(
    artifact: Artifact,
    staging: Path,
    out: Path,
    choice: builder.Choice,
    check: CheckEngine,
    settle: Settle,
    *,
    clock: Clock,
    on_progress: builder.Progress | None = None,
) -> Artifact:
    """Builds the engines of an artifact from its deployable models and says which one is its own.

    Args:
        artifact: its folder holds the deployable models.
        staging: where the engines are written.
        out: where the artifact will lie: the timing cache of before is there, and logs go there,
            which are of use where the build fails too.
        choice: the builder.
        check: what each engine is asked on the GPU that is here, if one is. An engine that does not
            pass is kept, and says so (`EngineFacts.checks`); one that cannot be asked says why
            (`unchecked`): nothing that comes after a build loses it.
        settle: which of a quantized artifact's two engines becomes `model.engine`.

    Raises:
        EngineError: the parser refused a model, the build failed, or a plugin layer is missing.
    """
    if choice.flavour is None:
        return replace(artifact, engine=None, no_engine=choice.reason)
    cache = staging / files.TIMING_CACHE
    if (out / files.TIMING_CACHE).is_file():
        with engine_errors("the timing cache of before cannot be taken over"):
            shutil.copy2(out / files.TIMING_CACHE, cache)
    plugin = None
    if artifact.jmp:
        with clock("plugin"):
            plugin = find_plugin()
    jobs: list[tuple[Precision, str, str, str, str]]
    jobs = [(artifact.precision, files.DEPLOYABLE, files.ENGINE, files.BUILD_LOG, "engine")]
    if artifact.quantization is not None:
        twin = (files.TWIN_DEPLOYABLE, files.TWIN_ENGINE, files.TWIN_BUILD_LOG, "twin engine")
        jobs.append(("fp16", *twin))
    options = builder.for_precision(artifact.engine_options, choice.flavour, artifact.precision)
    made: dict[str, EngineFile] = {}
    for precision, model, target, log, stage in jobs:
        spec = builder.EngineSpec(artifact.batch, artifact.image_shape, options, precision)
        with clock(stage):
            facts = builder.build_engine(
                artifact.path(model),
                staging / target,
                choice.flavour,
                spec,
                plugin=plugin[0] if plugin else None,
                timing_cache=cache,
                log=out / log,
                on_progress=on_progress,
            )
        expected = len(artifact.jmp.schedule) if artifact.jmp else 0
        if facts.plugin_layers != expected:
            raise EngineError(
                f"the engine has {facts.plugin_layers} plugin layers, expected {expected}"
            )
        facts = replace(facts, why=choice.reason, plugin=plugin[1] if plugin else None)
        made[precision] = EngineFile(staging / target, facts.flavour, facts)
    # After the last build: on a board of 8 GB a builder needs what an open engine would hold.
    made = {name: _checked(engine, artifact, check, clock) for name, engine in made.items()}
    if artifact.quantization is None:
        return replace(artifact, engine=made[artifact.precision].facts, no_engine=None)
    return _settled(artifact, staging, made, settle, clock)


def why_rebuild(artifact: Artifact) -> str | None:
    """Why the engine of an artifact cannot run here, as far as can be told without opening it;
    None where nothing speaks against it."""
    engine = artifact.engine
    if engine is None:
        return f"none was built: {artifact.no_engine}"
    try:
        artifact.verify(files.ENGINE)
    except ArtifactError as error:
        return error.message
    version = None
    if api.installed(engine.flavour):
        version = str(api.load(engine.flavour).__version__)
    plugin = None
    if engine.plugin:
        from ..plugin.library import plugin_info, plugin_library

        try:
            plugin = plugin_info(plugin_library(build=False))
        except JmpDeployError:
            plugin = None  # not built here yet: what it will be is not known
    here = gpus()[0] if gpus() else None
    found = fit.mismatches(
        # without a GPU nothing is known of the one that it will run on
        engine if here else replace(engine, targets=()),
        version=version,
        gpu=here.name if here else "",
        capability=here.compute_capability if here else (0, 0),
        plugin=plugin,
    )
    return "; ".join(map(str, found)) or None


def rebuild(
    artifact: Artifact,
    check: CheckEngine,
    settle: Settle,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_progress: builder.Progress | None = None,
) -> Artifact:
    """Builds an artifact's engines again for the machine that is here, and puts them and the new
    manifest in place of the old ones.

    Needs what built them minus PyTorch: a TensorRT, Polygraphy, and the plugin. The ONNX, the
    schedule and the weights stay what they are, so the result of their check stays true; the
    engines are checked as `make_engines` does.

    Raises:
        ArtifactError: another file of the artifact is missing or altered.
        EngineError: no builder can work here, or the build failed. The artifact is as before.
    """
    engines = (files.ENGINE, files.TWIN_ENGINE, *files.QUANTIZED_ENGINES.values())
    others = [name for name in artifact.files if name not in engines]
    models = [files.DEPLOYABLE]
    if artifact.quantization is not None:
        models.append(files.TWIN_DEPLOYABLE)
    artifact.verify(*dict.fromkeys([*models, *others]))
    choice = builder.choose("auto")
    if choice.flavour is None:
        raise EngineError(f"no builder can work here: {choice.reason}")
    artifact = replace(artifact, engine_options=_for_this_gpu(artifact.engine_options))
    folder = artifact.folder
    make_writable_dir(folder)
    with staging_dir(folder) as staging:
        clock = Clock(on_stage)
        made = make_engines(
            artifact, staging, folder, choice, check, settle, clock=clock, on_progress=on_progress
        )
        names = [path.name for path in staging.iterdir()]
        # The engines are there for a moment without their manifest's blessing: that is noticed,
        # and mended by another run of this.
        with engine_errors(f"the engines cannot be put into {folder}"), interrupt.held():
            for name in engines:
                if name not in names:
                    (folder / name).unlink(missing_ok=True)
            for name in names:
                (staging / name).replace(folder / name)
            return made.write()


def _for_this_gpu(options: EngineOptions) -> EngineOptions:
    """The options of before; targets that leave out the GPU that is here are given up for it."""
    here = {"sm_{}{}".format(*gpu.compute_capability) for gpu in gpus()[:1]}
    return options if here <= {*options.targets} else replace(options, targets=())


def _checked(
    engine: EngineFile, artifact: Artifact, check: CheckEngine, clock: Clock
) -> EngineFile:
    """An engine with what it answered on the GPU that is here, or why it was not asked."""
    assert engine.facts is not None
    if engine.facts.embeds_plugin:
        return replace(engine, facts=replace(engine.facts, unchecked=fit.HOST_CODE))
    if not gpus():
        return replace(engine, facts=replace(engine.facts, unchecked="no GPU was here"))
    try:
        with clock("engine check"):
            found = check(engine, artifact)
    except Exception as error:  # whatever it is, minutes of building are not lost by it
        return replace(engine, facts=replace(engine.facts, unchecked=in_words(error)))
    return replace(engine, facts=replace(engine.facts, checks=(found,)))


def _settled(
    artifact: Artifact,
    staging: Path,
    made: Mapping[str, EngineFile],
    settle: Settle,
    clock: Clock,
) -> Artifact:
    """The artifact with one of its two engines as `model.engine`, and why."""
    quantization, ours = artifact.quantization, artifact.precision
    assert quantization is not None
    facts = {name: engine.facts for name, engine in made.items() if engine.facts is not None}
    speed = settle(made, artifact, clock)
    if speed.engine == "fp16":
        made[ours].path.replace(staging / files.QUANTIZED_ENGINES[ours])
        made["fp16"].path.replace(staging / files.ENGINE)
    sizes = {name: one.bytes for name, one in facts.items()}
    other = facts[ours if speed.engine == "fp16" else "fp16"]
    settled = artifact.with_quantization(
        replace(quantization, speed=speed, engine_bytes=sizes, other_checks=other.checks)
    )
    return replace(settled, engine=facts[speed.engine], no_engine=None)


def find_plugin() -> tuple[Path, PluginFile]:
    """The compiled plugin, and what the manifest says of it."""
    from ..plugin.library import plugin_info, plugin_library

    library = plugin_library()
    # The digest differs from compiler to compiler; what was compiled is what has to agree.
    sources = plugin_info(library).get("sources")
    return library, PluginFile(library.name, sha256(library), sources)
