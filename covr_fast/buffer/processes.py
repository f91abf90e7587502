"""Tells processes apart.

Forked processes and the workers of a DataLoader start with equal copies of a buffer, which must not draw
equal batches.
"""

import multiprocessing
import os

from torch.utils.data import get_worker_info

_lineage = 0  # of the process that Python was started in; a fork's follows from its parent's
_forks = 0  # of this process


def here() -> tuple[int, ...]:
    """Numbers that differ between processes, but are the same in every run of the program.

    A worker of a DataLoader is recognised by its seed: torch draws one per epoch and adds its number.
    """
    worker = get_worker_info()
    if worker is not None:
        return 1, worker.seed
    # A process that multiprocessing spawned knows its place among its parent's children.
    return 0, _lineage, *multiprocessing.current_process()._identity


def _before_fork() -> None:
    global _forks
    _forks += 1


def _in_fork() -> None:
    global _lineage, _forks
    _lineage = hash((_lineage, _forks)) % 2**63
    _forks = 0


os.register_at_fork(before=_before_fork, after_in_child=_in_fork)
