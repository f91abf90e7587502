"""FineTuneView: the finished trajectories of a buffer, as indices."""

import numpy as np
import pytest
import torch

from covr_fast.buffer import FineTuneView, ReplayBuffer


def make(capacity=1000, num_envs=2) -> ReplayBuffer:
    return ReplayBuffer(capacity, num_envs=num_envs, obs_shape=(1,), action_shape=(), seed=0)


class Script:
    """Adds the given rewards; `ends` is one letter per row: - goes on, T terminated, t truncated."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer
        self.clock = np.zeros(buffer.num_envs, np.float32)

    def add(self, rewards, ends) -> torch.Tensor:
        ends = np.array(list(ends))
        obs = self.clock[:, None].copy()
        self.clock += 1
        return self.buffer.add(
            obs, np.zeros(len(ends)), np.array(rewards), self.clock[:, None].copy(), ends == "T", ends == "t"
        )


def test_only_finished_trajectories_with_their_returns():
    buffer = make()
    view, script = FineTuneView(buffer, gamma=0.5), Script(buffer)
    script.add([1, 10], "--")
    script.add([2, 20], "T-")
    assert (len(view), view.indices.tolist(), view.returns.tolist()) == (2, [0, 2], [2.0, 2.0])
    script.add([4, 40], "-t")
    script.add([8, 80], "--")
    assert view.indices.tolist() == [0, 2, 1, 3, 5]
    assert view.returns.tolist() == [2.0, 2.0, 30.0, 40.0, 40.0]  # no bootstrap after the truncation
    assert view.time_in_episode.tolist() == [0, 1, 0, 1, 2]
    assert view.returns.dtype == torch.float32


def test_clear_keeps_what_is_pending():
    buffer = make()
    view, script = FineTuneView(buffer, gamma=1.0), Script(buffer)
    script.add([1, 1], "--")
    script.add([1, 1], "T-")
    view.clear()
    assert len(view) == 0
    assert view.indices.tolist() == []
    assert view.returns.tolist() == []
    script.add([1, 1], "TT")
    assert view.indices.tolist() == [4, 1, 3, 5]
    assert view.returns.tolist() == [1, 3, 2, 1]


def test_a_cut_finishes_a_trajectory():
    buffer = make(num_envs=1)
    view, script = FineTuneView(buffer, gamma=1.0), Script(buffer)
    script.add([1], "-")
    script.add([1], "-")
    buffer.cut()
    assert view.returns.tolist() == [2, 1]


def test_overwritten_transitions_leave_and_are_counted():
    buffer = make(capacity=5, num_envs=1)
    view, script = FineTuneView(buffer, gamma=1.0), Script(buffer)
    for i in range(8):
        script.add([1], "T" if i in (3, 7) else "-")
    assert view.indices.tolist() == [3, 4, 5, 6, 7]
    assert view.returns.tolist() == [1, 4, 3, 2, 1]
    assert view.overwritten == 3
    view.clear()
    assert (len(view), view.overwritten) == (0, 0)


def test_horizon_needs_no_end():
    buffer = make(num_envs=1)
    view, script = FineTuneView(buffer, gamma=0.5, horizon=3), Script(buffer)
    for i in range(6):
        script.add([2.0**i], "T" if i == 3 else "-")
    assert view.indices.tolist() == [0, 1, 2, 3]
    assert view.returns.tolist() == [3.0, 6.0, 8.0, 8.0]
    script.add([64.0], "-")
    assert view.indices.tolist() == [0, 1, 2, 3, 4]
    assert view.returns.tolist()[-1] == 16 + 16 + 16
    view.clear()
    script.add([128.0], "-")
    assert view.indices.tolist() == [5]
    assert view.returns.tolist() == [32 + 32 + 32]


@pytest.mark.parametrize("horizon", [None, 1, 7])
def test_random_scripts_against_loops(horizon):
    rng = np.random.default_rng(0)
    buffer = make(capacity=40, num_envs=3)
    view, script, gamma = FineTuneView(buffer, 0.9, horizon), Script(buffer), 0.9
    rewards, ends = [], []
    cleared = set()
    for i in range(200):
        rewards.append(rng.standard_normal(3).astype(np.float32))
        ends.append(rng.choice(list("---------Tt"), 3))
        script.add(rewards[-1], ends[-1])
        expected = {}
        for e in range(3):
            for t in range(i + 1):
                total, k = 0.0, 0
                while t + k <= i and (horizon is None or k < horizon):
                    total += gamma**k * rewards[t + k][e]
                    k += 1
                    if ends[t + k - 1][e] != "-":
                        break
                if (ends[t + k - 1][e] != "-" or k == horizon) and t * 3 + e not in cleared:
                    expected[t * 3 + e] = total
        stored = {index for index in expected if buffer.contains([index])}
        assert set(view.indices.tolist()) == stored
        assert len(view) == len(stored)
        lost = {t * 3 + e for t in range(i + 1) for e in range(3)} - cleared
        lost = {index for index in lost if not buffer.contains([index])}
        assert view.overwritten == len(lost)
        np.testing.assert_allclose(
            view.returns, [expected[j] for j in view.indices.tolist()], rtol=1e-4, atol=1e-5
        )
        if rng.random() < 0.05:
            cleared |= expected.keys() | lost
            view.clear()


def test_state_survives():
    buffer = make(num_envs=1)
    view, script = FineTuneView(buffer, gamma=1.0), Script(buffer)
    script.add([1], "T")
    view.clear()
    script.add([1], "T")
    again = FineTuneView(buffer, gamma=1.0)
    assert len(again) == 2
    again.load_state_dict(view.state_dict())
    assert again.indices.tolist() == [1]


def test_argument_errors():
    with pytest.raises(ValueError, match="gamma is 2"):
        FineTuneView(make(), 2)
    with pytest.raises(ValueError, match="horizon is 0"):
        FineTuneView(make(), 0.9, 0)
