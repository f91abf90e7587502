"""Files that are whole or absent, and errors that say which file is damaged."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Adds the name `path` to OSErrors of the block: the error of a failed write has none."""
    try:
        yield
    except OSError as error:
        # An error without a number would lose its text.
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it replaces `path` when the block ends without an error. If the process is killed at
    any point, the old or the new file is there, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)  # else a power cut could undo the rename


def write_whole(path: Path, content: str) -> None:
    """Replaces the content of `path`."""
    with replacing(path) as file:
        file.write(bytes(content, "utf-8"))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: it is damaged; the message ends with `remedy`.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except ValueError as error:  # neither JSON nor text
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object): {remedy}")
    return content


def read_records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of a metrics.jsonl or answers.jsonl, and whether the last one was incomplete, for example
    after a power cut, and left out.

    Raises:
        UserError: another line is damaged, or the file cannot be read.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    records: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            record = json.loads(line)
            records.append({"step": record["step"], **record})
        except (ValueError, KeyError, TypeError) as error:
            if number == lines[-1][0]:
                return records, True
            raise UserError(f"{path} is damaged in line {number}: remove that line ({error})") from error
    return records, False


def drop_lines_after(path: Path, step: int) -> bool:
    """Removes the lines of a later step from a file of `read_records`, which a run wrote after the checkpoint
    from which it goes on. Returns whether the last line was incomplete.

    Raises:
        UserError: as for `read_records`.
    """
    records, torn = read_records(path)
    write_whole(path, "".join(json.dumps(r) + "\n" for r in records if r["step"] <= step))
    return torn


def flush_tree(folder: Path) -> None:
    """Waits until everything in `folder` is on the disk. A rename after that cannot become visible
    earlier."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def full_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their full names: {"env": {"height": 84}} -> {"env.height": 84}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
