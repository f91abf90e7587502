"""Episodes through make_env, as the agent sees them, on servers that are stand-ins."""

from itertools import pairwise

import numpy as np
import pytest
from carla_maps import carla
from carla_stand_in import SERVERS, Running, Sensor, Vehicle, Walker

from covr_fast.carla import connection
from covr_fast.carla.address import Address, traffic_port
from covr_fast.env_config import EnvConfig
from covr_fast.envs import make_env
from covr_fast.errors import UserError
from covr_fast.evaluate import evaluate
from covr_fast.tasks import find_task

STRAIGHT_ON = np.array([[0.0, 1.0]])
BOTH = ("carla-highway", "carla-pedestrians")


def config(env_id: str = "carla-highway", **changes) -> EnvConfig:
    small = {"num_envs": 1, "batch_size": 1, "height": 12, "width": 16, "frame_stack": 2, "action_repeat": 1}
    return EnvConfig(id=env_id, **(small | {"max_episode_steps": 50} | changes))


@pytest.fixture
def server(servers) -> Running:
    servers["localhost", 2000] = running = Running()
    return running


def bodies(server: Running, kind: type) -> list:
    return [actor for actor in server.world._actors.values() if type(actor) is kind]


def step(envs, action=STRAIGHT_ON, ids=(0,)):
    envs.send(np.tile(action, (len(ids), 1)) if len(action) == 1 else action, np.array(ids))
    return envs.recv()


@pytest.mark.parametrize("env_id", BOTH)
def test_frames_belong_to_their_steps_and_are_rgb(server, env_id):
    with make_env(config(env_id)) as envs:
        assert envs.action_shape == (2,)
        obs = envs.reset()
        assert obs.shape == (1, 6, 12, 16)
        before = server.world._frame
        rows = step(envs)
        assert server.world._frame == before + 1
        red, green, blue = rows.next_obs[0, 3:]
        assert (blue == (before + 1) % 256).all()
        assert (rows.next_obs[0, 2] == before % 256).all(), "the stack"
        assert (np.diff(green[0].astype(int)) > 0).all()
        assert set(np.unique(red)) <= {0, 255}
        assert rows.frames == 1


def test_the_picture_has_the_size_asked_for_and_is_not_resized(server):
    with make_env(config(height=30, width=40)) as envs:
        envs.reset()
        (camera,) = [s for s in bodies(server, Sensor) if "camera" in s._blueprint.id]
        assert camera._blueprint._attributes == {"image_size_x": "40", "image_size_y": "30", "fov": "60"}


def test_full_throttle_gains_the_metres_made_and_steering_costs(server):
    with make_env(config()) as envs:
        envs.reset()
        (ego,) = [v for v in bodies(server, Vehicle) if v._blueprint._attributes.get("role_name") == "hero"]
        start = ego.get_location().x
        rewards = [step(envs).reward.item() for _ in range(20)]
        assert sum(rewards) == pytest.approx(ego.get_location().x - start, abs=1e-3)
        assert all(b > a for a, b in pairwise(rewards)), "it accelerates"
        speed = ego.get_velocity().length()
        steered = step(envs, np.array([[0.5, 0.0]])).reward.item()
        assert steered == pytest.approx(speed * 0.05 - 0.05, abs=0.02)
        braked = step(envs, np.array([[0.0, -1.0]])).reward.item()
        assert braked == pytest.approx(ego.get_velocity().length() * 0.05 - 0.1, abs=0.02)
        assert ego._control.brake == 1
        assert ego._control.throttle == 0


def test_the_highway_has_ten_vehicles_that_drive(server):
    with make_env(config()) as envs:
        envs.reset()
        others = [v for v in bodies(server, Vehicle) if v._autopilot]
        assert len(others) == 10
        assert all(v._blueprint.id in ("vehicle.tesla.model3", "vehicle.audi.a2") for v in others)
        assert all(-60 <= v._below_limit <= -30 for v in others)
        before = [v.get_location().x for v in others]
        step(envs)
        assert all(v.get_location().x > x for v, x in zip(others, before, strict=True))
        assert server.world._map.name == "Town04"


