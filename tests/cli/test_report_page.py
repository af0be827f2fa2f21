"""`report --html`: a page that stands alone, says what is known, and trusts no text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jmp_deploy.cli.main import main
from jmp_deploy.cli.report_page import page
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.manifest import Check
from tests.fakes.artifacts import JMP, RANDOM_WEIGHTS, make_artifact

EVIL = '<script>alert("1")</script>'
VOID = {"meta", "img", "rect", "link", "br"}


class Outline(HTMLParser):
    """What a browser sees: elements that are closed in order, and what they point at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.targets: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.add(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, output = np.zeros((2, 3, 8, 8), np.float32), np.zeros((2, 3), np.float32)
    path = tmp_path / "a"
    path.mkdir()
    np.savez_compressed(
        path / "reference.npz", images=images, output=output, names=np.array(["one", EVIL])
    )
    pair = {"a": "torch", "b": EVIL, "cosine": None, "max_abs": 0.5, "top1_agreement": 1.0}
    made = make_artifact(path, jmp=JMP, rebuild=f"build {EVIL}", check=Check(True, ("p",), (), {}))
    replace(made, check=replace(made.check, pairs=(pair,))).write()
    return path


def test_the_page_stands_alone_and_escapes_what_it_is_told(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    drawn = tmp_path / "<drawn>.png"
    Image.new("RGB", (40, 20)).save(drawn)
    rows = [{"backend": EVIL, "batch": 8, "latency_ms": {"p50": 4.25}}]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"device": EVIL, "rows": rows}))
    flags = ["--bench", str(bench)]
    out = tmp_path / "r.html"
    command = ["report", str(folder), "--html", str(out), "--pictures", str(drawn)]
    assert main([*command, *flags]) == 0
    text = out.read_text()
    outline = Outline(text)
    assert "script" not in outline.seen and len(outline.targets) == 3
    assert all(target.startswith("data:image/png;base64,") for target in outline.targets)
    assert not re.search(r"https?:|url\(|@import", text)
    words = " ".join(outline.words)
    for told in (EVIL, "not finite", "4.25", "block 1", "build"):
        assert told in words, told
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    compared = {"pairs": [], "skipped": {"engine": EVIL}}
    outline = Outline(page(Artifact.read(folder), [], compared=compared))
    assert "script" not in outline.seen and EVIL in " ".join(outline.words)


def test_a_failed_check_and_random_weights_are_not_to_be_overlooked(folder: Path) -> None:
    found = Artifact.read(folder)
    assert "Random weights" not in page(found, []) and ">failed<" not in page(found, [])
    bad = replace(found, weights=RANDOM_WEIGHTS, check=replace(found.check, ok=False))
    assert "Random weights" in page(bad, []) and ">failed<" in page(bad, [])


@pytest.mark.parametrize("content", ["no json", "[]", '{"device": 1, "rows": []}', "null"])
def test_what_is_no_result_of_bench_is_one_message(
    content: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.json").write_text(content)
    out = tmp_path / "r.html"
    flags = ["--html", str(out), "--bench", str(tmp_path / "bench.json")]
    assert main(["report", str(folder), *flags]) == 2
    assert "not a result of `bench`" in capsys.readouterr().err and not out.exists()
    assert main(["report", str(folder), *flags[2:]]) == 2  # of use for the page alone
