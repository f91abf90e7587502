"""covr-fast push: a run's VLM onto the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .common import quiet_libraries


def main(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """Folder of a run that is not training."""
        repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")]
        """Name of the model on the hub: OWNER/NAME, or NAME for your own."""
        private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Make it private. A model that exists stays as it is."""
        base: Annotated[str | None, tyro.conf.arg(metavar="OWNER/NAME")] = None
        """OWNER/NAME of the model that was tuned, where the run has it as a folder."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Check and list what would be uploaded, without a connection."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast push",
        description="Make a run's VLM a model on the Hugging Face Hub, with its processor and a model card.",
        args=arguments,
    )
    from ..push import push

    quiet_libraries()
    address, upload = push(
        parsed.run, parsed.repo, private=parsed.private, base=parsed.base, dry_run=parsed.dry_run
    )
    for name, size in upload.sizes().items():
        print(f"{size:>13,} bytes  {name}")
    print(f"{'would be' if parsed.dry_run else 'now'} on {address}")
    if upload.base:
        print(f"an adapter of {upload.base}")
    return 0