def test_pedestrians_start_when_our_car_comes_near(server):
    # Its wheels do 6 m/s^2, so it is at the last parked car after some 8 seconds.
    with make_env(config("carla-pedestrians", max_episode_steps=400, num_envs=1)) as envs:
        envs.reset()
        walkers = bodies(server, Walker)
        assert len(walkers) == 4
        assert len([v for v in bodies(server, Vehicle) if v._control.hand_brake]) >= 18
        started: dict[int, float] = {}
        (ego,) = [v for v in bodies(server, Vehicle) if not v._control.hand_brake]
        for _ in range(300):
            rows = step(envs, np.array([[0.0, 0.3]]))
            for walker in walkers:
                if walker.get_velocity().length() and walker.id not in started:
                    started[walker.id] = walker.get_location().x - ego.get_location().x
            if rows.terminated or rows.truncated:
                break
        assert started, "nobody stepped out"
        assert all(5 < gap < 25 for gap in started.values())


def test_collisions_cost_stop_the_car_and_end_the_episode(server):
    with make_env(config(max_episode_steps=500)) as envs:
        envs.reset()
        (ego,) = [v for v in bodies(server, Vehicle) if not v._autopilot]
        other = bodies(server, Vehicle)[1]
        for _ in range(20):
            step(envs)
        speed = ego.get_velocity().length()
        other.set_transform(ego._state)  # another car comes out of nowhere, and stays
        other._autopilot = False
        other.set_target_velocity(carla.Vector3D())
        rows = [step(envs) for _ in range(20)]
        assert [r.terminated.item() for r in rows] == [False] * 19 + [True]
        assert rows[0].reward.item() == pytest.approx(-0.1 * (speed + 0.3), abs=0.01), "100 N s per m/s"


def test_leaving_the_road_terminates_and_time_truncates(server):
    with make_env(config(max_episode_steps=30)) as envs:
        envs.reset()
        ends = []
        for _ in range(65):
            rows = step(envs)
            ends.append((rows.terminated.item(), rows.truncated.item()))
        assert [i for i, end in enumerate(ends) if end == (False, True)] == [29, 59]
        assert (True, False) not in ends
    with make_env(config(max_episode_steps=300)) as envs:
        envs.reset()
        rows = step(envs)
        for _ in range(200):
            rows = step(envs, np.array([[-0.3, 0.5]]))
            if rows.terminated or rows.truncated:
                break
        assert rows.terminated
        assert not rows.truncated


def test_a_new_episode_begins_with_others_in_other_places(server):
    with make_env(config(max_episode_steps=3)) as envs:
        envs.reset()
        first = {v.id for v in bodies(server, Vehicle)}
        (ego,) = [v for v in bodies(server, Vehicle) if not v._autopilot]
        sensors = {s.id for s in bodies(server, Sensor)}
        for _ in range(2):
            step(envs)
        assert step(envs).truncated
        second = {v.id for v in bodies(server, Vehicle)}
        assert first & second == {ego.id}
        assert len(second) == 11
        assert {s.id for s in bodies(server, Sensor)} == sensors
        assert 100 <= ego.get_location().x <= 110.1
        assert ego.get_velocity().length() == 0


