"""Hand-overs between CUDA streams: their order, and the same results when every producer is late."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from one_step_episodes import add_step, make_buffer

from covr_fast import streams
from covr_fast.buffer.gpu import DeviceGather
from covr_fast.labeller import PriorLabeller
from covr_fast.streams import Lane
from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner

CPU = torch.device("cpu")


def test_on_a_cpu_a_lane_does_nothing():
    lane = Lane(CPU, urgent=True)
    with lane.work(torch.zeros(3), None, after=streams.mark(CPU)):
        pass
    lane.synchronize()
    streams.follow(streams.mark(CPU), CPU)
    streams.receive(torch.zeros(3))


def test_what_is_on_the_host_is_sent_nowhere_and_fetched_without_waiting():
    values = torch.arange(3)
    assert streams.send(values, CPU) is values
    fetched = streams.Fetch(values)
    assert not fetched.waits
    assert fetched.read()[0] is values


class FakeStream:
    """Writes down what would happen on it."""

    def __init__(self, name: str, log: list[tuple[str, str, str]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))


class FakeTensor:
    is_cuda = True

    def __init__(self, log: list[tuple[str, str, str]]) -> None:
        self.log = log

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append((stream.name, "reads", "tensor"))


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, str, str]]:
    """torch.cuda's streams replaced by ones that write a log."""
    log: list[tuple[str, str, str]] = []
    current = [FakeStream("caller", log)]

    @contextmanager
    def enter(stream):
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    def make(device, *, priority):
        return FakeStream({-1: "urgent", 0: "lane"}[priority], log)

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    return log


def test_a_lane_waits_for_its_caller_and_the_caller_for_the_lane(log):
    with Lane(torch.device("cuda")).work(FakeTensor(log)):
        log.append((torch.cuda.current_stream(None).name, "does", "the work"))
    assert log == [
        ("lane", "waits for", "caller"),
        ("lane", "reads", "tensor"),
        ("lane", "does", "the work"),
        ("caller", "waits for", "lane"),
    ]


def test_a_lane_inside_a_lane_waits_for_that_one(log):
    with Lane(torch.device("cuda"), urgent=True).work(), Lane(torch.device("cuda")).work(after="a mark"):
        log.append((torch.cuda.current_stream(None).name, "does", "the work"))
    assert log == [
        ("urgent", "waits for", "caller"),
        ("lane", "waits for", "a mark"),
        ("lane", "does", "the work"),
        ("urgent", "waits for", "lane"),
        ("caller", "waits for", "urgent"),
    ]


def test_the_caller_waits_for_a_lane_whose_work_fails(log):
    with pytest.raises(ZeroDivisionError), Lane(torch.device("cuda")).work():
        raise ZeroDivisionError
    assert log == [("lane", "waits for", "caller"), ("caller", "waits for", "lane")]


