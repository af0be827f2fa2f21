"""`report --html`: one page that needs nothing but itself.

No script, no font, no address: pictures are in it, and its own policy forbids the rest. It follows
the reader's light or dark, and prints on paper.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.images import as_picture, open_image

if TYPE_CHECKING:
    from ..core.artifact import Artifact
    from ..core.manifest import Jmp

MAX_SIDE = 1600
"""Pixels of a picture's longer side; larger ones are scaled down."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --page: #fff;
  --bar: #2f6fb2; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #3a424b;
  --page: #15181c; --bar: #6aa9e9; --good: #57c277; --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem; color: var(--ink);
  background: var(--page); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.lead { color: var(--soft); margin: .25rem 0 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
figure { margin: 0; } figure img { max-width: 100%; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .85rem; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
.wide { grid-template-columns: 1fr; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg rect { fill: var(--bar); }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --bar: #555; }
  body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  tr, figure, svg { break-inside: avoid; } }
"""


def page(
    artifact: Artifact,
    facts: Sequence[tuple[str, str]],
    *,
    compared: dict[str, Any] | None = None,
    benched: dict[str, Any] | None = None,
    pictures: Sequence[Path] = (),
) -> str:
    """The page of an artifact.

    Args:
        facts: (name, words) that say what it is.
        compared: a result of `compare --json`.
        benched: one of `bench --json`.
        pictures: image files, such as `visualize` draws.

    Raises:
        ImageError: a picture cannot be read.
        ArtifactError: the reference cannot be read.
    """
    made = artifact
    parts = [_section("What it is", _table((), facts))]
    if made.jmp:
        parts.append(_section("Patch tokens after each reduction", _tokens(made.jmp)))
    gmacs = [("without JMP", made.macs.dense / 1e9), ("this model", made.macs.model / 1e9)]
    parts.append(_section("GMACs per image", _bars(gmacs, "{:.3f}")))
    word = '<span class="good">ok</span>' if made.check.ok else '<span class="bad">failed</span>'
    check = f"<p>{word}: portable ONNX against PyTorch on {len(made.check.images)} photos</p>"
    parts.append(_section("Check", check + _pairs(made.check.pairs)))
    if compared:
        skipped = [(name, str(why)) for name, why in compared["skipped"].items()]
        table = _pairs(compared["pairs"]) + (_table(("not run", "why"), skipped) if skipped else "")
        parts.append(_section("Backends side by side", table))
    if benched:
        parts.append(_section(f"Latency on {benched['device']}, median in ms", _latency(benched)))
    if made.quantization and made.quantization.sensitivity:
        ranking = made.quantization.sensitivity["ranking"]
        title = made.precision.upper()
        rows = [(r["name"], f"{r['points']:.3f}", "FP16" if r["kept"] else title) for r in ranking]
        parts.append(_section(f"{title}: what each layer costs", _table(_RANKING, rows)))
    photos = [_figure(_reference(made, i), str(n)) for i, n in enumerate(made.reference().names)]
    drawn = [_figure(open_image(path), path.name) for path in pictures]
    if drawn:
        parts.append(_section("What becomes of each patch", _grid(drawn, "pictures wide")))
    parts.append(_section("Reference images", _grid(photos, "pictures")))
    machine = [*made.tools.items(), *((f"{s.name}, s", f"{s.seconds:.1f}") for s in made.stages)]
    parts.append(_section("Made with, and how long it took", _table((), machine)))
    parts.append(_section("Made anew by", f"<p><code>{escape(made.rebuild)}</code></p>"))
    warning = "<p class=bad>Random weights: what it answers means nothing.</p>"
    outputs = ", ".join(made.model.outputs)
    title = escape(f"{made.model.name}: {made.precision.upper()}, {outputs}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(made.model.name)}</h1>
<p class="lead">{escape(made.precision.upper())} at {made.preprocess.height} x
{made.preprocess.width} pixels, {escape(outputs)}</p>
{warning if made.is_random else ""}
{"".join(parts)}
</body>
</html>
"""


_RANKING = ("layer", "points alone", "stays")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Without heads the first cell of each row is its head."""
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"] * bool(heads)
    for first, *rest in rows:
        tag = "td" if heads else "th"
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f"<tr><{tag}>{escape(first)}</{tag}>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _bars(rows: Sequence[tuple[str, float]], spec: str = "{:g}") -> str:
    """Bars with their numbers, as SVG that grows with the page."""
    most = max((value for _, value in rows), default=0) or 1
    lines = []
    for index, (name, value) in enumerate(rows):
        y, width = 24 * index, 440 * value / most
        lines.append(
            f'<text x="150" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="160" y="{y + 3}" width="{width:.1f}" height="16" rx="2"/>'
            f'<text x="{166 + width:.1f}" y="{y + 15}">{escape(spec.format(value))}</text>'
        )
    size = f'viewBox="0 0 700 {24 * len(rows)}" width="100%"'
    return f'<svg {size} role="img">{"".join(lines)}</svg>'


def _tokens(jmp: Jmp) -> str:
    return _bars([(f"block {block}", keep) for block, keep in jmp.schedule])


def _pairs(pairs: Iterable[dict[str, Any]]) -> str:
    rows = [
        (
            f"{pair.get('a', '')} and {pair.get('b', '')}",
            _number(pair.get("cosine")),
            _number(pair.get("max_abs"), ".3g"),
            "" if pair.get("top1_agreement") is None else f"{pair['top1_agreement']:.0%}",
        )
        for pair in pairs
    ]
    return _table(("backends", "least cosine", "largest difference", "top-1"), rows)


def _number(value: Any, spec: str = ".6f") -> str:
    return format(value, spec) if isinstance(value, (int, float)) else "not finite"


def _latency(benched: dict[str, Any]) -> str:
    rows = [
        (f"{row['backend']}, batch {row['batch']}", float(row["latency_ms"]["p50"]))
        for row in benched["rows"]
    ]
    return _bars(rows, "{:.2f}")


def _grid(figures: Sequence[str], kind: str) -> str:
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _figure(picture: Any, caption: str) -> str:
    buffer = io.BytesIO()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    words = escape(caption, quote=True)
    image = f'<img alt="{words}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def _reference(artifact: Artifact, index: int) -> Any:
    return as_picture(artifact.reference().images[index], artifact.preprocess)
