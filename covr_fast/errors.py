"""Errors that the user can fix: one line that names the argument and the remedy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input from the user. The command line prints its message without a traceback."""


class DivergedError(UserError):
    """The networks contain NaN, so the present state of the run is not worth saving."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: training diverged; lower agent.lr, or look at the settings that were changed"
        )


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name; its message suggests similar names."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known[:20])}"
    return UserError(f"unknown {kind} {name!r}: {hint}")


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turns errors of the block into UserErrors of one line, also those for a missing dependency.

    Use it where the arguments of a call are the user's settings; elsewhere such an error is a bug.
    """
    try:
        yield
    except (UserError, BrokenPipeError):  # a reader that closed its pipe is no mistake of the user
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def os_error_as_user_error(consequence: str = "") -> Iterator[None]:
    """Turns errors of the operating system, for example of a full disk, into UserErrors of one line, which
    ends with the consequence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os_error_text(error)}{consequence and ': '}{consequence}") from error


def os_error_text(error: OSError) -> str:
    """What is wrong with which file, in one line."""
    text = error.strerror if error.errno is not None and error.strerror else str(error)
    return " ".join((f"{error.filename}: {text}" if error.filename else text).split())
