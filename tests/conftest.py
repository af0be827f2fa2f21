"""Fixtures that several test modules share."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads it once: a test that silently downloads
# weights passes on one machine and hangs on another.
os.environ["HF_HUB_OFFLINE"] = "1"

# Workers share the cores. Before anything imports torch: two threads of each of two workers on two
# cores spend half of the time in waiting for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SAMPLE_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


@cache
def gpu_missing() -> str | None:
    """Why no test can use a GPU here, or None where one works."""
    if shutil.which("nvidia-smi") is None and not Path("/etc/nv_tegra_release").exists():
        return "no NVIDIA driver on this machine"
    try:
        import torch
    except ImportError:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        return None if "GPU 0" in done.stdout else "nvidia-smi lists no GPU"
    return None if torch.cuda.is_available() else "PyTorch finds no usable GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := gpu_missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Paths of six natural photos, PNG and JPEG, of several sizes and shapes.

    Four come with scikit-image's wheel, two with scikit-learn's; nothing is downloaded.
    """
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for name in SAMPLE_PHOTOS:
        path = folder / f"{name}.png"
        Image.fromarray(getattr(data, name)()).save(path)
        paths.append(path)
    samples = load_sample_images()
    for name, pixels in zip(samples.filenames, samples.images, strict=True):
        path = folder / Path(name).name
        Image.fromarray(pixels).save(path, quality=95)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Fills a folder once per run: the worker that asks first does, the others share it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "whole").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder / "whole").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def built(once):
    """An artifact of DeiT-Ti with seeded weights from a file, built by the command line. Shared:
    a test that changes it takes a copy."""

    def fill(folder: Path) -> None:
        from safetensors.torch import save_file

        from jmp_deploy.cli.main import main
        from jmp_deploy.jmp.models import load_model

        save_file(load_model("deit_t", "random").model.state_dict(), folder / "w.safetensors")
        command = ["build", "deit_t", "--labels", "imagenet"]
        command += ["--weights", str(folder / "w.safetensors")]
        command += ["-o", str(folder / "a"), "--json", str(folder / "build.json")]
        assert main(command) == 0

    return once("built", fill) / "a"
