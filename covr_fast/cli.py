"""The command line: covr-fast train | evaluate | report | audit | push | bench | doctor."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .errors import UserError, as_user_error, unknown

if TYPE_CHECKING:
    from .config import TrainConfig
    from .evaluate import Policy

USAGE = """usage: covr-fast COMMAND ...

  train PRESET [--out DIR] [--FIELD VALUE ...]   train COVR and write a run folder
  evaluate RUN [--episodes N] [--seed N]         let a run's trained actor play
  evaluate RUN --vlm-alone [--round N]           let its VLM play, as it was after a round
  report RUN...                                  print runs' summaries and redraw their curves
  audit RUN [--rows N] [--seed N]                recompute stored priors, and tell which differ
  push RUN REPO [--private] [--dry-run]          make a run's VLM a model on the Hugging Face Hub
  bench [PRESET] [--seconds S] [--FIELD VALUE]   time the parts of a preset's loop on this machine
  doctor [--json]                                say what this machine can do and what is missing
  doctor [PRESET] --vlm.model MODEL [--FIELD VALUE]  say whether a run with this VLM fits its memory

covr-fast train --help lists the presets; covr-fast train PRESET --help every field."""


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
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "report": _report,
        "audit": _audit,
        "push": _push,
        "bench": _bench,
        "doctor": _doctor,
    }
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
            print(f"  {name:<20}{preset.summary}, with {preset.model}")
        print("\ncovr-fast train PRESET --help lists every field with its default in that preset.")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    suited = TrainConfig.preset(
        name, _value_of("--vlm.model", rest), _value_of("--agent.kind", rest)
    )  # first: raises for an unknown name

    @dataclass
    class Arguments:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        out: Path | None = None
        """Run folder, which must not contain a run. None: runs/PRESET-seedN, with a number if that exists."""
        resume: Path | None = None
        """Folder of an interrupted run to continue. Settings that are not given here stay as they were."""

    default = suited
    if resumed := _value_of("--resume", rest):
        default = load_config(Path(resumed))
        _check_preset(name, default, resumed)
    with as_user_error():
        parsed = tyro.cli(
            Arguments,
            prog=f"covr-fast train {name}",
            description=PRESETS[name].summary,
            default=Arguments(default),
            args=rest,
        )
    config = parsed.config
    if (asked := config.begun_as) != default.begun_as:
        raise UserError(f"--begun-as is for the record: covr-fast train {asked} takes another preset")
    if config.agent.kind != default.agent.kind:  # in a new run both have the kind that was asked for
        raise UserError(
            f"the run was begun with agent.kind={default.agent.kind}: it cannot go on with "
            f"{config.agent.kind}"
        )
    if parsed.resume and parsed.out:
        raise UserError("--resume continues in its own folder: leave out --out")
    config.check()

    from .logger import display
    from .report import print_summary
    from .run_folder import RunFolder
    from .trainer import Trainer

    _quiet_libraries()
    _interrupt_when_ended()
    console = display()
    given = parsed.resume or parsed.out
    folder = RunFolder(given) if given else RunFolder.numbered(Path("runs") / f"{name}-seed{config.seed}")
    with folder.claimed(resume=parsed.resume is not None):
        trainer = Trainer(config, folder, resume=parsed.resume is not None)
        begun = f", from step {trainer.step}" if parsed.resume else ""
        console.print(
            f"{PRESETS[name].summary}, with {config.vlm.model}; seed {config.seed}, on {trainer.device}, "
            f"into {folder.path}{begun}"
        )
        if not resumed and (changed := _differences(TrainConfig.preset(name), suited)):
            console.print(f"for this VLM and agent the preset sets {', '.join(changed)}")
        summary = trainer.run()
    print_summary(summary, console)
    names = sorted(path.name for path in folder.path.iterdir() if not path.name.startswith("."))
    console.print(f"{folder.path} holds {', '.join(names)}")
    return 0


def _check_preset(name: str, config: "TrainConfig", run: str) -> None:
    """Raises a UserError if the run began as another preset or, where that was not recorded, in another
    environment than the preset's."""
    from .config import TrainConfig

    begun = config.begun_as
    if begun and begun != name:
        raise UserError(
            f"the run was begun as {begun}, not {name}: covr-fast train {begun} --resume {run} continues it"
        )
    if not begun and config.env.id != (env := TrainConfig.preset(name).env.id):
        raise UserError(f"the run was begun with env.id={config.env.id}, and preset {name} is of {env}")


