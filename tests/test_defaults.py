"""Results do not depend on torch's default dtype and device, which other libraries change while they work."""

import threading
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_runs import small_config
from tensordict import TensorDict

from covr_fast import ReplayBuffer, Trainer, ops
from covr_fast.agents import SAC, AgentConfig
from covr_fast.buffer import FineTuneView, Prioritized, Recent
from covr_fast.integrations import sb3, torchrl
from covr_fast.vlm import ActionPrior


@contextmanager
def defaults(name: str):
    """torch's default dtype, or device, is the one of this name; then the usual one again."""
    if name == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["float64", "bfloat16", "float16", "meta"])
def unchanged(request):
    """Asserts that calls give the same under other defaults of torch."""

    def check(use: Callable, *arguments) -> None:
        expected = use(*arguments)
        with defaults(request.param):
            ours = use(*arguments)
        assert_same(ours, expected)

    check.defaults = lambda: defaults(request.param)
    return check


def drive(buffer: ReplayBuffer, steps: int = 24) -> ReplayBuffer:
    """Stacks of three frames, two environments, an episode every nine steps."""
    frames = np.random.default_rng(0).integers(0, 256, (steps + 3, 2, 1, 16, 16), np.uint8)
    for t in range(steps):
        end = np.full(2, t % 9 == 8)
        if t % 9 == 0:
            stack = [frames[t]] * 3
        following = [*stack[1:], frames[t + 1]]
        buffer.add(
            np.concatenate(stack, 1),
            np.full((2, 2), t, np.float32),
            np.full(2, t, np.float32),
            np.concatenate(following, 1),
            end,
            np.zeros(2, bool),
            prior=np.full((2, 3), t, np.float32),
        )
        stack = following
    return buffer


def make_buffer(sampler="uniform") -> ReplayBuffer:
    buffer = ReplayBuffer(
        64, num_envs=2, obs_shape=(3, 16, 16), action_shape=(2,), frame_stack=3, n_step=3, sampler=sampler,
        seed=0, extras={"prior": (3,)},
    )  # fmt: skip
    return drive(buffer)


def fields(batch) -> dict[str, torch.Tensor]:
    named = {name: getattr(batch, name) for name in batch.__dataclass_fields__ if name != "extras"}
    return {name: value for name, value in (named | batch.extras).items() if value is not None}


def use_buffer(sampler, path) -> list[dict[str, torch.Tensor]]:
    buffer = make_buffer(sampler)
    batches = [buffer.sample(8, augment="shift"), buffer.sample(8, dtype=torch.uint8, augment="crop", pad=2)]
    batches.append(buffer.sample(8, dtype=torch.float16, memory_format=torch.channels_last))
    if isinstance(sampler, Prioritized):
        buffer.update_priorities(batches[0].index, np.arange(8.0))
        batches.append(buffer.sample(8))
    with buffer.prefetch(8) as coming:
        batches += [next(coming), next(coming)]
    buffer.save(path)
    loaded = ReplayBuffer.load(path)
    batches += [loaded.sample(8), loaded.get([0, 3, 5], n_step=2)]
    index = batches[0].index
    loaded.set_extras(index[:1], prior=np.full((1, 3), 0.5))
    view = FineTuneView(loaded, 0.9)
    short = FineTuneView(loaded, 0.9, horizon=4)
    return [
        *map(fields, batches),
        {"obs": loaded.observations(index), "frames": loaded.frames(index), "stored": loaded.contains(index)},
        {"action": loaded.actions(index), **loaded.extras(index)},
        {"ids": view.indices, "returns": view.returns, "time": view.time_in_episode, "short": short.returns},
    ]


def assert_same(ours, expected) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            assert one[name].device.type == "cpu", name
            assert np.array_equal(one[name].detach().numpy(), other[name].detach().numpy()), name


@pytest.mark.parametrize("sampler", ["uniform", Recent(eta=0.99, floor=4), Prioritized()], ids=str)
def test_buffer(unchanged, sampler, tmp_path):
    unchanged(use_buffer, sampler, tmp_path / "saved")


def given() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float32, device="cpu")

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g, device="cpu")

    return {
        "rewards": rand(40, 3),
        "ends": rand(40, 3) < 0.1,
        "returns": rand(200) - 0.5,
        "many": rand(5000) - 0.5,
        "logits": rand(2, 5, 17),
        "hidden": rand(2, 5, 8),
        "head": rand(17, 8),
        "labels": below(17, 2, 5),
        "weights": rand(2),
        "frames": below(256, 4, 3, 12, 12).to(torch.uint8),
        "offsets": below(5, 4, 2),
        "indices": below(50, 30),
        "priorities": rand(30),
    }


def use_ops(x: dict[str, torch.Tensor], backend: str) -> list[dict[str, torch.Tensor]]:
    logits, hidden, head = (x[name].clone().requires_grad_() for name in ("logits", "hidden", "head"))
    labels, weights = x["labels"], x["weights"]
    plain = ops.return_weighted_cross_entropy(logits, labels, weights, backend=backend)
    fused = ops.return_weighted_linear_cross_entropy(
        hidden, head, labels, weights, label_smoothing=0.1, backend=backend
    )
    (plain + fused).backward()
    tree = ops.SumTree(50, "cpu", backend=backend)
    tree.update(x["indices"], x["priorities"])
    leaves, probabilities = tree.sample(16, torch.Generator().manual_seed(3))
    few = ops.exploration_filter(x["returns"], 0.5, backend=backend)
    many = ops.exploration_filter(x["many"], 0.5, backend=backend)
    assert few.tau == pytest.approx(ops.exploration_filter(x["returns"], 0.5, backend="reference").tau)
    return [
        {"returns": ops.discounted_returns(x["rewards"], x["ends"], 0.9, backend=backend)},
        {"few": few.indices, "many": many.indices},
        {"weights": ops.return_weights(x["returns"], backend=backend)},
        {"loss": plain, "logits": logits.grad},
        {"loss": fused, "hidden": hidden.grad, "head": head.grad},
        {"leaves": leaves, "probabilities": probabilities, "priorities": tree.priorities},
        {
            "shift": ops.random_shift(x["frames"], x["offsets"], 2, backend=backend),
            "crop": ops.random_crop(x["frames"], x["offsets"], 8, dtype=torch.float16, backend=backend),
        },
    ]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_ops(unchanged, backend):
    unchanged(use_ops, given(), backend)


