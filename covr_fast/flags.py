"""Settings as a command line writes them."""

from collections.abc import Iterator, Mapping
from typing import Any


def flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """The settings, by full names, as arguments of `covr-fast train`."""
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            section, _, leaf = flag[2:].rpartition(".")
            yield flag if value else f"--{section}.no-{leaf}" if section else f"--no-{leaf}"
        elif isinstance(value, (list, tuple)):
            yield from (flag, *map(str, value))
        else:
            yield f"{flag}={value}"
