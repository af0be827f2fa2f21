"""`build --softmax`: probabilities leave every backend, and nobody takes a softmax of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from jmp_deploy import pipeline
from jmp_deploy.cli.main import main
from jmp_deploy.compare.measures import measure
from jmp_deploy.core.errors import GraphError, ModelError
from jmp_deploy.core.outputs import LOGITS, PROBABILITIES, output_named
from jmp_deploy.export import export, graph
from jmp_deploy.jmp.models import OwnModel
from tests.fakes.models import tiny_vit


def softmax(logits):
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exact / exact.sum(axis=1, keepdims=True)


def ask(path, images):
    (answer,) = onnxruntime.InferenceSession(path).run(None, {"images": images})
    return answer


def test_probabilities_come_out_in_every_backend(tmp_path, capsys):
    options = {"precision": "fp16", "engine": "none", "schedule": "2:10"}
    plain = pipeline.build(tiny_vit(), tmp_path / "logits", **options)
    made = pipeline.build(tiny_vit(), tmp_path / "p", softmax=True, **options)
    assert made.model.output == PROBABILITIES.name and made.check.ok
    np.testing.assert_allclose(
        made.reference().output, softmax(plain.reference().output), rtol=1e-4, atol=1e-7
    )
    random = np.random.default_rng(0)
    images = random.normal(size=(3, *made.image_shape)).astype(np.float32)
    logits, found = (ask(one.path("model.onnx"), images) for one in (plain, made))
    # FP32 at the end, whatever comes before
    np.testing.assert_allclose(found, softmax(logits), rtol=1e-5, atol=1e-7)
    for name in ("model.onnx", "model.trt.onnx"):
        (output,) = graph.load_model(made.path(name)).graph.output
        assert output.name == PROBABILITIES.name
        assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    photo, out = tmp_path / "photo.png", tmp_path / "out.json"
    Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(photo)
    records = []
    for one in (plain, made):
        assert main(["run", str(one.folder), str(photo), "--json", str(out)]) == 0
        (record,) = json.loads(out.read_text())
        records.append({entry["index"]: entry["score"] for entry in record["top"]})
    assert records[1] == pytest.approx(records[0], rel=1e-4)
    assert main(["compare", str(made.folder), "--backends", "torch,onnxruntime"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("classes", "own", "why"),
    [
        (0, OwnModel(), "gives features"),
        (1, OwnModel(), "a single class"),
        (10, OwnModel(multi_label=True), "a question of its own"),
    ],
)
def test_a_softmax_that_means_nothing_is_refused(tmp_path, classes, own, why):
    with pytest.raises(ModelError, match=why) as caught:
        pipeline.build(tiny_vit(num_classes=classes), tmp_path / "a", softmax=True, own=own)
    assert "--softmax" in caught.value.hint and not (tmp_path / "a").exists()


def test_a_second_softmax_is_refused(tmp_path):
    path = export.export_onnx(tiny_vit(), tmp_path / "m.onnx", image_size=(32, 32))
    export.append_softmax(path)
    with pytest.raises(GraphError, match="belongs behind logits"):
        export.append_softmax(path)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
def test_tolerances_of_logits_hold_for_probabilities(scale):
    """Of nearly even ones, whose own cosine is 1 whatever they are, and of certain ones."""
    random = np.random.default_rng(0)
    logits = scale * random.normal(size=(4, 50))
    logits -= logits.mean(axis=1, keepdims=True)
    for noise in (0.02, 0.3):
        other = logits + noise * scale * random.normal(size=logits.shape)
        other -= other.mean(axis=1, keepdims=True)
        as_logits = measure("a", "b", LOGITS.name, logits, other, "fp32", near_ties=False)
        given = softmax(logits), softmax(other)
        found = measure("a", "b", PROBABILITIES.name, *given, "fp32", near_ties=False)
        assert not found.ok and found.cosine == pytest.approx(as_logits.cosine)
        assert found.kl_max == pytest.approx(as_logits.kl_max)
        assert replace(found, output=LOGITS.name).problems == as_logits.problems
    assert measure("a", "b", PROBABILITIES.name, *given[:1] * 2, "fp32").ok


def test_a_probability_of_zero_is_compared_too():
    certain = np.array([[1.0, 0.0, 0.0]], np.float32)
    assert measure("a", "b", PROBABILITIES.name, certain, certain, "fp32").ok
    turned = measure("a", "b", PROBABILITIES.name, certain, certain[:, ::-1], "fp32")
    assert not turned.ok and np.isfinite(turned.max_abs)


def test_probabilities_are_shown_as_they_are():
    row = np.array([0.1, 0.6, 0.3], np.float32)
    (best,) = output_named("probabilities").answer(row, ["ant", "bee", "cow"], topk=1)["top"]
    assert best["label"] == "bee" and best["score"] == pytest.approx(0.6)
