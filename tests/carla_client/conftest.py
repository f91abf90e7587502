import pytest


@pytest.fixture
def servers(monkeypatch):
    """The CARLA servers that run, by (host, port): none. Put a `carla_stand_in.Running` in."""
    from carla_maps import carla
    from carla_stand_in import SERVERS, Client

    from covr_fast.carla import address

    monkeypatch.setattr(carla, "Client", Client)
    monkeypatch.setattr(address, "_IN_USE", set())
    yield SERVERS
    worlds = [server.world for server in SERVERS.values() if server.alive and server.world]
    SERVERS.clear()
    for world in worlds:
        world._callbacks.shutdown()
        assert not world._actors, "actors were left behind"
        assert not world._settings.synchronous_mode, "a server was left standing still"
    assert not address._IN_USE, "an address was not given back"
