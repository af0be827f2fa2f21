"""Every command as a user types it, with good input and bad."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from jmp_deploy import pipeline
from jmp_deploy.backends import base
from jmp_deploy.cli.main import main
from jmp_deploy.compare import compare
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.device import gpus
from jmp_deploy.core.images import INPUT
from jmp_deploy.engine import builder
from jmp_deploy.export import export, graph

needs_rtx = pytest.mark.skipif(not builder.installed("rtx"), reason="TensorRT-RTX not installed")
without_gpu = pytest.mark.skipif(bool(gpus()), reason="tells what happens without a GPU")


@pytest.fixture
def artifact(built, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(built, tmp_path / "a")
    return tmp_path / "a"


def fails(capsys, arguments, message, code=2):
    """The command ends with this exit code and one clear line, and no traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "jmp_deploy"))]
    assert "Traceback" not in err
    assert len(lines) == 1 and message in lines[0], err
    return err


def test_build_leaves_a_whole_artifact(built):
    data = Artifact.read(built).to_json()
    Artifact.read(built).verify()
    names = {"model.onnx", "model.trt.onnx", "reference.npz", "manifest.json"}
    if builder.installed("rtx"):
        names |= {"model.engine", "build.log"}
        assert data["engine"]["plugin_layers"] == len(data["jmp"]["schedule"]) == 9
        assert len(data["engine"]["plugin"]["sha256"]) == 64
    assert {path.name for path in built.iterdir()} == names
    assert data == json.loads((built.parent / "build.json").read_text())
    assert data["check"]["ok"] and data["macs"]["model"] < 0.66 * data["macs"]["dense"]
    assert data["rebuild"].startswith("python -m jmp_deploy build deit_t --labels imagenet")
    assert data["weights"]["kind"] == "file" and len(data["class_names"]) == 1000


