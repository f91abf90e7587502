"""Checkpoints that are either whole or absent: written to a temporary folder, then renamed."""

import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .agents import Agent, make_agent
from .buffer import ReplayBuffer
from .config import TrainConfig, check_types
from .errors import UserError
from .evaluate import Policy, actor_policy
from .files import flush_tree, read_json, replacing, writing
from .model_card import write_run_card
from .tasks import find_task
from .versions import RoundWeights, add_rounds, drop_staged, last_published, rounds_in, save_vlm
from .view import agent_obs_shape

if TYPE_CHECKING:
    from .vlm import ActionPrior

RESCUED = "agent.pt"
"""File in the run folder with the agent alone. It exists if there was no room for the last checkpoint, so it
is newer than the checkpoint."""
NO_VLM: dict[str, Any] = {"rounds": [], "rounds_done": 0, "prior_version": 0}
"""The part of counters.pt that is the VLM's, in a run without one, or without rounds."""
_RESERVE = ".reserve"
_REMEDY = "put back a copy of the checkpoint, or begin a new run"


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill; it replaces `target` when the block ends without an error.

    If the process is killed at any point, the old or the new folder is there, whole. The old one may then
    have the name `target`.old, where `newest_folder` finds it.
    """
    new, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        flush_tree(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def newest_folder(target: Path) -> Path:
    """`target`, or `target`.old, if `replaced_folder` was killed between its two renames.

    Raises:
        UserError: neither exists.
    """
    if (folder := _newest(target)) is None:
        said = "is it the folder of a run? If so, it ended before any was saved"
        raise UserError(f"no checkpoint in {target.parent}: {said}")
    return folder


def has_checkpoint(run: Path) -> bool:
    """Whether the run in this folder can be resumed."""
    return _newest(run / "checkpoint") is not None


def _newest(target: Path) -> Path | None:
    old = target.with_name(target.name + ".old")
    return next((folder for folder in (target, old) if folder.is_dir()), None)


def save_checkpoint(
    run: Path,
    agent: Agent | None,
    prior: "ActionPrior | None",
    counters: dict[str, Any],
    buffer: ReplayBuffer | None,
) -> None:
    """Writes RUN/checkpoint: counters.pt, with `agent` agent.pt, with `prior` vlm/ (for
    ActionPrior.from_pretrained) and adapters/ (the same after each round; see `versions`), and with `buffer`
    replay.

    Raises:
        UserError: the prior is an adapter of a model in the checkpoint that would be replaced.
        OSError: it could not be written; the former checkpoint is still there.
    """
    if prior is not None and any(prior.needs(run / name) for name in ("checkpoint", "checkpoint.old")):
        raise UserError(
            f"the VLM is an adapter of {prior.backbone.source}, which saving would remove: copy that model "
            "to another place, and begin a run with it as vlm.model"
        )
    with replaced_folder(run / "checkpoint") as new:
        _write(counters, new / "counters.pt")
        if agent is not None:
            _write(agent.state_dict(), new / "agent.pt")
        if prior is not None:
            save_vlm(prior, new / "vlm", run / "checkpoint" / "vlm")
            write_run_card(new / "vlm", counters, counters.get("before", {}))
            add_rounds(new, run, _newest(run / "checkpoint"), counters.get("rounds", []), prior)
        if buffer is not None:
            buffer.save(new / "replay")
    drop_staged(run)
    (run / RESCUED).unlink(missing_ok=True)


@contextmanager
def reserved_room(run: Path, agent: Agent | None) -> Iterator[None]:
    """Reserves room on the disk for `rescue_agent` until the block ends; none without an agent.

    Raises:
        OSError: there is no room.
    """
    if agent is None:
        yield
        return
    path = run / _RESERVE
    weights = sum(p.numel() * p.element_size() for m in agent.modules().values() for p in m.parameters())
    try:
        with writing(path), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 3 * weights + (1 << 20))  # weights and both moments of Adam
        yield
    finally:
        path.unlink(missing_ok=True)


def rescue_agent(run: Path, agent: Agent) -> None:
    """Writes the agent alone, as RUN/agent.pt, into the reserved room.

    Raises:
        OSError: it could not be written.
    """
    (run / _RESERVE).unlink(missing_ok=True)
    _write(agent.state_dict(), run / RESCUED)


def _write(content: dict[str, Any], path: Path) -> None:
    """What `torch.save` writes. Not written to the file by torch, which does not say why a write failed."""
    serialized = io.BytesIO()
    torch.save(content, serialized)
    with replacing(path) as file:
        file.write(serialized.getbuffer())


class Checkpoint:
    """RUN/checkpoint, opened. `counters` is the content of counters.pt; the rest is read on request.

    Raises:
        UserError: there is none, or counters.pt is damaged.
    """

    def __init__(self, run: Path):
        self.folder = newest_folder(run / "checkpoint")
        self.vlm = self.folder / "vlm"
        self.counters = _read(self.folder / "counters.pt")
        self.written = (self.folder / "counters.pt").stat().st_mtime_ns

    def rounds(self, config: TrainConfig) -> list[RoundWeights]:
        """The rounds whose weights can be opened, in their order, from round 0 on: the VLM as it was before
        any. `config` is that of the run.

        Raises:
            UserError: a record of them is damaged.
        """
        if not config.has_vlm:
            raise UserError(f"{self.folder.parent} has no VLM: it is a run with covr.vlm='off'")
        found = {kept.number: kept for kept in rounds_in(self.folder / "adapters")}
        if version := self.counters["prior_version"]:  # vlm/ is there even if rounds are not kept
            last = last_published(self.counters["rounds"])
            number = last["round"] if last else self.counters["rounds_done"]
            found.setdefault(number, RoundWeights(number, version, self.vlm))
        return [RoundWeights(0, 0, config.vlm.model), *(found[number] for number in sorted(found))]

    def has_replay(self) -> bool:
        return (self.folder / "replay").is_file()

    def buffer(self, device: torch.device) -> ReplayBuffer:
        with self.opening(self.folder / "replay"):
            return ReplayBuffer.load(self.folder / "replay", device=device)

    @contextmanager
    def opening(self, part: Path) -> Iterator[None]:
        """Turns errors of the block into UserErrors that name this part of the checkpoint and the remedy."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{part} cannot be opened ({reason}): if it is damaged, {_REMEDY}") from error


