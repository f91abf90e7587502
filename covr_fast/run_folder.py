"""A run folder belongs to one run, and to one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from .errors import UserError

_ANOTHER = "choose another folder (--out, or Trainer's out)"
_FILES_OF_A_RUN = ("config.json", "metrics.jsonl", "checkpoint", "checkpoint.old", "summary.json")


class RunFolder:
    """A run folder that this process can claim.

    The claim is a lock on the file `.lock` in the folder. The system releases it when the process ends,
    however it ends.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        # Not per thread: a trainer may be built in one thread and run in another.
        self._lock = FileLock(self.path / ".lock", timeout=0, thread_local=False)
        self._made: list[Path] = []

    @classmethod
    def numbered(cls, base: Path) -> Self:
        """Makes the first of `base`, `base`-2, `base`-3, ... that does not exist. Two processes that do this
        at the same time get different folders."""
        for path in (base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 10_000))):
            folder = cls(path)
            if folder._make(exist_ok=False):
                return folder
        raise UserError(f"{base} and 9,998 more of its name exist: {_ANOTHER}")

    def has_run(self) -> bool:
        return any((self.path / name).exists() for name in _FILES_OF_A_RUN)

    def is_claimed(self) -> bool:
        """Whether another process or object writes a run here."""
        if not self.path.is_dir():
            return False
        try:
            self._lock.acquire()
        except Timeout:
            return True
        self._lock.release()
        return False

    @contextmanager
    def claimed(self, *, resume: bool) -> Iterator[None]:
        """Prevents others from writing a run here until the block ends. Claims of one object nest.

        A folder that was made for the claim is removed if nothing was written into it.

        Args:
            resume: True if the folder must contain a run already, False if it must not.

        Raises:
            UserError: the folder contains a run and must not, or the other way round; another process or
                object has claimed it; it cannot be written.
        """
        if self._lock.is_locked:
            yield
            return
        if resume and not self.has_run():
            raise UserError(f"{self.path} holds no run: give the folder of a run")
        if not resume:
            self._make(exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.path} is being written by another run: wait until it ends, or {_ANOTHER}"
            ) from error
        except OSError as error:
            self._remove_if_empty()
            raise UserError(f"{self.path} cannot be written ({error.strerror}): {_ANOTHER}") from error
        try:
            if not resume and self.has_run():
                raise UserError(
                    f"{self.path} already holds a run: {_ANOTHER}, or continue it (--resume {self.path}, or "
                    "Trainer's resume=True)"
                )
            yield
        finally:
            self._remove_if_empty()
            self._lock.release()

    def _make(self, *, exist_ok: bool) -> bool:
        """Makes the folder and its parents. Returns False if it exists already."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except FileExistsError as error:
            if self.path.is_dir() or (self.path.parent.is_dir() and not exist_ok):
                return False
            raise UserError(f"{error.filename} is a file, not a folder: {_ANOTHER}") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be made ({error.strerror}): {_ANOTHER}") from error
        self._made = missing
        return True

    def _remove_if_empty(self) -> None:
        if not self._made or {path.name for path in self.path.iterdir()} - {".lock"}:
            return
        (self.path / ".lock").unlink(missing_ok=True)
        with suppress(OSError):  # one of them is no longer empty
            for path in self._made:
                path.rmdir()
