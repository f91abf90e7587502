"""What would not come back as it went in is refused by name, and nothing of it is in the buffer."""

import pytest
import torch

pytest.importorskip("torchrl")
from tensordict import NonTensorData, NonTensorStack, TensorDict, tensorclass
from torchrl_peer import assert_as_torchrl, make, stacked, transitions

from covr_fast.integrations.torchrl import FastReplayBuffer


def assert_refused(buffer: FastReplayBuffer, data, error, match: str) -> None:
    """With the error, and with nothing of it in the buffer."""
    before = {name: tensor.clone() for name, tensor in buffer.buffer.state_dict()["tensors"].items()}
    with pytest.raises(error, match=match):
        buffer.extend(data)
    after = buffer.buffer.state_dict()["tensors"]
    assert all(torch.equal(before[name], after[name]) for name in before)


CHANGED = {
    "later at the root": (lambda d: d.set("new", torch.ones(24)), r"has 'new', which the first one had not"),
    "later under next": (lambda d: d["next"].set("new", torch.ones(24)), r"has \('next', 'new'\), which"),
    "later, nested": (lambda d: d.set(("a", "b"), torch.ones(24)), r"has \('a', 'b'\), which the first"),
    "missing": (lambda d: d.pop("extra"), r"lacks 'extra', which the first one had"),
    "missing observation": (lambda d: d["next"].pop("observation"), r"lacks \('next', 'observation'\)"),
    "missing end": (lambda d: d["next"].pop("truncated"), r"lacks \('next', 'truncated'\)"),
    "wide observation": (
        lambda d: d.set("observation", d["observation"].double()),
        r"'observation' has rows of torch.float64 \(3,\), the buffer holds rows of torch.float32 \(3,\)",
    ),
    "wide next observation": (
        lambda d: d["next"].set("observation", d["next", "observation"].double()),
        r"\('next', 'observation'\) has rows of torch.float64",
    ),
    "wide reward": (
        lambda d: d["next"].set("reward", d["next", "reward"].double()),
        r"\('next', 'reward'\) has rows of torch.float64 \(1,\), the buffer holds rows of torch.float32",
    ),
    "reward's shape": (
        lambda d: d["next"].set("reward", d["next", "reward"][:, 0]),
        r"\('next', 'reward'\) has rows of torch.float32 \(\)",
    ),
    "end's dtype": (
        lambda d: d["next"].set("done", d["next", "done"].to(torch.uint8)),
        r"\('next', 'done'\) has rows of torch.uint8",
    ),
    "action's dtype": (lambda d: d.set("action", d["action"].long()), r"'action' has rows of torch.int64"),
    "action's shape": (
        lambda d: d.set("action", torch.randn(24, 1, 2)),
        r"'action' has rows of torch.float32 \(1, 2\), the buffer holds rows of torch.float32 \(2,\)",
    ),
    "extra's dtype": (lambda d: d.set("extra", d["extra"].int()), r"'extra' has rows of torch.int32 \(2,\)"),
    "extra's shape": (lambda d: d.set("extra", torch.randn(24, 2, 1)), r"'extra' has rows of .* \(2, 1\)"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_entries_than_the_first_had_are_refused(change):
    buffer, data = make(), transitions(extra=torch.randn(24, 2))
    buffer.extend(data)
    mend, match = CHANGED[change]
    changed = data.clone()
    mend(changed)
    assert_refused(buffer, changed, ValueError, match)


@pytest.mark.parametrize(
    "key", ["action", "observation", "extra", ("next", "observation"), ("next", "reward")], ids=str
)
def test_nan_is_refused_before_anything_is_added(key):
    buffer, data = make(), transitions(extra=torch.randn(24, 2))
    buffer.extend(data)
    wrong = data.clone()
    wrong[key][17] = torch.nan
    assert_refused(buffer, wrong, ValueError, r"NaN.* in rows \[17\]: nothing was added")
    empty = make()
    with pytest.raises(ValueError, match="NaN"):
        empty.extend(wrong)
    assert len(empty) == 0


def test_infinite_logits_are_data_and_infinite_rewards_are_not():
    logits = torch.randn(24, 4)
    logits[::3, 1] = -torch.inf
    data = transitions(logits=logits)
    assert_as_torchrl(make(), data)
    data["next", "reward"][3] = torch.inf
    with pytest.raises(ValueError, match=r"\('next', 'reward'\) is NaN or infinite in rows \[3\]"):
        make().extend(data)
    data["next", "reward"] = torch.full((24, 1), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match="beyond the range of float32"):
        make().extend(data)


def test_what_is_no_stack_is_refused_before_anything_is_added():
    data = stacked(torch.randint(0, 256, (27, 1, 5, 4), dtype=torch.uint8))
    buffer = make(frame_stack=3)
    buffer.extend(data)
    data["next", "observation"][20, 0, 2, 2] += 1
    assert_refused(
        buffer, data, ValueError, r"\('next', 'observation'\) is not 'observation' moved on.* in rows \[20\]"
    )


@pytest.mark.parametrize(
    "text", [NonTensorData("left", batch_size=[24]), NonTensorStack(*("go" for _ in range(24)))]
)
def test_entries_that_are_no_tensors_are_refused(text):
    data = transitions()
    data["instruction"] = text
    with pytest.raises(
        TypeError, match=r"'instruction' is not a tensor.*tensordict.exclude\('instruction'\)"
    ):
        make().extend(data)
    buffer = make()
    buffer.extend(data.exclude("instruction"))
    assert len(buffer) == 24


def test_complex_numbers_are_refused():
    data = transitions(wave=torch.randn(24, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'wave' are complex.*torch.view_as_real"):
        make().extend(data)
    data["wave"] = torch.view_as_real(data["wave"])
    assert_as_torchrl(make(), data)


def test_tensorclasses_are_refused():
    @tensorclass
    class Camera:
        pose: torch.Tensor

    data = transitions()
    buffer = make()
    with pytest.raises(TypeError, match=r"got a Camera: it takes a TensorDict .*to_tensordict\(\)"):
        buffer.extend(Camera(pose=torch.ones(4), batch_size=[4]))
    with pytest.raises(TypeError, match="got a dict"):
        buffer.extend(data.to_dict())
    data["camera"] = Camera(pose=torch.randn(24, 3), batch_size=[24])
    with pytest.raises(TypeError, match=r"'camera' is a Camera.*to_tensordict\(\)"):
        buffer.extend(data)
    assert_as_torchrl(buffer, data.to_tensordict())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"obs_keys": "observation"}, TypeError, "obs_keys is 'observation': it must be a tuple of keys"),
        ({"obs_keys": (3,)}, TypeError, "obs_keys has 3"),
        ({"obs_keys": ()}, ValueError, "at least one key"),
        ({"obs_keys": ("a", ("a",))}, ValueError, "each once"),
        ({"obs_keys": (("next", "a"),)}, ValueError, "'next' is implied"),
        ({"capacity": 0}, ValueError, "capacity is 0"),
        ({"frame_stack": 0}, ValueError, "frame_stack is 0"),
        ({"frame_stack": "3"}, TypeError, "frame_stack is '3': it must be an integer"),
        ({"n_step": 0}, ValueError, "n_step is 0"),
        ({"gamma": 1.5}, ValueError, "gamma is 1.5"),
        ({"sampler": "best"}, ValueError, "sampler is 'best'"),
        ({"pixels_dtype": torch.float64}, ValueError, "pixels_dtype is torch.float64"),
    ],
)
def test_arguments_are_refused_at_once(options, error, match):
    with pytest.raises(error, match=match):
        make(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"obs_keys": ("agent", "pixels")},
            r"'agent' of obs_keys is a nested tensordict.*\('agent', \.\.\.\)",
        ),
        ({"obs_keys": (("agent", "pixel"),)}, r"lacks \('agent', 'pixel'\) of obs_keys: it has .*'pixels'"),
        ({"action_key": "act"}, "lacks 'act' of action_key"),
        ({"action_key": "nothing"}, r"'nothing' of action_key has rows \(2, 0\), which hold no value"),
        ({"reward_key": ("agent", "reward")}, r"lacks \('next', 'agent', 'reward'\) of reward_key"),
    ],
)
def test_keys_that_do_not_fit_are_named(options, match):
    data = transitions()
    data["agent"] = TensorDict({"pixels": torch.randn(24)}, [24])
    data["nothing"] = torch.ones(24, 2, 0)
    with pytest.raises(ValueError, match=match):
        make(**options).extend(data)


def test_priorities_beyond_the_trees_range_are_refused_before_anything_is_added():
    buffer = make(sampler="prioritized")
    buffer.extend(transitions(td_error=torch.ones(24, dtype=torch.float64)))
    wrong = transitions(td_error=torch.full((24,), 1e300, dtype=torch.float64))
    assert_refused(buffer, wrong, ValueError, "'td_error' is NaN or infinite, or beyond float32")
