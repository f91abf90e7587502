"""covr-fast audit: whether stored priors are those of the weights they name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .common import check_least, quiet_libraries


def main(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """Folder of a run whose checkpoint holds its replay buffer: one that was interrupted, or trained with
        --save-replay."""
        rows: int = 64
        """Most priors to recompute."""
        seed: int = 0
        """Seed of their choice."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast audit",
        description="Recompute priors in a run's replay buffer with the weights that gave them, and tell "
        "which differ. The exit code is 1 if any does.",
        args=arguments,
    )
    from rich.console import Console

    from ..audit import audit, print_audit

    check_least(parsed, rows=1, seed=0)
    quiet_libraries()
    result = audit(parsed.run, rows=parsed.rows, seed=parsed.seed)
    print_audit(result, Console(highlight=False, soft_wrap=True))
    return 1 if result.differences else 0
