"""Draws traced images with Pillow: token maps, heat maps, sheets, and a page of them.

A map shows the photo in patches. A token that stands for one patch shows the photo itself; one
that stands for several has a colour, the same in every stage, and a dot where its critical token
sits. Lines lead from what is merged in a stage to its target. What is pruned is crossed out, and
dark from the next stage on.

The page is one file: pictures are inlined, nothing is fetched.
"""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .node import MERGED, PRUNED
from .trace import GONE, Features, Picture, Stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

Colour = tuple[int, int, int]

PAPER: Colour = (250, 250, 248)
INK: Colour = (28, 30, 34)
QUIET: Colour = (104, 108, 116)
DARK: Colour = (26, 27, 31)
CROSS: Colour = (255, 84, 70)
OVERSAMPLE = 2
COLUMNS = 5
"""Panels side by side before a sheet goes on below."""
GAP, MARGIN = 14, 22

_HEAT = (
    (16, 14, 40),
    (70, 22, 108),
    (152, 44, 110),
    (222, 82, 74),
    (250, 160, 50),
    (252, 244, 170),
)

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


@dataclass(frozen=True)
class Caption:
    """What a sheet says of the model."""

    model: str
    schedule: str
    tau: float
    importance: str = "class"
    selection: str = "importance"

    def attention(self) -> str:
        """What importance is, in words."""
        if self.importance == "class":
            return "attention of the class token"
        return "attention of all tokens"

    def decision(self) -> str:
        """Which tokens stay, and how merged and pruned ones are told apart, in words."""
        words = f"keeps the most {'important' if self.selection == 'importance' else 'distinct'}, "
        if self.tau <= -1:
            return words + "merges the rest"
        if self.tau > 1:
            return words + "prunes the rest"
        return words + f"merges from similarity {self.tau:g}, prunes below"


