#!/usr/bin/env python3
"""A small labelled data set without a download: scikit-learn's handwritten digits as image folders.

    python scripts/digits_folder.py artifacts/digits
    python -m jmp_deploy validate artifacts/dinov2_s --data artifacts/digits \\
        --against artifacts/dinov2_s-dense

Writes OUT/train/DIGIT/*.png and OUT/val/DIGIT/*.png: the 1,797 scans of 8 x 8 pixels, enlarged to
224. val holds the 1,200 scans that `benchmarks/accuracy.py` calls test (seed 0), by which nothing
in this project was chosen; train holds the other 597.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

TRAIN = 597
SIDE = 224


def write_digits(out: Path) -> dict[str, int]:
    """Writes the folders, whole or not at all.

    Returns:
        Images per split.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.default_rng(0).permutation(len(scans.images))
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for place, index in enumerate(order):
            split = "train" if place < TRAIN else "val"
            folder = staging / split / str(scans.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            grey = (scans.images[index] * (255 / 16)).round().astype(np.uint8)
            picture = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            picture.convert("RGB").save(folder / f"{index:04d}.png")
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"train": TRAIN, "val": len(order) - TRAIN}


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
        counts = write_digits(out)
    except ImportError as error:
        print(f"error: {error}\nhint: pip install scikit-learn pillow", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    print(f"{out}: {counts['train']} images in train, {counts['val']} in val, 10 classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
