"""Where the CARLA servers of this process listen: one server per environment."""

import re
import threading
from dataclasses import dataclass

from ..errors import UserError

STRIDE = 10
"""From the port of one environment's server to the next. A server takes its port and the two after it."""
LAST_PORT = 50_000
"""The last that env.server may name: room for the servers after it, and for the traffic managers' ports."""

_IN_USE: set["Address"] = set()
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> "Address":
        """The address that `env.server` names.

        Raises:
            UserError: it is not HOST:PORT.
        """
        parts = re.fullmatch(r"([^\s:]+):(\d{1,5})", text)
        if parts is None or not 1 <= int(parts[2]) <= LAST_PORT:
            raise UserError(
                f"env.server={text!r} must be HOST:PORT with a port from 1 to {LAST_PORT}, "
                "such as localhost:2000"
            )
        return Address(parts[1], int(parts[2]))

    @property
    def traffic_port(self) -> int:
        """Port of the traffic manager, which runs in our process. For CARLA's default 2000 it is 8000, its
        default too."""
        return self.port + 6000

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def lease(first: Address) -> Address:
    """The first address in first.port, first.port + STRIDE, ... that nothing in this process uses, until
    `release`: a training run holds its servers while its evaluations need others."""
    with _LOCK:
        address = first
        while address in _IN_USE:
            address = Address(address.host, address.port + STRIDE)
        _IN_USE.add(address)
        return address


def release(address: Address) -> None:
    """Lets others lease the address."""
    with _LOCK:
        _IN_USE.discard(address)
