"""What the agent sees of a frame, with each augmentation of its replay."""

import pytest
import torch
from small_runs import roundless

from covr_fast import Trainer, load_policy
from covr_fast.errors import UserError
from covr_fast.view import agent_obs_shape, agent_view


@pytest.mark.parametrize("augment, border", [("none", 0), ("shift", 0), ("crop", -3), ("translate", 3)])
def test_the_agent_sees_the_centre_of_its_augmentation(augment, border):
    config = roundless(env__width=52, replay__augment=augment, replay__pad=3)
    channels, height, width = config.env.obs_shape
    frames = torch.randint(1, 256, (2, channels, height, width), dtype=torch.uint8)
    seen = agent_view(config, frames)
    assert seen.shape[1:] == agent_obs_shape(config) == (channels, 48 + 2 * border, 52 + 2 * border)
    if border <= 0:
        assert torch.equal(seen, frames[..., -border : 48 + border, -border : 52 + border])
        return
    assert torch.equal(seen[..., border : border + 48, border : border + 52], frames)
    assert (seen > 0).sum() == frames.numel()  # black around it


def test_an_agent_learns_from_translated_pictures_and_acts_on_centred_ones(tmp_path):
    trainer = Trainer(roundless(steps=48, replay__augment="translate", replay__pad=2), tmp_path)
    trained_on = []
    update = trainer.agent.update

    def watched(batch, *, guide):
        trained_on.append(batch)
        return update(batch, guide=guide)

    trainer.agent.update = watched
    trainer.run()
    assert {batch.obs.shape[2:] for batch in trained_on} == {(52, 52)}
    assert all(torch.equal(batch.obs_offset, batch.next_obs_offset) for batch in trained_on)
    frames = torch.randint(0, 256, (2, *trainer.envs.obs_shape), dtype=torch.uint8)
    centred = torch.zeros(2, frames.shape[1], 52, 52, dtype=torch.uint8)
    centred[..., 2:50, 2:50] = frames
    action = trainer.agent.act(centred, explore=False).cpu().numpy()
    assert (load_policy(tmp_path)(frames.numpy()) == action).all()


def test_a_picture_is_not_surrounded_without_end():
    with pytest.raises(UserError, match=r"replay\.pad=1025 must be at most 1024"):
        roundless(replay__augment="translate", replay__pad=1025).check()
