"""A video per group."""

from pathlib import Path

from .context import Context
from .groups import Group
from .markup import Markup, data_uri, figure, note, section, tag
from .runs import Run

_TYPES = {"episode.mp4": "video/mp4", "episode.gif": "image/gif"}


def videos_section(context: Context) -> Markup:
    shown: list[Markup] = []
    left_out: list[Markup] = []
    for task in context.study.tasks:
        for group in task.groups:
            if (found := _find(group)) is None:
                continue
            run, path = found
            size = path.stat().st_size * 4 // 3  # as base64
            if context.videos.take(size):
                shown.append(_video(path, f"{group.label}, seed {run.seed}, {task.title}"))
            else:
                said = f"{path} ({size / 1e6:.1f} MB) is left out: the page has no room for it."
                left_out.append(note(said))
    return section(
        "videos",
        "Videos",
        note(
            "An evaluation episode of each group’s first seed, with the agent’s action and the VLM’s prior."
        ),
        tag("div", *shown, class_="grid") if shown else note("No run has a video."),
        *left_out,
    )


def _find(group: Group) -> tuple[Run, Path] | None:
    """The first run that has a video, and the video."""
    found = ((run, run.folder / name) for run in group.runs for name in _TYPES)
    return next(((run, path) for run, path in found if path.is_file()), None)


def _video(path: Path, words: str) -> Markup:
    source = data_uri(path.read_bytes(), _TYPES[path.name])
    if path.suffix == ".gif":
        return figure(tag("img", class_="clip", src=source, alt=f"Episode: {words}"), words)
    video = tag("video", src=source, controls=True, loop=True, muted=True, playsinline=True, aria_label=words)
    return figure(video, words)