@pytest.mark.parametrize("env_id", BOTH)
def test_the_same_seed_gives_the_same_drive(servers, env_id):
    def drive(seed: int) -> list:
        servers["localhost", 2000] = Running()
        rng, out = np.random.default_rng(0), []
        with make_env(config(env_id, seed=seed, max_episode_steps=20)) as envs:
            out.append(envs.reset())
            for _ in range(45):
                rows = step(envs, rng.uniform(-0.1, 1, (1, 2)))
                out += [rows.obs, rows.reward, rows.terminated]
        return out

    once, again, other = drive(4), drive(4), drive(5)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def test_every_environment_has_a_server_of_its_own(servers):
    for port in (3000, 3010, 3020, 3030):
        servers["box", port] = Running()
    with make_env(config(num_envs=4, batch_size=2, server="box:3000", seed=10)) as envs:
        envs.reset()
        for ids in envs.batches():
            envs.send(np.repeat(STRAIGHT_ON, 2, 0), ids)
        for _ in envs.batches():
            envs.recv()
        assert [servers["box", port].seeds for port in (3000, 3010, 3020, 3030)] == [[10], [11], [12], [13]]
        assert [servers["box", port].traffic_ports for port in (3000, 3030)] == [
            [traffic_port(Address("box", port))] for port in (3000, 3030)
        ]
        assert all(server.world._frame > 106 for server in servers.values())


def test_evaluations_beside_a_run_take_the_next_server_one_episode_after_the_other(servers):
    servers["localhost", 2000], servers["localhost", 2010] = Running(), Running()
    watched = []
    with make_env(config()) as training:
        training.reset()
        at = SERVERS["localhost", 2000].world._frame
        result = evaluate(
            lambda obs: np.repeat(STRAIGHT_ON, len(obs), 0),
            config(max_episode_steps=10),
            episodes=3,
            seed=5,
            watch=lambda picture, obs, action, gained: watched.append(picture),
        )
        assert SERVERS["localhost", 2000].world._frame == at
    assert SERVERS["localhost", 2010].seeds == [5, 6, 7]
    assert len(result.returns) == 3
    assert len(watched) == 10, "only the first episode is watched"
    assert all(picture.shape == (12, 16, 3) for picture in watched)


# ---- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_second_server_is_missing(server, batch_size):
    with pytest.raises(UserError, match=r"no CARLA server answers at localhost:2010 .*-carla-rpc-port=2010"):
        make_env(config(num_envs=2, batch_size=batch_size))
    assert not server.world._actors


@pytest.mark.parametrize("frame", [101, 104, 120])
def test_a_server_that_dies_is_named_with_the_remedy(server, frame):
    server.dies_at = frame
    with make_env(config()) as envs:
        message = r"the CARLA server at localhost:2000 failed \(time-out .*\): start it again .* --resume"
        with pytest.raises(UserError, match=message):
            drive_on(envs)


def drive_on(envs) -> None:
    envs.reset()
    for _ in range(40):
        step(envs)


def test_a_camera_that_sends_nothing(server, monkeypatch):
    monkeypatch.setattr("covr_fast.carla.sensors.ANSWER_SECONDS", 0.1)
    with make_env(config()) as envs:
        envs.reset()
        monkeypatch.setattr(Sensor, "_measure", lambda *_: [])
        with pytest.raises(UserError, match=r"no picture of frame \d+ within 0.1 seconds"):
            step(envs)


def test_a_blocked_start_is_an_error_and_leaves_nothing(server, monkeypatch):
    monkeypatch.setattr("carla_stand_in.World.spawn_actor", blocked)
    with pytest.raises(UserError, match=r"localhost:2000 failed \(Spawn failed because of collision"):
        make_env(config())


def blocked(*_, **__):
    raise RuntimeError("Spawn failed because of collision at spawn position")


def test_settings_that_do_not_fit(servers):
    with pytest.raises(UserError, match=r"env.server='2000' must be HOST:PORT"):
        make_env(config(server="2000"))
    with pytest.raises(UserError, match="did you mean carla-highway"):
        make_env(config("carla-higway"))


def test_a_task_is_known_without_a_server():
    for env_id in BOTH:
        task = find_task(config(env_id))
        assert task.action_dim == 2
        assert "-1 is fully left" in task.words.prompt
        assert task.words.action_names == ("left/right", "brake/throttle")
    assert connection.SECONDS == 0.05
