"""Copies of a buffer in other processes draw batches of their own."""

import multiprocessing
import os
import pickle

import pytest
import torch
from test_buffer_samplers import fill
from torch.utils.data import DataLoader, IterableDataset

from covr_fast import ReplayBuffer


def make(seed: int = 0) -> ReplayBuffer:
    return fill(200, num_envs=1, capacity=200, seed=seed)


class Batches(IterableDataset):
    def __init__(self, buffer: ReplayBuffer | None) -> None:
        self.buffer = buffer

    def __iter__(self):
        buffer = make() if self.buffer is None else self.buffer
        for _ in range(3):
            yield buffer.sample(32).index


def loaded(dataset: Batches, start: str, epochs: int = 1, torch_seed: int = 0) -> list[tuple[int, ...]]:
    g = torch.Generator().manual_seed(torch_seed)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start, generator=g)
    return [tuple(index.tolist()) for _ in range(epochs) for index in loader]


def test_workers_of_a_data_loader_draw_different_batches():
    batches = loaded(Batches(make()), "fork", epochs=2)
    assert len(batches) == len(set(batches)) == 12
    assert batches == loaded(Batches(make()), "fork", epochs=2)
    assert batches[0] not in loaded(Batches(make(seed=1)), "fork")
    assert batches[0] not in loaded(Batches(make()), "fork", torch_seed=1)


def test_workers_that_got_the_buffer_pickled_draw_different_batches():
    batches = loaded(Batches(make()), "spawn")
    assert len(batches) == len(set(batches)) == 6
    assert sorted(batches) == sorted(loaded(Batches(make()), "fork"))


def test_a_buffer_made_in_a_worker_draws_as_its_seed_says():
    expected = make()
    batches = loaded(Batches(None), "fork")
    assert sorted(batches) == sorted([tuple(expected.sample(32).index.tolist()) for _ in range(3)] * 2)


def forked(buffers: list[ReplayBuffer]) -> list[list[int]]:
    """What each of two forked processes draws from all of `buffers`."""
    drawn = []
    for _ in range(2):
        receive, send = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(send, pickle.dumps([buffer.sample(16).index.tolist() for buffer in buffers]))
            finally:
                os._exit(0)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            drawn += pickle.load(pipe)
        os.waitpid(child, 0)
    return drawn


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forks_draw_other_batches_than_their_parent_and_each_other():
    buffer = make()
    drawn = [*forked([buffer]), buffer.sample(16).index.tolist()]
    assert len({tuple(index) for index in drawn}) == 3


def test_the_process_that_made_it_draws_as_before_when_others_were_forked():
    buffer, expected = make(), make()
    forked([buffer])
    assert torch.equal(buffer.sample(32).index, expected.sample(32).index)


def test_a_copy_in_the_same_process_goes_on_as_its_original():
    buffer = make()
    buffer.sample(8)
    copy = pickle.loads(pickle.dumps(buffer))
    assert torch.equal(copy.sample(32).index, buffer.sample(32).index)


def put_a_batch(buffer: ReplayBuffer, queue) -> None:
    queue.put(buffer.sample(32).index.tolist())


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_processes_that_got_the_buffer_draw_different_batches(start):
    buffer, context = make(), multiprocessing.get_context(start)
    queue = context.Queue()
    processes = [context.Process(target=put_a_batch, args=(buffer, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    batches = [tuple(queue.get(timeout=120)) for _ in processes]
    for process in processes:
        process.join()
    assert len({*batches, tuple(buffer.sample(32).index.tolist())}) == 3
