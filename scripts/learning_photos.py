#!/usr/bin/env python3
"""Unlabelled photos to learn from, out of two Debian packages, for the study of `recover`.

    python scripts/learning_photos.py artifacts/learning

Writes 263 photos (animals, fish, tools, monuments, wind and solar power): 258 of gcompris-qt-data,
which keeps them as WebP in Qt's resource files, and 5 puzzles of palapeli-data. None of them is
among those of `scripts/fetch_photos.py`, which judge. Whose they are and their licences:
usr/share/doc/*/copyright in the packages. None of them is in the repository.

Needs apt-get (after `apt-get update`, on Debian 12), dpkg-deb and Pillow with WebP.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fetch_photos

RESOURCES = ("categorization", "clickgame", "details", "erase", "explore_farm_animals")
RESOURCES += ("explore_monuments", "explore_world_animals", "explore_world_music")
PUZZLES = ("castle-maintenon", "cincinnati-bridge", "citrus-fruits", "european-honey-bee")
PUZZLES += ("panther-chameleon-female",)
PACKAGES = (
    ("gcompris-qt-data", "usr/share/gcompris-qt/rcc", RESOURCES, ".rcc"),
    ("palapeli-data", "usr/share/palapeli/collection", PUZZLES, ".jpg"),
)
SMALLEST = 9000
"""Bytes of a WebP file below which it is a sign, not a photo."""


def webp_files(content: bytes) -> Iterator[bytes]:
    """The WebP files that lie in a resource file as they are ("RIFF", size, "WEBP")."""
    at = 0
    while (at := content.find(b"RIFF", at)) >= 0:
        if content[at + 8 : at + 12] != b"WEBP":
            at += 4
            continue
        (size,) = struct.unpack("<I", content[at + 4 : at + 8])
        yield content[at : at + 8 + size]
        at += 8 + size


def photos(
    name: str, folder: str, stems: tuple[str, ...], suffix: str
) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of a package's photos.

    Raises:
        fetch_photos.FetchError: the package cannot be had.
    """
    entries = [{"file": stem + suffix} for stem in stems]
    with tempfile.TemporaryDirectory() as work:
        files = fetch_photos.debian({"name": name, "folder": folder, "photos": entries}, Path(work))
    for file, content in sorted(files.items()):
        if suffix != ".rcc":
            yield file, content
            continue
        large = [found for found in webp_files(content) if len(found) > SMALLEST]
        for number, found in enumerate(large):
            yield f"{Path(file).stem}-{number:03d}.webp", found


def main() -> int:
    """The command line; returns the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    out = Path(sys.argv[1])
    if out.exists():
        print(f"error: {out} is there already\nhint: remove it, or name another", file=sys.stderr)
        return 2
    try:
        found = [photo for package in PACKAGES for photo in photos(*package)]
        out.mkdir(parents=True)
        for name, content in found:
            fetch_photos.scaled(content).save(out / f"{Path(name).stem}.png")
    except (fetch_photos.FetchError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(found)} photos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
