"""Errors that a user can mend: one line that names the argument and the fix."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input from the user. The command line prints its message without a traceback."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not known, which suggests the nearest ones."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known[:20])}"
    return UserError(f"unknown {kind} {name!r}: {hint}")


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turns the errors with which the library refuses arguments, or lacks what they need, into UserErrors of
    one line.

    For places where the arguments are the user's settings; elsewhere such an error is a bug.
    """
    try:
        yield
    except (UserError, BrokenPipeError):  # a reader that has gone is nobody's mistake
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error
