import pytest
import torch

from covr_fast.vlm import ActionPrior


@pytest.fixture
def nano() -> ActionPrior:
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)


@pytest.fixture(scope="session")
def shared_nano() -> ActionPrior:
    """For tests that leave the weights alone."""
    return ActionPrior.from_pretrained("nano", action_dim=2, device="cpu", seed=0)


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(
        0, 256, (5, 3, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
