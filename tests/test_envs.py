import numpy as np
import pytest
import torch
from simulators import SIZE, counting_envs

from covr_fast import ReplayBuffer
from covr_fast.envs import EnvConfig, PixelEnvs, make_env
from covr_fast.errors import UserError


def labels(obs: np.ndarray) -> np.ndarray:
    """[n, stack, 3] (environment, episode, step) of every stacked frame."""
    return obs[:, :, 0, 0].reshape(len(obs), -1, 3)


def drive(envs: PixelEnvs, decisions: int):
    obs = envs.reset()
    doing = dict(enumerate(obs))
    for ids in envs.batches():
        envs.send(np.zeros((len(ids), 1)), ids)
    for _ in range(decisions):
        rows = envs.recv()
        yield np.stack([doing[e] for e in rows.env_ids]), rows
        doing.update(zip(rows.env_ids.tolist(), rows.obs, strict=True))
        envs.send(np.zeros((len(rows.env_ids), 1)), rows.env_ids)


def test_reset_rows_are_no_transitions_and_none_is_lost():
    envs, simulators = counting_envs(lengths=(3, 5))
    seen: dict[int, list[tuple[int, int]]] = {e: [] for e in range(4)}
    with envs:
        for obs, rows in drive(envs, 40):
            before, after = labels(obs)[:, -1], labels(rows.next_obs)[:, -1]
            assert (before[:, :2] == after[:, :2]).all(), "a transition crosses an episode"
            assert (after[:, 2] == before[:, 2] + 1).all()
            assert (rows.reward == after[:, 2]).all()
            for e, (_, episode, step) in zip(rows.env_ids, after, strict=True):
                seen[int(e)].append((int(episode), int(step)))
    for steps in seen.values():
        expected = [(k, s + 1) for k in range(20) for s in range((3, 5)[k % 2])]
        assert steps == expected[: len(steps)]
    assert sum(s.ignored_actions for s in simulators) > 0


def test_no_reset_row_is_ever_sampled():
    """Environment, driver, buffer and sample together: what comes out is what happened, n steps apart."""
    envs, _ = counting_envs(lengths=(3, 5), frame_stack=2)
    shapes = {"obs_shape": envs.obs_shape, "action_shape": (1,), "frame_stack": 2}
    buffer = ReplayBuffer(200, num_envs=4, n_step=2, gamma=0.5, seed=0, **shapes)
    with envs:
        for obs, rows in drive(envs, 90):
            action, ends = np.zeros((len(obs), 1)), (rows.terminated, rows.truncated)
            buffer.add(obs, action, rows.reward, rows.next_obs, *ends, env_ids=rows.env_ids)
    batch = buffer.sample(2000, dtype=torch.uint8)
    before, after = (labels(o.numpy())[:, -1].astype(int) for o in (batch.obs, batch.next_obs))
    assert (before[:, :2] == after[:, :2]).all(), "a transition crosses an episode"
    episode, step = before[:, 1], before[:, 2]
    length = np.where(episode % 2 == 0, 3, 5)
    k = np.minimum(2, length - step)
    assert (k > 0).all(), "the end of an episode was sampled as the beginning of a transition"
    assert (after[:, 2] == step + k).all()
    # The step that leads to s is rewarded with s; the second of two counts half.
    np.testing.assert_allclose(batch.reward.numpy(), step + 1 + np.where(k == 2, 0.5 * (step + 2), 0))
    ends = step + k == length
    assert (batch.truncated.numpy() == (ends & (episode % 2 == 0))).all()
    assert (batch.terminated.numpy() == (ends & (episode % 2 == 1))).all()
    # The Bellman target goes on behind a truncation and stops behind a termination.
    np.testing.assert_allclose(batch.discount.numpy(), np.where(ends & (episode % 2 == 1), 0, 0.5**k))


