"""What several commands do."""

import signal
import warnings
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import TrainConfig


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The last value given to a flag, as `--flag value` or `--flag=value`."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(flag + "="):
            value = argument.removeprefix(flag + "=")
    return value


def preset_of(name: str, arguments: list[str]) -> "TrainConfig":
    """The preset with the settings that suit the VLM, the agent and the method among the arguments.

    Raises:
        UserError: one of them is unknown.
    """
    from ..config import TrainConfig

    asked = [value_of(flag, arguments) for flag in ("--vlm.model", "--agent.kind", "--method")]
    return TrainConfig.preset(name, asked[0], asked[1], asked[2] or "covr")


def optional_preset(arguments: list[str], default: str) -> "tuple[str, list[str], TrainConfig]":
    """Of `[PRESET] [--FIELD VALUE]...`: the preset's name, the other arguments spelled out, and the preset as
    `preset_of` gives it.

    Raises:
        UserError: as `preset_of`.
    """
    given = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if given else (default, arguments)
    rest = spelled_out(rest)
    return name, rest, preset_of(name, rest)


def spelled_out(arguments: list[str]) -> list[str]:
    """`--covr off`, which reads well, as the setting that it stands for.

    Raises:
        UserError: another method is among the arguments as well.
    """
    spelled: list[str] = []
    for argument in arguments:
        if spelled and (spelled[-1], argument) == ("--covr", "off"):
            spelled[-1:] = ["--method", "off"]
        else:
            spelled.append("--method=off" if argument == "--covr=off" else argument)
    method = value_of("--method", arguments)
    if spelled != arguments and method not in (None, "off"):
        raise UserError(f"--covr off is --method off: leave it out, or --method {method}")
    return spelled


def check_least(parsed: object, **least: int) -> None:
    """Raises a UserError for an argument that is below its least value."""
    for name, low in least.items():
        if (value := getattr(parsed, name)) < low:
            raise UserError(f"--{name} {value} must be at least {low}")


def quiet_libraries() -> None:
    """Progress bars of transformers would disturb ours, and a warning tells a user nothing: peft reads an old
    name in transformers."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


def interrupt_when_ended() -> None:
    """A scheduler's SIGTERM and a closed terminal's SIGHUP save a run like Ctrl-C, unless they are ignored
    (nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
