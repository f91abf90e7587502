"""A user's environments, single or as vector environments in each autoreset mode: what reaches the replay
buffer is to the transition what happened in the environments, and the same in all of them."""

import numpy as np
import pytest
import torch
from counting_gymnasium import (
    ACTIONS,
    FRAMES,
    SIZE,
    Counting,
    ThirdParty,
    Transition,
    act,
    expected,
    vectors,
)
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from covr_fast import GymEnv, ReplayBuffer, make_env
from covr_fast.collect import Collector
from covr_fast.envs import PixelEnvs
from covr_fast.errors import UserError
from covr_fast.evaluate import evaluate

MODES = ("NextStep", "SameStep", "Disabled")
LONGEST = 6
"""Shorter than some episodes."""
NUM_ENVS, BATCH, STACK = 6, 3, 2


def settings(make, repeat: int = 1, longest: int = LONGEST, **changes) -> GymEnv:
    form = {"height": SIZE, "width": SIZE, "frame_stack": STACK, "num_envs": NUM_ENVS, "batch_size": BATCH}
    return GymEnv(make=make, action_repeat=repeat, max_episode_steps=longest, **(form | changes))


def labels(obs: np.ndarray) -> np.ndarray:
    """[n, stack, 3] (environment, episode, step) of every stacked frame."""
    return np.asarray(obs)[:, :, 0, 0].reshape(len(obs), -1, 3).astype(int)


def policy(obs: np.ndarray) -> np.ndarray:
    return np.array([[act(*label[-1])] for label in labels(obs)], np.float32)


def play(envs: PixelEnvs, turns: int) -> tuple[ReplayBuffer, list[int]]:
    """The replay buffer after so many turns of each batch, with the numbers of rows that turns gave."""
    buffer = ReplayBuffer(
        2000, num_envs=NUM_ENVS, obs_shape=envs.obs_shape, action_shape=(1,), frame_stack=STACK, seed=0,
        extras={"prior": (1,), "prior_mask": (), "prior_version": ((), torch.int64)},
    )  # fmt: skip
    collector, obs, sizes = Collector(envs, buffer), envs.reset(), []
    for ids in envs.batches():
        collector.send(obs[ids], policy(obs[ids]), ids)
    for _ in range(turns * len(envs.batches())):
        rows = envs.recv()
        collector.store(rows)
        collector.send(rows.obs, policy(rows.obs), rows.env_ids)
        sizes.append(len(rows.env_ids))
    return buffer, sizes


def stored(buffer: ReplayBuffer, env: int) -> list[Transition]:
    """All transitions of an environment that the buffer holds, in their order."""
    ids = torch.arange(env, 2000, NUM_ENVS)
    ids = ids[buffer.contains(ids)]
    batch = buffer.get(ids, n_step=1, dtype=torch.uint8)
    columns = (
        [tuple(map(tuple, stack)) for stack in labels(batch.obs.numpy()).tolist()],
        batch.action[:, 0].tolist(),
        batch.reward.tolist(),
        [tuple(map(tuple, stack)) for stack in labels(batch.next_obs.numpy()).tolist()],
        batch.terminated.tolist(),
        batch.truncated.tolist(),
    )
    return [Transition(*row) for row in zip(*columns, strict=True)]


KINDS = {
    "single": Counting,
    "single, rendered": lambda: Counting(rendered=True),
    **{mode: vectors(mode) for mode in MODES},
    **{f"{mode}, rendered": vectors(mode, rendered=True) for mode in ("NextStep", "Disabled")},
    **{f"{mode}, arrays used again": vectors(mode, copy=False) for mode in MODES},
    **{f"{mode}, in processes": vectors(mode, parallel=True) for mode in MODES},
}


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_buffer_holds_exactly_what_happened(kind, repeat):
    with make_env(settings(KINDS[kind], repeat)) as envs:
        buffer, sizes = play(envs, 60)
    check_all(buffer, repeat, LONGEST)
    lockstep = kind.startswith("single") or (repeat == 1 and not kind.startswith("NextStep"))
    assert (set(sizes) == {BATCH}) == lockstep


@pytest.mark.parametrize("repeat", [1, 3])
def test_so_it_does_with_a_vector_environment_of_another_library(repeat):
    with make_env(settings(ThirdParty, repeat, longest=99)) as envs:
        buffer, _ = play(envs, 60)
    check_all(buffer, repeat, 99)


def check_all(buffer: ReplayBuffer, repeat: int, longest: int) -> None:
    ends = set()
    for env in range(NUM_ENVS):
        ours = stored(buffer, env)
        assert len(ours) >= 20
        assert ours == expected(env, len(ours), stack=STACK, repeat=repeat, longest=longest)
        ends |= {(t.terminated, t.truncated, t.next_obs[-1][2] == longest) for t in ours}
    assert {(True, False, False), (False, True, False)} <= ends
    assert longest > 7 or (False, True, True) in ends, "no episode was cut off"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("repeat", [1, 3])
def test_evaluations_give_the_same_returns(mode, repeat):
    truth = evaluate(policy, settings(Counting, repeat), 5, seed=3).returns
    assert len(set(truth)) == 5
    shown = []
    watch = lambda picture, obs, action, total: shown.append(picture[0, 0].tolist())  # noqa: E731
    ours = evaluate(policy, settings(vectors(mode), repeat), 5, seed=3, watch=watch).returns
    assert ours.tolist() == truth.tolist()
    assert shown == [[3, 0, step] for step in range(0, min(LONGEST, 3), repeat)]


