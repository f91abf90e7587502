"""The serving vision tower against transformers' modules."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_tuner import QUICK, colours
from tiny import WRITERS

from covr_fast.vlm import ActionPrior, VLMTuner
from covr_fast.vlm.decode.tower import ServingTower, make_tower
from covr_fast.vlm.model import nano
from covr_fast.vlm.model.backbones import Backbone

# 56: one block of 2x2 image tokens a window, 16 patches. Two frames fill a temporal patch, as in real ones.
SMALL_WINDOWS = {"window_size": 56, "depth": 3, "fullatt_block_indexes": [1], "temporal_patch_size": 2}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Opens a checkpoint like nano whose tower has other settings."""

    def write(**vision) -> ActionPrior:
        for name, value in vision.items():
            monkeypatch.setitem(nano.VISION, name, value)
        nano.write_nano(tmp_path, seed=0)
        return ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu")

    return write


def random_frames(batch: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch)
    )


@torch.no_grad()
def assert_equal(tower: ServingTower | None, backbone: Backbone, frames: torch.Tensor) -> None:
    assert tower is not None
    expected = backbone.image_features(backbone.pixels(frames), len(frames), tuple(frames.shape[2:]))
    got = tower(frames)
    assert got.deep == ()
    torch.testing.assert_close(got.tokens, expected.tokens, rtol=1e-4, atol=3e-5)


def randomize(parameters) -> None:
    """Biases too, which a fresh checkpoint has at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# One window, one of a resized frame, two side by side (their patches change places), one above the other.
@pytest.mark.parametrize("size", [(84, 84), (50, 110), (56, 224), (224, 56)])
@pytest.mark.parametrize("batch", [1, 5])
def test_nano(shared_nano, size, batch):
    backbone = shared_nano.backbone
    assert_equal(make_tower(backbone, size), backbone, random_frames(batch, size))


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"hidden_size": 96, "num_heads": 2, "intermediate_size": 200},
        {"hidden_size": 80, "num_heads": 1, "fullatt_block_indexes": [0, 2]},
    ],
)
def test_other_towers(write, vision):
    """Heads of 32, 48 and 80 numbers, several small windows a frame, biases."""
    backbone = write(**SMALL_WINDOWS | vision).backbone
    randomize(backbone.tower.parameters())
    for size in ((112, 112), (56, 112), (112, 56)):
        assert_equal(make_tower(backbone, size), backbone, random_frames(3, size))


def test_frames_do_not_depend_on_their_batch_or_on_threads(write):
    """But for the rounding of torch's products, which threads may divide."""
    backbone = write(**SMALL_WINDOWS).backbone
    tower = make_tower(backbone, (112, 112))
    frames = random_frames(4, (112, 112))
    together = tower(frames).tokens
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = torch.cat([tower(frame[None]).tokens for frame in frames])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=3e-5)
        assert_equal(tower, backbone, frames)


@pytest.mark.parametrize("size", [(84, 84), (56, 224)])
def test_the_prior_uses_it(shared_nano, size, monkeypatch):
    def called(*_args):
        raise AssertionError("transformers' tower was called")

    frames = random_frames(4, size)
    slow = shared_nano.reference(frames)
    monkeypatch.setattr(shared_nano.backbone, "image_features", called)
    assert torch.equal(shared_nano(frames).token_ids, slow.token_ids)


# ---------------------------------------------------------------------- where it cannot run


def test_windows_of_several_sizes(shared_nano):
    """Five image tokens side by side are windows of four and of one."""
    size = (56, 140)
    assert make_tower(shared_nano.backbone, size) is None
    frames = random_frames(4, size)
    assert torch.equal(shared_nano(frames).token_ids, shared_nano.reference(frames).token_ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    prior = ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", dtype=dtype)
    assert make_tower(prior.backbone, (84, 84)) is None
    prior(random_frames(2, (84, 84)))


@pytest.mark.parametrize("vision", [{"num_heads": 16}, {"hidden_act": "gelu"}])
def test_layers_that_cpp_does_not_have(write, vision):
    """Heads of 8 numbers, another activation."""
    prior = write(**vision)
    assert make_tower(prior.backbone, (84, 84)) is None
    frames = random_frames(4, (84, 84))
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_architectures(name, tmp_path):
    WRITERS[name](tmp_path)
    prior = ActionPrior.from_pretrained(tmp_path, action_dim=2, prompt="Drive.", device="cpu")
    assert (make_tower(prior.backbone, (84, 84)) is not None) == (name == "qwen2_5_vl")


# ---------------------------------------------------------------------- other weights


def test_published_weights(nano):
    """A round that trains all weights: answers are of the new tower, and come from the one that is served."""
    frames, actions = colours(60)
    nano(frames[:4])
    before = nano._towers[56, 56]
    tuner = VLMTuner(nano, QUICK)
    tuner.start(frames, actions, torch.ones(60))
    tuner.wait()
    tuner.publish()
    assert torch.equal(nano(frames[:4]).token_ids, nano.reference(frames[:4]).token_ids)
    after = nano._towers[56, 56]
    assert_equal(after, nano.backbone, frames[:4])
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(before, nano.backbone, frames[:4])


def test_adapters(nano):
    """LoRA on every linear layer of the tower, as fine-tuned checkpoints may have it."""
    backbone = nano.backbone
    layers = r".*visual\.(blocks\..*(qkv|proj|gate_proj|up_proj|down_proj)|merger\.mlp\.[02])"
    config = LoraConfig(r=4, target_modules=layers, bias="none")
    backbone.model = get_peft_model(backbone.model, config)
    randomize(p for p in backbone.model.parameters() if p.requires_grad)
    assert_equal(make_tower(backbone, (84, 84)), backbone, random_frames(2, (84, 84)))
