"""Scenes, lanes, rewards and ends on real `carla.Map`s, waypoints and transforms."""

import numpy as np
import pytest
from carla_maps import HIGHWAY_ROAD, PARKING_ROAD, STREET_ROAD, carla, the_map

from covr_fast.carla import highway, street
from covr_fast.carla.ending import CRASH_FRAMES, CUT_OFF, STUCK_FRAMES, Ending
from covr_fast.carla.lanes import heading, kerb, lane_under
from covr_fast.carla.reward import reward
from covr_fast.carla.street import Crossing
from covr_fast.errors import UserError

HIGHWAY = the_map("Town04")
STREET = the_map("Town01")
SEEDS = range(30)


def at(x: float, y: float) -> object:
    return carla.Location(x=x, y=y)


# ---- #HW -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_highway(seed):
    scene = highway.draw_highway(HIGHWAY, np.random.default_rng(seed))
    assert 100 <= scene.ego.location.x <= 110
    places = [scene.ego] + [place for place, _ in scene.traffic]
    assert len(scene.traffic) == 10
    for place, below_limit in scene.traffic:
        assert place.location.x > scene.ego.location.x + 4.9
        assert -60 <= below_limit <= -30
    for i, place in enumerate(places):
        lane = lane_under(HIGHWAY, place.location)
        assert lane.lane_id in (-1, -2, -3, -4)
        assert place.location.y == pytest.approx(lane.transform.location.y, abs=1e-3)
        assert heading(lane).dot(place.get_forward_vector()) == pytest.approx(1)
        for other in places[:i]:
            same_lane = abs(other.location.y - place.location.y) < 1
            assert not same_lane or abs(other.location.x - place.location.x) >= 7.99
    assert not scene.parked
    assert not scene.pedestrians


def test_a_highway_with_little_room_has_fewer_vehicles(monkeypatch):
    monkeypatch.setattr(highway, "TRAFFIC", (115.0, 120.0))
    scene = highway.draw_highway(HIGHWAY, np.random.default_rng(0))
    assert 1 <= len(scene.traffic) <= 4  # one a lane


def test_lanes_and_starts_vary_and_follow_the_seed():
    scenes = [highway.draw_highway(HIGHWAY, np.random.default_rng(seed)) for seed in SEEDS]
    assert len({round(scene.ego.location.y, 2) for scene in scenes}) == 4
    again = highway.draw_highway(HIGHWAY, np.random.default_rng(3))
    assert again.ego == scenes[3].ego
    assert again.traffic == scenes[3].traffic


def test_a_map_without_the_road():
    with pytest.raises(
        UserError, match=r"map Town04 has no lane -\d of road 45 at .* metres: use the maps of"
    ):
        highway.draw_highway(the_map("Town04", STREET_ROAD), np.random.default_rng(0))
    with pytest.raises(UserError, match="has no lane -1 of road 12"):
        street.draw_street(the_map("Town01", HIGHWAY_ROAD), np.random.default_rng(0))


# ---- #GP -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", [STREET_ROAD, PARKING_ROAD], ids=["sidewalk", "parking lane"])
@pytest.mark.parametrize("seed", SEEDS)
def test_street(seed, road):
    world_map = the_map("Town01", road)
    scene = street.draw_street(world_map, np.random.default_rng(seed))
    assert 0 <= scene.ego.location.x <= 2.5
    assert lane_under(world_map, scene.ego.location).lane_id == -1
    assert len(scene.parked) >= 18
    for place in scene.parked:
        assert lane_under(world_map, place.location) is None
        # Their wheels are off the lane, and they face the way in which traffic of their side drives.
        inner_edge = abs(place.location.y) - 1.0
        assert inner_edge > (4.0 if road == STREET_ROAD else 3.5)
        assert place.get_forward_vector().x == pytest.approx(1 if place.location.y > 0 else -1)
    assert len(scene.pedestrians) == 4
    for plan in scene.pedestrians:
        hidden_by = [p for p in scene.parked if hides(p, plan.home, scene.ego, plan.trigger)]
        assert hidden_by, "our car sees the pedestrian before they start"
        assert plan.direction.length() == pytest.approx(1)
        assert plan.direction.y * plan.home.location.y < 0, "they walk away from the street"
        across = plan.home.location + plan.direction * plan.distance
        assert across.y == pytest.approx(-plan.home.location.y, abs=1e-3)


def hides(car, home, ego, distance) -> bool:
    """Whether a parked car, 4.8 by 2 metres, is between a pedestrian and our car, `distance` away."""
    behind = home.location.x - car.location.x
    if not (0 < behind < 6 and abs(home.location.y - car.location.y) < 1):
        return False
    x = np.linspace(car.location.x - 2.4, car.location.x + 2.4, 50)
    sight = ego.location.y + (home.location.y - ego.location.y) * (
        (x - home.location.x + distance) / distance
    )
    return bool((abs(sight - car.location.y) < 1).any())


def test_both_sides_have_pedestrians():
    sides = [
        plan.home.location.y > 0
        for seed in SEEDS
        for plan in street.draw_street(STREET, np.random.default_rng(seed)).pedestrians
    ]
    assert 0.3 < np.mean(sides) < 0.7


