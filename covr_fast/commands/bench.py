"""covr-fast bench: how long the parts of a preset's loop take here."""

import sys
from dataclasses import dataclass
from typing import Annotated

from ..errors import as_user_error
from .common import optional_preset, quiet_libraries


def main(arguments: list[str]) -> int:
    import tyro

    from ..config import TrainConfig

    name, rest, preset = optional_preset(arguments, "carracing")

    @dataclass
    class Arguments:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        seconds: float = 3.0
        """How long each part is timed, and the VLM with all sizes of frames together."""

    with as_user_error():
        parsed = tyro.cli(
            Arguments,
            prog=f"covr-fast bench {name}",
            description="Time the parts of a run's loop on this machine, each checked first and alone.",
            default=Arguments(preset),
            args=rest,
        )
    from rich.console import Console

    from ..bench import CheckFailedError, measure, print_figures
    from ..costs import cost_of
    from ..estimate import print_whole_run

    quiet_libraries()
    try:
        figures = measure(parsed.config, parsed.seconds)
    except CheckFailedError as error:
        print(f"no figures, for something is wrong: {error}", file=sys.stderr)
        return 1
    console = Console(highlight=False, soft_wrap=True)
    print_figures(figures, console)
    print_whole_run(parsed.config, figures, console)
    console.print(f"{name} as it is, measured before: {cost_of(name)}")
    return 0