def test_ends_are_told_apart_and_stacks_restart():
    envs, _ = counting_envs(lengths=(3, 5), frame_stack=3)
    with envs:
        for _, rows in drive(envs, 40):
            after, following = labels(rows.next_obs), labels(rows.obs)
            episode = after[:, -1, 1]
            last = after[:, -1, 2] == np.where(episode % 2 == 0, 3, 5)
            assert (rows.truncated == (last & (episode % 2 == 0))).all()
            assert (rows.terminated == (last & (episode % 2 == 1))).all()
            done = rows.truncated | rows.terminated
            # A new episode's stack holds its first frame alone; elsewhere nothing changes.
            assert (following[done, :, 2] == 0).all()
            assert (following[done, :, 1] == episode[done, None] + 1).all()
            assert (rows.obs[~done] == rows.next_obs[~done]).all()


def test_action_repeat_sums_rewards_and_stops_at_the_end_of_an_episode():
    envs, _ = counting_envs(num_envs=2, batch_size=2, lengths=(3,), action_repeat=2)
    with envs:
        steps = [(rows.reward.tolist(), rows.truncated.tolist(), rows.frames) for _, rows in drive(envs, 4)]
    assert steps[0] == ([3.0, 3.0], [False, False], 4)  # rewards 1 + 2
    assert steps[1] == ([3.0, 3.0], [True, True], 2)  # the third frame ends the episode: no fourth
    assert steps[2][0] == [3.0, 3.0]


def test_send_checks_shapes_and_recv_needs_a_send():
    envs, _ = counting_envs()
    with envs:
        envs.reset()
        with pytest.raises(ValueError, match="action has shape"):
            envs.send(np.zeros((2, 3)), np.arange(2))
        with pytest.raises(RuntimeError, match="without a send"):
            envs.recv()


def test_nan_reward_is_an_error_that_names_the_environment():
    envs, simulators = counting_envs(num_envs=2, batch_size=2)
    original = simulators[0].step

    def poisoned(action, env_id):
        frames, reward, *rest = original(action, env_id)
        return frames, np.where(env_id == 1, np.nan, reward), *rest

    simulators[0].step = poisoned
    with envs:
        envs.reset()
        envs.send(np.zeros((2, 1)), np.arange(2))
        with pytest.raises(UserError, match=r"reward that is not finite.*\[1\]"):
            envs.recv()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": "CarRacng-v3"}, "did you mean CarRacing-v3"),
        ({"id": "CartPole-v1"}, "discrete action space"),
        ({"id": "Pendulum-v1"}, "does not give pixels"),
        ({"num_envs": 5, "batch_size": 2}, "not a multiple of env.batch_size=2"),
        ({"frame_stack": 0}, "env.frame_stack=0 must be at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        make_env(EnvConfig(**change))


@pytest.mark.parametrize("grayscale", [False, True])
def test_car_racing(grayscale):
    config = EnvConfig(
        num_envs=4, batch_size=2, height=48, width=40, grayscale=grayscale, max_episode_steps=10
    )
    runs = []
    for _ in range(2):
        with make_env(config) as envs:
            rng = np.random.default_rng(0)
            obs = envs.reset()
            assert obs.shape == (4, 3 if grayscale else 9, 48, 40)
            assert obs.dtype == np.uint8
            assert obs.std() > 10, "a black frame"
            out = [obs]
            for ids in envs.batches():
                envs.send(rng.uniform(-1, 1, (2, 2)), ids)
            truncated = 0
            for _ in range(12):
                rows = envs.recv()
                truncated += rows.truncated.sum()
                out += [rows.next_obs, rows.obs, rows.reward]
                envs.send(rng.uniform(-1, 1, (2, 2)), rows.env_ids)
            # 10 frames at 4 a decision: the third decision is the last of each episode.
            assert truncated == 8
        runs.append(out)
    assert all((a == b).all() for a, b in zip(*runs, strict=True)), "same seed, different run"


def test_frames_keep_their_content_when_resized():
    envs, _ = counting_envs()
    with envs:
        image = np.zeros((1, 2 * SIZE, 2 * SIZE, 3), np.uint8)
        image[:, :SIZE, :, 1] = 200
        small = envs._resize(image)
    assert small.shape == (1, 3, SIZE, SIZE)
    assert (small[0, 1, : SIZE // 2 - 1] == 200).all()
    assert (small[0, 1, SIZE // 2 + 1 :] == 0).all()
    assert (small[0, [0, 2]] == 0).all()
