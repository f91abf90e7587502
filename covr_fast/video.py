"""A video of an evaluation episode, with gauges of the agent's action and the VLM's prior."""

from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .agents import Agent
from .config import TrainConfig
from .evaluate import actor_policy, evaluate
from .files import writing
from .tasks import find_task
from .view import newest_frame, vlm_view
from .vlm import ActionPrior

SCALE_TO = 448  # pixels of the enlarged frame's longer side
ROW = 34  # pixels of the panel per action dimension
AGENT, PRIOR, INK, PAPER = (66, 133, 244), (244, 143, 34), (235, 235, 235), (24, 26, 30)

SLOWEST = 4.0
"""Least frames per second of a video."""


class EpisodeVideo:
    """Collects frames and writes them as MP4, or as GIF where there is no H.264 encoder."""

    def __init__(self, labels: Sequence[str], fps: float):
        self.labels, self.fps = labels, fps
        self.frames: list[np.ndarray] = []
        self._font = ImageFont.load_default(15)

    def add(self, frame: np.ndarray, action: np.ndarray, prior: np.ndarray, total: float) -> None:
        """Adds a frame uint8[3, H, W]; below it both actions [A] in [-1, 1] and the return so far."""
        image = Image.fromarray(frame.transpose(1, 2, 0))
        scale = max(1, SCALE_TO // max(image.size))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        # Video encoders need even sizes.
        width, panel = (image.width + 1) // 2 * 2, 36 + ROW * len(self.labels)
        canvas = Image.new("RGB", (width, (image.height + panel + 1) // 2 * 2), PAPER)
        canvas.paste(image, (0, 0))
        draw = ImageDraw.Draw(canvas)
        y = image.height + 8
        draw.text((10, y), f"return {total:.0f}", fill=INK, font=self._font)
        draw.text((width - 10, y), "VLM prior", fill=PRIOR, font=self._font, anchor="ra")
        draw.text((width - 100, y), "agent", fill=AGENT, font=self._font, anchor="ra")
        for i, label in enumerate(self.labels):
            self._gauge(draw, width, y + 24 + i * ROW, label, float(action[i]), float(prior[i]))
        self.frames.append(np.asarray(canvas))

    def _gauge(
        self, draw: ImageDraw.ImageDraw, width: int, y: int, label: str, agent: float, prior: float
    ) -> None:
        left, right = 110, width - 12
        middle, half = (left + right) / 2, (right - left) / 2
        draw.text((10, y + 4), label, fill=INK, font=self._font)
        draw.line([(left, y + 13), (right, y + 13)], fill=(70, 74, 82), width=1)
        draw.line([(middle, y), (middle, y + 26)], fill=(110, 114, 122), width=1)
        for value, colour, top in ((agent, AGENT, y + 2), (prior, PRIOR, y + 15)):
            end = middle + half * float(np.clip(value, -1, 1))
            draw.rectangle([min(middle, end), top, max(middle, end) + 1, top + 9], fill=colour)

    def write(self, folder: Path) -> Path:
        """Writes episode.mp4, or episode.gif, and returns its path.

        Raises:
            OSError: it cannot be written; no part of it is left.
        """
        clip = np.stack(self.frames)
        path = folder / "episode.mp4"
        try:
            iio.imwrite(
                path, clip, fps=self.fps, codec="libx264", macro_block_size=2, ffmpeg_log_level="quiet"
            )
        except (ImportError, OSError, RuntimeError):
            path.unlink(missing_ok=True)
            path = folder / "episode.gif"
            try:
                with writing(path):
                    iio.imwrite(path, clip, duration=1000 / self.fps, loop=0)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return path


def record_episode(config: TrainConfig, agent: Agent, prior: ActionPrior, run: Path) -> None:
    """Writes a video of one evaluation episode, with the actor's actions and the VLM's priors, into `run`."""
    task = find_task(config.env)
    # In real time, but where decisions are seconds apart.
    fps = max(SLOWEST, task.steps_per_second / config.env.action_repeat)
    video = EpisodeVideo(task.words.action_names, fps=fps)

    def watch(obs: np.ndarray, action: np.ndarray, total: float) -> None:
        stack = torch.from_numpy(obs[None])
        answer = prior(vlm_view(config, stack)).action[0].cpu().numpy()
        video.add(newest_frame(config, stack)[0].numpy(), action, answer, total)

    evaluate(actor_policy(agent, config), config.env, 1, seed=config.eval.seed, watch=watch)
    video.write(run)
