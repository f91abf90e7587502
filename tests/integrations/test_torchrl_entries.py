"""Every entry of a tensordict comes back as it went in, as from TorchRL's own buffer."""

import pytest
import torch

pytest.importorskip("torchrl")
from tensordict import LazyStackedTensorDict, TensorDict
from torchrl_peer import assert_as_torchrl, make, stacked, stacks_of, transitions


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_rewards_and_ends_keep_their_shape(shape):
    data = transitions()
    for name in ("reward", "done", "terminated", "truncated"):
        data["next", name] = data["next", name].reshape(24, *shape)
    assert_as_torchrl(make(), data[:10], data[10:])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
def test_rewards_keep_their_dtype_to_the_last_bit(dtype):
    data = transitions()
    data["next", "reward"] = (torch.randn(24, 1, dtype=torch.float64) * 1e4 + 1 / 3).to(dtype)
    if dtype == torch.int64:
        data["next", "reward"] += 2**40
    assert_as_torchrl(make(), data[:10], data[10:])


def test_several_rewards():
    data = transitions()
    data["next", "reward"] = torch.randn(24, 3)
    buffer = make()
    assert_as_torchrl(buffer, data)
    inside = buffer.buffer.sample(8)
    assert torch.allclose(inside.reward, data["next", "reward"].sum(1)[inside.index])


def test_two_agents():
    n = 24
    states, done = torch.randn(n + 1, 2, 5), torch.arange(n) % 6 == 5
    agents = TensorDict({"observation": states[:-1], "action": torch.randint(4, (n, 2))}, [n, 2])
    following = TensorDict({"observation": states[1:], "reward": torch.randn(n, 2, 1)}, [n, 2])
    following["done"] = done[:, None, None].expand(n, 2, 1).clone()
    data = TensorDict(
        {
            "agents": agents,
            "next": TensorDict({"agents": following, "done": done, "terminated": done}, [n]),
        },
        [n],
    )
    options = {
        "obs_keys": (("agents", "observation"),),
        "action_key": ("agents", "action"),
        "reward_key": ("agents", "reward"),
    }
    assert_as_torchrl(make(**options), data[:10], data[10:], ours_only={("next", "truncated")})
    data["next", "done"] = following["done"]
    with pytest.raises(ValueError, match=r"\('next', 'done'\).*one bool per row.*any\(\) or all\(\)"):
        make(**options).extend(data)


def test_nested_keys_and_names_that_look_alike():
    data = transitions()
    stacks = stacks_of(torch.randint(0, 256, (27, 1, 5, 4), dtype=torch.uint8))
    data["agent"] = TensorDict({"pixels": stacks[:-1], "b/c": torch.randn(24)}, [24])
    data["next", "agent"] = TensorDict({"pixels": stacks[1:], "gain": torch.randn(24, 2)}, [24])
    data["agent/b"] = TensorDict({"c": torch.randn(24)}, [24])
    data["agent", "b"] = TensorDict({"c": torch.randn(24)}, [24])
    data["collector"] = TensorDict({"index": torch.arange(24), "done": torch.randn(24)}, [24])
    buffer = make(obs_keys=(("agent", "pixels"), "observation"), frame_stack=3)
    assert_as_torchrl(buffer, data[:10], data[10:])
    assert int(buffer.buffer.state_dict()["tensors"]["written.agent/pixels"].sum()) == 24 + 4 * 3


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.uint16),
        *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 1, 3, 2)])
def test_entries_of_any_dtype_and_shape(dtype, shape):
    value = (torch.randn(24, *shape) * 3).to(dtype)
    data = transitions(value=value)
    data["next", "value"] = value[torch.arange(23, -1, -1)]
    buffer = make()
    if dtype in (torch.uint16, torch.float8_e4m3fn):  # of which TorchRL's storage cannot set rows
        found = buffer[buffer.extend(data)]["value"]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found.double(), value.double())
        return
    assert_as_torchrl(buffer, data[:10], data[10:])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("width", [(), (4,), (6, 5), (3, 5, 4), (2, 3, 5, 4)])