def sheet(picture: Picture, caption: Caption) -> Image.Image:
    """One image: the photo, then a map and a heat map for each stage."""
    side = panel_side(picture.grid, 288)
    cells = len(picture.stages) + 1 + (picture.features is not None)
    columns = min(cells, COLUMNS)
    if cells > columns:  # even rows
        columns = -(-cells // -(-cells // columns))
    rows = -(-cells // columns)
    width, height = side[0], side[1]
    text = 46
    header = 96
    cell_height = text + 2 * height + 8
    canvas = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * width + (columns - 1) * GAP,
            header + rows * (cell_height + GAP) + MARGIN - GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    _header(canvas, draw, f"{picture.name}", caption)
    for index in range(cells):
        left = MARGIN + index % columns * (width + GAP)
        top = header + index // columns * (cell_height + GAP)
        if index == 0:
            last = picture.stages[-1]
            draw.text((left, top), "input", INK, font(17))
            note = f"{picture.stages[0].tokens} patches, {last.kept} tokens at the end"
            draw.text((left, top + 22), note, QUIET, font(13))
            canvas.paste(photo(picture, side), (left, top + text))
            _scale(canvas, (left, top + text + height + 8), width, caption)
            continue
        if index > len(picture.stages):
            assert picture.features is not None
            draw.text((left, top), FEATURES, INK, font(17))
            draw.text((left, top + 22), features_words(picture.features), QUIET, font(13))
            for below, colours in enumerate((picture.features.dense, picture.features.restored)):
                panel = colour_map(colours, picture.grid, side)
                canvas.paste(panel, (left, top + text + below * (height + 8)))
            continue
        stage = picture.stages[index - 1]
        draw.text((left, top), title(stage), INK, font(17))
        draw.text((left, top + 22), subtitle(stage), QUIET, font(13))
        canvas.paste(token_map(picture, stage, side), (left, top + text))
        canvas.paste(heat_map(picture, stage, side), (left, top + text + height + 8))
    return canvas


def contact_sheet(pictures: Sequence[Picture], caption: Caption) -> Image.Image:
    """Many images: a row for each, the photo and its map after each stage."""
    first = pictures[0]
    cells = len(first.stages) + 1 + 2 * (first.features is not None)
    side = panel_side(first.grid, 208 if cells <= 6 else 160)
    header, text = 96, 22
    top_text = 24
    row = side[1] + text + 8
    canvas = Image.new(
        "RGB",
        (
            2 * MARGIN + cells * (side[0] + 8) - 8,
            header + top_text + len(pictures) * row + MARGIN - 8,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    _header(canvas, draw, f"{len(pictures)} images", caption)
    for column, stage in enumerate(first.stages, start=1):
        left = MARGIN + column * (side[0] + 8)
        _fitted(
            draw, (left, header - 2), f"block {stage.block}: {stage.kept} stay", side[0], 14, INK
        )
    if first.features is not None:
        for column, words in enumerate(("features, no JMP", "features, JMP"), start=cells - 2):
            left = MARGIN + column * (side[0] + 8)
            _fitted(draw, (left, header - 2), words, side[0], 14, INK)
    for index, item in enumerate(pictures):
        top = header + top_text + index * row
        canvas.paste(photo(item, side), (MARGIN, top))
        _fitted(draw, (MARGIN, top + side[1] + 3), item.name, side[0], 12)
        for column, stage in enumerate(item.stages, start=1):
            left = MARGIN + column * (side[0] + 8)
            canvas.paste(token_map(item, stage, side), (left, top))
            words = f"{stage.merged} merged, {stage.pruned} pruned"
            _fitted(draw, (left, top + side[1] + 3), words, side[0], 12)
        if (seen := item.features) is not None:
            for column, colours in enumerate((seen.dense, seen.restored), start=cells - 2):
                left = MARGIN + column * (side[0] + 8)
                canvas.paste(colour_map(colours, item.grid, side), (left, top))
            _fitted(draw, (left, top + side[1] + 3), features_words(seen, ""), side[0], 12)
    return canvas


def page(pictures: Sequence[Picture], caption: Caption) -> str:
    """HTML: for each image the photo, and a map and a heat map for each stage."""
    signs = "\n".join(
        f"<li>{_img(sign, words)}{escape(words)}</li>" for words, sign in legend_cells()
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


def title(stage: Stage) -> str:
    """E.g. "block 3: 256 to 180 tokens"."""
    return f"block {stage.block}: {stage.tokens} to {stage.kept} tokens"


def subtitle(stage: Stage) -> str:
    """Shares of what goes."""
    gone = stage.merged + stage.pruned
    return (
        f"{stage.merged} merged ({stage.merged / gone:.0%}), "
        f"{stage.pruned} pruned ({stage.pruned / gone:.0%})"
    )


FEATURES = "features of the patches"


def features_words(features: Features, where: str = "; above without JMP") -> str:
    """How near the restored ones are."""
    cosine = features.cosine
    return f"cosine {cosine.mean():.3f}, lowest {cosine.min():.3f}{where}"


def panel_side(grid: tuple[int, int], wanted: int) -> tuple[int, int]:
    """Width and height of a panel near `wanted`: a whole number of pixels for each patch."""
    cell = max(7, round(wanted / max(grid)))
    return grid[1] * cell, grid[0] * cell


def photo(picture: Picture, side: tuple[int, int]) -> Image.Image:
    """What the model sees."""
    return Image.fromarray(picture.pixels).resize(side, Image.Resampling.LANCZOS)


def token_map(picture: Picture, stage: Stage, side: tuple[int, int]) -> Image.Image:
    """The photo with what became of each patch (see the module's docstring)."""
    rows, columns = picture.grid
    size = (side[0] * OVERSAMPLE, side[1] * OVERSAMPLE)
    cell = size[0] // columns
    pixels = np.asarray(photo(picture, size), np.float32)
    sizes = np.bincount(stage.seat[stage.seat >= 0], minlength=rows * columns)
    tint = np.zeros((rows * columns, 3), np.float32)
    alpha = np.zeros(rows * columns, np.float32)
    for patch, (fate, seat) in enumerate(zip(stage.fate, stage.seat.tolist(), strict=True)):
        if fate == GONE:
            tint[patch], alpha[patch] = DARK, 0.93
        elif fate == PRUNED:
            tint[patch], alpha[patch] = DARK, 0.62
        elif sizes[seat] > 1:
            tint[patch] = group_colour(seat)
            alpha[patch] = 0.6 if fate == MERGED else 0.36
    shade, cover = (_enlarge(v.reshape(rows, columns, -1), cell) for v in (tint, alpha[:, None]))
    image = Image.fromarray((pixels * (1 - cover) + shade * cover).round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    _borders(draw, stage, sizes, picture.grid, cell)
    for cross in np.flatnonzero(stage.fate == PRUNED):
        x, y = _centre(int(cross), columns, cell)
        arm = cell * 0.24
        for sign in (1, -1):
            draw.line((x - arm, y - sign * arm, x + arm, y + sign * arm), CROSS, OVERSAMPLE * 2)
    for source, target in stage.moves:
        ends = (*_centre(source, columns, cell), *_centre(target, columns, cell))
        draw.line(ends, (255, 255, 255), OVERSAMPLE * 2)
        draw.line(ends, group_colour(target), OVERSAMPLE)
    for centre in np.flatnonzero(sizes > 1):
        x, y = _centre(int(centre), columns, cell)
        radius = cell * 0.22
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, group_colour(int(centre)), (255, 255, 255), OVERSAMPLE)
    return image.resize(side, Image.Resampling.LANCZOS)


def heat_map(picture: Picture, stage: Stage, side: tuple[int, int]) -> Image.Image:
    """Importance of each token over its patches, from the least to the most of the stage."""
    rows, columns = picture.grid
    alive = stage.fate != GONE
    values = np.where(alive, stage.importance, 0.0)
    top = float(values.max(initial=0.0))
    # The square root, because a handful of tokens draws most of the attention.
    share = np.sqrt(np.clip(values / top, 0, 1)) if top > 0 else np.zeros_like(values)
    colours = heat_colours(share)
    colours[~alive] = np.asarray(DARK, np.float32) + 14
    cell = side[0] // columns
    # A little of the photo's light and shade shows where one is.
    grey = np.asarray(photo(picture, side).convert("L"), np.float32)[..., None] / 255
    shaded = _enlarge(colours.reshape(rows, columns, 3), cell) * (0.72 + 0.28 * grey)
    image = Image.fromarray(shaded.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for hole in np.flatnonzero(~alive):
        x, y = (int(hole) % columns * cell, int(hole) // columns * cell)
        draw.line((x, y + cell - 1, x + cell - 1, y), DARK, 1)
    return image


def colour_map(
    colours: NDArray[np.float64], grid: tuple[int, int], side: tuple[int, int]
) -> Image.Image:
    """A colour for each patch, [M, 3] in 0 to 1."""
    values = (colours.reshape(*grid, 3) * 255).round().astype(np.uint8)
    return Image.fromarray(values).resize(side, Image.Resampling.NEAREST)


def heat_colours(share: NDArray[np.float64]) -> NDArray[np.float32]:
    """[n] in 0..1 to [n, 3] in 0..255, dark violet to light yellow."""
    stops = np.linspace(0, 1, len(_HEAT))
    table = np.asarray(_HEAT, np.float32)
    return np.stack([np.interp(share, stops, table[:, c]) for c in range(3)], 1).astype(np.float32)


def group_colour(seat: int) -> Colour:
    """A colour of its own for each seat; neighbours differ (steps of the golden ratio)."""
    hue = (seat * 0.6180339887) % 1
    light = (0.98, 0.82, 0.9)[seat % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.82, 0.7, 0.55)[seat // 3 % 3], light)
    return round(red * 255), round(green * 255), round(blue * 255)


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font: the same picture on every machine."""
    return ImageFont.load_default(size)


def legend_cells() -> list[tuple[str, Image.Image]]:
    """The signs of a map and their meaning."""
    side = 30
    blank = Image.new("RGB", (side, side), (188, 192, 186))
    signs: list[tuple[str, Image.Image]] = [("token of one patch: photo", blank.copy())]
    for words, strength in (("group: several patches in one token", 0.36), ("merged here", 0.6)):
        tinted = Image.blend(blank, Image.new("RGB", blank.size, group_colour(2)), strength)
        draw = ImageDraw.Draw(tinted)
        if strength < 0.5:
            draw.ellipse((9, 9, 21, 21), group_colour(2), (255, 255, 255), 2)
        else:
            draw.line((15, 15, 30, 6), (255, 255, 255), 4)
            draw.line((15, 15, 30, 6), group_colour(2), 2)
        signs.append((words, tinted))
    dimmed = Image.blend(blank, Image.new("RGB", blank.size, DARK), 0.62)
    for ends in ((8, 8, 22, 22), (8, 22, 22, 8)):
        ImageDraw.Draw(dimmed).line(ends, CROSS, 3)
    signs.append(("pruned here", dimmed))
    signs.append(("pruned before", Image.blend(blank, Image.new("RGB", blank.size, DARK), 0.93)))
    return signs


def _header(canvas: Image.Image, draw: ImageDraw.ImageDraw, name: str, caption: Caption) -> None:
    _fitted(draw, (MARGIN, 16), name, canvas.width // 3, 22, INK)
    begin = MARGIN + min(canvas.width / 3, draw.textlength(name, font(22))) + 16
    words = f"{caption.model}, schedule {caption.schedule}, {caption.decision()}"
    _fitted(draw, (begin, 22), words, canvas.width - begin - MARGIN, 15)
    left = float(MARGIN)
    for words, sign in legend_cells():
        width = 24 + draw.textlength(words, font(13)) + 22
        if left + width > canvas.width:
            break
        canvas.paste(sign.resize((18, 18), Image.Resampling.LANCZOS), (round(left), 58))
        draw.text((left + 24, 59), words, INK, font(13))
        left += width


def _scale(canvas: Image.Image, at: tuple[int, int], width: int, caption: Caption) -> None:
    """The heat map's colours, under the photo."""
    draw = ImageDraw.Draw(canvas)
    left, top = at
    draw.text((left, top + 2), "importance of each token:", INK, font(13))
    _fitted(draw, (left, top + 20), f"{caption.attention()}, square root", width, 13, INK)
    bar = heat_colours(np.linspace(0, 1, width, dtype=np.float64))[None].repeat(14, 0)
    canvas.paste(Image.fromarray(bar.astype(np.uint8)), (left, top + 44))
    draw.text((left, top + 62), "0", QUIET, font(12))
    words = "the stage's highest"
    draw.text((left + width - draw.textlength(words, font(12)), top + 62), words, QUIET, font(12))


def _borders(
    draw: ImageDraw.ImageDraw,
    stage: Stage,
    sizes: NDArray[np.int64],
    grid: tuple[int, int],
    cell: int,
) -> None:
    """Faint lines between patches, clear ones around groups."""
    rows, columns = grid
    # Negative: no group; patches of no group have none of their borders drawn clearly.
    groups = np.where((stage.seat >= 0) & (sizes[stage.seat] > 1), stage.seat, -1)
    groups = groups.reshape(rows, columns)
    for row in range(rows):
        for column in range(columns):
            x, y = column * cell, row * cell
            for down in (False, True):
                a, b = (row + 1, column) if down else (row, column + 1)
                if a >= rows or b >= columns:
                    continue
                ends = (
                    (x, y + cell, x + cell, y + cell) if down else (x + cell, y, x + cell, y + cell)
                )
                if groups[row, column] != groups[a, b]:
                    draw.line(ends, (255, 255, 255), OVERSAMPLE)
                elif groups[row, column] == -1:
                    draw.line(ends, (120, 122, 126), 1)


def _enlarge(values: NDArray[np.float32], cell: int) -> NDArray[np.float32]:
    return values.repeat(cell, 0).repeat(cell, 1)


def _centre(patch: int, columns: int, cell: int) -> tuple[float, float]:
    return (patch % columns + 0.5) * cell, (patch // columns + 0.5) * cell


def _fitted(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    words: str,
    width: float,
    size: int,
    colour: Colour = QUIET,
) -> None:
    """Text cut to a width."""
    face = font(size)
    if draw.textlength(words, face) > width:
        while words and draw.textlength(words + "...", face) > width:
            words = words[:-1]
        words += "..."
    draw.text(at, words, colour, face)


def _section(picture: Picture) -> str:
    side = panel_side(picture.grid, 320)
    last = picture.stages[-1]
    figures = [
        _figure(
            "input",
            f"{picture.stages[0].tokens} patches, {last.kept} tokens at the end",
            _img(photo(picture, side), picture.name),
        )
    ]
    figures += [_stage(picture, stage, side) for stage in picture.stages]
    if (seen := picture.features) is not None:
        maps = (colour_map(colours, picture.grid, side) for colours in (seen.dense, seen.restored))
        both = "".join(
            _img(image, f"features of {picture.name}, {words}")
            for image, words in zip(maps, ("without JMP", "with JMP"), strict=True)
        )
        figures.append(_figure(FEATURES, features_words(seen), both))
    return (
        f"<section>\n<h2>{escape(picture.name)}</h2>\n"
        f'<div class="stages">\n{chr(10).join(figures)}\n</div>\n</section>'
    )


def _stage(picture: Picture, stage: Stage, side: tuple[int, int]) -> str:
    name = f"{picture.name}, block {stage.block}"
    tokens = _img(token_map(picture, stage, side), f"tokens of {name}")
    heat = _img(heat_map(picture, stage, side), f"importance in {name}")
    return _figure(title(stage), subtitle(stage), tokens + heat)


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
