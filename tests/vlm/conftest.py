import pytest
import torch

from covr_fast.vlm import ActionPrior


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small for more, and other test runs share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