def test_observations_of_any_dtype_and_shape(dtype, width):
    assert_as_torchrl(make(), *transitions(width=width, dtype=dtype).split(12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stacks_of_float_pixels(dtype):
    data = stacked(torch.rand(27, 1, 5, 4).to(dtype))
    assert_as_torchrl(make(frame_stack=3), data[:10], data[10:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.uint8])
def test_actions_of_any_dtype(dtype):
    one_hot = torch.nn.functional.one_hot(torch.arange(24) % 4, 4).to(dtype)
    data = transitions()
    data["action"] = one_hot
    assert_as_torchrl(make(), data[:10], data[10:])
    data["action"] = one_hot[:, 0]
    assert_as_torchrl(make(), data)


def test_entries_under_next_and_ends_at_the_root_are_kept():
    data = transitions()
    data["done"] = torch.zeros(24, 1, dtype=torch.bool)
    data["next", "step_count"] = torch.arange(24)[:, None]
    data["next", "info"] = TensorDict({"lives": torch.arange(24)}, [24])
    assert_as_torchrl(make(), data[:10], data[10:])


def test_ends_that_contradict_each_other_come_back_as_they_are():
    data = transitions()
    data["next", "truncated"][11] = True  # what ReplayBufferTrainer does to the last step of a batch
    data["next", "done"][5] = False
    assert_as_torchrl(make(), data)


@pytest.mark.parametrize(
    "given", [("done",), ("terminated",), ("done", "terminated"), ("terminated", "truncated")]
)
def test_missing_ends_follow_from_the_others(given):
    data = transitions()
    kept = data.clone()
    for name in {"done", "terminated", "truncated"} - set(given):
        del kept["next", name]
    buffer = make()
    sample = buffer[buffer.extend(kept)]
    if "truncated" in given:
        done, terminated = data["next", "done"], data["next", "terminated"]
    elif "terminated" in given:
        terminated = data["next", "terminated"]
        done = data["next", "done"] if "done" in given else terminated
    else:  # as TorchRL completes it
        done = terminated = data["next", "done"]
    for name, expected in (("done", done), ("terminated", terminated), ("truncated", done & ~terminated)):
        assert torch.equal(sample["next", name], expected), name


def test_done_and_truncated_alone_do_not_tell_what_terminated():
    data = transitions()
    del data["next", "terminated"]
    with pytest.raises(ValueError, match=r"do not tell what terminated: set \('next', 'terminated'\)"):
        make().extend(data)
    data = data.exclude(("next", "done"))
    with pytest.raises(ValueError, match=r"neither .*'done'.* nor .*'terminated'"):
        make().extend(data)


@pytest.mark.parametrize("n_step", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float64, (1,)), (torch.float32, (2,)), (torch.float16, ())]
)
def test_n_step_rewards_of_any_shape(n_step, dtype, shape):
    data = transitions()
    data["next", "reward"] = torch.randn(24, *shape).to(dtype)
    data["next", "step_count"] = torch.arange(24)
    data["when"] = torch.arange(24)
    buffer = make(n_step=n_step, gamma=0.9)
    buffer.extend(data)
    sample = buffer.sample(64)
    rewards, done = data["next", "reward"].double(), data["next", "done"][:, 0]
    for i, start in enumerate(sample["index"].tolist()):
        expected, t = rewards[start].clone(), start
        while t + 1 < start + n_step and not done[t]:
            t += 1
            expected += 0.9 ** (t - start) * rewards[t]
        assert torch.equal(sample["next", "reward"][i], expected.to(dtype))
        assert sample["next", "step_count"][i] == t
        assert sample["steps_to_next_obs"][i] == t - start + 1
        assert sample["when"][i] == start
        assert sample["next", "done"][i] == done[t]
        assert torch.equal(sample["next", "observation"][i], data["next", "observation"][t])


