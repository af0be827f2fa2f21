"""`build --embed-plugin`: an engine that carries its plugin; our own runtime does not open it."""

# ruff: noqa: F811 (fixtures of engine_world)
from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from jmp_deploy import patch
from jmp_deploy.backends import get
from jmp_deploy.cli import inspection, probes
from jmp_deploy.cli.main import main
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import EngineError
from jmp_deploy.core.images import INPUT
from jmp_deploy.core.manifest import EngineOptions
from jmp_deploy.engine import builder, stage
from jmp_deploy.engine.fit import EngineFile
from jmp_deploy.engine.runtime import Engine
from jmp_deploy.export import export, fuse
from jmp_deploy.package import targets
from jmp_deploy.plugin.library import plugin_library
from tests.fakes.artifacts import ENGINE, JMP, make_artifact
from tests.fakes.engine import images, make_world, world  # noqa: F401
from tests.fakes.models import tiny_vit

EMBEDS = replace(ENGINE, embeds_plugin=True)


@pytest.mark.skipif(not builder.installed("rtx"), reason="TensorRT-RTX not installed")
def test_the_engine_holds_the_library_to_the_byte(tmp_path):
    model = patch(tiny_vit(depth=2), "1:10")
    portable = export.export_onnx(model, tmp_path / "m.onnx", image_size=(32, 32))
    fuse.to_deployable(portable, tmp_path / "t.onnx")
    library, plans = plugin_library(), []
    for embed in (False, True):
        options = EngineOptions(("sm_86",), embed_plugin=embed)
        spec = builder.EngineSpec((1, 2, 4), (3, 32, 32), options, "fp32")
        plan = tmp_path / f"{embed}.engine"
        facts = builder.build_engine(tmp_path / "t.onnx", plan, "rtx", spec, plugin=library)
        assert facts.plugin_layers == 1 and facts.embeds_plugin is embed
        plans.append(plan.read_bytes())
    content = library.read_bytes()
    assert content not in plans[0] and content in plans[1]
    assert len(plans[1]) >= len(plans[0]) + len(content)
    assert str(library).encode() not in plans[1]  # nothing of the machine that built it


def test_our_engine_does_not_open_it(world, monkeypatch):
    folder = world.artifact()
    with Engine(folder) as engine:
        assert engine.infer({INPUT: images(2)})
    made = Artifact.read(folder)
    facts = replace(made.engine, embeds_plugin=True)
    replace(made, engine=facts).write()
    with pytest.raises(EngineError, match="host code that jmp_deploy never lets") as caught:
        Engine(folder)
    assert "without --embed-plugin" in caught.value.hint
    file = EngineFile(folder / "model.engine", facts.flavour, facts)

    def unasked(engine, artifact):
        raise AssertionError("it cannot be asked")

    checked = stage._checked(file, made, unasked, stage.Clock())
    assert "host code" in checked.facts.unchecked


def test_commands_say_so_in_one_sentence(tmp_path, capsys):
    artifact = make_artifact(tmp_path, engine=EMBEDS)
    (tmp_path / "model.engine").write_bytes(b"plan")
    artifact.write(["model.engine"])
    assert "host code" in get("engine").obstacle(artifact)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (9, 6)).save(photo)
    assert main(["run", str(tmp_path), str(photo), "--backend", "engine"]) == 2
    said = capsys.readouterr().err
    assert "host code that jmp_deploy never lets an engine run" in said and "Traceback" not in said


@pytest.mark.parametrize("more", [("--dense",), ("--engine", "none")])
def test_where_no_plugin_is_it_is_refused(tmp_path, capsys, more):
    out = tmp_path / "a"
    assert main(["build", "deit_t", "--embed-plugin", *more, "-o", str(out)]) == 2
    assert f"--embed-plugin puts the plugin into the engine, and {' '.join(more)} has none" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert not out.exists()


def test_triton_is_told_to_allow_it(tmp_path):
    made = make_artifact(tmp_path, jmp=JMP)
    for engine, option in ((ENGINE, "plugins="), (EMBEDS, "version-compatible=true")):
        commands = targets.TARGETS["triton"].commands(replace(made, engine=engine), "m")
        assert f"--backend-config=tensorrt,{option}" in commands[0][1]


def test_inspect_and_doctor_say_in_a_line_how_serving_stacks_load_the_plugin(tmp_path, monkeypatch):
    library = tmp_path / "libjmp_deploy_plugin.so"
    made = make_artifact(tmp_path, jmp=JMP, engine=ENGINE)

    def found(*, build):
        assert not build  # looking compiles nothing
        return library

    monkeypatch.setattr(inspection, "plugin_library", found)
    monkeypatch.setattr("jmp_deploy.plugin.library.plugin_library", found)
    (said,) = (check.found for check in probes._cache() if check.name == "serving stacks")
    assert f"dlopen registers it: {library}" in said
    assert inspection.serving(made) == said
    assert inspection.serving(replace(made, jmp=None)).startswith("no plugin is needed")
    assert "engine_host_code_allowed" in inspection.serving(replace(made, engine=EMBEDS))