def test_a_gather_comes_after_uploads_and_after_gathers_on_other_streams(log, monkeypatch):
    class Event(str):
        def record(self, stream: FakeStream) -> None:
            log.append((stream.name, "records", str(self)))

    events = iter(("sent", "used"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(next(events)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream("upload", log))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    gather = DeviceGather(torch.device("cuda"), None, pinned=False)
    with gather.reading():
        log.append(("caller", "does", "the gather"))
    assert log == [
        ("caller", "records", "used"),
        ("caller", "waits for", "sent"),
        ("caller", "waits for", "used"),
        ("caller", "does", "the gather"),
        ("caller", "records", "used"),
    ]


# ---- on a device: the same results when whoever hands something over is late ----

LATE = 50_000_000  # clock cycles: some 30 ms
LATER = 10 * LATE  # frames come after the lane that reads them would have begun, were it not for the wait


@pytest.fixture
def late(monkeypatch):
    """Every lane's work begins late, and so does what its caller does before it."""
    work = Lane.work

    @contextmanager
    def slow(self, *inputs, after=None):
        torch.cuda._sleep(LATE)
        with work(self, *inputs, after=after):
            torch.cuda._sleep(LATE)
            yield

    monkeypatch.setattr(Lane, "work", slow)


def nano() -> ActionPrior:
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cuda", dtype=torch.float32, seed=0)


def frames_of(seed: int, count: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 56, 56), dtype=torch.uint8, generator=generator)


def late_copy(values: torch.Tensor) -> torch.Tensor:
    """On the device, written only after a while."""
    values = values.cuda()
    result = torch.zeros_like(values)
    torch.cuda.synchronize()
    torch.cuda._sleep(LATER)
    result.copy_(values, non_blocking=True)
    return result


@pytest.mark.needs_cuda
def test_memory_that_a_lane_reads_is_not_given_away():
    """Though nobody but the lane waits for its reader."""
    lane = Lane(torch.device("cuda"))
    source, third = torch.arange(1 << 20, device="cuda"), torch.cuda.Stream()
    expected = source.sum()
    torch.cuda.synchronize()
    with torch.cuda.stream(third):
        given = source.clone()
    ready = third.record_event()
    with lane.work(given, after=ready):
        torch.cuda._sleep(LATER)
        result = given.sum()
    del given
    with torch.cuda.stream(third):
        torch.full_like(source, -1)  # would take it
    streams.receive(result)
    assert torch.equal(result, expected)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_sent_may_change_afterwards(pinned):
    values = torch.arange(1000)
    values = values.pin_memory() if pinned else values
    torch.cuda._sleep(LATE)
    sent = streams.send(values, torch.device("cuda"))
    values.zero_()
    assert torch.equal(sent.cpu(), torch.arange(1000))


@pytest.mark.needs_cuda
def test_a_fetch_waits_for_what_it_copies_and_for_nothing_later():
    def sent_and_fetched() -> streams.Fetch:
        return streams.Fetch(streams.send(torch.arange(1000), torch.device("cuda")) * 2)

    sent_and_fetched().read()  # pinned memory is allocated
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(LATE)
        fetched = sent_and_fetched()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda._sleep(LATER)
    end = torch.cuda.Event()
    end.record()
    assert fetched.waits
    assert torch.equal(fetched.read()[0], torch.arange(1000) * 2)
    assert not end.query()
    torch.cuda.synchronize()


@pytest.mark.needs_cuda
def test_answers_wait_for_their_frames_and_their_readers_for_them(late):
    prior = nano()
    expected = [prior(frames_of(seed)).action.cpu() for seed in range(3)]
    with Lane(torch.device("cuda"), urgent=True).work():
        answers = []
        for seed in range(3):
            answer = prior(late_copy(frames_of(seed))).action
            answers.append(answer * 2)
            del answer
        for answer, truth in zip(answers, expected, strict=True):
            torch.testing.assert_close(answer.cpu(), 2 * truth)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_a_round_waits_for_its_frames_and_answers_for_what_is_published(overlap, monkeypatch, request):
    frames, actions, returns = frames_of(0, 48), torch.rand(48, 2) * 2 - 1, torch.linspace(0, 1, 48)
    config = TunerConfig(mode="full", learning_rate=1e-3, epochs=2, overlap=overlap, batch_size=16)

    def run(hand_over) -> tuple[list[float], torch.Tensor]:
        prior = nano()
        tuner = VLMTuner(prior, config)
        losses = []
        with Lane(torch.device("cuda"), urgent=True).work():
            for _ in range(2):
                given = hand_over(frames)
                tuner.start(given, actions, returns)
                del given
                report = tuner.wait()
                tuner.publish()
                losses += [report.loss_before, report.loss_after]
            return losses, prior(frames).action.cpu()

    losses, action = run(torch.Tensor.cuda)
    request.getfixturevalue("late")
    late_losses, late_action = run(late_copy)
    assert late_losses == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(late_action, action)


@pytest.mark.needs_cuda
def test_background_labels_are_those_of_late_frames(late):
    prior = nano()
    buffer, rng = make_buffer(32, device="cuda"), np.random.default_rng(0)
    with Lane(torch.device("cuda"), urgent=True).work():
        ids = torch.cat([add_step(buffer, rng)[0] for _ in range(4)])
        # In the labeller's batches, because products of another size may round otherwise.
        expected = torch.cat([prior(buffer.frames(part)).action.cpu() for part in ids.split(4)])
        labeller = PriorLabeller(prior, buffer, lambda ids: late_copy(buffer.frames(ids)), max_batch=4)
        labeller.due(ids.tolist())
        while len(labeller):
            labeller.step()
        labeller.close()
        torch.testing.assert_close(buffer.extras(ids)["prior"].cpu(), expected)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_frames_are_not_replaced_before_a_late_gather_has_read_them(storage):
    buffer, rng = make_buffer(8, device="cuda", storage=storage), np.random.default_rng(0)
    batches = []
    for _ in range(20):
        ids, obs, after = add_step(buffer, rng)
        torch.cuda._sleep(LATE)  # the gather comes late; the adds after it must not
        batch = buffer.get(ids, dtype=torch.uint8)
        batches.append((batch.obs, batch.next_obs, obs, after))
    for got_obs, got_after, obs, after in batches:
        assert torch.equal(got_obs.cpu(), torch.from_numpy(obs))
        assert torch.equal(got_after.cpu(), torch.from_numpy(after))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("read", ["get", "frames"])
def test_frames_that_are_sent_late_are_waited_for(read):
    buffer, rng = make_buffer(8, device="cuda"), np.random.default_rng(0)
    for _ in range(8):  # around the ring: what is not there yet is old frames
        with torch.cuda.stream(buffer._gather._upload_stream):
            torch.cuda._sleep(LATE)
        ids, obs, _ = add_step(buffer, rng)
        got = buffer.frames(ids) if read == "frames" else buffer.get(ids, dtype=torch.uint8).obs
        assert torch.equal(got.cpu(), torch.from_numpy(obs))


@pytest.mark.needs_cuda
def test_frames_are_not_replaced_before_any_stream_has_read_them():
    """A late reader on one stream, and after it a quick one on another."""
    buffer, rng = make_buffer(8, device="cuda"), np.random.default_rng(0)
    slow, quick = torch.cuda.Stream(), torch.cuda.Stream()
    ids, obs, _ = add_step(buffer, rng)
    with torch.cuda.stream(slow):
        torch.cuda._sleep(LATER)
        got = buffer.frames(ids)
    with torch.cuda.stream(quick):
        buffer.frames(ids)
    for _ in range(8):
        add_step(buffer, rng)
    with torch.cuda.stream(slow):
        assert torch.equal(got.cpu(), torch.from_numpy(obs))
