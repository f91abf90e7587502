"""Draws what environments show: one row per environment, several moments of random actions.

    python docs/make_contact_sheet.py docs/environments.png cartpole-swingup walker-walk CarRacing-v3

takes presets' names and environments' ids.
"""

import argparse
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from covr_fast import EnvConfig, TrainConfig, make_env
from covr_fast.presets import PRESETS

MOMENTS = (0, 7, 14, 21, 28, 35)
"""Decisions before each picture of a row."""
HELD = 5
"""Decisions for which a random action is held, so that something happens."""
TILE, WORDS, GAP = 100, 170, 4
"""Pixels: a picture's side, the width of a row's title, and what is between pictures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the PNG to write")
    parser.add_argument("environment", nargs="+", help="a preset or the id of an environment")
    arguments = parser.parse_args()
    height = TILE + GAP
    sheet = Image.new("RGB", (WORDS + len(MOMENTS) * height, len(arguments.environment) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, name in enumerate(arguments.environment):
        config = settings(name)
        title = f"{name}\n\naction repeat {config.action_repeat}\n{config.height} x {config.width}"
        draw.text((GAP, row * height + 16), title, "black", font)
        for column, frame in enumerate(moments(config)):
            picture = ImageOps.contain(Image.fromarray(frame), (TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(picture, (WORDS + column * height, row * height))
    sheet.save(arguments.file)


def settings(name: str) -> EnvConfig:
    """One environment of a preset, or of an id with the defaults, in colour."""
    config = TrainConfig.preset(name).env if name in PRESETS else EnvConfig(id=name)
    return replace(config, num_envs=1, batch_size=1, frame_stack=1, grayscale=False)


def moments(config: EnvConfig) -> list[np.ndarray]:
    """uint8[height, width, 3] after each of MOMENTS."""
    rng, frames, (env,) = np.random.default_rng(1), [], np.arange(1)
    with make_env(config) as envs:
        obs = envs.reset()
        for decision in range(MOMENTS[-1] + 1):
            if decision in MOMENTS:
                frames.append(obs[0].transpose(1, 2, 0))
            if decision % HELD == 0:
                action = rng.uniform(-1, 1, (1, *envs.action_shape))
            envs.send(action, np.array([env]))
            obs = envs.recv().obs
    return frames


if __name__ == "__main__":
    main()
