"""What all sections of a page share."""

from collections.abc import Iterable, Sequence

from .charts import Charts, Look
from .groups import Group, Study
from .markup import Markup, tag
from .statistics import Curve

PICTURES = 3_000_000
"""Most bytes of frames on a page."""
VIDEOS = 5_000_000
"""Most bytes of videos on a page."""


class Budget:
    """Bytes that may be taken."""

    def __init__(self, left: int):
        self.left = left

    def take(self, size: int) -> bool:
        """Whether there was room for it; if so, it is taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Context:
    """The runs, the charts' ids, each group's look, and the room for pictures and videos."""

    def __init__(self, study: Study):
        self.study = study
        self.charts = Charts()
        self.looks = {label: Look.number(i) for i, label in enumerate(study.labels)}
        self.pictures = Budget(PICTURES)
        self.videos = Budget(VIDEOS)

    def look(self, group: Group) -> Look:
        return self.looks[group.label]

    def legend(self, labels: Iterable[str]) -> Markup:
        """The look of each label."""
        return tag("ul", *(tag("li", self._swatch(label), label) for label in labels), class_="legend")

    def _swatch(self, label: str) -> Markup:
        colour, dash = self.looks[label]
        dashes = None if dash == "solid" else " ".join(f"{2.4 * part:g}" for part in dash[1])
        line = tag("line", x1=0, y1=5, x2=26, y2=5, stroke=colour, stroke_width=3, stroke_dasharray=dashes)
        return tag("svg", line, viewBox="0 0 26 10", aria_hidden="true")


def seeds_text(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def seeds_of(curves: Iterable[Curve]) -> str:
    """ "3 seeds a group", or the least and the most where groups differ."""
    counts = sorted({curve.runs for curve in curves}) or [0]
    least = f"{counts[0]} to " if len(counts) > 1 else ""
    return f"{least}{seeds_text(counts[-1])} a group"


def with_intervals(curves: Iterable[Curve]) -> str:
    """ "3 seeds a group, with 95 % intervals.", as far as there are some: one seed has none."""
    curves = list(curves)
    have = [curve.low is not None for curve in curves]
    where = "" if all(have) else " where there are several"
    return f"{seeds_of(curves)}{f', with 95 % intervals{where}' if any(have) else ''}."


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return "".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} and {words[-1]}"
