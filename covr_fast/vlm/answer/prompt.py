"""The prompt, and the text of an action.

An action is written as `Action: [0.43, -0.37]`. Every number has a fixed count of decimals, and only negative
numbers have a sign (zero has none), so each value of the grid {k / 10^decimals} has one spelling.
"""

import re
from collections.abc import Sequence
from typing import SupportsIndex

from ...scalars import as_int

OPENING = "Action: ["
JOINER = ", "
CLOSING = "]"
MAX_DECIMALS = 4

_ANSWER = re.compile(re.escape(OPENING) + r"(?P<body>[^\]]*)" + re.escape(CLOSING))


def answer_format(action_dim: SupportsIndex, decimals: SupportsIndex) -> tuple[int, int]:
    """Both as Python integers.

    Raises:
        TypeError: one is no integer.
        ValueError: `action_dim` is below 1, or `decimals` not in [1, MAX_DECIMALS].
    """
    dim, digits = as_int(action_dim, "action_dim"), as_int(decimals, "decimals")
    if dim < 1:
        raise ValueError(f"action_dim must be at least 1, not {dim}")
    if not 1 <= digits <= MAX_DECIMALS:
        raise ValueError(f"decimals must be between 1 and {MAX_DECIMALS}, not {digits}")
    return dim, digits


def default_prompt(action_dim: int, decimals: int) -> str:
    """The prompt used when none is given. It gives the format of answers and says nothing about the task."""
    return task_prompt("You control an agent.", action_dim, decimals)


def task_prompt(words: str, action_dim: int, decimals: int) -> str:
    """A prompt of a task's words, which name what is controlled, and the format of answers."""
    action_dim, decimals = answer_format(action_dim, decimals)
    unit = 10 ** (decimals - 1)
    # Numbers of alternating sign, so that the example shows both.
    example = JOINER.join(spell((-3 if i % 2 else 4) * unit, decimals) for i in range(action_dim))
    return (
        f"{words} Look at the image and choose its next action: {action_dim} "
        f"{'number' if action_dim == 1 else 'numbers'} in [-1, 1]. "
        f"Answer in this format: {OPENING}{example}{CLOSING}"
    )


def spell(step: int, decimals: int) -> str:
    """The one spelling of `step / 10**decimals`; `spell(-37, 2) == "-0.37"`."""
    whole, fraction = divmod(abs(step), 10**decimals)
    return f"{'-' if step < 0 else ''}{whole}.{fraction:0{decimals}d}"


def format_action(action: Sequence[float], decimals: int) -> str:
    """The answer text of an action, each number clipped to [-1, 1] and rounded half to even."""
    scale = 10**decimals
    steps = [round(min(max(float(value), -1.0), 1.0) * scale) for value in action]
    return OPENING + JOINER.join(spell(step, decimals) for step in steps) + CLOSING


def parse_action(text: str) -> list[float]:
    """The numbers of the first `Action: [...]` in `text`.

    Raises:
        ValueError: there is no such answer, or part of it is not a number in [-1, 1].
    """
    found = _ANSWER.search(text)
    if found is None:
        raise ValueError(f"no '{OPENING}...{CLOSING}' in {text!r}")
    values = [float(word) for word in found["body"].split(",")]
    if not all(-1.0 <= value <= 1.0 for value in values):
        raise ValueError(f"an action outside [-1, 1] in {text!r}")
    return values
