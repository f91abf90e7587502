"""FineTuneView: the finished trajectories of a buffer, as indices."""

from functools import partial

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
    assert view.episodes.tolist() == [0, 0, 1, 1, 1]
    assert view.episodes.dtype == torch.int64
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
    script.add([1], "T")
    assert view.episodes.tolist() == [0, 0, 2]


def test_overwritten_transitions_leave_and_are_counted():
    buffer = make(capacity=5, num_envs=1)
    view, script = FineTuneView(buffer, gamma=1.0), Script(buffer)
    for i in range(8):
        script.add([1], "T" if i in (3, 7) else "-")
    assert view.indices.tolist() == [3, 4, 5, 6, 7]
    assert view.returns.tolist() == [1, 4, 3, 2, 1]
    assert view.episodes.tolist() == [0, 4, 4, 4, 4]
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
    assert view.episodes.tolist() == [4]  # as that of step 4, which the round before had
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
        for index, episode in zip(view.indices.tolist(), view.episodes.tolist(), strict=True):
            first, e = divmod(index, 3)
            while first > 0 and ends[first - 1][e] == "-":
                first -= 1
            assert episode == first * 3 + e
        lost = {t * 3 + e for t in range(i + 1) for e in range(3)} - cleared
        lost = {index for index in lost if not buffer.contains([index])}
        assert view.overwritten == len(lost)
        np.testing.assert_allclose(
            view.returns, [expected[j] for j in view.indices.tolist()], rtol=1e-4, atol=1e-5
        )
        if rng.random() < 0.05:
            cleared |= expected.keys() | lost
            view.clear()


@pytest.mark.parametrize("horizon", [None, 2])
def test_values_follow_what_was_truncated_or_cut(horizon):
    buffer = make(num_envs=3)
    asked = []

    def values(ids: torch.Tensor) -> torch.Tensor:
        asked.append(ids.tolist())
        return (100.0 * ids).requires_grad_()

    view, script = FineTuneView(buffer, 0.5, horizon, values), Script(buffer)
    script.add([1, 1, 1], "---")
    script.add([2, 2, 2], "Tt-")
    script.add([4, 4, 4], "---")
    buffer.cut([2])
    returns = view.returns
    assert asked == [[4, 8]]  # the truncated one and the cut one, in one call
    assert not returns.requires_grad
    # Environment 0 terminated; 1 was truncated with its step 1 (id 4), and 2 was cut after its step 2 (id 8).
    cut = [1 + 1 + 1 + 100, 2 + 2 + 200, 4 + 400] if horizon is None else [1 + 1, 2 + 2 + 200, 4 + 400]
    assert view.indices.tolist() == [0, 3, 1, 4, 2, 5, 8]
    assert returns.tolist() == [2, 2, 1 + 1 + 100, 2 + 200, *cut]


def test_no_environment_sees_the_rewards_of_the_next():
    """All are one column of the operation, also where the last step is not the end of an episode."""
    buffer = make(num_envs=2)
    view, script = FineTuneView(buffer, gamma=1.0, horizon=2), Script(buffer)
    for _ in range(3):
        script.add([1, 1000], "--")
    assert view.indices.tolist() == [0, 2, 1, 3]
    assert view.returns.tolist() == [2, 2, 2000, 2000]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("horizon", [None, 7])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_on_a_gpu_the_returns_are_there_and_the_host_does_not_wait(horizon, bootstrap):
    returns = {}
    for device in ("cpu", "cuda"):
        buffer = ReplayBuffer(999, num_envs=3, obs_shape=(1,), action_shape=(), seed=0, device=device)
        rng, script = np.random.default_rng(0), Script(buffer)
        for _ in range(200):
            script.add(rng.standard_normal(3).astype(np.float32), rng.choice(list("-----------Tt"), 3))
        values = partial(torch.narrow, torch.arange(1000.0, device=device), 0, 0)
        view = FineTuneView(buffer, 0.9, horizon, (lambda ids, f=values: f(len(ids))) if bootstrap else None)
        if device == "cuda":
            view.returns  # noqa: B018 - the first call allocates
            torch.cuda.set_sync_debug_mode("error")
        try:
            returns[device] = view.returns
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert returns["cuda"].is_cuda
    torch.testing.assert_close(returns["cuda"].cpu(), returns["cpu"])


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