def test_integer_rewards_have_no_discounted_sums():
    data = transitions()
    data["next", "reward"] = torch.ones(24, 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"\('next', 'reward'\) is torch.int64.*n_step=3.*cast it to torch.float32"
    ):
        make(n_step=3).extend(data)


def test_lazy_stacks_of_the_same_and_of_different_entries():
    rows = [row.clone() for row in transitions(extra=torch.randn(24, 2)).unbind(0)]
    assert_as_torchrl(make(), LazyStackedTensorDict.lazy_stack(rows, 0))
    halves = [LazyStackedTensorDict.lazy_stack(rows[i : i + 12], 0) for i in (0, 12)]
    assert_as_torchrl(make(num_envs=2), LazyStackedTensorDict.lazy_stack(halves, 0))
    rows[7]["only"] = torch.ones(1)
    rows[9]["next", "only"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"only some .* have 'only', \('next', 'only'\)"):
        make().extend(LazyStackedTensorDict.lazy_stack(rows, 0))
    del rows[7]["only"], rows[9]["next", "only"]
    rows[3]["extra"] = torch.ones(5)
    with pytest.raises(ValueError, match="'extra' cannot be stacked"):
        make().extend(LazyStackedTensorDict.lazy_stack(rows, 0))


def test_memory_mapped_locked_and_gradient_carrying_tensordicts(tmp_path):
    data = transitions(extra=torch.randn(24, 2))
    assert_as_torchrl(make(), data.clone().memmap(tmp_path), data.clone().lock_())
    data["value"] = torch.randn(24, requires_grad=True) * 2
    buffer = make()
    assert torch.equal(buffer[buffer.extend(data)]["value"], data["value"])
    with pytest.raises(NotImplementedError, match="meta"):
        make().extend(transitions().to("meta"))


@pytest.mark.parametrize("names", [None, ["env", "time"], ["time", "env"]])
def test_time_is_where_its_name_is(names):
    data = torch.stack([transitions() for _ in range(3)])
    if names:
        data = (data if names[0] == "env" else data.transpose(0, 1).contiguous()).refine_names(*names)
    buffer = make(num_envs=3)
    assert_as_torchrl(buffer, data)
    assert int(buffer.buffer.state_dict()["tensors"]["written.observation"].sum()) == 3 * (24 + 4)


def test_empty_tensordicts_and_padding():
    data, buffer = transitions(), make(num_envs=2)
    assert buffer.extend(data[:0]).shape == (0,)
    assert buffer.extend(data[:0].reshape(2, 0)).shape == (0,)
    assert len(buffer) == 0
    data["collector", "mask"] = torch.arange(24) < 20
    with pytest.raises(ValueError, match=r"\('collector', 'mask'\) is False in some rows.*padding"):
        buffer.extend(data)
    buffer.extend(data[data["collector", "mask"]].reshape(2, 10))
    assert len(buffer) == 20


def test_flat_rows_of_unknown_environments_are_said_to_be():
    with pytest.warns(UserWarning, match=r"which of the 3 environments.*\('collector', 'traj_ids'\)"):
        make(num_envs=3).extend(transitions())
    data = transitions()
    data["collector", "traj_ids"] = torch.zeros(24, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'traj_ids'\) are 48 values .* for 24 rows"):
        make(num_envs=3).extend(data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_negative_zero_continues_a_stream(dtype):
    data = transitions(n=4, episode=9, dtype=dtype)
    data["observation"], data["next", "observation"] = torch.zeros(2, 4, 3, dtype=dtype)
    data["observation"][1:] = -0.0
    data["next", "reward"] = torch.ones(4, 1)
    buffer = make(n_step=3, gamma=1.0)
    buffer.extend(data)
    assert buffer[[0]]["next", "reward"].item() == 3
    assert buffer.buffer.jumps == 0
