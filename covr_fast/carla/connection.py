"""The connection to one CARLA server, whose world stands still until we ask for its next frame."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ..errors import UserError
from .address import Address, traffic_port

SECONDS = 0.05
"""Simulated seconds per frame: 20 frames a second, as in Zhang et al. 2021 (DBC) and Xu et al. 2024 (DMR)."""
ANSWER_SECONDS = 10.0
"""Wall-clock seconds until a server has to answer, for a frame too."""
LOAD_SECONDS = 120.0
"""Wall-clock seconds until it has to have loaded a map."""


def import_carla() -> Any:
    """The client's module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import carla
    except ImportError as error:
        raise UserError(
            f"CARLA's client is missing ({error}): pip install 'covr-fast[carla]' "
            "(it exists for Linux on x86_64 with Python 3.10 to 3.12)"
        ) from error
    return carla


class Server:
    """A server with a freshly loaded map, in synchronous mode with a fixed time step.

    Attributes:
        client, world, map, traffic: CARLA's objects; `traffic` is the traffic manager.
        lost: whether it has stopped answering. Then nothing more is asked of it.
    """

    def __init__(self, address: Address, map_name: str, *, seed: int) -> None:
        """Connects, checks versions, and loads the map, which destroys whatever an earlier client left.

        Raises:
            UserError: the client is not installed, no server answers, its version is not the client's, it has
                no such map, or it fails meanwhile.
        """
        carla = import_carla()
        self.address = address
        self.lost = False
        self._restore = ExitStack()
        self.client = self._connect(carla)
        try:
            with self.answering():
                self._check_map(map_name)
                self._begin(carla, map_name, seed)
        except BaseException:
            self.close()
            raise

    def tick(self) -> int:
        """Simulates one frame; returns its number."""
        return int(self.world.tick())

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turns errors of CARLA's client in the block into a UserError that says what to do."""
        try:
            yield
        except RuntimeError as error:
            self.lost = "time-out" in str(error)
            raise UserError(
                f"the CARLA server at {self.address} failed ({_line(error)}): start it again "
                f"({_start(self.address)}); a training run then goes on with --resume"
            ) from error

    def close(self) -> None:
        """Gives the server back as it was: it runs by itself again. A second call does nothing."""
        undo = self._restore.pop_all()
        if not self.lost:
            with suppress(RuntimeError):  # it died after its last answer, and nothing of it is left
                undo.close()

    def _connect(self, carla: Any) -> Any:
        try:
            client = carla.Client(self.address.host, self.address.port)
            client.set_timeout(ANSWER_SECONDS)
            theirs = client.get_server_version()
        except RuntimeError as error:
            raise UserError(
                f"no CARLA server answers at {self.address} ({_line(error)}): start one with "
                f"{_start(self.address)}, or name another by env.server. Every environment needs one of its "
                "own, and so do evaluations during a run (docs/carla.md)"
            ) from error
        ours = client.get_client_version()
        if theirs != ours:
            raise UserError(
                f"the CARLA server at {self.address} has version {theirs}, but the client is {ours}: "
                f"start CARLA {ours}"
            )
        return client

    def _check_map(self, name: str) -> None:
        names = sorted(path.rpartition("/")[2] for path in self.client.get_available_maps())
        if name not in names:
            raise UserError(
                f"the CARLA server at {self.address} has no map {name} (it has {', '.join(names)}): "
                "start the server of CARLA's own package, which has it"
            )

    def _begin(self, carla: Any, map_name: str, seed: int) -> None:
        self.client.set_timeout(LOAD_SECONDS)
        self.world = self.client.load_world(map_name)
        self.map = self.world.get_map()
        self._restore.callback(self.world.apply_settings, self.world.get_settings())
        settings = self.world.get_settings()
        settings.synchronous_mode = True
        settings.fixed_delta_seconds = SECONDS
        self.world.apply_settings(settings)
        self.traffic = self.client.get_trafficmanager(traffic_port(self.address))
        self._restore.callback(self.traffic.set_synchronous_mode, False)
        self.traffic.set_synchronous_mode(True)
        self.traffic.set_random_device_seed(seed)
        self.world.set_weather(carla.WeatherParameters.ClearNoon)
        self.client.set_timeout(ANSWER_SECONDS)


def _start(address: Address) -> str:
    return f"./CarlaUE4.sh -RenderOffScreen -carla-rpc-port={address.port}"


def _line(error: RuntimeError) -> str:
    return " ".join(str(error).split())
