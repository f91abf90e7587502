"""Where EnvPool's DMControl differs from DeepMind's, and what makes both the same.

EnvPool 1.2.5 has the tasks of dm_control 1.0.38 (Tunyasuvunakool et al. 2020) with MuJoCo 3.6.0 in C++. Both
were stepped side by side through the tasks of the presets, from the same states with the same actions. Two
differences were found, each a wrong index into a table of the model:

- Ball in Cup pays while the ball is anywhere inside the rim of the cup: EnvPool takes the radius of a part of
  the cup (8 mm) for that of the ball (25 mm). Random actions were paid 133 where DeepMind pays 91.
- Finger Spin shows the tip of the spinner as a turquoise ball, which DeepMind hides.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_TARGET_ABOVE_BALL = 0.35  # metres, where all positions are 0: the target's height 0.55, the ball's 0.2
_ROOM = 0.05 - 0.025  # half the target's width and height, less the ball's radius


class BallInCup:
    """A simulator of EnvPool's Ball in Cup with DeepMind's reward; the rest is EnvPool's."""

    def __init__(self, simulator: Any):
        self._simulator = simulator
        self.reset, self.render, self.close = simulator.reset, simulator.render, simulator.close

    def step(self, action: np.ndarray, env_id: np.ndarray) -> tuple[Any, ...]:
        """As EnvPool's. The row that only resets has no reward."""
        observation, reward, terminated, truncated, info = self._simulator.step(action, env_id)
        started = info["elapsed_step"] == 0
        reward = np.where(started, reward, ball_in_target(observation["position"]))
        return observation, reward.astype(np.float32), terminated, truncated, info


def ball_in_target(position: np.ndarray) -> np.ndarray:
    """Whether the whole ball is inside the cup's target, a square of 10 cm.

    Args:
        position: float64[n, 4], Ball in Cup's observation: x and z of the cup, x and z of the ball.

    Returns:
        bool[n]. As `Physics.in_target` of dm_control's ball_in_cup.py.
    """
    cup, ball = position[:, :2], position[:, 2:]
    return np.asarray((np.abs(cup - ball + [0, _TARGET_ABOVE_BALL]) < _ROOM).all(1))


@contextlib.contextmanager
def models_without_tip(base_path: str) -> Iterator[str]:
    """A folder like EnvPool's `base_path`, in which the finger's spinner has an invisible tip.

    EnvPool reads it while it builds an environment. It means to hide the tip at each reset, as DeepMind does,
    but writes the 0 to the tip's red instead of its opacity.
    """
    models = Path(base_path, "mujoco", "assets_dmc")
    with tempfile.TemporaryDirectory(prefix="covr-models-") as folder:
        changed = Path(folder, "mujoco", "assets_dmc")
        changed.mkdir(parents=True)
        for each in models.iterdir():
            if each.name != "finger.xml":
                (changed / each.name).symlink_to(each)
        finger = (models / "finger.xml").read_text()
        shown = '<site name="tip" '
        (changed / "finger.xml").write_text(finger.replace(shown, f'{shown}rgba=".5 .5 .5 0" '))
        yield folder
