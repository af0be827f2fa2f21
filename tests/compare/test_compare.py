"""Backends side by side: measures, input, bad input, exit codes."""

from __future__ import annotations

import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from jmp_deploy.cli.main import main
from jmp_deploy.compare import compare, measures
from jmp_deploy.jmp.patch import patch, unpatch
from tests.fakes.compare import artifact_of, plant


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(artifact folder, its PyTorch model): JMP in FP16, 10 classes."""
    return artifact_of(tmp_path_factory.mktemp("tiny") / "a", precision="fp16")


@pytest.fixture
def restored(tiny, monkeypatch):
    """The artifact, with its model for PyTorch's part."""
    monkeypatch.setattr("jmp_deploy.jmp.models.restore_model", lambda data, weights=None: tiny[1])
    return tiny[0]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(5):
        pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def run(folder, tmp_path, *options):
    out = tmp_path / "c.json"
    code = main(["compare", str(folder), *map(str, options), "--json", str(out)])
    return code, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_an_output_that_is_all_but_zero_is_judged_by_the_difference_not_its_direction(precision):
    floor = compare.TABLE[precision].floor
    tiny = np.full((2, 4), floor / 3)
    turned = np.array([[1, -1, 1, -1], [1, 1, -1, -1]]) * tiny
    within = compare.measure("a", "b", "logits", tiny, turned, precision)
    assert within.ok and within.cosine == 0
    assert not compare.measure("a", "b", "logits", tiny, 4 * turned, precision).ok
    asked = compare.measure("a", "b", "logits", tiny, turned, precision, min_cosine=0.9)
    assert not asked.ok


def test_measures_against_pytorch_in_float64():
    random = np.random.default_rng(0)
    a = random.normal(size=(7, 20)).astype(np.float32) * 3
    b = a + random.normal(size=a.shape).astype(np.float32) * 0.5
    pair = compare.measure("a", "b", "logits", a, b, "fp32")
    x, y = (torch.from_numpy(v).double() for v in (a, b))
    cosine = torch.nn.functional.cosine_similarity(x, y)
    assert pair.cosine == pytest.approx(cosine.min().item(), abs=1e-12)
    assert pair.cosine_mean == pytest.approx(cosine.mean().item(), abs=1e-12)
    assert pair.worst == cosine.argmin().item()
    assert pair.max_abs == pytest.approx((x - y).abs().max().item())
    assert pair.mean_abs == pytest.approx((x - y).abs().mean().item())
    assert pair.max_rel == pytest.approx(((x - y).abs().max() / x.abs().max()).item())
    kl = torch.nn.functional.kl_div(
        y.log_softmax(1), x.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    assert pair.kl_mean == pytest.approx(kl.mean().item())
    assert pair.kl_max == pytest.approx(kl.max().item())
    top = [v.topk(5).indices.tolist() for v in (x, y)]
    shared = [len(set(p) & set(q)) / 5 for p, q in zip(*top, strict=True)]
    assert pair.top5_agreement == pytest.approx(np.mean(shared)) and pair.top5_agreement < 1
    assert pair.top1_agreement == (x.argmax(1) == y.argmax(1)).double().mean().item()
    assert not pair.ok and "cosine" in pair.problems[0]


def test_large_logits_do_not_overflow():
    a = np.array([[1e4, 0, -1e4]])
    assert compare.measure("a", "b", "logits", a, a + 5, "fp16").kl_max == 0


def test_features_have_no_classes():
    a = np.eye(3)
    pair = compare.measure("a", "b", "features", a, a, "fp32")
    assert pair.ok and pair.top1_agreement is None and pair.kl_mean is None


def test_overrides_of_the_tolerances():
    a, b = np.array([[1.0, 0.0]]), np.array([[1.0, 0.1]])
    assert not compare.measure("a", "b", "features", a, b, "fp16").ok
    assert compare.measure("a", "b", "features", a, b, "fp16", min_cosine=0.99).ok
    tight = compare.measure("a", "b", "features", a, b, "int8", max_abs=0.05)
    assert not tight.ok and "largest difference 0.1 is above 0.05" in tight.problems


def turned(cosines):
    """Pairs of unit vectors with these cosines."""
    c = np.asarray(cosines)
    return np.tile([1.0, 0.0], (len(c), 1)), np.stack([c, np.sqrt(1 - c**2)], axis=1)


def test_one_near_tie_does_not_fail_a_reduced_model():
    a, b = turned([0.9999, 0.995, 0.9999])
    assert compare.measure("a", "b", "features", a, b, "fp16").ok
    dense = compare.measure("a", "b", "features", a, b, "fp16", near_ties=False)
    assert not dense.ok and "smallest cosine, 0.995000" in dense.problems[0]
    assert not compare.measure("a", "b", "features", a, b, "fp16", min_cosine=0.999).ok


def test_dense_features_of_a_reduced_model_are_judged_by_the_median_patch():
    """A near tie moves a few patches to another token; with all a little off, or none reduced, it
    is no near tie."""
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 20, 8))
    moved = x.copy()
    moved[:, :3] = random.normal(size=(4, 3, 8))
    off = x + 0.1 * random.normal(size=x.shape)
    judged = [
        measures.measure("a", "b", "dense", x, y, "fp16", near_ties=ties).ok
        for y, ties in ((moved, True), (moved, False), (off, True))
    ]
    assert judged == [True, False, False]


