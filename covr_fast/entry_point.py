"""Entry points: names by which another process finds a function again.

`package.module:name` is imported as by `python -m` (the current directory counts), `folder/file.py:name` as
by `python folder/file.py`.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, unknown


def load(entry_point: str) -> Callable[..., Any]:
    """The function or class that an entry point names.

    Raises:
        UserError: it has another form, its module is missing or fails, or it names nothing that can be
            called.
    """
    what = f"env.entry_point={entry_point!r}"
    place, _, name = entry_point.rpartition(":")
    if not (place and name):
        raise UserError(f"{what} must be package.module:name or folder/file.py:name")
    found: Any = _run_file(place, what) if place.endswith(".py") else _imported(place, what)
    for part in name.split("."):
        if not hasattr(found, part):
            known = [each for each in vars(found) if not each.startswith("_")]
            raise UserError(f"{what}: {unknown('name', part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(
            f"{what} is of type {type(found).__name__}: it must be a function or class that makes it"
        )
    make: Callable[..., Any] = found
    return make


def entry_point_of(make: Callable[..., Any]) -> str | None:
    """The entry point by which another process finds `make`; None where there is none, as for a lambda, a
    function within a function, or one that was typed into an interpreter."""
    name, module = getattr(make, "__qualname__", ""), sys.modules.get(getattr(make, "__module__", None) or "")
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not make or module is None:
        return None
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    if (spec := getattr(module, "__spec__", None)) is not None:  # python -m
        return f"{spec.name}:{name}"
    file = getattr(module, "__file__", None)
    return f"{Path(file).resolve()}:{name}" if file and file.endswith(".py") else None


def short_name(entry_point: str) -> str:
    """A name for people, without folders and packages: own_task:Reach."""
    place, _, name = entry_point.rpartition(":")
    return f"{Path(place).stem if place.endswith('.py') else place.rpartition('.')[2]}:{name}"


def _imported(module: str, what: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with blamed(f"{what}: importing it"):
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name and f"{module}.".startswith(f"{error.name}."):
                raise UserError(
                    f"{what}: there is no module {error.name!r} in {os.getcwd()} or among the installed "
                    "ones: go to the folder that it lies in, or install it"
                ) from error
            raise


def _run_file(place: str, what: str) -> ModuleType:
    """The file as a module. Its folder joins the path of modules, so it may import its neighbours."""
    file = Path(place).resolve()
    if not file.is_file():
        raise UserError(f"{what}: there is no file {file} (in a run that was moved: edit it in config.json)")
    for module in (sys.modules["__main__"], sys.modules.get(file.stem)):
        if module is not None and _is_of(module, file):
            return module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    with blamed(f"{what}: importing it"):
        module = import_module(file.stem)
    if not _is_of(module, file):
        raise UserError(f"{what} has the name of another module, {file.stem}: give the file another name")
    return module


def _is_of(module: ModuleType, file: Path) -> bool:
    return Path(getattr(module, "__file__", None) or "").resolve() == file


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turns errors of a user's own code into a UserError of one line, which says where it was raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{what} raised {reason} ({place.filename}, line {place.lineno})") from error
