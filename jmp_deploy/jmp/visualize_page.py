"""A page of traced images in one file: pictures are inlined, nothing is fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from . import draw as drawing
from .visualize import Picture, Stage

if TYPE_CHECKING:
    from PIL import Image

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1c1e22; --quiet: #666c76; --paper: #fafaf8; --line: #d9dad6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e4; --quiet: #a2a7b0; --paper: #17181b; --line: #34363c; }
}
body { margin: 2rem auto; padding: 0 1.5rem; max-width: 110rem; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p, figcaption span { color: var(--quiet); }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: .5rem; }
.legend img { width: 20px; height: 20px; }
.stages { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { margin: 0; }
figure img { display: block; margin-top: .4rem; }
figcaption b, figcaption span { display: block; }
figcaption span { font-size: .87rem; min-height: 1.3rem; }
"""


def page(pictures: Sequence[Picture], caption: drawing.Caption) -> str:
    """HTML: for each image the photo, and a map and a heat map for each stage."""
    signs = "\n".join(
        f"<li>{_img(sign, words)}{escape(words)}</li>" for words, sign in drawing.legend_cells()
    )
    sections = "\n".join(_section(picture) for picture in pictures)
    heading = f"What became of each patch: {caption.model}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(heading)}</h1>
<p>Schedule {escape(caption.schedule)}; {escape(caption.decision())}. Above: the tokens after each
reduction, lines lead from merged tokens to their targets, dots mark the critical token of a group.
Below: importance of each token, the {escape(caption.attention())} (dark: none, light: the stage's
highest, square root scale). Colours of groups stay the same from stage to stage.</p>
<ul class="legend">
{signs}
</ul>
{sections}
</body>
</html>
"""


def _section(picture: Picture) -> str:
    side = drawing.panel_side(picture.grid, 320)
    last = picture.stages[-1]
    figures = [
        _figure(
            "input",
            f"{picture.stages[0].tokens} patches, {last.kept} tokens at the end",
            _img(drawing.photo(picture, side), picture.name),
        )
    ]
    figures += [_stage(picture, stage, side) for stage in picture.stages]
    return (
        f"<section>\n<h2>{escape(picture.name)}</h2>\n"
        f'<div class="stages">\n{chr(10).join(figures)}\n</div>\n</section>'
    )


def _stage(picture: Picture, stage: Stage, side: tuple[int, int]) -> str:
    name = f"{picture.name}, block {stage.block}"
    tokens = _img(drawing.token_map(picture, stage, side), f"tokens of {name}")
    heat = _img(drawing.heat_map(picture, stage, side), f"importance in {name}")
    return _figure(drawing.title(stage), drawing.subtitle(stage), tokens + heat)


def _figure(title: str, note: str, images: str) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{escape(note)}</span></figcaption>"
        f"{images}</figure>"
    )


def _img(image: Image.Image, words: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(words, quote=True)}">'
    )
