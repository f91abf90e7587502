"""One thread adds while others sample."""

import threading
from collections.abc import Callable

import numpy as np
import torch
from test_buffer_prefetch import stack

from covr_fast import ReplayBuffer


def add_beside(readers: list[Callable[[], None]], add: Callable[[int], None], steps: int) -> None:
    """Adds `steps` steps while each of `readers` is called over and over in a thread; raises what one did."""
    stop, errors = threading.Event(), []

    def repeat(read: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                read()
        except BaseException as error:
            errors.append(error)

    add(0)
    threads = [threading.Thread(target=repeat, args=(read,)) for read in readers]
    for thread in threads:
        thread.start()
    for step in range(1, steps):
        add(step)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_rows_stay_whole_while_the_ring_turns():
    """Every pixel, the action, the reward and the extra of a row hold the step's number."""
    buffer = ReplayBuffer(
        64, num_envs=2, obs_shape=(9, 12, 12), action_shape=(), frame_stack=3, seed=0, extras={"step": ()}
    )

    def add(step: int) -> None:
        number, no = np.full(2, step, np.float32), np.zeros(2, bool)
        buffer.add(stack(step), number, number, stack(step + 1), no, no, step=number)

    def sample() -> None:
        batch = buffer.sample(32, dtype=torch.uint8)
        step = batch.reward.long()
        assert torch.equal(batch.action, batch.reward)
        assert torch.equal(batch.extras["step"], batch.reward)
        assert torch.equal(batch.index // 2, step)
        assert (batch.obs[:, 6:].long() == (step % 256)[:, None, None, None]).all()
        assert (batch.next_obs[:, 6:].long() == ((step + 1) % 256)[:, None, None, None]).all()

    add_beside([sample, sample], add, 2000)


def test_access_by_id_is_whole_while_the_ring_turns():
    """What is read belongs to the ids asked for, and what is set goes to them, however fast they are lost."""
    buffer = ReplayBuffer(8, num_envs=1, obs_shape=(1,), action_shape=(), seed=0, extras={"a": (), "b": ()})

    def add(step: int) -> None:
        number, no = np.full(1, step, np.float32), np.zeros(1, bool)
        buffer.add(number[None], number, number, number[None] + 1, no, no, a=number, b=number)

    def watch() -> None:
        index = buffer.sample(4).index
        try:
            assert torch.equal(buffer.actions(index), index.float())
            buffer.set_extras(index, a=-index.float(), b=-index.float())
            np.testing.assert_array_equal(buffer.windows(index, 1)[0][:, 0], index)
        except IndexError:
            pass  # overwritten in the meantime, and said so

    def sample() -> None:
        batch = buffer.sample(8)
        assert torch.equal(batch.extras["a"], batch.extras["b"])
        assert torch.equal(batch.extras["a"].abs(), batch.index.float())

    add_beside([watch, watch, sample], add, 3000)
