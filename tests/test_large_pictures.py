"""Pictures for people: as the simulator draws them, and by a second simulator that goes through the same
episode, while observations stay what they are."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from PIL import Image
from simulators import SIZE, counting_envs

from covr_fast import EnvConfig, TrainConfig, make_env, register_task
from covr_fast.evaluate import evaluate, random_policy
from covr_fast.large_pictures import LargePictures
from covr_fast.tasks import find_task

LARGE = {
    "carracing": (480, 480),
    "racetrack": (480, 480),
    "highway": (252, 756),
    "cartpole-swingup": (480, 480),
    "finger-spin": (480, 480),
    "ball-in-cup-catch": (480, 480),
}
"""Of each preset, the height and width of its large pictures."""


def short(preset: str) -> EnvConfig:
    config = TrainConfig.preset(preset).env
    frames = {"racetrack": 20, "highway": 10}.get(preset, 12 * config.action_repeat)
    return replace(config, num_envs=1, batch_size=1, max_episode_steps=frames)


@pytest.mark.parametrize("preset", LARGE)
def test_the_second_simulator_goes_through_the_same_states(preset):
    config = replace(short(preset), max_episode_steps=300)
    task = find_task(config)
    first, second = task.simulate(7), task.simulate_large(7)
    rng, one, same = np.random.default_rng(0), np.zeros(1, np.int32), []

    def compare(a, b):
        if isinstance(a, dict):
            return all(np.array_equal(a[name], b[name]) for name in a)
        return np.array_equal(a, b)

    same.append(compare(first.reset()[0], second.reset()[0]))
    for _ in range(40):
        action = task.to_sim(rng.uniform(-1, 1, (1, task.action_dim)).astype(np.float32))
        a, b = first.step(action, one), second.step(action, one)
        second.render(one)  # which changes nothing
        same.append(all(map(compare, a[:4], b[:4])))
    first.close()
    second.close()
    assert all(same)


@pytest.mark.parametrize("preset", LARGE)
def test_pictures_are_large_and_observations_stay_as_they_are(preset):
    config, seed = short(preset), 1_000_000
    policy = random_policy(find_task(config).action_dim, 0)
    alone, seen, firsts, larges = [], [], [], []
    evaluate(policy, config, 1, seed=seed, watch=lambda picture, obs, *_: alone.append(obs.copy()))
    policy = random_policy(find_task(config).action_dim, 0)
    with LargePictures(config, seed) as large:

        def watch(picture, obs, action, total):
            seen.append(obs.copy())
            firsts.append(picture)
            larges.append(large.picture(picture, total))
            large.step(action)

        evaluate(policy, config, 1, seed=seed, watch=watch)
    assert np.array_equal(alone, seen)
    assert len(larges) >= 2
    # The highway's lines are as thin in large pictures as in small ones.
    most = 10 if preset == "highway" else 6
    for first, shown in zip(firsts, larges, strict=True):
        assert shown.shape == (*LARGE[preset], 3)
        assert shown.dtype == np.uint8
        if preset == "racetrack":  # the large picture shows more of the road, from the same place
            shown = shown[240 - 56 : 240 + 56, 240 - 56 : 240 + 56]
        if preset == "carracing":  # the first simulator's picture lacks the instruments
            shown = shown[: 480 * 84 // 96]
        small = Image.fromarray(shown).resize(first.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(np.asarray(small, int) - first).mean() < most
    moved = np.abs(larges[0].astype(int) - larges[-1]).mean()
    assert moved > 0.1, "the pictures do not move"


def test_another_episode_is_not_shown():
    """Pictures are the first one's where the second is paid otherwise, or its episode is over."""
    config = short("carracing")
    first = np.full((84, 96, 3), 9, np.uint8)
    with LargePictures(config, 3) as large:
        assert large.picture(first, 0.0).shape == (480, 480, 3)
        large.step(np.zeros(2, np.float32))
        assert large.picture(first, 123.0) is first
        large.step(np.zeros(2, np.float32))
        assert large.picture(first, 0.0) is first
    with LargePictures(replace(config, max_episode_steps=1), 3) as large:
        large.step(np.zeros(2, np.float32))
        assert large.picture(first, large._total) is first


class Coloured(gymnasium.Env):
    """Frames of 30x40 with a red bar as wide as the steps so far; no two episodes are the same."""

    action_space = Box(-1, 1, (1,), np.float32)
    observation_space = Box(0, 255, (30, 40, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.frame(), {}

    def step(self, action):
        self.steps += 1
        return self.frame(), 1.0, False, self.steps == 4, {}

    def frame(self):
        frame = np.full((30, 40, 3), np.random.default_rng().integers(60), np.uint8)
        frame[:, : self.steps] = (200, 10, 20)
        return frame


def test_an_environment_of_one_s_own_is_shown_as_it_draws_itself():
    register_task("Coloured", Coloured, "You control nothing.", ["left/right"])
    config = EnvConfig(
        id="Coloured", num_envs=2, batch_size=2, height=15, width=20, grayscale=True, action_repeat=1
    )
    shown = []
    with LargePictures(config, 0) as large:

        def watch(picture, obs, action, total):
            shown.append((large.picture(picture, total), obs[-1]))
            large.step(action)

        evaluate(random_policy(1, 0), config, 2, seed=0, watch=watch)
    assert len(shown) == 4
    for step, (picture, grey) in enumerate(shown):
        assert picture.shape == (30, 40, 3)
        assert (picture[:, :step] == (200, 10, 20)).all()
        assert len(np.unique(picture[:, step:])) == 1
        assert grey.shape == (15, 20)


def test_pictures_are_those_of_the_newest_observations():
    """In every environment of every batch, over the ends of episodes, before they are resized or grey."""
    config = EnvConfig(num_envs=4, batch_size=2, height=42, width=48, grayscale=True, max_episode_steps=6)
    rng, ends = np.random.default_rng(0), 0
    with make_env(config) as envs:
        newest = dict(enumerate(envs.reset()[:, -1]))
        for _ in range(4):
            for ids in envs.batches():
                envs.send(rng.uniform(-1, 1, (2, 2)), ids[::-1])
            for _ in envs.batches():
                rows = envs.recv()
                newest.update(zip(rows.env_ids.tolist(), rows.obs[:, -1], strict=True))
                ends += rows.truncated.sum()
            for env in range(4):
                picture = envs.picture(env)
                assert picture.shape == (84, 96, 3)
                assert (envs._resize(picture[None])[0, 0] == newest[env]).all()
        pictures = [envs.picture(env) for env in range(4)]
        assert not any((pictures[0] == other).all() for other in pictures[1:])
    assert ends == 8


def test_a_picture_is_not_asked_for_at_the_wrong_time():
    envs, _ = counting_envs()
    with pytest.raises(RuntimeError, match=r"picture\(0\) before reset\(\)"):
        envs.picture(0)
    envs.reset()
    envs.send(np.zeros((2, 1)), np.arange(2))
    with pytest.raises(RuntimeError, match="between"):
        envs.picture(1)
    assert envs.picture(2).shape == (SIZE, SIZE, 3)
    envs.recv()
    envs.picture(1)[:] = 255  # a copy
    assert (envs.picture(1)[0, 0] == (1, 0, 1)).all()
    envs.close()
    with pytest.raises(RuntimeError, match="after close"):
        envs.picture(0)
