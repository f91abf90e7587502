"""Rows whose tensors are on a GPU are stored as those of the host are, and are refused where those are."""

import numpy as np
import pytest
import torch
from buffer_oracle import StackedEnv
from test_buffer import make
from test_buffer_jumps import PATH

from covr_fast import ReplayBuffer
from covr_fast._C import FrameStackError
from covr_fast.buffer.device_add import DeviceAdd

pytestmark = pytest.mark.needs_cuda


def on_device(value):
    """What `add` is given, moved to the GPU."""
    if isinstance(value, dict):
        return {name: on_device(each) for name, each in value.items()}
    return None if value is None else torch.as_tensor(value).to("cuda")


def all_on_device(rows, named):
    return [on_device(row) for row in rows], {name: on_device(value) for name, value in named.items()}


class Twins:
    """A buffer on the CPU that is given arrays, and one on the GPU that is given what `given` makes of
    them."""

    def __init__(self, given=on_device, **options) -> None:
        self.given = given
        self.on_cpu = ReplayBuffer(**options)
        self.on_gpu = ReplayBuffer(**options, device="cuda")

    def add(self, *rows, given=None, **named) -> torch.Tensor:
        given = given or self.given
        expected = self.on_cpu.add(*rows, **named)
        ids = self.on_gpu.add(*map(given, rows), **{name: given(value) for name, value in named.items()})
        assert ids.is_cuda == (given is on_device)
        assert torch.equal(ids.cpu(), expected)
        return expected

    def check(self) -> None:
        """Both have the same content, and the mirror in device memory that of the host."""
        expected, got = self.on_cpu.state_dict(), self.on_gpu.state_dict()
        assert (len(self.on_gpu), self.on_gpu.jumps) == (len(self.on_cpu), self.on_cpu.jumps)
        rows = self.on_cpu.ids_at(*_every_place(self.on_cpu)) >= 0
        for name, values in expected["tensors"].items():
            own = got["tensors"][name].cpu()
            if not name.startswith("frames."):  # slots that no transition refers to may differ
                stored = torch.from_numpy(rows) if len(values) == len(rows) else slice(None)
                assert torch.equal(own[stored], values[stored]), name
        mirror = self.on_gpu._gather.mirror
        assert torch.equal(mirror.streams.cpu(), self.on_gpu._storage.streams)
        for name, values in mirror.tensors.items():
            assert torch.equal(values.cpu(), self.on_gpu._storage.tensors[name]), name
        index = self.on_cpu.ids_at(*_every_place(self.on_cpu))[rows]
        for name in "obs", "next_obs", "reward", "discount", "action", "extras":
            a = getattr(self.on_cpu.get(index, dtype=torch.uint8), name)
            b = getattr(self.on_gpu.get(index, dtype=torch.uint8), name)
            for one, other in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]:
                assert torch.equal(one, other.cpu()), name


