import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from simulators import SIZE, counting_envs

from covr_fast import ReplayBuffer
from covr_fast.env_config import EnvConfig
from covr_fast.envs import PixelEnvs, make_env
from covr_fast.errors import UserError
from covr_fast.opengl import import_envpool
from covr_fast.tasks import find_task

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or is how Linux loads OpenGL")


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
    # The Bellman target goes on after a truncation and stops after a termination.
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


@pytest.mark.parametrize(
    "env_ids, message",
    [
        ([1, 2], r"env_ids=\[1, 2\] are not one batch: send one of batches\(\).*\[0, 1\]"),
        ([-2, -1], "are not one batch"),
        ([0, 0], "are not one batch"),
        ([2, 4], "are not one batch"),
        ([2**40, 2**40 + 1], "are not one batch"),
        ([0], "are not one batch"),
        ([], "env_ids has shape"),
        (0, "env_ids has shape"),
        ([[0, 1]], "env_ids has shape"),
        ([0.0, 1.0], "dtype float64, expected integers"),
        ([True, False], "dtype bool, expected integers"),
    ],
)
def test_send_takes_whole_batches_only(env_ids, message):
    envs, simulators = counting_envs()
    with envs:
        envs.reset()
        with pytest.raises(ValueError, match=message):
            envs.send(np.zeros((2, 1)), np.array(env_ids))
        with pytest.raises(RuntimeError, match="without a send"):  # nothing was begun
            envs.recv()
    assert all((s.step_in_episode == 0).all() for s in simulators)


@pytest.mark.parametrize(
    "action, message",
    [
        (np.zeros((2, 3)), "action has shape"),
        (np.zeros(2), "action has shape"),
        (np.zeros((1, 1)), "action has shape"),
        (np.zeros((2, 1), bool), "dtype bool, expected real numbers"),
        (np.zeros((2, 1), complex), "dtype complex128, expected real numbers"),
        (np.array([["0"], ["1"]]), "expected real numbers"),
        (np.array([[0.0], [np.nan]]), r"NaN or infinity for env_ids \[3\]"),
        (np.array([[np.inf], [0.0]], np.float32), r"NaN or infinity for env_ids \[2\]"),
    ],
)
def test_send_refuses_what_is_no_action(action, message):
    envs, simulators = counting_envs()
    with envs:
        envs.reset()
        with pytest.raises(ValueError, match=message):
            envs.send(action, np.array([2, 3]))
    assert all((s.step_in_episode == 0).all() for s in simulators)


def test_actions_beyond_one_count_as_one():
    received = []
    envs, simulators = counting_envs(num_envs=2, batch_size=2)
    step = simulators[0].step
    simulators[0].step = lambda action, env_id: (received.append(action.copy()), step(action, env_id))[1]
    with envs:
        envs.reset()
        envs.send(torch.tensor([[-7], [5]]), torch.tensor([1, 0]))
        assert envs.recv().env_ids.tolist() == [1, 0]
    assert received[0].tolist() == [[-1], [1]]