def test_a_kerb_is_on_the_first_lane_with_room():
    narrow, broad = kerb(STREET, 12, -1, 50.0, 1.1), kerb(the_map("Town01", PARKING_ROAD), 12, 1, 50.0, 1.1)
    assert narrow.location.y == pytest.approx(4.0 + 0.3 + 1.1, abs=1e-3)  # on the sidewalk
    assert broad.location.y == pytest.approx(-3.5 - 1.1, abs=1e-3)  # on the parking lane
    with pytest.raises(UserError, match="has no lane 1 of road 45"):
        kerb(HIGHWAY, 45, 1, 50.0, 1.1)


def test_a_pedestrian_waits_walks_and_stops_on_the_other_side():
    plan = street.draw_street(STREET, np.random.default_rng(1)).pedestrians[0]
    crossing, home = Crossing(plan), plan.home.location

    def ego(before: float) -> object:
        return carla.Transform(at(home.x - before, 2))

    assert crossing.control(ego(plan.trigger + 1), home) is None
    assert crossing.control(ego(-1), home) is None, "our car has passed"
    control = crossing.control(ego(plan.trigger - 1), home)
    assert control.direction == plan.direction
    assert control.speed == pytest.approx(plan.speed)
    # Once begun, they go on, wherever our car is.
    assert crossing.control(ego(50), home + plan.direction * (plan.distance - 0.1)).speed > 0
    assert crossing.control(ego(50), home + plan.direction * (plan.distance + 0.1)).speed == 0


# ---- lanes, reward and ends ------------------------------------------------------------------------


def test_where_the_road_and_its_lanes_end():
    assert lane_under(HIGHWAY, at(200, 1)).lane_id == -1
    assert lane_under(HIGHWAY, at(200, -0.5)) is None
    assert lane_under(HIGHWAY, at(200, 14.5)) is None, "the shoulder is no driving lane"
    assert heading(lane_under(HIGHWAY, at(200, 1))).x == pytest.approx(1)
    assert heading(lane_under(HIGHWAY, at(584, 1))) is None
    assert heading(None) is None
    assert heading(lane_under(STREET, at(100, -2))).x == pytest.approx(-1), "the oncoming lane"


@pytest.mark.parametrize(
    "velocity, y, costs, expected",
    [
        ((10, 0), 1, {}, 0.5),
        ((10, 3), 1, {}, 0.5),  # across the lane nothing is gained
        ((-4, 0), 1, {}, -0.2),
        ((10, 0), 1, {"steer": -0.5}, 0.45),
        ((10, 0), 1, {"brake": 1.0}, 0.4),
        ((10, 0), 1, {"impulse": 200.0}, 0.3),
        ((10, 0), -1, {}, 0.0),  # off the road
        ((10, 0), -1, {"impulse": 200.0, "steer": 1.0, "brake": 1.0}, -0.4),
    ],
)
def test_reward(velocity, y, costs, expected):
    ahead = heading(lane_under(HIGHWAY, at(200, y)))
    paid = {"impulse": 0.0, "steer": 0.0, "brake": 0.0} | costs
    got = reward(carla.Vector3D(*velocity, 0), ahead, seconds=0.05, **paid)
    assert got == pytest.approx(expected)


def test_driving_against_the_traffic_costs():
    ahead = heading(lane_under(STREET, at(100, -2)))
    got = reward(carla.Vector3D(10, 0, 0), ahead, seconds=0.05, impulse=0, steer=0, brake=0)
    assert got == pytest.approx(-0.5)


def ends(ending: Ending, world_map, places, *, speed=5.0, impulse=0.0) -> list[str | None]:
    out = []
    for place in places:
        lane = lane_under(world_map, at(*place))
        out.append(ending.after(lane, heading(lane), speed=speed, impulse=impulse))
    return out


def test_ends():
    on = (200, 1)
    assert ends(Ending(1000, None), HIGHWAY, [on, on, (200, -1)]) == [None, None, "off the road"]
    assert ends(Ending(3, None), HIGHWAY, [on] * 3) == [None, None, "time"]
    assert ends(Ending(1000, None), HIGHWAY, [on, (584, 1)]) == [None, "end of the road"]
    assert ends(Ending(1000, 45), HIGHWAY, [on]) == [None]
    assert ends(Ending(1000, 12), HIGHWAY, [on]) == ["end of the road"]
    standing = ends(Ending(1000, None), HIGHWAY, [on] * STUCK_FRAMES, speed=0.01)
    assert standing == [None] * (STUCK_FRAMES - 1) + ["stuck"]
    crashing = ends(Ending(1000, None), HIGHWAY, [on] * CRASH_FRAMES, impulse=10.0)
    assert crashing == [None] * (CRASH_FRAMES - 1) + ["crash"]
    assert ends(Ending(1, None), HIGHWAY, [(200, -1)]) == ["off the road"], "not cut off: it would bootstrap"
    assert set(CUT_OFF) == {"end of the road", "time"}


def test_a_moment_of_driving_begins_the_count_anew():
    ending = Ending(1000, None)
    on = [(200, 1)] * (STUCK_FRAMES - 1)
    assert set(ends(ending, HIGHWAY, on, speed=0.0)) == {None}
    assert ends(ending, HIGHWAY, [(200, 1)], speed=1.0) == [None]
    assert set(ends(ending, HIGHWAY, on, speed=0.0)) == {None}
