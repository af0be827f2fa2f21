"""A manifest is read and checked once: what is odd in it ends in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jmp_deploy.core import artifact as files
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import ArtifactError
from jmp_deploy.core.manifest import EngineOptions, Quantization, Speed, Stage
from tests.fakes.artifacts import CALIBRATED, ENGINE, JMP, make_artifact, write_artifact


@pytest.fixture
def whole(tmp_path):
    """An artifact with something in every field."""
    (tmp_path / files.ENGINE).write_bytes(b"plan")
    speed = Speed("fp16", "as fast", 1.0, {"int8": 1.0, "fp16": 1.0})
    return make_artifact(
        tmp_path,
        precision="int8",
        jmp=JMP,
        engine=ENGINE,
        engine_options=EngineOptions(("sm_86",), 256),
        no_engine=None,
        int8=Quantization(
            "max", CALIBRATED, {"head": "why"}, speed=speed, engine_bytes={"int8": 1}
        ),
        class_names=("Kätzchen", "犬"),
        stages=(Stage("fuse", 0.5),),
        tools={"torch": "2.14.1"},
    ).write()


def test_what_is_written_is_read(whole):
    assert Artifact.read(whole.folder) == whole
    data = json.loads((whole.folder / files.FILE).read_text())
    assert data == whole.to_json() and data["format"] == files.FORMAT
    assert data["jmp"]["schedule"] == [[1, 2]] and "folder" not in data


@pytest.mark.parametrize(
    "change",
    [
        {"batch": [4, 2, 8]},
        {"batch": [0, 1, 2]},
        {"batch": "1,2,3"},
        {"batch": [1, 8, 1 << 80]},
        {"precision": "fp4"},
        {"model": {"name": "m", "image_size": -1, "output": "logits"}},
        {"model": {"name": "m", "image_size": 8, "output": "x"}},
        {"weights": {"kind": "file"}},
        {"weights": {"kind": "file", "path": "w", "sha256": "../x"}},
        {"preprocess": {"height": 1 << 30, "width": 8, "resize": 8}},
        {"preprocess": None},
        {"jmp": {"schedule_name": "x", "schedule": [[3, 1], [2, 1]], "tau": 0.7}},
        {"jmp": {"schedule_name": "x", "schedule": [[3, 0]], "tau": 0.7}},
        {"jmp": {"schedule_name": "x", "schedule": [], "tau": 0.7}},
        {"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"model.onnx": {"sha256": "0" * 64, "bytes": -1}}},
        {"files": {"model.onnx": {"sha256": 5, "bytes": 1}}},
        {"engine": {"flavour": "x", "version": "1", "targets": [], "precision": "fp16"}},
        {"engine": {"flavour": "rtx", "version": "1", "targets": ["a b"], "precision": "fp16"}},
        {"rebuild": "rm\x1b[2J"},
        {"class_names": ["cat\r\nok"]},
        {"tools": {"a\x07": "1"}},
        {"format": 2},
        {"format": "x\x1b"},
        {"macs": None},
        {"check": []},
    ],
)
def test_what_is_odd_is_refused_in_one_printable_sentence(whole, change):
    data = {**whole.to_json(), **change}
    (whole.folder / files.FILE).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        Artifact.read(whole.folder)
    assert caught.value.message.isprintable() and "build the artifact again" in caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"format": NaN}']
)
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / files.FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        Artifact.read(tmp_path)
    assert caught.value.message.isprintable()


def test_every_key_is_needed_that_has_no_default(whole):
    for key in ("model", "weights", "preprocess", "precision", "batch", "rebuild"):
        data = whole.to_json()
        del data[key]
        (whole.folder / files.FILE).write_text(json.dumps(data))
        with pytest.raises(ArtifactError, match=key):
            Artifact.read(whole.folder)


def test_a_string_that_could_not_be_read_back_is_not_written(tmp_path):
    made = make_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be printed"):
        replace(made, rebuild="build 'a\nb'").write()
    assert not (tmp_path / files.FILE).exists()


def test_figures_that_are_not_finite_become_null(tmp_path):
    made = make_artifact(tmp_path)
    pair = {"cosine": float("nan"), "max_abs": float("inf")}
    replace(made, check=replace(made.check, ok=False, pairs=(pair,))).write()
    assert Artifact.read(tmp_path).check.pairs[0] == {"cosine": None, "max_abs": None}


def test_an_altered_file_is_noticed(tmp_path):
    (tmp_path / files.PORTABLE).write_bytes(b"abc")
    made = write_artifact(tmp_path)
    made.verify()
    (tmp_path / files.PORTABLE).write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="not the file that was built"):
        made.verify(files.PORTABLE)
    with pytest.raises(ArtifactError, match="built without"):
        made.verify(files.REFERENCE)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY cut", b"\x80\x04."])
def test_a_reference_that_is_no_archive_of_arrays_is_refused(tmp_path, content):
    (tmp_path / files.REFERENCE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"reference\.npz is not a reference"):
        write_artifact(tmp_path).reference()
