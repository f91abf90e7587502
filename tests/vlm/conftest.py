import pytest
import torch
from tiny import SIZES, WRITERS, open_prior, random_frames

from covr_fast.vlm import ActionPrior


@pytest.fixture
def nano() -> ActionPrior:
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)


@pytest.fixture(scope="session")
def shared_nano() -> ActionPrior:
    """For tests that leave the weights alone."""
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)


@pytest.fixture(scope="module", params=sorted(WRITERS))
def checkpoint(request, tmp_path_factory):
    """The directory of a tiny checkpoint of every architecture; it has the architecture's name."""
    directory = tmp_path_factory.mktemp("checkpoints") / request.param
    directory.mkdir()
    WRITERS[request.param](directory)
    return directory


@pytest.fixture
def opened(checkpoint):
    return open_prior(checkpoint), random_frames(SIZES.get(checkpoint.name, (64, 64)))


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(
        0, 256, (5, 3, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