def test_build_says_what_it_does_and_marks_random_weights(tmp_path, capsys):
    out = tmp_path / "a"
    command = ["build", "deit_t", "--weights", "random", "--dense", "--engine", "none"]
    assert main([*command, "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert "exporting to ONNX" in printed.err
    assert "RANDOM WEIGHTS" in printed.out and "dense baseline" in printed.out
    data = Artifact.read(out).to_json()
    assert data["jmp"] is None and data["engine"] is None
    assert data["no_engine"] == "no engine was asked for (--engine none)"
    err = fails(capsys, ["run", out, out], "has random weights: its answers mean nothing")
    assert "--allow-random" in err


def test_options_reach_the_model(tmp_path):
    command = ["build", "deit_t", "--weights", "random", "--engine", "none", "--precision", "fp32"]
    options = ["--keep-rate", "0.5", "--blocks", "3,6", "--strategy", "merge", "--batch", "4"]
    options += ["--granularity", "sample", "--no-proportional", "--img-size", "160"]
    options += ["--inline"]
    assert main([*command, *options, "-o", str(tmp_path / "a")]) == 0
    data = Artifact.read(tmp_path / "a").to_json()
    assert data["jmp"]["schedule"] == [[3, 50], [6, 25]] and data["jmp"]["tau"] == -1.0
    assert data["jmp"]["granularity"] == "sample" and not data["jmp"]["proportional"]
    assert data["batch"] == [4, 4, 4] and data["model"]["image_size"] == 160
    found = graph.load_model(tmp_path / "a" / "model.onnx")
    keeps = [graph.read_node(n) for n in found.graph.node if n.domain == "jmp_deploy"]
    assert [a.num_keep for a in keeps] == [50, 25] and keeps[0].tau == -1.0
    assert "model.inlined.onnx" in data["files"]
    assert not graph.load_model(tmp_path / "a" / "model.inlined.onnx").functions


def test_run_gives_classes(built, photos, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main(["run", str(built), *map(str, photos[:3]), "--topk", "2", "--json", str(out)]) == 0
    records = json.loads(out.read_text())
    assert [Path(record["image"]) for record in records] == photos[:3]
    for record in records:
        first, second = record["top"]
        assert 1 >= first["score"] >= second["score"] > 0
        assert first["label"] == Artifact.read(built).class_names[first["index"]]
    assert "onnxruntime" in capsys.readouterr().out


def test_run_equals_pytorch(built, photos, tmp_path):
    import torch

    from jmp_deploy.core.images import load_batch
    from jmp_deploy.jmp.models import restore_model

    found = Artifact.read(built)
    batch = load_batch(photos, found.preprocess)
    want = restore_model(found)(torch.from_numpy(batch)).softmax(-1).max(-1)
    main(["run", str(built), *map(str, photos), "--topk", "1", "--json", str(tmp_path / "r.json")])
    records = json.loads((tmp_path / "r.json").read_text())
    for record, score in zip(records, want.values, strict=True):
        assert record["top"][0]["score"] == pytest.approx(float(score), rel=0.01)


def test_json_to_standard_output_is_nothing_but_json(built, photos, capsys):
    assert main(["run", str(built), str(photos[0]), "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 1
    assert "top classes" in captured.err


def test_compare_agrees(built, photos, tmp_path):
    out = tmp_path / "c.json"
    assert main(["compare", str(built), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["ok"] and result["backends"][:2] == ["torch", "onnxruntime"]
    pair = result["pairs"][0]
    assert {"a", "b", "output", "cosine", "max_abs", "max_rel", "top1_agreement"} <= set(pair)
    assert pair["cosine"] > 0.999 and 0 < pair["max_abs"] < 0.1
    command = ["compare", str(built), "--images", str(photos[0].parent), "--json", str(out)]
    assert main(command) == 0
    assert json.loads(out.read_text())["images"] == len(photos)


def test_compare_outside_tolerance_exits_1(built, monkeypatch, capsys):
    monkeypatch.setitem(compare.TOLERANCES, "fp16", 1.1)
    assert main(["compare", str(built)]) == 1
    assert "outside" in capsys.readouterr().out


def test_compare_notices_another_model(artifact):
    """What the check is for: an ONNX that is intact but computes something else."""
    import onnx

    proto = graph.load_model(artifact / "model.onnx")
    weight = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(weight)
    weight.raw_data = values[::-1].tobytes()
    graph.save_model(proto, artifact / "model.onnx")
    Artifact.read(artifact).write()
    assert main(["compare", str(artifact)]) == 1


def test_compare_without_pytorch_takes_the_stored_outputs(built, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jmp_deploy.jmp.models", None)  # import fails
    assert main(["compare", str(built), "--json", str(tmp_path / "c.json")]) == 0
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["backends"][0] == "torch (stored)"


def test_compare_with_other_weights_is_refused(built, tmp_path, capsys):
    from jmp_deploy.jmp.models import load_model

    other = tmp_path / "other.safetensors"
    save_file(load_model("deit_t", "random", seed=9).model.state_dict(), other)
    fails(capsys, ["compare", built, "--weights", other, "--backends", "torch,onnxruntime"], "not")


def test_inspect_shows_where_the_reductions_are(built, capsys, tmp_path):
    out = tmp_path / "i.json"
    assert main(["inspect", str(built), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["onnx"]["reductions"][0]["name"] == "blocks.2.token_reduce"
    assert "all files are as they were built" in capsys.readouterr().out
    if builder.installed("rtx"):
        assert result["network"]["plugin_layers"] == 9
    assert main(["inspect", str(built / "model.onnx"), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["onnx"]["form"] == "portable" and "network" in result["missing"]


def test_report_repeats_build_and_comparison(built, tmp_path, capsys):
    result = tmp_path / "c.json"
    main(["compare", str(built), "--json", str(result)])
    capsys.readouterr()
    assert main(["report", str(built), "--compare", str(result)]) == 0
    printed = capsys.readouterr().out
    for word in ("GMACs", "sizes", "seconds", "cosine", "this machine could not"):
        assert word in printed
    fails(capsys, ["report", built, "--compare", built / "manifest.json"], "not a result")


def test_doctor_and_plugin(tmp_path):
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    assert "can" in json.loads((tmp_path / "d.json").read_text())
    assert main(["plugin", "build"]) == 0
    assert main(["plugin", "path", "--json", str(tmp_path / "p.json")]) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert Path(found["path"]).is_file() and len(found["sha256"]) == 64


def test_no_command_and_unknown_commands(capsys):
    for arguments in ([], ["bild"], ["build"], ["build", "deit_t", "--precision", "int9"]):
        assert main(arguments) == 2
        assert "usage:" in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_flags_are_not_guessed_from_their_beginnings(capsys):
    assert main(["build", "deit_t", "--force"]) == 2  # not --force-int8
    assert "unrecognized arguments: --force" in capsys.readouterr().err


BUILD = ["build", "deit_t", "--weights", "random", "--engine", "none", "-o", "OUT"]
SHALLOW = ["--model-kwargs", "depth=3"]  # where any model does


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "diet_s"], "unknown model 'diet_s'"),
        (["build", "resnet18", "--weights", "random"], "ResNet cannot be patched"),
        ([*BUILD, "--schedule", "12:100"], "block 12"),
        ([*BUILD, "--schedule", "3:500"], "keeps 500 tokens in block 3"),
        ([*BUILD, "--schedule", "3:0"], "keeps 0 tokens"),
        ([*BUILD, "--schedule", "3:50,6:60"], "keeps 60 tokens in block 6"),
        ([*BUILD, "--schedule", "nonsense"], "unknown schedule"),
        ([*BUILD, "--keep-rate", "0.5"], "go together"),
        ([*BUILD, "--keep-rate", "1", "--blocks", "3"], "keeps every token"),
        ([*BUILD, "--schedule", "paper", "--dense"], "exclude each other"),
        ([*BUILD, "--weights", "nowhere.safetensors"], "no such weights file"),
        ([*BUILD, "--weights", "pretrained"], "no pretrained weights"),
        ([*BUILD, "--images", "nowhere"], "no such image or folder"),
        ([*BUILD, "--tau", "nan"], "--tau: must be"),
        ([*BUILD, "-o", "/dev/null/x"], "cannot write"),
        ([*BUILD, "-o", "/dev/null"], "is a file"),
        ([*BUILD, "--targets", "ampere"], "unknown target 'ampere'"),
        ([*BUILD, "--img-size", "100"], "not a multiple of the patch size 16"),
    ],
)
def test_bad_builds(tmp_path, capsys, arguments, message):
    out = tmp_path / "a"
    fails(capsys, [str(out) if word == "OUT" else word for word in arguments], message)
    assert not out.exists()


@without_gpu
def test_tensorrt_without_a_gpu(tmp_path, capsys):
    arguments = ["build", "deit_t", "--weights", "random", "--engine", "tensorrt"]
    fails(capsys, [*arguments, "-o", tmp_path / "a"], "cannot build with tensorrt")


def test_bad_artifacts(artifact, photos, capsys, tmp_path):
    photo = photos[0]
    fails(capsys, ["run", tmp_path / "none", photo], "no such artifact folder")
    fails(capsys, ["run", tmp_path, photo], "has no manifest.json")
    fails(capsys, ["run", artifact, tmp_path / "none.jpg"], "no such image")
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    fails(capsys, ["run", artifact, text], "cannot read")
    fails(capsys, ["compare", artifact, "--images", tmp_path / "none"], "no such image or folder")
    fails(capsys, ["inspect", tmp_path / "none"], "no such file or folder")
    fails(capsys, ["inspect", text], "is neither")


def test_a_truncated_onnx(artifact, photos, capsys):
    path = artifact / "model.onnx"
    path.write_bytes(path.read_bytes()[:100_000])
    fails(capsys, ["inspect", path], "truncated or not an ONNX model")
    err = fails(capsys, ["run", artifact, photos[0]], "bytes, the manifest says")
    assert "python -m jmp_deploy build deit_t" in err
    fails(capsys, ["inspect", artifact], "bytes, the manifest says")


def test_an_altered_file(artifact, photos, capsys):
    path = artifact / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fails(capsys, ["run", artifact, photos[0]], "is not the file that was built")


@without_gpu
def test_a_foreign_engine(artifact, capsys, tmp_path):
    (tmp_path / "x.engine").write_bytes(b"not an engine")
    fails(capsys, ["inspect", tmp_path / "x.engine"], "cannot be opened")
    if builder.installed("rtx"):
        (artifact / "model.engine").write_bytes(b"short")
        fails(capsys, ["inspect", artifact / "model.engine"], "bytes, the manifest says")


@without_gpu
def test_nothing_can_run_it(artifact, photos, capsys):
    (artifact / "model.onnx").unlink()
    err = fails(capsys, ["run", artifact, photos[0]], "nothing here can run")
    assert "no GPU is here" in err or "none was built" in err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_broken_manifest(artifact, photos, capsys, text):
    (artifact / "manifest.json").write_text(text)
    fails(capsys, ["run", artifact, photos[0]], "manifest.json")


def test_a_check_that_fails_keeps_the_artifact(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.TOLERANCES, "fp16", 1.1)
    out = tmp_path / "a"
    arguments = [str(out) if word == "OUT" else word for word in [*BUILD, *SHALLOW]]
    fails(capsys, arguments, "does not agree with PyTorch", code=1)
    assert (out / "model.onnx").is_file() and not Artifact.read(out).check.ok


@pytest.mark.parametrize("stage", ["export", "engine"])
def test_ctrl_c_leaves_the_old_artifact_whole(artifact, monkeypatch, capsys, stage):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    if stage == "export":
        monkeypatch.setattr(export, "export_onnx", interrupt)
    else:
        monkeypatch.setattr(pipeline, "_deployable", interrupt)
    arguments = [str(artifact) if word == "OUT" else word for word in [*BUILD, *SHALLOW]]
    fails(capsys, arguments, "interrupted", code=130)
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before


@needs_rtx
def test_ctrl_c_while_the_builder_runs(tmp_path):
    """A real signal to the process group, as a terminal sends it."""
    import signal
    import time

    out = tmp_path / "a"
    command = [sys.executable, "-m", "jmp_deploy", "build", "deit_t", "--weights", "random"]
    process = subprocess.Popen(
        [*command, *SHALLOW, "-o", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 1200
    while process.poll() is None and not list(out.glob(".staging-*/model.onnx")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=1200)[1]
    assert process.returncode == 130 and "error: interrupted" in err and "Traceback" not in err
    assert not out.exists()


def test_a_ctrl_c_that_a_library_swallowed_still_ends_the_build(artifact, monkeypatch, capsys):
    import signal

    genuine = export.export_onnx

    def swallow(*args, **kwargs):
        with contextlib.suppress(KeyboardInterrupt):  # as a destructor or a C++ callback would
            os.kill(os.getpid(), signal.SIGINT)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(export, "export_onnx", swallow)
    arguments = [str(artifact) if word == "OUT" else word for word in [*BUILD, *SHALLOW]]
    fails(capsys, arguments, "interrupted", code=130)


def test_a_full_disk(tmp_path):
    """Files of at most 3 MB can be written: the export fails half-way through."""
    import resource

    command = [sys.executable, "-m", "jmp_deploy", "build", "deit_t", "--weights", "random"]
    done = subprocess.run(
        [*command, *SHALLOW, "--engine", "none", "-o", str(tmp_path / "a")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "error: cannot write" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    err = fails(capsys, ["build", "deit_t"], "needs timm, which is not installed")
    assert "pip install" in err and "[export-no-torch]" in err  # PyTorch is there and is kept


def test_batches_are_split_and_padded_to_the_profile():
    calls = []

    class Runner:
        name = "a runner"

        def infer(self, feed):
            calls.append(len(feed[INPUT]))
            return {"y": feed[INPUT] * 2}

    images = np.arange(11, dtype=np.float32).reshape(11, 1)
    out = base.infer(Runner(), images, (2, 4, 5))["y"]
    assert calls == [5, 5, 2]
    np.testing.assert_array_equal(out, images * 2)
