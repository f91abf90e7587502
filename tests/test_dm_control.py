"""DMControl's tasks as the field has them: DeepMind's rewards, time limit and action repeats."""

from typing import Any

import numpy as np
import pytest

from covr_fast import EnvConfig, ReplayBuffer, TrainConfig, make_env
from covr_fast.dm_control import ball_in_target, models_without_tip
from covr_fast.opengl import import_envpool
from covr_fast.tasks import find_task

ACTION_REPEATS = {
    "cartpole-swingup": 8, "reacher-easy": 4, "cheetah-run": 4, "walker-walk": 2, "finger-spin": 2,
    "ball-in-cup-catch": 4, "hopper-hop": 4, "walker-run": 2, "pendulum-swingup": 4,
}  # fmt: skip
"""Those of CURL and RAD: 8 for cartpole, 2 for finger and walker, else 4. The last three go by this rule."""


def simulator(env_id: str, seed: int, num_envs: int = 1) -> tuple[Any, int]:
    """A simulator of covr_fast, and the number of its actions."""
    task = find_task(EnvConfig(id=env_id, num_envs=num_envs, batch_size=num_envs))
    return task.simulate(seed), task.action_dim


@pytest.mark.parametrize("name", ACTION_REPEATS)
def test_a_preset_s_episode_is_1000_frames_of_rewards_in_0_to_1_and_is_cut_off(name):
    env = TrainConfig.preset(name).env
    assert env.action_repeat == ACTION_REPEATS[name]
    assert env.max_episode_steps % env.action_repeat == 0
    sim, actions = simulator(env.id, seed=5)
    sim.reset()
    rng, one = np.random.default_rng(0), np.zeros(1, np.int32)
    for frame in range(1, 1001):
        action = rng.uniform(-1, 1, (1, actions)).astype(np.float32)
        _, reward, terminated, truncated, _ = sim.step(action, one)
        assert 0 <= reward.item() <= 1
        assert not terminated.item()
        assert truncated.item() == (frame == 1000)
    sim.close()


@pytest.mark.parametrize(
    "env_id, seed, repeat, decisions, row, paid",
    [
        ("CartpoleSwingup-v1", 0, 8, 50, None, 45.960057),
        ("ReacherEasy-v1", 0, 4, 50, None, 61),
        ("CheetahRun-v1", 0, 4, 50, None, 0.85646202),
        ("WalkerWalk-v1", 0, 2, 50, None, 9.7372670),
        ("WalkerRun-v1", 0, 2, 50, None, 4.3889367),
        ("HopperHop-v1", 40, 4, 100, 40, 0.29855177),
        ("PendulumSwingup-v1", 43, 4, 150, 43, 16),
        ("BallInCupCatch-v1", 56, 4, 150, 56, 91),  # EnvPool pays 133
    ],
)
def test_rewards_are_deepmind_s(env_id, seed, repeat, decisions, row, paid):
    """`paid` is what dm_control 1.0.38 with MuJoCo 3.6.0 paid from the same state for the same actions."""
    sim, actions = simulator(env_id, seed)
    sim.reset()
    rng, one, total = np.random.default_rng(0), np.zeros(1, np.int32), 0.0
    for _ in range(decisions):
        if row is None:
            action = rng.uniform(-1, 1, actions)
        else:
            action = np.clip(rng.normal(0, 2, (64, actions)), -1, 1)[row]
        for _ in range(repeat):
            total += sim.step(action[None].astype(np.float32), one)[1].item()
    sim.close()
    assert total == pytest.approx(paid, rel=1e-5)


def test_the_finger_is_paid_while_it_spins_the_body_at_15_radians_a_second():
    """As Spin.get_reward of dm_control's finger.py."""
    sim, actions = simulator("FingerSpin-v1", 0, num_envs=8)
    sim.reset()
    rng, ids, paid = np.random.default_rng(0), np.arange(8, dtype=np.int32), 0
    for _ in range(600):
        observation, reward, *_ = sim.step(rng.choice([-1, 1], (8, actions)).astype(np.float32), ids)
        assert (reward == (observation["velocity"][:, 2] <= -15)).all()
        paid += int(reward.sum())
    sim.close()
    assert paid > 0