def test_rows_that_wait_are_sent_and_a_second_reset_begins_anew():
    with make_env(settings(vectors("NextStep"), 3)) as envs:
        obs = envs.reset()
        assert labels(obs)[:, -1].tolist() == [[env, 0, 0] for env in range(NUM_ENVS)]
        envs.send(policy(obs[:BATCH]), np.arange(BATCH))
        rows = envs.recv()  # its episode of one step ended, and the next step was its reset
        assert (rows.env_ids.tolist(), rows.frames, labels(rows.obs)[0, -1].tolist()) == ([0], 5, [0, 1, 0])
        with pytest.raises(
            ValueError, match=r"are not one batch: .*\[0\], or the env_ids that recv\(\) gave"
        ):
            envs.send(policy(obs[:BATCH]), np.arange(BATCH))
        obs = envs.reset()
        assert labels(obs)[:, -1].tolist() == [[0, 2, 0], *([env, 1, 0] for env in range(1, NUM_ENVS))]
        envs.send(policy(obs[:BATCH]), np.arange(BATCH))
        assert envs.recv().env_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, "NextStep", "NEXT_STEP"])
def test_an_autoreset_mode_may_be_named(mode):
    def make(num_envs):
        envs = SyncVectorEnv([Counting] * num_envs)
        envs.metadata = {"autoreset_mode": mode}
        return envs

    with make_env(settings(make)) as envs:
        check_all(play(envs, 60)[0], 1, LONGEST)


def test_episodes_that_nobody_can_cut_off_are_an_error():
    envs = make_env(settings(ThirdParty, longest=5))
    with (
        envs,
        pytest.raises(UserError, match=r"environment .*:ThirdParty has not ended .*=5 steps, and cannot"),
    ):
        play(envs, 60)


def another(
    mode="NextStep", *, observations=FRAMES, actions=ACTIONS, rendered=False, metadata=None, sizes=None
):
    class Another(Counting):
        action_space = actions

        def __init__(self):
            super().__init__(rendered)
            self.observation_space = observations

        def observation(self):
            return np.zeros(observations.shape, observations.dtype)

    def make(num_envs):
        envs = SyncVectorEnv([Another] * (sizes or num_envs), autoreset_mode=mode)
        envs.metadata = envs.metadata if metadata is None else metadata
        return envs

    return make


@pytest.mark.parametrize(
    "make, message",
    [
        (another(metadata={}), r"metadata\['autoreset_mode'\] is None: it must be one of gymnasium.vector"),
        (another("SameStep", observations=Box(0, 1, (3,)), rendered=True), "last frame cannot be rendered"),
        (another(observations=Box(0, 255, (8, 8, 4), np.uint8)), r"\(8, 8, 4\).*uint8 observations \[H, W"),
        (another(observations=Box(0, 1, (3,))), "without frames: .*render_mode='rgb_array'"),
        (another(actions=Box(-1, np.inf, (1,))), "give its Box finite low and high"),
        (another(sizes=2), "makes 2 environments: it was asked for 1"),
        (lambda: SyncVectorEnv([Counting]), r"it must take their number: make\(num_envs\)"),
        (lambda num_envs: Counting(), "takes an argument, and makes a Counting: .* without any one"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(make, message):
    with pytest.raises(UserError, match=rf"^GymEnv: make\(\) .*{message}"):
        make_env(settings(make))


def test_last_observations_that_are_missing_are_an_error():
    class Forgetful(SyncVectorEnv):
        def step(self, actions):
            *result, _ = super().step(actions)
            return *result, {}

    envs = make_env(settings(lambda n: Forgetful([Counting] * n, autoreset_mode="SameStep")))
    with envs, pytest.raises(UserError, match="infos hold no 'final_obs': add the last observations"):
        play(envs, 60)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda o, r, t, u, i: (o, None, t, u, i), "returned the reward None: it must be 3 numbers, one for"),
        (lambda o, r, t, u, i: (o, r[:2], t, u, i), r"returned the reward array\(.*: it must be 3 numbers"),
        (lambda o, r, t, u, i: (o, r, t[:, None], u, i), r"of shape \(3, 1\): they must be bool \(3,\)"),
        (lambda o, r, t, u, i: (o[:, 1:], r, t, u, i), r"uint8 \(3, 7, 8, 3\), and its observation space"),
        (lambda o, r, t, u, i: (o / 255, r, t, u, i), r"float64 \(3, 8, 8, 3\), and its observation space"),
    ],
)  # fmt: skip
def test_steps_that_return_something_else_are_an_error(change, said):
    class Other(SyncVectorEnv):
        def step(self, actions):
            return change(*super().step(actions))

    envs = make_env(settings(lambda n: Other([Counting] * n)))
    with envs, pytest.raises(UserError, match=rf"^environment [^ ]*:.*{said}"):
        play(envs, 60)


def test_last_observations_of_another_shape_are_an_error():
    class Narrow(SyncVectorEnv):
        def step(self, actions):
            *result, infos = super().step(actions)
            if "final_obs" in infos:
                infos["final_obs"] = [None if each is None else each[1:] for each in infos["final_obs"]]
            return *result, infos

    envs = make_env(settings(lambda n: Narrow([Counting] * n, autoreset_mode="SameStep")))
    with envs, pytest.raises(UserError, match=r"uint8 \(7, 8, 3\), and its observation space uint8 \(8, 8"):
        play(envs, 60)


def test_rendered_frames_that_change_their_shape_are_an_error():
    class Growing(SyncVectorEnv):
        size = 3

        def render(self):
            self.size += 1
            return [np.zeros((self.size, 8, 3), np.uint8)] * self.num_envs

    def make(num_envs):
        return Growing([lambda: Counting(rendered=True)] * num_envs)

    with make_env(settings(make)) as envs, pytest.raises(UserError, match=r"render\(\) gave frames \(3, "):
        play(envs, 60)
