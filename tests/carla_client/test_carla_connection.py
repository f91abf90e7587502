"""Servers that are missing, do not fit, or die; and that nothing of us is left on them."""

import socket

import pytest
from carla_maps import carla
from carla_stand_in import Running

from covr_fast.carla import address, connection
from covr_fast.carla.address import Address, lease, release, traffic_port
from covr_fast.carla.connection import Server
from covr_fast.errors import UserError

HERE = Address("localhost", 2000)


# ---- the real client, without a server -------------------------------------------------------------


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.3)
    with pytest.raises(
        UserError,
        match=r"no CARLA server answers at localhost:1 \(time-out of 300ms .*\): start one with "
        r"./CarlaUE4.sh -RenderOffScreen -carla-rpc-port=1, or name another by env.server",
    ):
        Server(Address("localhost", 1), "Town04", seed=0)


def test_something_else_listens_there(monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match=rf"no CARLA server answers at 127.0.0.1:{port} \(time-out"):
            Server(Address("127.0.0.1", port), "Town04", seed=0)


def test_no_such_host():
    with pytest.raises(UserError, match=r"no CARLA server answers at no.such.host.invalid:2000 \(resolve: "):
        Server(Address("no.such.host.invalid", 2000), "Town04", seed=0)


# ---- against the stand-in --------------------------------------------------------------------------


def test_the_world_waits_for_us_and_runs_by_itself_afterwards(servers):
    servers["localhost", 2000] = running = Running()
    server = Server(HERE, "Town04", seed=7)
    settings = running.world.get_settings()
    assert settings.synchronous_mode
    assert settings.fixed_delta_seconds == pytest.approx(0.05)
    assert running.traffic_ports == [traffic_port(HERE)]
    assert running.seeds == [7]
    assert running.world._weather == carla.WeatherParameters.ClearNoon
    assert server.tick() == server.tick() - 1
    server.close()
    server.close()
    assert not running.world.get_settings().synchronous_mode
    assert not running.world._traffic.synchronous


def test_two_runs_on_one_machine_have_traffic_managers_of_their_own(servers):
    """Here another process has the port that belongs to ours; then this one has its own port and keeps it."""
    servers["box", 23_450] = running = Running()
    with socket.socket() as other:
        other.bind(("", 29_450))
        other.listen()
        Server(Address("box", 23_450), "Town04", seed=0).close()
    with socket.socket() as ours:
        ours.bind(("", 29_460))
        ours.listen()
        Server(Address("box", 23_450), "Town04", seed=0).close()
    assert running.traffic_ports == [29_460, 29_460]


def test_a_server_of_another_version(servers):
    servers["localhost", 2000] = Running(version="0.9.15")
    with pytest.raises(
        UserError, match=r"has version 0\.9\.15, but the client is 0\.9\.16: start CARLA 0\.9\.16"
    ):
        Server(HERE, "Town04", seed=0)


def test_a_map_that_the_server_does_not_have(servers):
    servers["localhost", 2000] = Running(maps=("Town01", "Mine"))
    with pytest.raises(UserError, match=r"localhost:2000 has no map Town04 \(it has Mine, Town01\)"):
        Server(HERE, "Town04", seed=0)


def test_a_server_that_fails_while_we_prepare_it_is_restored(servers, monkeypatch):
    servers["localhost", 2000] = running = Running()

    def taken(client, port=8000):
        raise RuntimeError("trying to create rpc server for traffic manager; bind error")

    monkeypatch.setattr("carla_stand_in.Client.get_trafficmanager", taken)
    with pytest.raises(UserError, match=r"localhost:2000 failed \(.*bind error\): start it again"):
        Server(HERE, "Town04", seed=0)
    assert not running.world.get_settings().synchronous_mode


def test_a_server_that_died_is_asked_nothing_more(servers, monkeypatch):
    servers["localhost", 2000] = running = Running(dies_at=102)
    server = Server(HERE, "Town04", seed=0)
    server.tick()
    message = r"server at localhost:2000 failed \(time-out .*\): start it again .* goes on with --resume"
    with pytest.raises(UserError, match=message), server.answering():
        server.tick()
    assert server.lost

    def asked(*_):
        raise AssertionError("waits for a server that is gone")

    monkeypatch.setattr(running.world, "apply_settings", asked)
    server.close()


# ---- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "localhost:", ":2000", "localhost:0", "localhost:50001", "localhost:2000:1", "a b:1"],
)
def test_what_is_no_address(text):
    with pytest.raises(UserError, match=r"env.server='.*' must be HOST:PORT with a port from 1 to 50000"):
        Address.parse(text)


def test_every_user_of_a_process_gets_servers_of_its_own(monkeypatch):
    monkeypatch.setattr(address, "_IN_USE", set())
    first = Address.parse("gpu-1:3000")
    assert [lease(first).port for _ in range(3)] == [3000, 3010, 3020]
    release(Address("gpu-1", 3010))
    assert lease(first) == Address("gpu-1", 3010)
    assert lease(Address("gpu-2", 3000)) == Address("gpu-2", 3000)
