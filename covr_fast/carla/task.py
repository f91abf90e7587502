"""CARLA's scenarios as tasks, and what a VLM is told of them."""

from typing import TYPE_CHECKING

from ..words import Words
from .address import Address
from .connection import Server
from .drive import Drive
from .highway import HIGHWAY
from .scene import Scenario
from .simulator import CarlaSimulator
from .street import STREET

if TYPE_CHECKING:
    from ..env_config import EnvConfig

_CAR = "You drive a car. The picture is the view from the front of its roof, looking ahead. {} "
_ACTIONS = (
    "Number 1 steers: -1 is fully left, 1 is fully right. Number 2 is the pedals: -1 is full brake, 1 is "
    "full throttle."
)
_NAMES = ("left/right", "brake/throttle")

SCENARIOS: dict[str, tuple[Scenario, Words]] = {
    "carla-highway": (
        HIGHWAY,
        Words(
            _CAR.format(
                "It is on a highway with four lanes and other vehicles ahead. Drive along the highway fast, "
                "stay on it, and do not hit the other vehicles."
            )
            + _ACTIONS,
            _NAMES,
        ),
    ),
    "carla-pedestrians": (
        STREET,
        Words(
            _CAR.format(
                "It is in a street with one lane per direction and parked cars at both sides, from behind "
                "which pedestrians step out. Drive along the street, stay on it, and brake in time for "
                "pedestrians."
            )
            + _ACTIONS,
            _NAMES,
        ),
    ),
}
"""By id, the scenario and its words."""


def carla_simulator(config: "EnvConfig", seed: int) -> CarlaSimulator:
    """A batch of config.batch_size environments, whose seeds are seed, seed + 1, ...

    Raises:
        UserError: the client is not installed, or a server is missing or does not fit.
    """
    scenario, _ = SCENARIOS[config.id]

    def open_drive(address: Address, number: int) -> Drive:
        return Drive(
            Server(address, scenario.map_name, seed=seed + number),
            scenario,
            seed=seed + number,
            max_frames=config.max_episode_steps,
            height=config.height,
            width=config.width,
        )

    return CarlaSimulator(open_drive, config.batch_size, Address.parse(config.server))