def _every_place(buffer: ReplayBuffer) -> tuple[np.ndarray, np.ndarray]:
    m = -(-buffer.capacity // buffer.num_envs)
    envs, places = np.divmod(np.arange(buffer.num_envs * m), m)
    return envs, places


class Images:
    """Rows of random stacks, one environment each."""

    def __init__(
        self, num_envs=3, frame=(2, 7, 5), stack=3, padding="repeat", last=False, max_length=10
    ) -> None:
        self.rng = np.random.default_rng(0)
        frame = (*frame[1:], frame[0]) if last else frame
        self.envs = [StackedEnv(self.rng, frame, stack, padding, max_length, last) for _ in range(num_envs)]
        self.shape = (*frame[:-1], frame[-1] * stack) if last else (frame[0] * stack, *frame[1:])
        self.options = {
            "capacity": 50,
            "num_envs": num_envs,
            "obs_shape": self.shape,
            "action_shape": (2,),
            "frame_stack": stack,
            "channels_last": last,
            "n_step": 2,
            "seed": 0,
            "extras": {"prior": (3,), "version": ((), torch.int64)},
        }

    def rows(self, env_ids=None):
        """(positional, named) arguments of add."""
        envs = self.envs if env_ids is None else [self.envs[e] for e in env_ids]
        obs, next_obs, terminated, truncated = map(np.array, zip(*(env.step() for env in envs), strict=True))
        n = len(envs)
        action, reward = self.rng.standard_normal((n, 2), np.float32), self.rng.standard_normal(n, np.float32)
        named = {"prior": self.rng.standard_normal((n, 3), np.float32), "version": np.arange(n)}
        if env_ids is not None:
            named["env_ids"] = np.array(env_ids)
        return (obs, action, reward, next_obs, terminated, truncated), named


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("padding", ["repeat", "zero", "full"])
@pytest.mark.parametrize("stack, frame", [(1, (2, 7, 5)), (3, (2, 7, 5)), (4, (1, 4, 8)), (3, (3, 32, 33))])
def test_images_are_stored_as_from_the_host(stack, frame, padding, last):
    images = Images(stack=stack, frame=frame, padding=padding, last=last)
    twins = Twins(**images.options)
    for step in range(60):
        rows, named = images.rows()
        twins.add(*rows, **named)
        if step % 15 == 14:
            twins.check()


def test_rows_of_some_environments_in_any_order():
    images = Images(num_envs=5)
    twins = Twins(**images.options)
    for _ in range(60):
        size = images.rng.integers(1, 6)
        rows, named = images.rows(images.rng.permutation(5)[:size])
        twins.add(*rows, **named)
    twins.check()


def test_rows_of_the_host_and_of_the_device_in_turn():
    images = Images()
    twins = Twins(**images.options)
    for step in range(80):
        rows, named = images.rows()
        twins.add(*rows, **named, given=on_device if step // 3 % 2 else (lambda value: value))
    twins.check()


def test_a_cut_comes_between_rows_of_the_device():
    images = Images(max_length=1000)
    twins = Twins(**images.options)
    for step in range(20):
        rows, named = images.rows()
        twins.add(*rows, **named)
        if step % 6 == 5:
            for buffer in twins.on_cpu, twins.on_gpu:
                buffer.cut([1])
            images.envs[1].left = 0
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stack", [1, 2])
def test_floats_that_differ_by_rounding_go_on_and_others_begin_a_segment(dtype, stack):
    kind = torch.zeros(0, dtype=dtype).numpy().dtype
    path = PATH.astype(kind)
    path = np.concatenate([path[i : len(path) - stack + 1 + i] for i in range(stack)], 1)
    twins = Twins(
        capacity=64, num_envs=1, obs_shape=(4 * stack,), action_shape=(), frame_stack=stack, obs_dtype=dtype,
        on_jump="cut", seed=0,
    )  # fmt: skip
    no = np.zeros(1, bool)
    for t in range(len(path) - 1):
        obs = np.nextafter(path[t], kind.type(np.inf)) if t % 3 else path[t]
        if t % 7 == 6:
            obs = path[0]
        next_obs = np.concatenate([obs[4:], path[t + 1, -4:]])
        twins.add(obs[None], np.zeros(1, np.float32), np.ones(1, np.float32), next_obs[None], no, no)
    assert twins.on_cpu.jumps == (4 if stack == 1 else 7)  # a stack's older frame jumps back one step later
    twins.check()


@pytest.mark.filterwarnings("ignore:.*did not continue")
def test_a_jump_of_one_key_begins_a_segment_of_all():
    images = Images(max_length=1000)
    twins = Twins(
        **images.options
        | {
            "obs_shape": {"view": images.shape, "speed": (2,)},
            "frame_stack": {"view": 3},
            "channels_last": False,
        }
    )
    speed = np.zeros((3, 2), np.float32)
    for step in range(40):
        (obs, action, reward, next_obs, *ends), named = images.rows()
        start = speed + (step % 5 == 4)  # not where the step before has ended
        speed = images.rng.standard_normal((3, 2), np.float32)
        before, after = {"view": obs, "speed": start}, {"view": next_obs, "speed": speed}
        twins.add(before, action, reward, after, *ends, **named)
    assert twins.on_gpu.jumps == 3 * 8
    twins.check()


def test_batches_after_rows_of_the_device_are_those_of_the_cpu():
    images = Images()
    twins = Twins(**images.options)
    for step in range(40):
        rows, named = images.rows()
        twins.add(*rows, **named)
        if step > 4:
            a = twins.on_cpu.sample(9, augment="shift", pad=1)
            b = twins.on_gpu.sample(9, augment="shift", pad=1)
            assert torch.equal(a.index, b.index.cpu())
            assert torch.equal(a.obs, b.obs.cpu())
            assert torch.equal(a.next_obs, b.next_obs.cpu())


def test_a_simulator_may_overwrite_its_frames_after_add():
    images = Images()
    twins = Twins(**images.options)
    rows, named = images.rows()
    expected = twins.on_cpu.add(*rows, **named)
    given = [on_device(row) for row in rows]
    twins.on_gpu.add(*given, **{name: on_device(value) for name, value in named.items()})
    for tensor in given:
        tensor.zero_()
    assert torch.equal(twins.on_cpu.observations(expected), twins.on_gpu.observations(expected).cpu())


def test_adding_does_not_wait_for_the_device():
    images = Images()
    twins = Twins(**images.options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):  # more than may be on their way
            rows, named = images.rows()
            torch.cuda.set_sync_debug_mode("default")
            given = (
                [on_device(row) for row in rows],
                {name: on_device(value) for name, value in named.items()},
            )
            torch.cuda.set_sync_debug_mode("error")
            twins.on_gpu.add(*given[0], **given[1])
            twins.on_cpu.add(*rows, **named)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    twins.check()


# ---- refusals ----


def added(twins: Twins, images: Images, times: int = 5) -> None:
    for _ in range(times):
        rows, named = images.rows()
        twins.add(*rows, **named)


@pytest.mark.parametrize("which, what", [(0, "obs is not next_obs"), (3, "the older frames of next_obs")])
def test_a_contradiction_is_raised_later_and_nothing_of_its_call_is_added(which, what):
    images = Images(max_length=1000)
    twins = Twins(**images.options)
    added(twins, images)
    rows, named = images.rows()
    wrong = [np.array(row) for row in rows]
    wrong[which][1] += 1
    ids = twins.on_gpu.add(
        *map(on_device, wrong), **{name: on_device(value) for name, value in named.items()}
    )
    assert ids.tolist() == [-1, -1, -1]
    with pytest.raises(FrameStackError, match=rf"'obs' of row 1 \(environment 1\): {what}"):
        len(twins.on_gpu)
    twins.check()  # it is raised once
    twins.add(*rows, **named)
    added(twins, images)
    twins.check()


@pytest.mark.parametrize("given", [on_device, lambda value: value], ids=["device", "host"])
def test_an_add_that_raises_for_an_earlier_one_adds_nothing(given):
    images = Images(max_length=1000)
    twins = Twins(**images.options)
    added(twins, images)
    rows, named = images.rows()
    wrong, named_there = all_on_device(rows, named)
    wrong[0] = 1 - wrong[0]
    twins.on_gpu.add(*wrong, **named_there)
    torch.cuda.synchronize()
    with pytest.raises(FrameStackError, match="row 0"):
        twins.on_gpu.add(*map(given, rows), **{name: given(value) for name, value in named.items()})
    twins.check()
    twins.add(*rows, **named, given=given)
    twins.check()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place, name", [(1, "action"), (2, "reward"), ("prior", "prior")])
def test_what_is_no_number_is_raised_later(value, place, name):
    images = Images()
    twins = Twins(**images.options)
    added(twins, images)
    rows, named = images.rows()
    wrong = dict(enumerate(rows)) | named
    wrong[place] = wrong[place].copy()
    wrong[place].reshape(-1)[-1] = value
    rows, named = [wrong[i] for i in range(6)], {name: wrong[name] for name in named}
    if name == "prior" and not np.isnan(value):
        twins.add(*rows, **named)  # extras may be infinite
        return twins.check()
    rows, named = all_on_device(rows, named)
    twins.on_gpu.add(*rows, **named)
    with pytest.raises(ValueError, match=f"{name} of row 2 is NaN, infinite or too large; nothing"):
        twins.on_gpu.stream_bounds()
    twins.check()


def test_an_observation_that_is_no_number_is_raised_later():
    buffer = ReplayBuffer(9, num_envs=1, obs_shape=(3,), action_shape=(), device="cuda")
    one, no = torch.ones(1, device="cuda"), torch.zeros(1, dtype=torch.bool, device="cuda")
    bad = torch.tensor([[1.0, torch.nan, 2]], device="cuda")
    for rows, name in ((bad, bad[:, :1].expand(1, 3)), "obs"), ((bad[:, :1].expand(1, 3), bad), "next_obs"):
        buffer.add(rows[0], one, one, rows[1], no, no)
        with pytest.raises(ValueError, match=f"^{name} 'obs' of row 0 is NaN"):
            len(buffer)
    assert len(buffer) == 0


def test_floats_beyond_the_range_of_a_column_are_raised_later():
    buffer = ReplayBuffer(9, num_envs=1, obs_shape=(1,), action_shape=(), device="cuda", extras={"x": ()})
    one, no = torch.ones(1, device="cuda"), torch.zeros(1, dtype=torch.bool, device="cuda")
    buffer.add(one[None], one, one.double(), one[None], no, no, x=one.double() * 1e300)
    with pytest.raises(ValueError, match=r"^x of row 0 is NaN, infinite or too large"):
        len(buffer)


@pytest.mark.parametrize(
    "env_ids, message",
    [([0, 3], r"env_ids\[1\] = 3 is not in \[0, num_envs = 3\)"), ([-1, 0], r"env_ids\[0\] = -1"),
     ([2, 2], "env_ids contains 2 twice")],
)  # fmt: skip
def test_environments_that_do_not_exist_are_raised_later(env_ids, message):
    images = Images()
    twins = Twins(**images.options)
    added(twins, images)
    rows, named = images.rows([0, 1])
    named["env_ids"] = np.array(env_ids)
    rows, named = all_on_device(rows, named)
    twins.on_gpu.add(*rows, **named)
    with pytest.raises(ValueError, match=message):
        twins.on_gpu.contains([0])
    twins.check()
    for env in images.envs:  # whose steps are lost
        env.left = 0
    for buffer in twins.on_cpu, twins.on_gpu:
        buffer.cut()
    added(twins, images)
    twins.check()


@pytest.mark.parametrize(
    "place, wrong, message",
    [
        (0, lambda x: x[:, :1], "obs has shape .* it must be"),
        (0, lambda x: x.float(), "obs has dtype float32: on cuda:0 it must be uint8"),
        (1, lambda x: x[:1], "action has shape"),
        (1, lambda x: x.long(), "action has dtype int64: on cuda:0 it must be float32; cast it"),
        (2, lambda x: x[:2], "reward has 2 rows for 3 environments"),
        (3, lambda x: x[:2], "next_obs has shape"),
        (4, lambda x: x.float(), "terminated has dtype float32: on cuda:0 it must be bool"),
        (5, lambda x: x[:2], "truncated has shape"),
    ],
)
def test_another_shape_or_dtype_is_an_error_at_once(place, wrong, message):
    images = Images()
    twins = Twins(**images.options)
    added(twins, images)
    rows, named = images.rows()
    given = [on_device(row) for row in rows]
    given[place] = wrong(given[place])
    with pytest.raises(ValueError, match=message):
        twins.on_gpu.add(*given, **{name: on_device(value) for name, value in named.items()})
    twins.check()


@pytest.mark.parametrize("given", [on_device, lambda value: value], ids=["device", "host"])
def test_without_room_on_the_device_nothing_is_added(given, monkeypatch):
    images = Images()
    twins = Twins(**images.options)
    added(twins, images)
    rows, named = images.rows()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(DeviceAdd, "_reserve", full)
        with pytest.raises(torch.OutOfMemoryError):
            twins.on_gpu.add(*map(given, rows), **{name: given(value) for name, value in named.items()})
    twins.check()
    twins.add(*rows, **named, given=given)
    twins.check()


def test_strided_tensors_and_values_of_the_host_are_taken():
    images = Images()
    twins = Twins(**images.options)
    rows, named = images.rows()
    twins.on_cpu.add(*rows, **named)
    given = [on_device(row) for row in rows]
    given[0] = torch.stack([given[0], given[0]], 1)[:, 0]
    given[2] = rows[2].tolist()
    twins.on_gpu.add(*given, **named)
    twins.check()


def test_more_keys_than_a_kernel_takes_go_through_the_host():
    shapes = {f"key{i}": (2,) for i in range(9)}
    twins = Twins(capacity=20, num_envs=2, obs_shape=shapes, action_shape=(), seed=0, given=on_device)
    rng, no = np.random.default_rng(0), np.zeros(2, bool)
    for _ in range(5):
        obs, next_obs = ({name: rng.random((2, 2), np.float32) for name in shapes} for _ in range(2))
        rows = obs, np.zeros(2, np.float32), np.ones(2, np.float32), next_obs, no, no
        assert torch.equal(twins.on_cpu.add(*rows), twins.on_gpu.add(*map(on_device, rows)))
    twins.check()


@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_frames_in_either_storage(storage):
    a, b = make(), make(device="cuda", storage=storage)
    for _ in range(60):
        assert torch.equal(a.add(), b.add())
    rows = Images(num_envs=3).rows()
    for driver in a, b:
        driver.buffer.cut()
    (obs, action, reward, next_obs, *ends), named = rows
    given = [obs, action, reward, next_obs, *ends]
    ids = a.buffer.add(*given, prior=named["prior"])
    assert torch.equal(ids, b.buffer.add(*map(on_device, given), prior=on_device(named["prior"])).cpu())
    assert torch.equal(a.buffer.observations(ids), b.buffer.observations(ids).cpu())
