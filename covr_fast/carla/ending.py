"""When an episode ends."""

from typing import Any, Literal

STUCK_SPEED = 0.02
"""Metres per second below which the car stands (DBC, DMR)."""
STUCK_FRAMES = 100
"""Frames without a break of standing that end an episode. (DBC and DMR look at every 100th frame only.)"""
CRASH_FRAMES = 20
"""Frames without a break of collisions that end an episode (DMR)."""

End = Literal["off the road", "stuck", "crash", "end of the road", "time"]
CUT_OFF = ("end of the road", "time")
"""The ends that truncate an episode, whose last state has a future value. The others terminate it."""


class Ending:
    """Watches one episode."""

    def __init__(self, max_frames: int, road: int | None) -> None:
        """`road`: see Scenario.road."""
        self._max_frames = max_frames
        self._road = road
        self._frames = self._standing = self._crashing = 0

    def after(self, lane: Any | None, ahead: Any | None, *, speed: float, impulse: float) -> End | None:
        """Why the episode ends after this frame; None if it goes on.

        Args:
            lane: the driving lane under the car; None off the road.
            ahead: the lane's direction ahead; None where the road ends.
            speed: of the car, in m/s.
            impulse: of the collisions in this frame, in N s.
        """
        self._frames += 1
        self._standing = self._standing + 1 if speed < STUCK_SPEED else 0
        self._crashing = self._crashing + 1 if impulse > 0 else 0
        if lane is None:
            return "off the road"
        if self._crashing >= CRASH_FRAMES:
            return "crash"
        if self._standing >= STUCK_FRAMES:
            return "stuck"
        if ahead is None or (self._road is not None and lane.road_id != self._road):
            return "end of the road"
        return "time" if self._frames >= self._max_frames else None