def _read(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: a ZIP archive with a checksum of each part, which torch does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{part} does not match its checksum")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_REMEDY}") from error
    except Exception as error:  # damaged bytes may cause an error of any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}): {_REMEDY}") from error


def load_config(run: Path) -> TrainConfig:
    """Reads config.json of a run folder."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} holds no config.json: is it the folder of a run?")
    settings = read_json(path, "put back a copy of it")
    try:
        config = TrainConfig.from_dict(settings)
        check_types(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def load_actor(run: Path) -> tuple[Policy, TrainConfig]:
    """The trained actor of a run, used as in the evaluations of training, and the run's settings."""
    config = load_config(run)
    config.check()
    if not config.has_agent:
        raise UserError(f"{run} has no actor: its VLM decides (covr.decides='vlm'), so add --vlm-alone")
    agent = make_agent(
        agent_obs_shape(config), (find_task(config.env).action_dim,), config.agent, seed=config.seed
    )
    rescued = run / RESCUED
    path = rescued if rescued.is_file() else newest_folder(run / "checkpoint") / "agent.pt"
    restore_agent(agent, path)
    return actor_policy(agent, config), config


def load_policy(run: Path | str) -> Policy:
    """The trained actor of a run, which acts without the VLM: uint8[n, C, H, W] observations, as
    `make_env(config.env)` gives them, -> actions float32[n, A] in [-1, 1].

    Raises:
        UserError: it is not the folder of a run, or a file in it is damaged.
    """
    policy, _ = load_actor(Path(run))
    return policy


def restore_agent(agent: Agent, path: Path) -> None:
    """Loads an agent.pt.

    Raises:
        UserError: it is missing, damaged, or the state of an agent with other settings.
    """
    state = _read(path)
    try:
        agent.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the settings in config.json ({reason}): {_REMEDY}") from error