def use_agent(buffer: ReplayBuffer) -> list[dict[str, torch.Tensor]]:
    small = AgentConfig(channels=(4, 4), strides=(2, 2), latent=8, hidden=16)
    agent = SAC((3, 16, 16), (2,), small, seed=0)
    batch = buffer.get(range(8))
    batch.extras["prior"], batch.extras["prior_mask"] = batch.action, torch.ones_like(batch.reward)
    metrics = [agent.update(batch, guide=guide) for guide in (False, True)]
    obs = (batch.obs * 255).to(torch.uint8)
    acted = {"acted": agent.act(obs), "mean": agent.act(obs, explore=False), "value": agent.value(obs)}
    return [*metrics, acted, dict(agent.actor.state_dict())]


def test_agent(unchanged):
    """Its first weights are drawn in the default dtype's own way, but are float32 and of the same law."""
    unchanged(use_agent, make_buffer())


@pytest.fixture(scope="module")
def nano() -> ActionPrior:
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)


def frames_of(size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(size)
    return torch.randint(256, (3, 3, size, size), generator=g, device="cpu").to(torch.uint8)


def use_prior(prior: ActionPrior, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    batch = prior(images)
    pixels = prior.backbone.pixels(images)
    return [{"tokens": batch.token_ids, "action": batch.action, "pixels": pixels}]


def test_prior(unchanged, nano):
    unchanged(use_prior, nano, frames_of(48))


def test_what_a_prior_makes_at_its_first_call(unchanged, nano):
    """The tower, the prompt's cache and the tables of its decoder."""
    images = frames_of(64)
    first = ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)
    with unchanged.defaults():
        ours = use_prior(first, images)
    assert_same(ours, use_prior(nano, images))


def use_torchrl() -> list[dict[str, torch.Tensor]]:
    buffer = torchrl.FastReplayBuffer(100, obs_keys=("observation",), seed=0)
    states = torch.linspace(0, 1, 42, dtype=torch.float32, device="cpu").view(21, 2)
    following = {
        "observation": states[1:],
        "reward": states[1:, :1],
        "done": torch.zeros(20, 1, dtype=torch.bool, device="cpu"),
        "terminated": torch.zeros(20, 1, dtype=torch.bool, device="cpu"),
    }
    buffer.extend(
        TensorDict({"observation": states[:-1], "action": states[1:], "next": following}, batch_size=[20])
    )
    again = torchrl.FastReplayBuffer(100, obs_keys=("observation",), seed=0)
    again.load_state_dict(buffer.state_dict())
    return [dict(each.sample(8).flatten_keys(".").items()) for each in (buffer, again)]


def test_torchrl_drop_in(unchanged):
    unchanged(use_torchrl)


def use_sb3() -> list[dict[str, torch.Tensor]]:
    space = spaces.Box(0, 255, (3, 16, 16), np.uint8)
    buffer = sb3.FastReplayBuffer(40, space, spaces.Box(-1, 1, (2,)), "cpu", n_steps=2, gamma=0.9)
    frames = np.random.default_rng(0).integers(0, 256, (23, 1, 16, 16), np.uint8)
    for t in range(20):
        stacks = [np.concatenate(frames[i : i + 3])[None] for i in (t, t + 1)]
        buffer.add(*stacks, np.full((1, 2), t / 20), np.ones(1), np.array([t % 7 == 6]), [{}])
    np.random.seed(0)  # noqa: NPY002
    return [buffer.sample(8)._asdict(), {"rewards": torch.from_numpy(buffer.rewards)}]


def test_sb3_drop_in(unchanged):
    unchanged(use_sb3)


@pytest.mark.parametrize("name", ["float64", "meta"])
def test_a_whole_run(name, tmp_path):
    expected = Trainer(small_config(), tmp_path / "expected").run()
    with defaults(name):
        ours = Trainer(small_config(), tmp_path / "ours").run()
    assert ours["evaluations"] == expected["evaluations"]
    for loss in ("loss_before", "loss_after"):
        assert [r[loss] for r in ours["rounds"]] == [r[loss] for r in expected["rounds"]]


def test_batches_stay_right_while_another_thread_changes_the_default():
    """As transformers does while it loads a model."""
    expected, ours = (make_buffer(Prioritized()) for _ in range(2))
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
                torch.set_default_dtype(dtype)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        sampled = [fields(ours.sample(16)) for _ in range(300)]
        made = make_buffer("recent")
    finally:
        stop.set()
        thread.join()
        torch.set_default_dtype(torch.float32)
    assert_same(sampled, [fields(expected.sample(16)) for _ in range(300)])
    assert_same([fields(made.sample(16))], [fields(make_buffer("recent").sample(16))])
