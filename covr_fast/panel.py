"""The drawing of one decision: the simulator's picture, what agent and VLM see of it, and their numbers.

A square picture has the rest at its right, a wide one below it. Pictures are enlarged by whole numbers, so
that their pixels stay sharp.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .gauges import AGENT, FAINT, INK, LINE, TEXT, VLM, Box, draw_gauges, font, least_height

PAPER, BORDER = (22, 24, 28), (84, 90, 100)
PICTURE = (840, 480)
"""Most pixels of the simulator's picture, in width and height."""
INSET = (260, 200)
"""Most pixels of an inset."""
GAP, NUMBER, COLUMN = 16, 32, 340
"""Pixels: between things, of the letters of numbers, and the least width of the numbers and gauges."""
NUMBERS = LINE + NUMBER + 6
"""Pixels of the numbers with their titles."""
WIDE = 1.6
"""Width of a picture, relative to its height, from which on things are arranged below each other."""


class Decision(NamedTuple):
    """What is shown of a decision. What a run without an agent or without a VLM does not have is None."""

    picture: np.ndarray
    """uint8[H, W, 3], the simulator's."""
    agent_sees: np.ndarray | None
    """uint8[h, w, 3]."""
    vlm_sees: np.ndarray | None
    """uint8[h', w', 3]."""
    action: np.ndarray | None
    """float[A] in [-1, 1], the agent's."""
    prior: np.ndarray | None
    """float[A] in [-1, 1], the VLM's."""
    value: float | None
    """Q of the agent's action, by its critic."""
    total: float
    """The return so far."""
    step: int
    """Environment steps so far."""


class Panel:
    """Draws the decisions of an episode, all in one layout.

    Attributes:
        size: width and height of the drawings in pixels, even, as video encoders need them.
        picture: where the simulator's picture is; a smaller one is in the middle of it.
        agent_sees, vlm_sees: where the insets are, without their titles; None without such an inset.
        numbers: where return, Q and step are.
        gauges: where the actions are.
    """

    def __init__(self, action_names: Sequence[str], first: Decision):
        """The layout suits the sizes of the pictures of the `first` decision."""
        self._names = action_names
        picture = enlarged(first.picture, PICTURE)
        insets = self._size_insets(first)
        numbers = NUMBERS + GAP + least_height(action_names)
        if picture.width >= WIDE * picture.height:
            width = max(picture.width, insets[0] + COLUMN + 3 * GAP)
            height = picture.height + max(insets[1], numbers) + 2 * GAP
            self.picture = Box(0, 0, width, picture.height)
            corner = (GAP, picture.height + GAP)
            x, top, under = insets[0] + 2 * GAP, picture.height + GAP, picture.height + 2 * GAP + NUMBERS
        else:
            width = picture.width + max(insets[0], COLUMN) + 2 * GAP
            height = max(picture.height, insets[1] + numbers + 3 * GAP)
            self.picture = Box(0, 0, picture.width, height)
            corner = (picture.width + GAP, NUMBERS + 2 * GAP)
            x, top, under = picture.width + GAP, GAP, corner[1] + insets[1] + GAP
        self.numbers = Box(x, top, width - x - GAP, NUMBERS)
        self.gauges = Box(x, under, width - x - GAP, height - under - GAP)
        self.agent_sees, self.vlm_sees = self._place_insets(first, corner)
        self.size = (width + width % 2, height + height % 2)

    def _size_insets(self, first: Decision) -> tuple[int, int]:
        """Width and height of all insets with their titles. Both are enlarged alike, so that one sees what a
        crop leaves out."""
        seen = [each.shape for each in (first.agent_sees, first.vlm_sees) if each is not None]
        height, width = max(h for h, _, _ in seen), max(w for _, w, _ in seen)
        self._factor = min(INSET[0] / width, INSET[1] / height)
        if self._factor > 1:
            self._factor = int(self._factor)
        height, width = round(height * self._factor), round(width * self._factor)
        if width >= WIDE * height:
            self._next = (0, LINE + height + GAP)
        else:
            self._next = (max(width, 5 * TEXT) + GAP, 0)
        more = len(seen) - 1
        return max(width, 5 * TEXT) + more * self._next[0], LINE + height + more * self._next[1]

    def _place_insets(self, first: Decision, corner: tuple[int, int]) -> tuple[Box | None, Box | None]:
        x, y = corner
        places: list[Box | None] = []
        for seen in (first.agent_sees, first.vlm_sees):
            if seen is None:
                places.append(None)
                continue
            height, width = round(seen.shape[0] * self._factor), round(seen.shape[1] * self._factor)
            places.append(Box(x, y + LINE, width, height))
            x, y = x + self._next[0], y + self._next[1]
        return places[0], places[1]

    def draw(self, decision: Decision) -> Image.Image:
        """An RGB image of `size`."""
        canvas = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(canvas)
        _, _, width, height = self.picture
        picture = enlarged(decision.picture, (width, height))
        canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        self._draw_numbers(draw, decision)
        insets = (
            ("agent sees", AGENT, self.agent_sees, decision.agent_sees),
            ("VLM sees", VLM, self.vlm_sees, decision.vlm_sees),
        )
        for title, colour, box, seen in insets:
            if box is not None and seen is not None:
                draw.text((box.x, box.y - LINE), title, colour, font(TEXT))
                draw.rectangle([box.x - 1, box.y - 1, box.x + box.width, box.y + box.height], BORDER)
                canvas.paste(enlarged(seen, (box.width, box.height)), (box.x, box.y))
        draw_gauges(draw, self.gauges, self._names, decision.action, decision.prior)
        return canvas

    def _draw_numbers(self, draw: ImageDraw.ImageDraw, decision: Decision) -> None:
        numbers = {"return": _short(decision.total)}
        if decision.value is not None:
            numbers["Q"] = _short(decision.value)
        numbers["step"] = str(decision.step)
        x, y, width, _ = self.numbers
        for title, number in numbers.items():
            draw.text((x, y), title, FAINT, font(TEXT))
            draw.text((x, y + LINE), number, INK, font(NUMBER))
            x += width // len(numbers)


def enlarged(picture: np.ndarray, most: tuple[int, int]) -> Image.Image:
    """uint8[H, W, 3] as large as a whole factor makes it within `most` (width, height). One that is larger
    than that is reduced."""
    image = Image.fromarray(picture)
    factor = min(most[0] // image.width, most[1] // image.height)
    if factor == 0:
        image.thumbnail(most)
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _short(number: float) -> str:
    return f"{number:.1f}" if abs(number) < 99.95 else f"{number:.0f}"
