"""Random programs of adds, cuts, saves and samples against the oracle that stores everything."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_buffer import Driver, make

from covr_fast import ReplayBuffer
from covr_fast.buffer import FineTuneView, Uniform


class BufferMachine(RuleBasedStateMachine):
    driver: Driver | None = None

    @initialize(
        num_envs=st.integers(1, 5),
        extra_capacity=st.integers(0, 40),
        stack=st.integers(1, 4),
        frame=st.sampled_from([(1, 2, 3), (3, 4, 4), (2, 150, 120)]),  # the last: almost no spare frames
        n_step=st.integers(1, 4),
        padding=st.sampled_from(["repeat", "zero", "full"]),
        max_length=st.sampled_from([1, 2, 5, 30, 10**6]),
        channels_last=st.booleans(),
        sampler=st.sampled_from(["uniform", "prioritized", "recent"]),
        seed=st.integers(0, 2**63 - 1),
    )
    def build(self, num_envs, extra_capacity, frame, n_step, channels_last, **options):
        self.driver = make(
            capacity=num_envs * n_step + extra_capacity,
            num_envs=num_envs,
            frame=(*frame[1:], frame[0]) if channels_last else frame,
            n_step=n_step,
            channels_last=channels_last,
            **options,
        )
        self.view = FineTuneView(self.driver.buffer, 0.9)
        self.added: list[int] = []

    @rule(times=st.integers(1, 30))
    def add_all(self, times):
        for _ in range(times):
            self.added += self.driver.add().tolist()

    @rule(data=st.data())
    def add_some(self, data):
        num_envs = self.driver.buffer.num_envs
        env_ids = data.draw(
            st.lists(st.integers(0, num_envs - 1), min_size=1, max_size=num_envs, unique=True)
        )
        self.added += self.driver.add(env_ids).tolist()

    @rule(data=st.data())
    def reset_outside(self, data):
        env = data.draw(st.integers(0, self.driver.buffer.num_envs - 1))
        self.driver.buffer.cut([env])
        if self.driver.oracle.streams[env]:
            self.driver.oracle.streams[env][-1].cut = True
        self.driver.envs[env].left = 0

    @precondition(lambda self: self.driver is not None and self.added)
    @rule(data=st.data())
    def refuse_a_contradiction(self, data):
        driver = self.driver
        env = data.draw(st.sampled_from(sorted({index % driver.buffer.num_envs for index in self.added})))
        step = driver.oracle.streams[env][-1]
        if driver.envs[0].stack == 1 or step.end:
            return
        wrong = np.flip(step.next_obs["obs"], axis=2 if driver.envs[0].channels_last else 0).copy()[None]
        if np.array_equal(wrong[0], step.next_obs["obs"]):
            return
        end, zero = np.ones(1, bool), np.zeros(1)
        args = (wrong, np.zeros((1, 2)), zero, wrong, end, end)
        with pytest.raises(ValueError, match="frame_stack=1"):
            driver.buffer.add(*args, env_ids=[env], prior=np.zeros((1, 3)))

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.driver.buffer.save(Path(folder, "buffer"))
            self.driver.buffer = ReplayBuffer.load(Path(folder, "buffer"))
        state, self.view = self.view.state_dict(), FineTuneView(self.driver.buffer, 0.9)
        self.view.load_state_dict(state)

    @rule()
    def clear_view(self):
        self.view.clear()
        assert len(self.view) == 0

    @rule(priority=st.floats(0, 100))
    def reprioritize(self, priority):
        if self.driver.buffer.beta:
            recent = self.added[-20:]
            self.driver.buffer.update_priorities(recent, [priority] * len(recent))

    @invariant()
    def samples_are_right(self):
        if self.driver is None:
            return
        buffer, oracle = self.driver.buffer, self.driver.oracle
        added = torch.tensor(self.added, dtype=torch.int64)
        stored = added[buffer.contains(added)].tolist()
        assert len(buffer) == len(stored)
        ready = [index for index in stored if oracle.window(index) is not None]
        if not ready:
            with pytest.raises(IndexError, match="nothing to sample"):
                buffer.sample(1)
            return
        self.driver.check(16)
        if isinstance(buffer.sampler, Uniform):
            assert set(buffer.sample(len(ready) * 12 + 40, dtype=torch.uint8).index.tolist()) <= set(ready)
        for env in {index % buffer.num_envs for index in stored}:  # the latest part of every stream
            of_env = [index // buffer.num_envs for index in stored if index % buffer.num_envs == env]
            assert len(of_env) == len(oracle.streams[env]) - min(of_env)

    @invariant()
    def view_is_right(self):
        if self.driver is None:
            return
        for index, value in zip(self.view.indices.tolist(), self.view.returns.tolist(), strict=True):
            env, t = index % self.driver.buffer.num_envs, index // self.driver.buffer.num_envs
            expected = 0.0
            for k, step in enumerate(self.driver.oracle.streams[env][t:]):
                expected += 0.9**k * step.reward
                if step.end:
                    break
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(
    max_examples=int(os.environ.get("COVR_EXAMPLES", "40")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