def test_the_spinner_s_tip_is_hidden_and_nothing_else_changes():
    options = {"render_mode": "rgb_array", "render_width": 100, "render_height": 100, "render_camera_id": 0}
    (shown,) = pictures(import_envpool().make_gymnasium("FingerSpin-v1", num_envs=1, seed=48, **options))
    task = find_task(EnvConfig(id="FingerSpin-v1", num_envs=1, batch_size=1, height=100, width=100))
    (hidden,) = pictures(task.simulate(48))
    turquoise = (shown[..., 1] > 120) & (shown[..., 0] < 40)
    assert 5 < turquoise.sum() < 40
    assert not ((hidden[..., 1] > 120) & (hidden[..., 0] < 40)).any()
    changed = (shown != hidden).any(-1)
    assert changed[turquoise].all()
    assert changed.sum() < 60  # the rest is the tip's edge and its shadow


def pictures(sim: Any) -> np.ndarray:
    """uint8[n, H, W, 3] after a reset."""
    sim.reset()
    frames: np.ndarray = sim.render(np.zeros(1, np.int32)).copy()
    sim.close()
    return frames


def test_the_changed_models_are_gone_once_they_are_read(tmp_path):
    assets = tmp_path / "mujoco" / "assets_dmc"
    assets.mkdir(parents=True)
    (assets / "finger.xml").write_text('<site name="tip" type="sphere"/>')
    (assets / "walker.xml").write_text("walker")
    with models_without_tip(str(tmp_path)) as folder:
        changed = type(tmp_path)(folder, "mujoco", "assets_dmc")
        assert (changed / "walker.xml").read_text() == "walker"
        assert (changed / "finger.xml").read_text() == '<site name="tip" rgba=".5 .5 .5 0" type="sphere"/>'
    assert not changed.exists()


def test_the_ball_has_to_be_in_the_cup_whole():
    ball = np.array(
        [[0, 0, x, z] for x, z in [(0, 0.35), (0.024, 0.35), (0.026, 0.35), (0, 0.374), (0, 0.376)]]
    )
    assert ball_in_target(ball).tolist() == [True, True, False, True, False]
    moved = ball + np.array([0.3, -0.2, 0.3, -0.2])
    assert ball_in_target(moved).tolist() == [True, True, False, True, False]


def test_an_episode_of_cartpole_is_drawn_once_a_decision_and_its_end_has_a_future():
    """125 decisions of 8 frames; the last one's state is worth gamma times its value."""
    config = TrainConfig.preset("cartpole-swingup").env
    config.num_envs = config.batch_size = 1
    config.height = config.width = 16
    drawn = []
    with make_env(config) as envs:
        (sim,) = envs._simulators
        draw = sim.render
        sim.render = lambda rows: (drawn.append(len(rows)), draw(rows))[1]
        shapes = {"obs_shape": envs.obs_shape, "action_shape": envs.action_shape, "frame_stack": 3}
        buffer = ReplayBuffer(200, num_envs=1, gamma=0.99, seed=0, **shapes)
        obs, rng, ends, returned = envs.reset(), np.random.default_rng(0), [], 0.0
        for _ in range(126):
            action = rng.uniform(-1, 1, (1, 1))
            envs.send(action, np.array([0]))
            rows = envs.recv()
            buffer.add(obs, action, rows.reward, rows.next_obs, rows.terminated, rows.truncated)
            obs = rows.obs
            ends.append(rows.truncated.item())
            returned += rows.reward.item()
            assert rows.frames == 8
            assert 0 <= rows.reward.item() <= 8
    assert [t for t, end in enumerate(ends) if end] == [124]
    assert len(drawn) == 1 + 126 + 1  # two first frames, and one a decision
    assert 0 < returned < 1000
    batch = buffer.sample(1000)
    assert batch.truncated.any()
    assert not batch.terminated.any()
    assert np.allclose(batch.discount.numpy(), 0.99)
