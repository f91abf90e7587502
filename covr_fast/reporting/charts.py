"""Charts as SVG within the page: text stays text, and the page's theme gives its colour."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from .statistics import Curve, Estimate

_INK, _LINES = "#010203", "#040506"
"""Stand for colours of the page, which `Charts` puts in their places."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito 2008: told apart by the colour-blind. Without black and yellow, which one theme hides."""
_MOST_TICKS = 4  # below a row of intervals: what is left beside the labels is narrow
_DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _LINES,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.grid": True,
    "grid.color": _LINES,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


class Look(NamedTuple):
    """How a group is drawn: six colours, and other dashes for each further six groups."""

    colour: str
    dash: Any

    @classmethod
    def number(cls, i: int) -> "Look":
        return cls(_COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)])


class Chart:
    """A chart that is being drawn; `svg` has it when the block of `Charts.draw` is over."""

    def __init__(self, axes: Axes):
        self.axes = axes
        self.svg = Markup("")

    def curve(self, curve: Curve, look: Look, *, band: bool = True) -> None:
        self.axes.plot(curve.steps, curve.mean, color=look.colour, linestyle=look.dash, linewidth=1.8,
                       marker="o" if len(curve.steps) < 12 else None, markersize=3)  # fmt: skip
        if not band or curve.low is None or curve.high is None:
            return
        if len(curve.steps) == 1:  # a band would have no width
            self.axes.vlines(curve.steps, curve.low, curve.high, color=look.colour, alpha=0.5, linewidth=1.8)
        else:
            self.axes.fill_between(curve.steps, curve.low, curve.high, color=look.colour, alpha=0.18, lw=0)

    def level(
        self, value: float, colour: str, text: str, dash: Any = "dashed", *, left: bool = False
    ) -> None:
        """A horizontal line with its name at the right end, or at the left one."""
        self.axes.axhline(value, color=colour, linestyle=dash, linewidth=1.2)
        end, side = (0.01, "left") if left else (1, "right")
        self.axes.annotate(text, (end, value), xycoords=("axes fraction", "data"), xytext=(0, 2),
                           textcoords="offset points", ha=side, color=colour, fontsize=8)  # fmt: skip

    def intervals(self, estimates: Sequence[Estimate], looks: Sequence[Look], names: Sequence[str]) -> None:
        """A row per estimate, from the top: its interval as a bar, its value as a stroke."""
        for row, (estimate, look) in enumerate(zip(estimates, looks, strict=True)):
            if estimate.low is not None and estimate.high is not None:
                width = estimate.high - estimate.low
                self.axes.barh(row, width, 0.5, estimate.low, color=look.colour, alpha=0.35)
            self.axes.plot([estimate.value] * 2, [row - 0.3, row + 0.3], color=look.colour, linewidth=2.5)
        self.axes.set_yticks(range(len(names)), names)
        self.axes.set_ylim(len(names) - 0.4, -0.6)
        self.axes.use_sticky_edges = False
        self.axes.autoscale(axis="x")
        self.axes.grid(False, axis="y")
        self.axes.xaxis.set_major_locator(MaxNLocator(_MOST_TICKS))


class Charts:
    """Draws the charts of one page, whose ids are unique in it."""

    NARROW = 4.4  # inches: shrunk to the width of a phone, text is still legible

    def __init__(self) -> None:
        self._numbers = count()

    @contextmanager
    def draw(self, title: str, alt: str, height: float = 2.9) -> Iterator[Chart]:
        with self.draw_rows(1, alt, height) as (chart,):
            chart.axes.set_title(title)
            yield chart

    @contextmanager
    def draw_rows(self, rows: int, alt: str, height: float) -> Iterator[list[Chart]]:
        """Charts one above the other, of one width and one x axis. The first has the picture."""
        with rc_context(_STYLE):
            drawing = Figure((self.NARROW, height), layout="constrained")
            axes = drawing.subplots(rows, squeeze=False, sharex=True)[:, 0]
            charts = [Chart(each) for each in axes]
            yield charts
            file = io.StringIO()
            drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        charts[0].svg = self._inline(file.getvalue(), alt)

    def _inline(self, drawn: str, alt: str) -> Markup:
        prefix = f"c{next(self._numbers)}-"
        svg = drawn[drawn.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
        svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
        svg = re.sub(r'\bid="', f'id="{prefix}', svg)
        svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
        svg = re.sub(r'xlink:href="#', f'href="#{prefix}', svg)
        svg = re.sub(r"(font:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--font)", svg)
        svg = svg.replace(_INK, "var(--ink)").replace(_LINES, "var(--line)")
        view = re.search(r'viewBox="[^"]*"', svg)
        assert view is not None
        start = Markup('<svg {} role="img" aria-label="{}">').format(Markup(view[0]), alt)
        return start + Markup(svg[svg.index(">") + 1 :])


def steps_axis(axes: Axes, label: str = "environment steps") -> None:
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500, 1k, 1.5k


def rounds_axis(axes: Axes) -> None:
    axes.set_xlabel("fine-tuning round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first, last = axes.dataLim.intervalx
    if first == last:
        axes.set_xlim(first - 0.5, last + 0.5)