def test_many_small_differences_or_a_large_one_fail_a_reduced_model():
    for cosines, word in (([0.998, 0.998, 0.9999], "median"), ([0.9999, 0.9, 0.9999], "smallest")):
        pair = compare.measure("a", "b", "features", *turned(cosines), "fp16")
        assert not pair.ok and len(pair.problems) == 1 and word in pair.problems[0]
        assert pair.cosine_median == pytest.approx(np.median(cosines))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value):
    a, b = np.ones((4, 3)), np.ones((4, 3))
    b[1, 2] = b[3, 0] = value
    pair = compare.measure("torch", "engine", "logits", a, b, "fp16")
    key, word = ("nan", "NaN") if math.isnan(value) else ("inf", "inf")
    assert not pair.ok and pair.not_finite["engine"][key] == 2
    assert pair.not_finite["engine"]["images"] == [1, 3] and "torch" not in pair.not_finite
    assert pair.problems == (f"logits of engine holds 2 {word}, in 2 images",)


def test_other_shapes_are_told():
    pair = compare.measure("a", "b", "logits", np.ones((2, 3)), np.ones((2, 4)), "fp32")
    assert not pair.ok and "[2, 3]" in pair.problems[0] and "[2, 4]" in pair.problems[0]


def test_zero_outputs():
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert compare.measure("a", "b", "features", zero, zero, "fp32").ok
    assert compare.measure("a", "b", "features", zero, one, "fp32").cosine == 0
    assert measures.cosines(one, -one)[0] == pytest.approx(-1)


def test_a_comparison(restored, tmp_path, capsys):
    code, result = run(restored, tmp_path)
    assert code == 0 and result["ok"]
    assert result["backends"] == ["torch", "onnxruntime"] and "engine" in result["skipped"]
    pair = result["pairs"][0]
    assert {"a", "b", "output", "cosine", "max_abs", "top1_agreement"} <= set(pair)
    assert pair["top5_agreement"] == 1.0 and 0 <= pair["kl_mean"] < 1e-2
    assert pair["worst_image"] in ("r0", "r1", "r2", "r3")
    assert result["reductions"]["flagged"] == 0 and len(result["reductions"]["nodes"]) == 2
    printed = capsys.readouterr().out
    assert "…" not in printed and "near" in printed