def test_calls_out_of_order_are_errors_that_leave_the_environments_usable():
    envs, _ = counting_envs()
    first, second = envs.batches()
    action = np.zeros((2, 1))
    with pytest.raises(RuntimeError, match=r"send\(\) before reset\(\)"):
        envs.send(action, first)
    envs.reset()
    envs.reset()
    with pytest.raises(RuntimeError, match="without a send"):
        envs.recv()
    envs.send(action, first)
    envs.send(action, second)
    with pytest.raises(RuntimeError, match=r"env_ids=\[0, 1\] are simulating: recv\(\) them"):
        envs.send(action, first)
    with pytest.raises(RuntimeError, match="while a batch is simulating"):
        envs.reset()
    rows = [envs.recv(), envs.recv()]
    assert [r.env_ids.tolist() for r in rows] == [[0, 1], [2, 3]]
    assert (labels(rows[0].next_obs)[:, -1, 1:] == [1, 1]).all()  # the second episode's first step
    envs.close()
    envs.close()
    for call in (envs.reset, envs.recv, lambda: envs.send(action, first)):
        with pytest.raises(RuntimeError, match=r"after close\(\): make_env\(\)"):
            call()


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
        ({"id": "CartPole-v1"}, r"has discrete actions.*highway-v0 has an adapter \(two numbers\)"),
        ({"id": "Pendulum-v1"}, "does not give pixels"),
        ({"num_envs": 5, "batch_size": 2}, "not a multiple of env.batch_size=2"),
        ({"frame_stack": 0}, "env.frame_stack=0 must be at least 1"),
        ({"height": 84.0}, "env.height is 84.0: it must be an integer"),
        ({"num_envs": "8"}, "env.num_envs is '8': it must be an integer"),
        ({"seed": -1}, "env.seed=-1 must be at least 0"),
        ({"seed": 2**31 - 8}, f"env.seed={2**31 - 8} leaves no 32-bit seeds for 16 .* at most {2**31 - 16}"),
        ({"id": "LqrLqr21-v1"}, "have no bounds"),
        ({"id": "VizdoomCustom-v1"}, "cannot be built .*: choose CarRacing-v3"),
        ({"id": "Basic-v1"}, "does not give pixels for continuous actions"),  # VizDoom's buttons
        ({"id": "racetrack-oval-v0"}, "does not give pixels for continuous actions"),
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


