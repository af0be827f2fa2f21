"""Photos of every kind, and preprocessing that is timm's to the last bit or nearly."""

from __future__ import annotations

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from jmp_deploy.core import images
from jmp_deploy.core.errors import ImageError, ModelError
from jmp_deploy.core.images import Preprocess


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_small_patch16_224", 224),  # crop 0.9, bicubic
        ("vit_tiny_patch16_224", 224),  # mean and std 0.5
        ("vit_small_patch14_dinov2", 224),  # crop 1.0
        ("vit_base_patch16_clip_224", 224),
        ("deit_tiny_patch16_224", 160),
    ],
)
def test_equals_timms_transform(name, size, photos):
    with_size = {"img_size": size} if size != 224 or "dinov2" in name else {}
    config = resolve_model_data_config(timm.create_model(name, **with_size))
    config["input_size"] = (3, size, size)
    spec = Preprocess.from_timm(config)
    transform = create_transform(**config, is_training=False)
    for path in photos:
        photo = images.open_image(path)
        ours, theirs = images.preprocess(photo, spec), transform(photo).numpy()
        assert ours.shape == (3, size, size) and ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(500, 224), (224, 500), (31, 900), (5, 5), (1, 1), (224, 224)])
def test_equals_timms_transform_at_odd_shapes(shape):
    config = {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic"}
    config.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="center")
    pixels = np.random.default_rng(0).integers(0, 256, size=(*shape, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    ours = images.preprocess(photo, Preprocess.from_timm(config))
    theirs = create_transform(**config, is_training=False)(photo).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :20] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(images.open_image(tmp_path / "a.png"))
    assert upright.shape == (40, 20, 3)
    assert upright[:20].min() == 255 and upright[20:].max() == 0


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode, photos):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    path = tmp_path / f"a.{suffix}"
    with Image.open(photos[0]) as photo:
        photo.convert(mode).save(path)
    decoded = images.open_image(path)
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).std() > 20  # still a picture


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    grey = np.asarray(images.open_image(tmp_path / "a.png"))[..., 0]
    assert grey.min() == 0 and grey.max() == 255
    np.testing.assert_allclose(grey, ramp / 257, atol=0.51)


def test_unreadable_files_are_named(tmp_path, photos):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photos[-1].read_bytes()[:2000])
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for path in (cut, text, empty):
        with pytest.raises(ImageError, match=f"cannot read .*{path.name}"):
            images.open_image(path)
    with pytest.raises(ImageError, match="no such image"):
        images.open_image(tmp_path / "none.png")


def test_folders_are_searched_in_order(tmp_path, photos):
    nested = tmp_path / "b"
    nested.mkdir()
    for target in (nested / "2.PNG", tmp_path / "a.png"):
        target.write_bytes(photos[0].read_bytes())
    (tmp_path / "notes.txt").write_text("not an image")
    assert [p.name for p in images.find_images([tmp_path])] == ["a.png", "2.PNG"]
    with pytest.raises(ImageError, match="no such image or folder"):
        images.find_images([tmp_path / "nowhere"])
    (tmp_path / "c").mkdir()
    with pytest.raises(ImageError, match="no images in"):
        images.find_images([tmp_path / "c"])


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_an_input_that_is_not_square_is_prepared_as_timm_does(photos, mode):
    from timm.data import create_transform

    config = {"input_size": (3, 80, 160), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    config |= {"crop_pct": 0.9, "crop_mode": mode, "interpolation": "bilinear"}
    spec, transform = Preprocess.from_timm(config), create_transform(**config)
    for path in photos[:3]:
        photo = images.open_image(path)
        np.testing.assert_array_equal(images.preprocess(photo, spec), transform(photo).numpy())


def test_grey_16_bit_and_many_channels(tmp_path):
    spec = Preprocess(4, 4, 4, "bicubic", "squash", (0.5,), (0.25,))
    values = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "g.png")
    np.save(tmp_path / "g.npy", values)
    wanted = ((values / 65535 - 0.5) / 0.25)[None]
    for name in ("g.png", "g.npy"):
        (found,) = images.load_batch([tmp_path / name], spec)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    Image.fromarray((values // 257).astype(np.uint8)).save(tmp_path / "l.png")
    assert images.load_batch([tmp_path / "l.png"], spec).shape == (1, 1, 4, 4)
    many = Preprocess(4, 4, 4, "bicubic", "center", (0.5,) * 5, (0.25,) * 5)
    np.save(tmp_path / "m.npy", np.full((8, 8, 5), 0.75, np.float32))
    np.testing.assert_allclose(images.load_batch([tmp_path / "m.npy"], many), 1, atol=1e-5)
    for name, wrong in (("m.npy", spec), ("g.png", many)):
        with pytest.raises(ImageError, match="the model takes"):
            images.load_batch([tmp_path / name], wrong)
    np.save(tmp_path / "o.npy", np.array([object()], dtype=object))
    with pytest.raises(ImageError, match="cannot read"):
        images.load_batch([tmp_path / "o.npy"], many)


def test_sample_photos_are_photos():
    found = dict(images.sample_photos())
    assert len(found) >= 4
    assert all(photo.mode == "RGB" and min(photo.size) > 200 for photo in found.values())


def test_preprocessing_that_cannot_be_reproduced_is_refused():
    config = {"input_size": (3, 224, 224), "mean": (0, 0, 0), "std": (1, 1, 1)}
    with pytest.raises(ModelError, match="crop mode 'border'"):
        Preprocess.from_timm({**config, "crop_mode": "border"})
    with pytest.raises(ModelError, match="takes 1 channel, but its mean has 3"):
        Preprocess.from_timm({**config, "input_size": (1, 224, 224)})
