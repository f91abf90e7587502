"""benchmarks/bench_train.py: contestants are compared only if both train the same, and only while timed."""

import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from bench_train import check_same, compare  # noqa: E402
from training.checks import Seen, check_finite, check_updates, operations, parameters  # noqa: E402
from training.chunks import Chunk, Contestant, Pauses, Progress, Stop, cpu_seconds  # noqa: E402


def count(connection, ready_at):
    """A contestant that makes two decisions and an update per millisecond."""
    pauses, steps = Pauses(connection, ready_at, settle=3), 0
    while True:
        time.sleep(0.001)
        steps += 1
        pauses(Progress(2 * steps, steps, {"sleep": steps * 0.001}), partial(dict, steps=steps))


def fail(connection):
    raise ValueError("no such simulator")


def fail_a_check(connection):
    raise AssertionError("3 of 64 sampled observations are of no environment")


def burn(seconds):
    while time.process_time() < seconds:
        pass


class Pipe:
    """The parent's end of a connection, with all commands known before."""

    def __init__(self, *commands):
        self.commands, self.sent = list(commands), []

    def recv(self):
        return self.commands.pop(0)

    def send(self, what):
        self.sent.append(what)


def test_a_chunk_counts_what_was_done_while_the_clock_ran():
    contestant = Contestant(count, 20)
    try:
        assert contestant.facts() == {"steps": 10}
        chunk = contestant.chunk(0.05)
        assert chunk.took >= 0.05
        assert chunk.decisions == 2 * chunk.updates
        assert chunk.seconds["sleep"] == pytest.approx(0.001 * chunk.updates)
        assert chunk.cpu < chunk.took  # it sleeps
        assert 1 <= chunk.updates <= chunk.took / 0.001  # sleeps are never shorter
    finally:
        contestant.close()


def test_who_cannot_train_is_named_and_who_trains_wrongly_ends_the_benchmark():
    row = compare({"covr_fast": (count, 20), "peer": (fail,)}, 1, 0.01, 1)
    assert row["unavailable"] == {"peer": "ValueError: no such simulator"}
    with pytest.raises(AssertionError, match="3 of 64 sampled"):
        compare({"covr_fast": (count, 20), "peer": (fail_a_check,)}, 1, 0.01, 1)


FACTS = {"obs_shape": (3, 56, 56), "batch_size": 64, "threads": 1, "parameters": 1000, "act operations": 2000,
         "critic operations": 3000}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 65), ("parameters", 1020), ("act operations", 1900)]
)
def test_who_trains_another_network_is_not_compared(name, value):
    check_same(FACTS, {**FACTS, "parameters": 1005})
    with pytest.raises(AssertionError, match=name):
        check_same(FACTS, {**FACTS, name: value})


def test_steps_that_simulated_during_a_pause_are_not_counted(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    pipe = Pipe(2.0, None)
    pauses = Pauses(pipe, ready_at=1, settle=3)
    for step in range(1, 6):
        pauses(Progress(step, 0, {}), dict)
    with pytest.raises(Stop):
        pauses(Progress(6, 0, {}), dict)
    # Step 1 ends the warm-up, 2 to 4 settle, and the clock runs from the end of 4 to that of 6.
    facts, chunk = pipe.sent
    assert facts == {}
    assert chunk._replace(cpu=0.0) == Chunk(decisions=2, updates=0, took=2, cpu=0.0, seconds={})


def test_the_processors_of_children_are_counted():
    begin = cpu_seconds()
    child = multiprocessing.get_context("fork").Process(target=burn, args=(0.3,))
    child.start()
    while cpu_seconds() - begin < 0.2:
        assert child.is_alive()
        time.sleep(0.01)
    child.join()


def test_a_contestant_that_fails_says_why():
    contestant = Contestant(fail)
    with pytest.raises(RuntimeError, match="ValueError: no such simulator"):
        contestant.facts()
    contestant.close()


def test_observations_of_no_environment_are_found():
    obs = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    seen = Seen()
    seen.add(obs)
    seen.check(torch.from_numpy(obs[::2]))
    with pytest.raises(AssertionError, match="1 of 2"):
        seen.check(torch.tensor([3, 9], dtype=torch.uint8).reshape(2, 1, 1, 1))
    with pytest.raises(AssertionError, match="same picture"):
        seen.check(torch.zeros(8, 1, 1, 1, dtype=torch.uint8))


def test_updates_that_were_not_made_are_found():
    check_updates(25, 100, 4, slack=0)
    check_updates(23, 100, 4, slack=8)
    for updates in (22, 26):
        with pytest.raises(AssertionError, match=f"{updates} updates"):
            check_updates(updates, 100, 4, slack=8)


def test_weights_are_counted_once_and_must_be_finite():
    layer = nn.Linear(3, 2)
    assert parameters([layer, nn.Sequential(layer)]) == 8
    assert operations(lambda: layer(torch.zeros(5, 3))) == 2 * 5 * 3 * 2
    check_finite(layer)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="finite"):
        check_finite(layer)


def test_the_peers_environment_repeats_actions_and_stacks_frames():
    pytest.importorskip("Box2D")
    from training.peer_envs import car_racing

    from covr_fast.env_config import EnvConfig

    config = EnvConfig(height=56, width=56, grayscale=True, action_repeat=4, max_episode_steps=10)
    env = car_racing(config)
    obs, _ = env.reset(seed=0)
    assert obs.shape == config.obs_shape
    assert (obs == obs[0]).all()
    ends = []
    for _ in range(3):
        before, (obs, reward, terminated, truncated, _) = obs, env.step(np.array([0.0, 1.0], np.float32))
        np.testing.assert_array_equal(obs[:-1], before[1:])
        assert isinstance(reward, float)
        ends.append(terminated or truncated)
    assert ends == [False, False, True]  # 10 frames are two and a half decisions
    env.close()


@pytest.mark.slow
def test_the_benchmark_as_a_user_starts_it(tmp_path):
    pytest.importorskip("Box2D")
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("envpool")
    options = [
        "--environments",
        "carracing",
        "--decisions-per-update",
        "4",
        "--rounds",
        "1",
        "--seconds",
        "0.2",
    ]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_train.py"), *options],
        env={**os.environ, "COVR_BENCH_TINY": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| carracing")]
    assert len(rows) == 5, done.stdout  # three ways to simulate, two to train
    assert not any("not measured" in row for row in rows)
    assert "| carracing, 1/4 updates per decision | covr_fast |" in rows[3]
    assert "policy update" in rows[3]
    assert "Stable-Baselines3 on gymnasium" in rows[4]
    # Both have one network; the update of ours is less work.
    assert "weights; 1e9 operations of an update: covr_fast" in done.stdout
