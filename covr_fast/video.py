"""A video of an evaluation episode: the simulator's picture, what agent and VLM see of it, and do."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v2 as iio
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .agents import Agent
from .config import TrainConfig
from .evaluate import actor_policy, evaluate, vlm_policy
from .files import writing
from .large_pictures import LargePictures
from .panel import Decision, Panel
from .tasks import find_task
from .view import agent_view, newest_frame, vlm_view

if TYPE_CHECKING:
    from .vlm import ActionPrior

SLOWEST = 4.0
"""Least frames per second of a video."""
QUALITY = "26"
"""H.264's constant rate factor: lower is sharper and larger."""


class EpisodeVideo:
    """Collects frames and writes them as MP4, or as GIF where there is no H.264 encoder."""

    def __init__(self, action_names: Sequence[str], fps: float):
        self._names, self._fps = action_names, fps
        self._panel: Panel | None = None
        self._frames: list[bytes] = []  # PNG: a long episode would take a gigabyte as it is

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, decision: Decision) -> None:
        """Adds a frame."""
        if self._panel is None:
            self._panel = Panel(self._names, decision)
        file = io.BytesIO()
        self._panel.draw(decision).save(file, "PNG", compress_level=1)
        self._frames.append(file.getvalue())

    def frames(self) -> Iterator[np.ndarray]:
        """uint8[H, W, 3] each."""
        for frame in self._frames:
            yield np.asarray(Image.open(io.BytesIO(frame)))

    def write(self, folder: Path) -> Path:
        """Writes episode.mp4, or episode.gif, and returns its path.

        Raises:
            OSError: it cannot be written; no part of it is left.
        """
        path = folder / "episode.mp4"
        try:
            self._write_mp4(path)
        except (ImportError, OSError, RuntimeError):
            path.unlink(missing_ok=True)
            path = folder / "episode.gif"
            self._encode(path, duration=1000 / self._fps, loop=0)
        return path

    def _write_mp4(self, path: Path) -> None:
        from imageio_ffmpeg import count_frames_and_secs

        # With its index first, a browser plays it while it loads.
        h264 = ["-crf", QUALITY, "-preset", "slow", "-movflags", "+faststart"]
        self._encode(
            path,
            fps=self._fps,
            codec="libx264",
            quality=None,
            macro_block_size=2,
            ffmpeg_log_level="quiet",
            output_params=h264,
        )
        # A short video may fail without an error: nobody reads the exit code of ffmpeg.
        if not path.exists() or count_frames_and_secs(path)[0] != len(self):
            raise RuntimeError(f"{path} was not written whole")

    def _encode(self, path: Path, **options: Any) -> None:
        try:
            writer: Any
            with writing(path), iio.get_writer(path, **options) as writer:
                for frame in self.frames():
                    writer.append_data(frame)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def record_episode(config: TrainConfig, agent: Agent | None, prior: "ActionPrior | None", run: Path) -> None:
    """Writes a video of one evaluation episode into `run`. The actor acts; in a run without an agent the VLM.

    Raises:
        ValueError: neither an agent nor a VLM.
        OSError: it cannot be written.
    """
    if agent is not None:
        policy = actor_policy(agent, config)
    elif prior is not None:
        policy = vlm_policy(prior, config)
    else:
        raise ValueError("record_episode() needs an agent or a VLM to act")
    task = find_task(config.env)
    # In real time, but where decisions are seconds apart.
    fps = max(SLOWEST, task.steps_per_second / config.env.action_repeat)
    video = EpisodeVideo(task.words.action_names, fps)
    with LargePictures(config.env, config.eval.seed) as large:

        def watch(picture: np.ndarray, obs: np.ndarray, action: np.ndarray, total: float) -> None:
            stack = torch.from_numpy(obs[None])
            agent_sees = vlm_sees = answer = value = None
            if agent is not None:
                seen = agent_view(config, stack)
                agent_sees, value = _image(newest_frame(config, seen)), agent.value(seen).item()
            if prior is not None:
                seen = vlm_view(config, stack)
                vlm_sees = _image(seen)
                answer = action if agent is None else prior(seen).action[0].cpu().numpy()
            video.add(
                Decision(
                    picture=large.picture(picture, total),
                    agent_sees=agent_sees,
                    vlm_sees=vlm_sees,
                    action=None if agent is None else action,
                    prior=answer,
                    value=value,
                    total=total,
                    step=len(video) * config.env.action_repeat,
                )
            )
            large.step(action)

        evaluate(policy, config.env, 1, seed=config.eval.seed, watch=watch)
    video.write(run)


def _image(frames: Tensor) -> np.ndarray:
    """uint8[1, 3, H, W] -> uint8[H, W, 3]."""
    return frames[0].permute(1, 2, 0).contiguous().cpu().numpy()
