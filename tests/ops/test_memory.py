"""Memory of large results: used again when free, never while somebody looks at it."""

import pytest
import torch

from covr_fast import _C, ops

FRAMES = torch.randint(0, 256, (32, 9, 84, 84), dtype=torch.uint8)
OFFSETS = torch.randint(0, 9, (32, 2))


def test_memory_that_nobody_uses_is_used_again():
    ops.release_memory()
    first = ops.random_shift(FRAMES, OFFSETS)
    address, expected = first.data_ptr(), first.clone()
    second = ops.random_shift(FRAMES, OFFSETS)
    assert second.data_ptr() != address
    view = first[3:]
    del first
    assert ops.random_shift(FRAMES, OFFSETS).data_ptr() != address  # the view still shares it
    torch.testing.assert_close(view, expected[3:], rtol=0, atol=0)
    del view
    addresses = {ops.random_shift(FRAMES, OFFSETS).data_ptr() for _ in range(3)}
    assert len(addresses) == 1


def test_release_gives_back_what_nobody_uses_and_leaves_the_rest():
    ops.release_memory()
    kept = ops.random_shift(FRAMES, OFFSETS)
    expected = ops.random_shift(FRAMES, OFFSETS, backend="reference")
    dropped = ops.random_shift(FRAMES, OFFSETS)
    size = dropped.nbytes
    assert ops.release_memory() == 0
    del dropped
    assert ops.release_memory() == size
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("size, again", [(1000, True), (900, True), (801, True), (799, False), (1001, False)])
def test_a_block_serves_results_down_to_four_fifths_of_its_size(size, again):
    pool = _C.OutputPool()
    address = pool.take(1000).ctypes.data
    assert pool.idle == 1000
    taken = pool.take(size)
    assert pool.idle == (0 if again else 1000)
    assert taken.nbytes == size
    if again:
        assert taken.ctypes.data == address


def test_the_most_recent_are_kept_up_to_the_limit():
    pool = _C.OutputPool(idle_bytes=2500)
    blocks = [pool.take(1000 * (i + 1)) for i in range(2)] + [pool.take(400)]
    while blocks:
        blocks.pop(0)  # 1000, then 2000, then 400
    assert pool.idle == 2400  # the oldest had to go
    del blocks
    large = pool.take(2600)
    del large
    assert pool.idle == 0  # more than the limit alone: nothing is kept
