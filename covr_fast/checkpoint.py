"""Checkpoints that are either whole or absent: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .agents import SAC
from .buffer import ReplayBuffer
from .config import TrainConfig
from .envs import action_labels
from .errors import UserError
from .evaluate import Policy, actor_policy
from .view import agent_obs_shape
from .vlm import ActionPrior


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` when the block ends without an error.

    Interrupted anywhere, either the old or the new folder is there, whole (the old one as `target`.old at
    worst, which `newest_folder` finds).
    """
    new, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def newest_folder(target: Path) -> Path:
    """`target`, or what an interrupted `replaced_folder` left of it.

    Raises:
        UserError: there is neither.
    """
    for folder in (target, target.with_name(target.name + ".old")):
        if folder.is_dir():
            return folder
    raise UserError(f"no checkpoint in {target.parent}: is it the folder of a run?")


def save_checkpoint(
    run: Path, agent: SAC, prior: ActionPrior, counters: dict[str, Any], buffer: ReplayBuffer | None
) -> None:
    """Writes RUN/checkpoint: agent.pt, counters.pt, vlm/ (for ActionPrior.from_pretrained), replay.

    Raises:
        UserError: the prior is an adapter of a model in the checkpoint that would be replaced.
    """
    if prior.needs(run / "checkpoint") or prior.needs(run / "checkpoint.old"):
        raise UserError(
            f"the VLM is an adapter of {prior.backbone.source}, which saving would remove: copy that model "
            "to another place, and begin a run with it as vlm.model"
        )
    with replaced_folder(run / "checkpoint") as new:
        torch.save(agent.state_dict(), new / "agent.pt")
        torch.save(counters, new / "counters.pt")
        prior.save_pretrained(new / "vlm")
        if buffer is not None:
            buffer.save(new / "replay")


class Checkpoint:
    """An opened checkpoint; `counters` is what the trainer counted, the rest is read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.vlm = folder / "vlm"
        self.counters: dict[str, Any] = torch.load(folder / "counters.pt", weights_only=True)

    def agent_state(self) -> dict[str, Any]:
        """For SAC.load_state_dict."""
        return torch.load(self.folder / "agent.pt", map_location="cpu", weights_only=True)

    def buffer(self, device: str) -> ReplayBuffer:
        path = self.folder / "replay"
        if not path.is_file():
            raise UserError(
                f"{self.folder} holds no replay buffer, so the run cannot be continued: it ended without "
                "--save-replay"
            )
        return ReplayBuffer.load(path, device=device)


def load_checkpoint(run: Path) -> Checkpoint:
    """RUN/checkpoint.

    Raises:
        UserError: there is none.
    """
    return Checkpoint(newest_folder(run / "checkpoint"))


def load_config(run: Path) -> TrainConfig:
    """config.json of a run folder."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} holds no config.json: is it the folder of a run?")
    try:
        return TrainConfig.from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def load_actor(run: Path) -> tuple[Policy, TrainConfig]:
    """The trained actor of a run, deployed as in training's evaluations, and the run's configuration."""
    config = load_config(run)
    agent = SAC(agent_obs_shape(config), (len(action_labels(config.env)),), config.agent, seed=config.seed)
    agent.load_state_dict(load_checkpoint(run).agent_state())
    return actor_policy(agent, config), config