def _quiet_libraries() -> None:
    """Progress bars of transformers would disturb ours. Two warnings tell a user nothing: peft reads an old
    name in transformers, and bitsandbytes misses a faster kernel even where nothing is quantized."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _interrupt_when_ended() -> None:
    """A scheduler's SIGTERM and a closed terminal's SIGHUP save the run like Ctrl-C, unless they are ignored
    (nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _differences(before: "TrainConfig", after: "TrainConfig") -> list[str]:
    """The settings in which `after` differs, except those that were asked for, as `name=value`."""
    from .files import full_names

    old, new = full_names(before.to_dict()), full_names(after.to_dict())
    asked = {"vlm.model", "agent.kind", "begun_as"}
    changed = (name for name in new if name not in asked and new[name] != old[name])
    return [f"{name}={new[name]}" for name in changed]


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The last value given to a flag, as `--flag value` or `--flag=value`."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(flag + "="):
            value = argument.removeprefix(flag + "=")
    return value


def _evaluate(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """Folder of a run."""
        episodes: int = 10
        """Episodes to play."""
        seed: int = 2_000_000
        """Seed of the first episode's environment."""
        vlm_alone: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Let the VLM make every decision, instead of the actor."""
        round: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """With --vlm-alone, the round after which the VLM plays; 0: before any. None: the last."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast evaluate",
        description="Let a run's actor play, alone, or its VLM.",
        args=arguments,
    )
    from .checkpoint import load_actor
    from .evaluate import evaluate

    _check_least(parsed, episodes=1, seed=0)
    if parsed.vlm_alone:
        _quiet_libraries()
        policy, config, player = _vlm_player(parsed.run, parsed.round)
    elif parsed.round is not None:
        raise UserError(f"--round {parsed.round} is of the VLM: add --vlm-alone")
    else:
        (policy, config), player = load_actor(parsed.run), ""
    result = evaluate(policy, config.env, parsed.episodes, seed=parsed.seed)
    print("returns: " + " ".join(f"{value:.0f}" for value in result.returns))
    print(f"{config.env.id}{player}: {result.mean:.1f} ± {result.std:.1f} over {parsed.episodes} episodes")
    return 0


def _vlm_player(run: Path, number: int | None) -> "tuple[Policy, TrainConfig, str]":
    """The policy of a run's VLM after a round (None: the last), the run's settings, and who plays."""
    from .checkpoint import Checkpoint, load_config
    from .evaluate import vlm_policy
    from .parts import load_round

    config = load_config(run)
    config.check()
    saved = Checkpoint(run)
    rounds = {weights.number: weights for weights in saved.rounds(config)}
    if number is None:
        number = max(rounds)
    if number not in rounds:
        known = ", ".join(map(str, rounds))
        raise UserError(f"--round {number}: {run} has the weights after the rounds {known} (0: before any)")
    prior = load_round(config, saved, rounds[number])
    after = f"after round {number}" if number else "before any round"
    return vlm_policy(prior, config), config, f", VLM alone {after} (version {prior.version} of its weights)"


def _check_least(parsed: object, **least: int) -> None:
    """Raises a UserError for an argument that is below its least value."""
    for name, low in least.items():
        if (value := getattr(parsed, name)) < low:
            raise UserError(f"--{name} {value} must be at least {low}")


def _report(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
        """Folders of finished runs."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast report",
        description="Print runs' summaries, compare them, and redraw their curves.",
        args=arguments,
    )
    from rich.console import Console

    from .files import read_records
    from .report import plot_curves, print_comparison, print_summary, read_summary, run_labels

    if not parsed.runs:
        raise UserError("report needs at least one run folder: covr-fast report runs/carracing-seed0")
    console = Console(highlight=False, soft_wrap=True)
    summaries = [read_summary(run) for run in parsed.runs]
    labels = run_labels(parsed.runs)
    several = len(parsed.runs) > 1
    for run, label, summary in zip(parsed.runs, labels, summaries, strict=True):
        print_summary(summary, console, label if several else None)
        with as_user_error():
            print(f"drawn: {plot_curves(run)}")
        if read_records(run / "metrics.jsonl")[1]:
            print(f"{run / 'metrics.jsonl'}: its last line is torn and was left out")
    if several:
        print_comparison(labels, summaries, console)
    return 0


def _audit(arguments: list[str]) -> int:
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

    from .audit import audit, print_audit

    _check_least(parsed, rows=1, seed=0)
    _quiet_libraries()
    result = audit(parsed.run, rows=parsed.rows, seed=parsed.seed)
    print_audit(result, Console(highlight=False, soft_wrap=True))
    return 1 if result.differences else 0


def _push(arguments: list[str]) -> int:
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
    from .push import push

    _quiet_libraries()
    address, upload = push(
        parsed.run, parsed.repo, private=parsed.private, base=parsed.base, dry_run=parsed.dry_run
    )
    for name, size in upload.sizes().items():
        print(f"{size:>13,} bytes  {name}")
    print(f"{'would be' if parsed.dry_run else 'now'} on {address}")
    if upload.base:
        print(f"an adapter of {upload.base}")
    return 0


def _bench(arguments: list[str]) -> int:
    import tyro

    from .config import TrainConfig

    given = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if given else ("carracing", arguments)
    preset = TrainConfig.preset(name, _value_of("--vlm.model", rest), _value_of("--agent.kind", rest))

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

    from .bench import CheckFailedError, measure, print_figures

    _quiet_libraries()
    try:
        figures = measure(parsed.config, parsed.seconds)
    except CheckFailedError as error:
        print(f"no figures, for something is wrong: {error}", file=sys.stderr)
        return 1
    print_figures(figures, Console(highlight=False, soft_wrap=True))
    return 0


def _doctor(arguments: list[str]) -> int:
    if _value_of("--vlm.model", arguments) is not None:
        return _doctor_of_memory(arguments)
    # Not tyro: it may be missing.
    parser = argparse.ArgumentParser(
        "covr-fast doctor",
        description="Say what this machine can do. With --vlm.model MODEL: whether a run with it fits.",
        allow_abbrev=False,
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


def _doctor_of_memory(arguments: list[str]) -> int:
    import tyro

    from .config import TrainConfig

    given = not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if given else ("carracing-gpu", arguments)
    preset = TrainConfig.preset(name, _value_of("--vlm.model", rest), _value_of("--agent.kind", rest))

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
        from .fits import answer, as_json, print_answer

        _quiet_libraries()
        with warnings.catch_warnings(action="ignore"):  # those of transformers, about itself
            found = answer(parsed.config)
    if parsed.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print_answer(found)
    return 0 if found.fits_here else 1


if __name__ == "__main__":
    main()
