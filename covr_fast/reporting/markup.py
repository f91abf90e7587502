"""HTML in small pieces. What is not Markup is escaped."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from ..digits import form

__all__ = [
    "Markup",
    "data_uri",
    "exact",
    "figure",
    "join",
    "note",
    "number",
    "picture",
    "scrolled_table",
    "section",
    "spread",
    "tag",
]

_VOID = {"br", "img"}


def tag(name: str, *content: Any, **attributes: Any) -> Markup:
    """An element. An attribute's underscore is a hyphen, a trailing one is dropped (class_); None leaves the
    attribute out, True gives it no value."""
    given = Markup("")
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        given += Markup(" {}").format(key) if value is True else Markup(' {}="{}"').format(key, value)
    if name in _VOID:
        return Markup("<{}{}>").format(Markup(name), given)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, join(content))


def join(parts: Iterable[Any]) -> Markup:
    return Markup("").join(escape(part) for part in parts)


def section(name: str, title: str, *content: Any) -> Markup:
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *content, id=name, aria_labelledby=f"{name}-title")


def note(*content: Any) -> Markup:
    return tag("p", *content, class_="note")


def figure(content: Markup, caption: Any, class_: str = "chart") -> Markup:
    return tag("figure", content, tag("figcaption", caption), class_=class_)


def scrolled_table(
    heads: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str, words: int = 1
) -> Markup:
    """A table in a box that scrolls sideways where the page is narrow, below its caption, which does not. The
    first `words` columns are text; the others, numbers, are aligned to the right. A cell of tag("td") or
    tag("th") stands as it is."""
    head = tag("tr", *(_head(text, i, words) for i, text in enumerate(heads)))
    body = [tag("tr", *(_cell(cell, i, words) for i, cell in enumerate(row))) for row in rows]
    table = tag("table", tag("thead", head), tag("tbody", *body), aria_label=caption)
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("figure", tag("figcaption", caption), box, class_="table")


def _head(text: Any, column: int, words: int) -> Markup:
    if isinstance(text, Markup):
        return text
    return tag("th", text, scope="col", class_=_side(column, words))


def _side(column: int, words: int) -> str | None:
    return None if column < words else "number"


def _cell(cell: Any, column: int, words: int) -> Markup:
    if isinstance(cell, Markup) and cell.startswith(("<td", "<th")):
        return cell
    if column == 0:
        return tag("th", cell, scope="row")
    return tag("td", cell, class_=_side(column, words))


def number(value: float | None) -> str:
    """Three significant digits, all before the point, or two of a small number; "-" for None."""
    if value is None:
        return "-"
    return _signed(f"{value:,{_form(value)}}")


def exact(value: float) -> str:
    """A number as it was published, with all its digits."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def spread(mean: float, std: float) -> str:
    """A mean and its standard deviation, with as many decimals as the larger one has."""
    used = _form(max(abs(mean), std))
    return _signed(f"{mean:,{used}} ± {std:,{used}}")


def _form(value: float) -> str:
    size = abs(value)
    return form(size, 0 if size >= 99.95 else 1 if size >= 9.995 else 2)


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def picture(frame: np.ndarray, alt: str) -> Markup:
    """A frame uint8[3, H, W] as an image within the page."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "PNG", optimize=True)
    source = data_uri(file.getvalue(), "image/png")
    return tag("img", src=source, alt=alt, width=frame.shape[2], height=frame.shape[1])


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
