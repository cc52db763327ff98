"""Draws the picture of `distmatch compare`, laid out like Figures 6 and 8 of the paper (arXiv 2311.18828)."""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from distmatch.commands.comparison import method_folder


def sheet(out: Path, rows: list[dict[str, Any]], prompts: list[str]) -> np.ndarray:
    """Return the picture u8[H,W,3]: a column per method under its name and latency, a row per prompt above its text."""
    tiles = [
        [Image.open(method_folder(out, row["name"]) / f"{i:06d}.png").convert("RGB") for row in rows]
        for i in range(len(prompts))
    ]
    width, height = tiles[0][0].size
    font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", max(11, width // 20))
    line, gap = round(1.4 * font.size), max(2, width // 64)
    heads = [row["name"] + (f"\n{row['ms_per_image']:,.0f} ms" if "ms_per_image" in row else "") for row in rows]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    cell = max(width, *(ceil(probe.textbbox((0, 0), head, font)[2]) for head in heads)) + gap
    texts = [_wrapped(f"“{prompt}”", font, cell * len(rows) - 2 * gap) for prompt in prompts]
    total = 2 * line + 2 * gap + sum(height + line * len(text) + 2 * gap for text in texts)
    sheet = Image.new("RGB", (cell * len(rows) + gap, total), "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.multiline_text((column * cell + cell // 2, gap), head, "black", font, "ma", align="center")
    top = 2 * line + 2 * gap
    for row, text in zip(tiles, texts, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * cell + (cell - width) // 2 + gap // 2, top))
        top += height + gap
        for words in text:
            pen.text((sheet.width // 2, top), words, "black", font, "ma")
            top += line
        top += gap
    return np.asarray(sheet)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap `text` into lines of at most `width` pixels; a single longer word gets its own line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
