"""What add() sends to a device, applied elsewhere, makes the same tables."""

import pytest
import torch
from test_buffer import make

from covr_fast.buffer import arguments


class Block:
    """Memory for a block, and how often it was asked for."""

    def __init__(self, shortage: int = 0) -> None:
        self.times, self.shortage, self.bytes = 0, shortage, torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        self.times += 1
        self.bytes = torch.full((nbytes - self.shortage,), 255, dtype=torch.uint8)
        return self.bytes


def recorded(driver, block: Block, env_ids=None):
    """Lets the driver add, in a way that fills the block. Returns how many rows it added."""
    core, options = driver.buffer._storage.core, driver.buffer._options

    def add(obs, action, reward, next_obs, terminated, truncated, *, env_ids, prior):
        rows = [
            arguments.observation(obs, options, "obs"),
            arguments.observation(next_obs, options, "next_obs"),
        ]
        columns = arguments.columns(action, {"prior": prior}, options)
        return torch.from_numpy(core.add(*rows, reward, terminated, truncated, columns, env_ids, block.take))

    driver.buffer.add = add
    return len(driver.add(env_ids))


@pytest.mark.parametrize("padding", ["repeat", "zero", "full"])
@pytest.mark.parametrize("stack, max_length", [(1, 10), (3, 1), (3, 4), (4, 40)])
def test_a_buffer_that_follows_has_the_same_tables(padding, stack, max_length):
    leading, following = (make(stack=stack, padding=padding, max_length=max_length, seed=1) for _ in range(2))
    for step in range(90):
        block, env_ids = Block(), None if step % 3 else leading.rng.permutation(3)[: 1 + step % 2].tolist()
        rows = recorded(leading, block, env_ids)
        assert block.times == 1
        following.buffer._storage.core.follow(block.bytes, rows)
    for name, values in leading.buffer._storage.tensors.items():
        if not name.startswith("frames."):
            assert torch.equal(values, following.buffer._storage.tensors[name]), name
    assert len(following.buffer) == len(leading.buffer) > 20


def test_a_block_that_is_too_small_is_refused_before_anything_is_written():
    driver = make()
    with pytest.raises(TypeError, match="block has fewer bytes than were asked for"):
        recorded(driver, Block(shortage=1))
    assert len(driver.buffer) == 0
    assert driver.buffer.stream_bounds()[2].tolist() == [0, 0, 0]


def test_an_error_of_whoever_gives_the_block_comes_through():
    driver = make()

    class Full(Block):
        def take(self, nbytes: int) -> torch.Tensor:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        recorded(driver, Full())
    assert len(driver.buffer) == 0


def test_a_block_without_its_rows_is_refused():
    driver, block = make(), Block()
    rows = recorded(driver, block)
    with pytest.raises(TypeError, match="block must hold the records of its rows"):
        make().buffer._storage.core.follow(block.bytes[:64], rows)
