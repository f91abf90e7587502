"""The report: one HTML file that needs no network."""

from pathlib import Path

from ..errors import UserError, os_error_as_user_error
from ..files import replacing
from .aggregates import aggregates_section
from .beside_paper import published_section
from .context import Context
from .filtering import filter_section
from .groups import Study
from .head import head
from .markup import Markup, join, tag
from .over_time import agreement_section, curves_section
from .run_list import runs_section
from .speed import speed_section
from .style import CSS
from .videos import videos_section
from .vlm_alone import vlm_section

SECTIONS = {
    "curves": ("Learning curves", curves_section),
    "aggregates": ("Aggregates", aggregates_section),
    "published": ("Published figures", published_section),
    "filter": ("Filter and weights", filter_section),
    "vlm": ("VLM alone", vlm_section),
    "priors": ("Agreement", agreement_section),
    "speed": ("Throughput", speed_section),
    "videos": ("Videos", videos_section),
    "runs": ("Runs", runs_section),
}
"""By the id of each section, in the page's order: its name in the navigation, and what makes it."""


def page(study: Study) -> str:
    """The whole page."""
    context = Context(study)
    links = [tag("a", name, href=f"#{id}") for id, (name, _) in SECTIONS.items()]
    sections = [make(context) for _, make in SECTIONS.values()]
    body = join([head(context), tag("nav", *links, aria_label="Sections"), *sections])
    megabytes = f"{len(body.encode()) / 1e6:.1f} MB"
    footer = tag("footer", f"This page has {megabytes} and needs no network.")
    meta = Markup(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>COVR report</title><style>{}</style>"
    ).format(Markup(CSS))
    main = tag("main", body, footer)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{meta}</head><body>{main}</body></html>\n'


def check_writable(out: Path) -> None:
    """Raises a UserError if a page cannot be written there, before anything is computed."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or choose another file")


def write_page(study: Study, out: Path) -> int:
    """Writes the page, whole or not at all, and returns its size in bytes.

    Raises:
        UserError: it cannot be written.
    """
    check_writable(out)
    content = page(study).encode()
    with (
        os_error_as_user_error("the page was not written; choose another file with --out"),
        replacing(out) as file,
    ):
        file.write(content)
    return len(content)
