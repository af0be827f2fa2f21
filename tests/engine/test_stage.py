"""The engine stage: what `build` made, `run --rebuild` makes again, both engines of INT8 too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jmp_deploy.backends import get
from jmp_deploy.core import artifact as files
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.device import Gpu
from jmp_deploy.core.errors import EngineError
from jmp_deploy.core.manifest import EngineCheck, EngineFacts, EngineOptions, Quantization, Speed
from jmp_deploy.engine import builder, stage
from tests.fakes.artifacts import CALIBRATED, JMP, make_artifact

OPTIONS = EngineOptions(("sm_86",), workspace_mb=256)
CHOICE = builder.Choice("rtx", "it is here")


@pytest.fixture
def built(monkeypatch):
    """A builder that writes what it was asked for, and remembers it."""
    asked = []

    def build_engine(model, target, flavour, spec, *, plugin, timing_cache, log, on_progress):
        asked.append((model.name, spec, timing_cache.read_text() if timing_cache.exists() else ""))
        target.write_text(f"{model.read_text()} {len(asked)}")
        timing_cache.write_text("warm")
        return EngineFacts(flavour, "1.7", ("sm_86",), spec.precision, bytes=len(asked))

    monkeypatch.setattr(builder, "build_engine", build_engine)
    monkeypatch.setattr(builder, "choose", lambda wanted: CHOICE)
    return asked


def quantized(folder, precision="int8"):
    for name in (files.DEPLOYABLE, files.TWIN_DEPLOYABLE, files.PORTABLE):
        (folder / name).write_text(name)
    return make_artifact(
        folder,
        precision=precision,
        **{precision: Quantization("max", CALIBRATED, {})},
        engine_options=OPTIONS if precision == "int8" else replace(OPTIONS, targets=("sm_89",)),
        batch=(1, 2, 4),
    ).write()


def settle_for(winner):
    return lambda engines, artifact, clock: Speed(winner, f"{winner} of {sorted(engines)}")


def unasked(engine, artifact):
    raise AssertionError("without a GPU no engine is asked")


def passes(engine, artifact):
    return EngineCheck(True, "a GPU", "2026-11-25")


@pytest.mark.parametrize(
    ("ours", "first", "then"),
    [
        ("int8", "fp16", "fp16"),
        ("int8", "fp16", "int8"),
        ("int8", "int8", "fp16"),
        ("int8", "int8", "int8"),
        ("fp8", "fp8", "fp16"),
        ("fp8", "fp16", "fp8"),
    ],
)
def test_rebuild_makes_both_engines_and_settles_again(tmp_path, built, ours, first, then):
    made = stage.make_engines(
        quantized(tmp_path, ours),
        tmp_path,
        tmp_path,
        CHOICE,
        unasked,
        settle_for(first),
        clock=stage.Clock(),
    ).write()
    assert get("engine").precision(made) == first
    assert get("onnxruntime").precision(made) == ours and get("torch").precision(made) == "fp32"
    for turn, winner in enumerate((first, then)):
        if turn:
            made = stage.rebuild(made, unasked, settle_for(winner))
        one, two = built[2 * turn : 2 * turn + 2]
        assert [one[0], two[0]] == [files.DEPLOYABLE, files.TWIN_DEPLOYABLE]
        for _, spec, cache in (one, two):
            assert spec.options == made.engine_options and spec.batch == (1, 2, 4)
            assert cache == "warm" or (turn, cache) == (0, "")
        assert [one[1].precision, two[1].precision] == [ours, "fp16"]
        found = Artifact.read(tmp_path)
        found.verify()
        assert found == made and found.engine.precision == winner
        assert found.quantization.speed == Speed(winner, f"{winner} of {sorted(['fp16', ours])}")
        other = {ours: files.TWIN_ENGINE, "fp16": f"model.{ours}.engine"}[winner]
        engines = {n for n in found.files if n.endswith(".engine")}
        assert engines == {files.ENGINE, other}
        assert {p.name for p in tmp_path.glob("*.engine")} == engines
        number = {ours: 1, "fp16": 2}[winner] + 2 * turn
        assert (tmp_path / files.ENGINE).read_text().endswith(f" {number}")
        assert found.engine.unchecked == "no GPU was here" and found.engine.checks == ()
        assert found.quantization.engine_bytes == {ours: 2 * turn + 1, "fp16": 2 * turn + 2}


@pytest.mark.parametrize(("capability", "targets"), [((8, 6), ("sm_86",)), ((8, 9), ())])
def test_an_engine_for_other_gpus_is_made_for_the_one_that_is_here(
    tmp_path, built, monkeypatch, capability, targets
):
    monkeypatch.setattr(stage, "gpus", lambda: (Gpu("a GPU", capability, 1 << 33),))
    (tmp_path / files.DEPLOYABLE).write_text("onnx")
    made = stage.rebuild(
        make_artifact(tmp_path, engine_options=OPTIONS).write(), passes, settle_for("int8")
    )
    (asked,) = built
    assert asked[1].options == made.engine_options == replace(OPTIONS, targets=targets)


def test_a_missing_plugin_layer_is_noticed_and_nothing_changes(tmp_path, built, monkeypatch):
    (tmp_path / files.DEPLOYABLE).write_text("onnx")
    (tmp_path / files.ENGINE).write_text("old")
    made = make_artifact(tmp_path, jmp=JMP).write()
    monkeypatch.setattr(stage, "find_plugin", lambda: (None, None))
    with pytest.raises(EngineError, match="0 plugin layers, expected 1"):
        stage.rebuild(made, unasked, settle_for("int8"))
    assert Artifact.read(tmp_path) == made and (tmp_path / files.ENGINE).read_text() == "old"
    assert not list(tmp_path.glob(".staging*"))


def test_without_a_builder_the_reason_stays(tmp_path):
    choice = builder.Choice(None, "no GPU")
    made = stage.make_engines(
        make_artifact(tmp_path),
        tmp_path,
        tmp_path,
        choice,
        unasked,
        settle_for("int8"),
        clock=stage.Clock(),
    )
    assert made.engine is None and made.no_engine == "no GPU"
    assert stage.why_rebuild(replace(made, no_engine="no GPU")) == "none was built: no GPU"


HERE = Gpu("a GPU", (8, 6), 1 << 33)


@pytest.mark.parametrize("winner", ["fp16", "int8"])
def test_on_a_gpu_both_engines_are_checked_after_the_last_build(
    tmp_path, built, monkeypatch, winner
):
    monkeypatch.setattr(stage, "gpus", lambda: (HERE,))
    settled = []

    def check(engine, artifact):
        assert len(built) == 2, "a builder needs the memory that an open engine holds"
        assert artifact.precision == "int8"
        name = engine.facts.precision
        assert engine.path.read_text().startswith(
            {"int8": files.DEPLOYABLE, "fp16": files.TWIN_DEPLOYABLE}[name]
        )
        return EngineCheck(name == winner, HERE.name, "2026-11-25", (f"of {name}",))

    def settle(engines, artifact, clock):
        settled.append({name: engine.facts.is_off for name, engine in engines.items()})
        return Speed(winner, "it is right")

    clock = stage.Clock()
    made = stage.make_engines(
        quantized(tmp_path), tmp_path, tmp_path, CHOICE, check, settle, clock=clock
    ).write()
    found = Artifact.read(tmp_path)
    assert found == made
    other = {"int8": "fp16", "fp16": "int8"}[winner]
    assert settled == [{winner: False, other: True}]
    assert [check.problems for check in found.engine.checks] == [(f"of {winner}",)]
    assert [check.problems for check in found.int8.other_checks] == [(f"of {other}",)]
    assert [item.name for item in clock.stages][-2:] == ["engine check", "engine check"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (EngineError("expected sm_86, found sm_90"), "expected sm_86, found sm_90"),
        (TypeError("a bug"), "TypeError: a bug"),
        # a manifest holds nothing that cannot be printed: TensorRT's words may be of any kind
        (EngineError("refused:\tnode \x1b]0;x\nmore"), "refused: node  ]0;x"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_check_that_cannot_be_made_loses_no_build(tmp_path, built, monkeypatch, fault, reason):
    def check(engine, artifact):
        raise fault

    monkeypatch.setattr(stage, "gpus", lambda: (HERE,))
    (tmp_path / files.DEPLOYABLE).write_text("onnx")
    made = stage.rebuild(make_artifact(tmp_path).write(), check, settle_for("int8"))
    assert Artifact.read(tmp_path) == made and (tmp_path / files.ENGINE).is_file()
    assert made.engine.checks == () and made.engine.unchecked == reason


def test_files_that_the_system_refuses_end_in_an_engine_error(tmp_path, built, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / files.DEPLOYABLE).write_text("onnx")
    (tmp_path / files.TIMING_CACHE).write_text("of before")
    made = make_artifact(tmp_path).write()
    monkeypatch.setattr(stage.shutil, "copy2", full)
    with pytest.raises(EngineError, match=r"timing cache .*: No space left on device"):
        stage.rebuild(made, unasked, settle_for("int8"))
    assert Artifact.read(tmp_path) == made and not list(tmp_path.glob(".staging*"))
