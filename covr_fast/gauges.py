"""Gauges of actions: for each number a bar of the agent's and one of the VLM's, from 0 in the middle."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw, ImageFont

INK, FAINT, TRACK = (238, 238, 238), (164, 169, 178), (42, 46, 53)
AGENT, VLM = (88, 156, 255), (255, 160, 52)
TEXT, BAR = 22, 11
"""Pixels of letters, and of a bar where there is room."""
LINE = TEXT + 8
"""Pixels of a line of text with what is below it."""
_NAMED = 14
"""Fewest pixels of a gauge that has its name beside it."""


class Box(NamedTuple):
    """A rectangle in pixels."""

    x: int
    y: int
    width: int
    height: int


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def fitted(text: str, width: int, size: int) -> str:
    """The text, or as much of its beginning as has room."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def least_height(names: Sequence[str]) -> int:
    """Pixels that `draw_gauges` needs: more than twelve gauges are so narrow that they have no names."""
    row = 26 if len(names) <= 6 else 20 if len(names) <= 12 else 8
    return LINE + len(names) * row


def draw_gauges(
    draw: ImageDraw.ImageDraw,
    box: Box,
    names: Sequence[str],
    action: np.ndarray | None,
    prior: np.ndarray | None,
) -> None:
    """A legend, and below it a gauge of each number of the agent's and of the VLM's action, float[A] in
    [-1, 1]. Either may be missing."""
    given = [
        each
        for each in (("agent", AGENT, action), ("VLM" if action is None else "VLM's prior", VLM, prior))
        if each[2] is not None
    ]
    x, y, width, height = box
    for title, colour, _ in given:
        draw.rectangle([x, y + 5, x + 12, y + 17], colour)
        draw.text((x + 20, y), title, INK, font(TEXT))
        x += 20 + round(font(TEXT).getlength(title)) + 20
    row = min(2 * LINE + 2 * BAR, (height - LINE) // len(names))
    for i, name in enumerate(names):
        bars = [(colour, float(numbers[i])) for _, colour, numbers in given if numbers is not None]
        _draw_gauge(draw, Box(box.x, y + LINE + i * row, width, row), name, bars)


def _draw_gauge(
    draw: ImageDraw.ImageDraw, box: Box, name: str, bars: Sequence[tuple[tuple[int, int, int], float]]
) -> None:
    """One gauge. Its name is above the bars if there is room, else beside them, or left out."""
    x, y, width, height = box
    bar = min(BAR, (height - 2) // len(bars))
    if height >= LINE + 2 * BAR + 4:
        draw.text((x, y + 4), fitted(name, width, TEXT), FAINT, font(TEXT))
        y += LINE + 2
    else:
        if height >= _NAMED:
            size, aside = min(TEXT, height - 4), width * 2 // 5
            shown = fitted(name, aside - 8, size)
            draw.text((x, y + height // 2), shown, FAINT, font(size), anchor="lm")
            x, width = x + aside, width - aside
            bar = min(bar, (height - 4) // len(bars))
        y += (height - len(bars) * bar) // 2
    middle, half, bottom = x + width // 2, width // 2 - 1, y + len(bars) * bar - 1
    draw.rectangle([x, y, x + width - 1, bottom], TRACK)
    for i, (colour, number) in enumerate(bars):
        end = middle + round(half * min(1.0, max(-1.0, number)))
        top = y + i * bar
        draw.rectangle([min(middle, end), top, max(middle, end), top + bar - 1], colour)
    draw.line([(middle, y), (middle, bottom)], INK)
