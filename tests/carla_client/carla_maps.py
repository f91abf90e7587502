"""Roads in OpenDRIVE for `carla.Map`, which needs no server. They have the numbers that the scenarios use.

This folder is not called `carla`: from here, that name would be found instead of CARLA's client.
"""

from functools import cache
from typing import Any

import pytest

carla = pytest.importorskip(
    "carla", reason="CARLA's client is not installed: pip install 'covr-fast[carla]' (Python 3.10 to 3.12)"
)


def _road(number: int, length: float, lanes: dict[int, tuple[str, float]]) -> str:
    """A straight road along x with lanes of a type and a width, by their ids."""

    def side(name: str, ids: list[int]) -> str:
        return f"<{name}>" + "".join(_lane(i, *lanes[i]) for i in sorted(ids, reverse=True)) + f"</{name}>"

    left, right = [i for i in lanes if i > 0], [i for i in lanes if i < 0]
    return f"""<?xml version="1.0"?><OpenDRIVE>
    <header revMajor="1" revMinor="4" name="" version="1" north="0" south="0" east="0" west="0">
    <geoReference><![CDATA[+proj=tmerc +lat_0=0 +lon_0=0]]></geoReference></header>
    <road name="" length="{length}" id="{number}" junction="-1"><link/>
    <planView><geometry s="0" x="0" y="0" hdg="0" length="{length}"><line/></geometry></planView>
    <elevationProfile><elevation s="0" a="0" b="0" c="0" d="0"/></elevationProfile><lateralProfile/>
    <lanes><laneSection s="0">{side("left", left) if left else ""}
    <center><lane id="0" type="none" level="false"/></center>{side("right", right)}
    </laneSection></lanes></road></OpenDRIVE>"""


def _lane(number: int, kind: str, width: float) -> str:
    size = f'<width sOffset="0" a="{width}" b="0" c="0" d="0"/>'
    return f'<lane id="{number}" type="{kind}" level="false"><link/>{size}</lane>'


HIGHWAY_ROAD = _road(45, 586, {-i: ("driving", 3.5) for i in range(1, 5)} | {-5: ("shoulder", 3.5)})
"""Like road 45 of Town04: four lanes and a shoulder. y is 0 at the left edge and 14 at the right one."""
STREET_ROAD = _road(
    12,
    225,
    {sign * i: lane for sign in (-1, 1) for i, lane in enumerate(
        [("driving", 4.0), ("shoulder", 0.3), ("sidewalk", 4.0)], start=1
    )},
)  # fmt: skip
"""Like road 12 of Town01: a lane per direction, shoulders too narrow to park on, sidewalks."""
PARKING_ROAD = _road(
    12,
    225,
    {sign * i: lane for sign in (-1, 1) for i, lane in enumerate(
        [("driving", 3.5), ("parking", 2.5), ("sidewalk", 3.0)], start=1
    )},
)  # fmt: skip
ROADS = {"Town04": HIGHWAY_ROAD, "Town01": STREET_ROAD}


@cache
def the_map(name: str, road: str = "") -> Any:
    """A carla.Map of this name."""
    return carla.Map(name, road or ROADS[name])
