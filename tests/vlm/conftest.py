import pytest
import torch
from tiny import WRITERS, frames_for, make_nano, open_prior, random_frames, write_checkpoint

from covr_fast.vlm import ActionPrior


@pytest.fixture
def nano() -> ActionPrior:
    return make_nano()


@pytest.fixture(scope="session")
def shared_nano() -> ActionPrior:
    """For tests that leave the weights alone."""
    return make_nano()


@pytest.fixture(scope="module", params=sorted(WRITERS))
def checkpoint(request, tmp_path_factory):
    """The directory of a tiny checkpoint of every architecture; it has the architecture's name."""
    return write_checkpoint(request.param, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def opened(checkpoint):
    return open_prior(checkpoint), frames_for(checkpoint)


@pytest.fixture
def frames() -> torch.Tensor:
    return random_frames((84, 84), 5, seed=1)
