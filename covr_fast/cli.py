"""The command line: covr-fast train | evaluate | report | bench | doctor."""

import argparse
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .errors import UserError, as_user_error, unknown

if TYPE_CHECKING:
    from .config import TrainConfig

USAGE = """usage: covr-fast COMMAND ...

  train PRESET [--out DIR] [--FIELD VALUE ...]   train COVR and write a run folder
  evaluate RUN [--episodes N] [--seed N]         let a run's trained actor play
  report RUN...                                  print runs' summaries and redraw their curves
  bench [PRESET] [--seconds S] [--FIELD VALUE]   time the parts of a preset's loop on this machine
  doctor [--json]                                say what this machine can do and what is missing

covr-fast train --help lists the presets; covr-fast train PRESET --help every field."""


def main() -> None:
    """Entry point. User mistakes end with one line and exit code 2, an interrupt with 130."""
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing more to say, and nothing to flush into at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    commands = {"train": _train, "evaluate": _evaluate, "report": _report, "bench": _bench, "doctor": _doctor}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

        print(f"covr-fast {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        raise unknown("command", name, commands)
    try:
        return commands[name](rest)
    except ImportError as error:
        raise UserError(f"{error.name or error} is not installed: pip install 'covr-fast[train]'") from error


def _train(arguments: list[str]) -> int:
    import tyro

    from .checkpoint import load_config
    from .config import TrainConfig
    from .presets import PRESETS

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: covr-fast train PRESET [--out DIR] [--FIELD VALUE ...]\n\npresets:")
        for name, preset in PRESETS.items():
            print(f"  {name:<20}{preset.summary}")
        print("\ncovr-fast train PRESET --help lists every field with its default in that preset.")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    suited = TrainConfig.preset(name, _value_of("--vlm.model", rest))  # an unknown name is said first

    @dataclass
    class Arguments:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        out: Path | None = None
        """Run folder, which must not hold a run yet. None: runs/PRESET-seedN, numbered if taken."""
        resume: Path | None = None
        """Folder of an interrupted run to continue, with its own settings where none are given here."""

    resumed = _value_of("--resume", rest)
    default = load_config(Path(resumed)) if resumed else suited
    with as_user_error():
        parsed = tyro.cli(
            Arguments,
            prog=f"covr-fast train {name}",
            description=PRESETS[name].summary,
            default=Arguments(default),
            args=rest,
        )
    config = parsed.config
    if parsed.resume and parsed.out:
        raise UserError("--resume continues in its own folder: leave out --out")
    out = parsed.resume or _new_run_folder(parsed.out, f"{name}-seed{config.seed}")

    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from .report import print_summary
    from .trainer import Trainer

    # The run has a progress display of its own; transformers' bars would break into it.
    disable_progress_bar()
    trainer = Trainer(config, out, resume=parsed.resume is not None)
    # How schedulers end a job: the run is saved as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    print(f"{PRESETS[name].summary}; seed {config.seed}, on {trainer.device}, into {out}", flush=True)
    if not resumed and (changed := _differences(TrainConfig.preset(name), suited)):
        print(f"for this VLM the preset sets {', '.join(changed)}", flush=True)
    summary = trainer.run()
    print_summary(summary, Console(highlight=False))
    print(f"{out} holds {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _differences(before: "TrainConfig", after: "TrainConfig") -> list[str]:
    """The settings but vlm.model in which `after` differs, as `section.name=value`."""
    old = before.to_dict()
    return [
        f"{section}.{name}={value}"
        for section, values in after.to_dict().items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != old[section][name] and (section, name) != ("vlm", "model")
    ]


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The value given to a flag, as `--flag value` or `--flag=value`."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


def _new_run_folder(asked: Path | None, name: str) -> Path:
    """The folder to write, which must not hold a run already: nothing is overwritten."""
    if asked is not None:
        if (asked / "config.json").exists():
            raise UserError(f"--out {asked} already holds a run: choose another folder")
        return asked
    base = Path("runs") / name
    candidates = [base, *(base.with_name(f"{name}-{i}") for i in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())


def _evaluate(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        run: Annotated[Path, tyro.conf.Positional]
        """Folder of a run."""
        episodes: int = 10
        """Episodes to play."""
        seed: int = 2_000_000
        """Seed of the first episode's environment."""

    parsed = tyro.cli(
        Arguments, prog="covr-fast evaluate", description="Let a run's actor play, alone.", args=arguments
    )
    from .checkpoint import load_actor
    from .evaluate import evaluate

    if parsed.episodes < 1:
        raise UserError(f"--episodes {parsed.episodes} must be at least 1")
    policy, config = load_actor(parsed.run)
    result = evaluate(policy, config.env, parsed.episodes, seed=parsed.seed)
    print("returns: " + " ".join(f"{value:.0f}" for value in result.returns))
    print(f"{config.env.id}: {result.mean:.1f} ± {result.std:.1f} over {parsed.episodes} episodes")
    return 0


def _report(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """Folders of finished runs."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast report",
        description="Print runs' summaries, compare them, and redraw their curves.",
        args=arguments,
    )
    from rich.console import Console

    from .report import plot_curves, print_comparison, print_summary, read_summary

    if not parsed.runs:
        raise UserError("report needs at least one run folder: covr-fast report runs/carracing-seed0")
    console = Console(highlight=False)
    summaries = [read_summary(run) for run in parsed.runs]
    for run, summary in zip(parsed.runs, summaries, strict=True):
        print_summary(summary, console)
        print(f"drawn: {plot_curves(run)}")
    if len(summaries) > 1:
        print_comparison(summaries, console)
    return 0


def _bench(arguments: list[str]) -> int:
    import tyro

    from .config import TrainConfig

    given = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if given else ("carracing", arguments)
    preset = TrainConfig.preset(name, _value_of("--vlm.model", rest))

    @dataclass
    class Arguments:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        seconds: float = 3.0
        """How long each part is timed."""

    with as_user_error():
        parsed = tyro.cli(
            Arguments,
            prog=f"covr-fast bench {name}",
            description="Time the parts of a run's loop on this machine, each checked first and alone.",
            default=Arguments(preset),
            args=rest,
        )
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from .bench import CheckFailedError, measure, print_timings

    disable_progress_bar()
    try:
        timings = measure(parsed.config, parsed.seconds)
    except CheckFailedError as error:
        print(f"no figures, for something is wrong: {error}", file=sys.stderr)
        return 1
    print_timings(timings, Console(highlight=False))
    return 0


def _doctor(arguments: list[str]) -> int:
    # Not tyro, which may be among what is missing.
    parser = argparse.ArgumentParser(
        "covr-fast doctor", description="Say what this machine can do.", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines for people")
    parsed = parser.parse_args(arguments)
    from .doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    if parsed.json:
        print(json.dumps(diagnosis, indent=2))
    else:
        print_diagnosis(diagnosis)
    return 0 if diagnosis["ready_to_train"] else 1


if __name__ == "__main__":
    main()
