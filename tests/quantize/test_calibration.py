"""Calibration images: drawn the same each time, prepared as for the model, looked at."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from jmp_deploy.core.errors import CalibrationError, ImageError
from jmp_deploy.core.images import Preprocess, load_batch
from jmp_deploy.quantize import images

SPEC = Preprocess(
    32, 32, 36, "bicubic", "center", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


@pytest.fixture
def folder(photos, tmp_path):
    """Twelve different photos in two folders."""
    for index in range(12):
        image = Image.open(photos[index % 6])
        target = tmp_path / "images" / ("a" if index % 2 else "b") / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.crop((index, index, 150 + index, 150)).save(target)
    return tmp_path / "images"


def everything(found, size=5):
    return np.concatenate(list(found.batches(size)))


def test_images_are_prepared_as_for_the_artifact(folder):
    found = images.gather(folder, SPEC)
    assert len(found) == 12 and not found.demonstration
    np.testing.assert_array_equal(everything(found), load_batch(found.names, SPEC))
    np.testing.assert_array_equal(found.first(3), everything(found)[:3])
    assert [len(batch) for batch in found.batches(5)] == [5, 5, 2]


def test_decoding_again_gives_the_same(folder, monkeypatch):
    kept = images.gather(folder, SPEC)
    monkeypatch.setattr(images, "KEPT_BYTES", 0)
    again = images.gather(folder, SPEC)
    assert again._kept is None
    np.testing.assert_array_equal(everything(again), everything(kept))
    np.testing.assert_array_equal(again.first(4), kept.first(4))


def test_the_draw_depends_on_the_seed_alone(folder):
    first, again, other = (images.gather(folder, SPEC, count=6, seed=s) for s in (1, 1, 2))
    assert first.names == again.names != other.names
    assert first.to_manifest() == again.to_manifest()
    assert first.to_manifest()["sha256"] != other.to_manifest()["sha256"]
    assert len(set(first.names)) == 6


def test_duplicates_and_blank_images_are_left_out_and_said(folder):
    shutil.copy(folder / "a" / "1.png", folder / "copy.png")
    Image.new("RGB", (40, 40), (10, 200, 30)).save(folder / "blank.png")
    found = images.gather(folder, SPEC)
    assert len(found) == 12 and len(set(found.digests)) == 12
    text = " ".join(found.warnings)
    assert "1 duplicate left out" in text and "1 image of one colour left out" in text


def test_few_images_are_warned_of(folder):
    assert "only 12 images" in images.gather(folder, SPEC).warnings[0]
    one = images.gather(folder / "a" / "1.png", SPEC)
    assert len(one) == 1 and "only 1 image:" in one.warnings[0]
    sample = images.gather("sample", SPEC, count=images.FEW)
    assert not any("only" in warning for warning in sample.warnings)


def test_images_unlike_photographs_are_noticed(tmp_path):
    random = np.random.default_rng(0)
    for index in range(3):
        ink = random.random((40, 40)) < 0.05  # digits, scans: white on black
        Image.fromarray(ink).save(tmp_path / f"{index}.png")
        assert Image.open(tmp_path / f"{index}.png").mode == "1"
    found = images.gather(tmp_path, SPEC)
    assert any("unlike photographs" in warning for warning in found.warnings)
    values = everything(found) * np.reshape(SPEC.std, (3, 1, 1)) + np.reshape(SPEC.mean, (3, 1, 1))
    np.testing.assert_allclose(found.mean, values.mean(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found.std, values.std(axis=(0, 2, 3)), atol=1e-5)


def test_photographs_are_not(photos):
    for mean in (SPEC.mean, (0.5, 0.5, 0.5)):
        spec = Preprocess(32, 32, 36, "bicubic", "center", mean=mean, std=(0.5, 0.5, 0.5))
        found = images.gather(photos[0].parent, spec)
        assert not any("unlike" in warning for warning in found.warnings)


def test_nothing_to_calibrate_with(tmp_path):
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(CalibrationError, match="nothing to calibrate with") as error:
            images.gather(missing, SPEC)
        assert "--calib" in error.value.hint
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    with pytest.raises(CalibrationError, match="1 of one colour"):
        images.gather(tmp_path / "black.png", SPEC)


def test_an_unreadable_image_is_named(folder):
    (folder / "broken.jpg").write_bytes((folder / "a" / "1.png").read_bytes()[:300])
    with pytest.raises(ImageError, match=r"1 of 13 images cannot be read: .*broken\.jpg"):
        images.gather(folder, SPEC)


def test_one_in_a_hundred_may_be_unreadable(folder):
    random = np.random.default_rng(1)
    for index in range(100):
        pixels = random.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"n{index}.png")
    (folder / "broken.jpg").write_bytes(b"junk")
    found = images.gather(folder, SPEC)
    assert len(found) == 112 and "1 that cannot be read left out" in " ".join(found.warnings)


def test_the_sample_photos_are_a_demonstration():
    found, again = (images.gather("sample", SPEC, count=70) for _ in range(2))
    assert len(found) == 70 == len(set(found.digests)) and found.demonstration
    assert found.to_manifest()["demonstration"] is True
    np.testing.assert_array_equal(everything(found), everything(again))
    assert not any("unlike" in warning for warning in found.warnings)
