"""covr-fast doctor: what this machine can do, and whether a run fits its memory."""

import argparse
import json
import warnings
from dataclasses import dataclass
from typing import Annotated

from ..errors import as_user_error
from .common import optional_preset, quiet_libraries, value_of


def main(arguments: list[str]) -> int:
    if value_of("--vlm.model", arguments) is not None:
        return _doctor_of_memory(arguments)
    # Not tyro: it may be missing.
    parser = argparse.ArgumentParser(
        "covr-fast doctor",
        description="Say what this machine can do. With --vlm.model MODEL: whether a run with it fits.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines for people")
    parsed = parser.parse_args(arguments)
    from ..doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    if parsed.json:
        print(json.dumps(diagnosis, indent=2))
    else:
        print_diagnosis(diagnosis)
    return 0 if diagnosis["ready_to_train"] else 1


def _doctor_of_memory(arguments: list[str]) -> int:
    import tyro

    from ..config import TrainConfig

    name, rest, preset = optional_preset(arguments, "carracing-gpu")

    @dataclass
    class Arguments:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Print JSON instead of lines for people."""

    with as_user_error():
        parsed = tyro.cli(
            Arguments,
            prog=f"covr-fast doctor {name}",
            description="Say whether a run with these settings fits the memory of this machine.",
            default=Arguments(preset),
            args=rest,
        )
        from ..fits import answer, as_json, print_answer

        quiet_libraries()
        with warnings.catch_warnings(action="ignore"):  # those of transformers, about itself
            found = answer(parsed.config)
    if parsed.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print_answer(found)
    return 0 if found.fits_here else 1
