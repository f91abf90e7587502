"""What several commands do."""

import logging
import warnings

from ..errors import UserError


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The last value given to a flag, as `--flag value` or `--flag=value`."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(flag + "="):
            value = argument.removeprefix(flag + "=")
    return value


def check_least(parsed: object, **least: int) -> None:
    """Raises a UserError for an argument that is below its least value."""
    for name, low in least.items():
        if (value := getattr(parsed, name)) < low:
            raise UserError(f"--{name} {value} must be at least {low}")


def quiet_libraries() -> None:
    """Progress bars of transformers would disturb ours. Two warnings tell a user nothing: peft reads an old
    name in transformers, and bitsandbytes misses a faster kernel even where nothing is quantized."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