def test_what_is_left_where_both_keep_and_merge_the_same(tiny, tmp_path, monkeypatch, capsys):
    """PyTorch merges what ONNX Runtime prunes: with the same choices they agree."""
    pruning = unpatch(deepcopy(tiny[1]))
    patch(pruning, "1:11,3:6", tau=2.0)  # as `artifact_of` does, but for tau
    monkeypatch.setattr("jmp_deploy.jmp.models.restore_model", lambda *_: pruning)
    _, result = run(tiny[0], tmp_path)
    report = result["reductions"]
    assert report["nodes"][0]["merged_elsewhere"] > 0
    assert report["first"] == report["nodes"][0]["node"]
    assert "what a kept token takes in" in report["verdict"]
    (alike,) = report["alike"]
    assert alike["cosine"] > 0.9999 > result["pairs"][0]["cosine"]
    assert "with the choices of onnxruntime" in capsys.readouterr().out


def test_a_folder_and_a_limit_spread_over_it(restored, images, tmp_path):
    code, result = run(restored, tmp_path, "--images", images, "--limit", 2)
    assert code == 0 and result["images"] == 2
    found = compare.load_photos(
        sorted(images.iterdir()),
        compare.Preprocess(32, 32, 32, "bicubic", "center", *[(0.5,) * 3] * 2),
        2,
    )
    assert [name[-5:] for name in found.names] == ["0.png", "2.png"]


def test_unreadable_images_are_listed_and_fail_above_one_percent(
    restored, images, tmp_path, capsys
):
    (images / "broken.png").write_bytes(b"not a picture")
    code, result = run(restored, tmp_path, "--images", images)
    assert code == 1 and not result["ok"] and all(pair["ok"] for pair in result["pairs"])
    assert result["images"] == 5 and "broken.png" in result["unreadable"][0]["image"]
    assert "1 images could not be read" in capsys.readouterr().out


def test_only_unreadable_images(restored, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"")
    code, _ = run(restored, tmp_path, "--images", tmp_path / "a.png")
    assert code == 2 and "no image can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-cosine", "2"], "between -1 and 1"),
        (["--min-cosine", "nan"], "between -1 and 1"),
        (["--max-abs", "-1"], "at least 0"),
        (["--max-abs", "x"], "not a number"),
        (["--backends", "torch"], "two different backends"),
        (["--backends", "torch,tpu"], "is not one of"),
        (["--limit", "0"], "at least 1"),
    ],
)
def test_wrong_options(restored, tmp_path, capsys, options, message):
    code, _ = run(restored, tmp_path, *options)
    assert code == 2 and message in capsys.readouterr().err


def test_tolerances_from_the_command_line(restored, tmp_path, capsys):
    code, result = run(restored, tmp_path, "--max-abs", "1e-9")
    assert code == 1 and "largest difference" in result["pairs"][0]["problems"][0]
    assert "largest difference" in capsys.readouterr().out
    code, result = run(restored, tmp_path, "--min-cosine", "1")
    assert code == 1 and result["tolerance"]["cosine"] == 1
    assert result["tolerance"]["source"] == "--min-cosine"


def test_nan_in_an_output_exits_1_and_names_the_backend(tmp_path, monkeypatch, capsys):
    folder, model = artifact_of(tmp_path / "a", precision="fp16")
    plant(folder, 4, "fc2", lambda w: np.full_like(w, np.inf))
    monkeypatch.setattr("jmp_deploy.jmp.models.restore_model", lambda data, weights=None: model)
    code, result = run(folder, tmp_path, "--debug")
    assert code == 1 and result["pairs"][0]["not_finite"]["onnxruntime"]["nan"] > 0
    found = result["debug"][0]
    assert found["first"] == "blocks.4" == found["cause"] and found["cause_part"] == "MLP"
    printed = " ".join(capsys.readouterr().out.split())
    assert "logits of onnxruntime holds" in printed
    assert "blocks.4 (fp16) is the first with NaN or inf" in printed


def test_stored_outputs_have_no_tokens_and_no_blocks(tiny, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "jmp_deploy.jmp.models", None)  # import fails
    code, result = run(tiny[0], tmp_path, "--debug")
    assert code == 0 and result["backends"][0] == "torch (stored)"
    assert result["reductions"] is None and "stored outputs" in result["reductions_skipped"]
    assert result["debug"] is None and "holds outputs only" in result["debug_skipped"]
    assert "no look at the blocks" in capsys.readouterr().out
