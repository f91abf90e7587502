"""Where the CARLA servers of this process listen: one server per environment."""

import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from ..errors import UserError

STRIDE = 10
"""From the port of one environment's server to the next. A server takes its port and the two after it."""
LAST_PORT = 50_000
"""The last that env.server may name: room for the servers after it, and for the traffic managers' ports."""
LARGEST_PORT = 65_535

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


@cache
def traffic_port(address: Address) -> int:
    """The port of the address' traffic manager, which runs in this process from then on: the first free one
    of this machine from address.port + 6000 (CARLA's defaults, 2000 and 8000) in steps of STRIDE. At a port
    in use, CARLA's client would silently become a client of the traffic manager there, which drives another
    server's cars.

    Raises:
        UserError: none is free.
    """
    for port in range(address.port + 6000, LARGEST_PORT, STRIDE):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"no port from {address.port + 6000} on is free here for CARLA's traffic manager")