@pytest.mark.parametrize(
    "env_id, camera, size, repeat",
    [
        ("CheetahRun-v1", 0, (84, 84), 4),
        ("CartpoleSwingup-v1", 0, (60, 100), 3),
        ("QuadrupedWalk-v1", 2, (64, 64), 2),
    ],
)
def test_dm_control_shows_what_its_camera_sees_after_every_decision(env_id, camera, size, repeat):
    """Against EnvPool's own way, which draws every repeated frame: the same pictures, rewards and ends."""
    config = EnvConfig(
        id=env_id, num_envs=4, batch_size=2, height=size[0], width=size[1], frame_stack=2,
        action_repeat=repeat, max_episode_steps=5, seed=3,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with make_env(config) as envs:
        truth = [
            import_envpool().make_gymnasium(
                env_id, num_envs=2, seed=3 + first, max_episode_steps=5, from_pixels=True, frame_stack=1,
                render_height=size[0], render_width=size[1], render_camera_id=camera,
            )
            for first in (0, 2)
        ]  # fmt: skip
        low, high = truth[0].action_space.low, truth[0].action_space.high
        newest = np.concatenate([t.reset()[0] for t in truth])
        assert np.array_equal(envs.reset(), np.tile(newest, (1, 2, 1, 1)))
        ended = 0
        for decision in range(5):
            actions = rng.uniform(-1, 1, (4, *envs.action_shape)).astype(np.float32)
            for ids in envs.batches():
                envs.send(actions[ids], ids)
            for first in (0, 2):
                rows = envs.recv()
                assert rows.env_ids.tolist() == [first, first + 1]
                reward, ends = np.zeros(2, np.float32), np.zeros(2, bool)
                action = (low + (actions[first : first + 2] + 1) * 0.5 * (high - low)).astype(np.float32)
                for _ in range(repeat):
                    frame, r, terminated, truncated, _ = truth[first // 2].step(action)
                    reward += r
                    ends = terminated | truncated
                    if ends.any():
                        break
                assert np.array_equal(rows.next_obs[:, -3:], frame), f"decision {decision}"
                assert np.array_equal(rows.reward, reward)
                assert np.array_equal(rows.truncated, ends)
                assert not rows.terminated.any()
                if ends.all():
                    frame, *_ = truth[first // 2].step(action)
                    assert np.array_equal(rows.obs, np.tile(frame, (1, 2, 1, 1)))
                    ended += 1
        assert ended >= 2


def test_every_dm_control_task_has_bounded_actions_and_a_camera(monkeypatch):
    monkeypatch.setattr("covr_fast.tasks._envpool_simulator", lambda config, seed, **options: options)
    monkeypatch.setattr("covr_fast.tasks.BallInCup", lambda simulator: simulator)
    envpool = import_envpool()
    tasks = [k for k, (module, *_) in envpool.registration.registry.specs.items() if module.endswith(".dmc")]
    assert len(tasks) == 51
    for env_id in (task for task in tasks if not task.startswith("Lqr")):
        spec = envpool.make_spec(env_id)
        task = find_task(EnvConfig(id=env_id, height=20, width=30))
        corners = task.to_sim(np.array([[-1.0], [1.0]]).repeat(task.action_dim, 1))
        assert np.allclose(corners, [spec.action_space.low, spec.action_space.high])
        options = task.simulate(0)
        assert (options["render_height"], options["render_width"]) == (20, 30)
        assert options["render_camera_id"] >= 0  # EnvPool's default, -1, looks from far away


def run_python(code: str, **environment: str) -> str:
    """What the code prints in a process of its own, which has to end well."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


CLOSE_AND_MEASURE = """
import os
import numpy as np
from covr_fast import EnvConfig, make_env

def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 10**6

for _ in range(3):
    with make_env(EnvConfig(id="PendulumSwingup-v1", num_envs=6, batch_size=6)) as envs:
        envs.reset()
        (ids,) = envs.batches()
        envs.send(np.zeros((6, 1)), ids)  # drawn by a thread of its own
        envs.recv()
        used = megabytes()
    print(used, megabytes())
"""


def test_one_thread_draws_at_a_time():
    drawing = threading.Semaphore(1)
    envs = make_env(EnvConfig(id="CartpoleSwingup-v1", num_envs=3, batch_size=1, height=16, width=16))

    def alone(draw, rows):
        assert drawing.acquire(blocking=False), "two threads draw at the same time"
        time.sleep(0.02)
        frames = draw(rows)
        drawing.release()
        return frames

    for simulator in envs._simulators:
        simulator.render = partial(alone, simulator.render)
    with envs:
        envs.reset()
        for _ in range(3):
            for ids in envs.batches():
                envs.send(np.zeros((1, 1)), ids)
            for _ in envs.batches():
                envs.recv()


@on_linux
def test_closed_environments_give_their_opengl_memory_back():
    rounds = [[int(n) for n in line.split()] for line in run_python(CLOSE_AND_MEASURE).splitlines()]
    for used, closed in rounds:
        assert closed < used - 150
    assert rounds[-1][0] < rounds[0][0] + 150


MAKE_DM_CONTROL = """
from covr_fast.env_config import EnvConfig
from covr_fast.envs import make_env
from covr_fast.errors import UserError
try:
    make_env(EnvConfig(id="CartpoleSwingup-v1"))
except UserError as error:
    print(error)
"""


@on_linux
def test_without_opengl_dm_control_is_refused_before_it_ends_the_process(tmp_path):
    (tmp_path / "libEGL.so.1").touch()  # found first, and cannot be loaded
    said = run_python(MAKE_DM_CONTROL, LD_LIBRARY_PATH=str(tmp_path))
    assert "DMControl cannot draw its frames here" in said
    assert "apt install libegl1" in said


@on_linux
def test_without_a_driver_dm_control_is_refused(tmp_path):
    said = run_python(MAKE_DM_CONTROL, __EGL_VENDOR_LIBRARY_FILENAMES=str(tmp_path / "none.json"))
    assert "failed to initialize EGL: apt install libegl1" in said


@on_linux
def test_an_envpool_imported_too_early_is_an_error_that_says_so():
    said = run_python(f"import envpool\n{MAKE_DM_CONTROL}")
    assert "call covr_fast.make_env before `import envpool`" in said


def test_simulators_are_closed_if_one_of_them_cannot_be_built(monkeypatch):
    made, closed = [], []

    class Simulator:
        def close(self):
            closed.append(self)

    def simulate(seed):
        if made:
            raise UserError("no second simulator")
        made.append(Simulator())
        return made[0]

    task = replace(find_task(EnvConfig()), simulate=simulate)
    monkeypatch.setattr("covr_fast.envs.find_task", lambda config: task)
    with pytest.raises(UserError, match="no second simulator"):
        make_env(EnvConfig(num_envs=4, batch_size=2))
    assert closed == made
