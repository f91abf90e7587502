"""The command line: covr-fast train | evaluate | report | audit | push | bench | doctor."""

import contextlib
import os
import sys
from importlib import import_module

from .errors import UserError, unknown

USAGE = """usage: covr-fast COMMAND ...

  train PRESET [--out DIR] [--FIELD VALUE ...]   train COVR and write a run folder
  train PRESET --method METHOD                   train a baseline or an ablation of its paper
  sweep SPEC [--seeds N] [--jobs N]              train a grid of presets, agents, methods and seeds
  evaluate RUN [--episodes N] [--json]           let a run's trained actor play
  evaluate RUN --vlm-alone [--round N]           let its VLM play, as it was after a round
  report RUN... [--out FILE]                     print runs' summaries, and write a page about them
  audit RUN [--rows N] [--seed N]                recompute stored priors, and tell which differ
  push RUN REPO [--private] [--dry-run]          make a run's VLM a model on the Hugging Face Hub
  bench [PRESET] [--seconds S] [--FIELD VALUE]   time the parts of a preset's loop on this machine
  doctor [--json]                                say what this machine can do and what is missing
  doctor [PRESET] --vlm.model MODEL [--FIELD VALUE]  say whether a run with this VLM fits its memory

covr-fast train --help lists the presets; covr-fast train PRESET --help every field."""


COMMANDS = ("train", "sweep", "evaluate", "report", "audit", "push", "bench", "doctor")
"""Each is a module of `commands`."""


def main() -> None:
    """Entry point. A user's mistake ends it with one line and exit code 2, an interrupt with 130."""
    try:
        code = run(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()  # here, where the error of a closed pipe is still caught
        sys.exit(code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        _forget_output()
        sys.exit(0)
    except OSError as error:
        _forget_output()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _forget_output() -> None:
    """Discards output that cannot be written (`| head`, a full disk), so that Python does not fail later."""
    with contextlib.suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

        print(f"covr-fast {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    try:
        command = import_module(f".commands.{name}", __package__)
        return int(command.main(rest))
    except ImportError as error:
        raise UserError(f"{error.name or error} is not installed: pip install 'covr-fast[train]'") from error


if __name__ == "__main__":
    main()
