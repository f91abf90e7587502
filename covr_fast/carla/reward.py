"""The reward of one frame."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import carla

PER_IMPULSE = 1e-3
"""Cost per N s of collision."""
PER_STEER = 0.1
"""Cost of full steering."""
PER_BRAKE = 0.1
"""Cost of full braking."""


def reward(
    velocity: "carla.Vector3D",
    heading: "carla.Vector3D | None",
    *,
    seconds: float,
    impulse: float,
    steer: float,
    brake: float,
) -> float:
    """Metres made along the lane in this frame, minus what collisions, steering and braking cost.

    `r = v . u * dt - 1e-3 * impulse - 0.1 * |steer| - 0.1 * brake`: the code of Xu et al. 2024 (DMR), some of
    whose authors wrote Xia et al. 2026 too. It goes back to Zhang et al. 2021 (DBC), who have 1e-4 per N s, 1
    for steering and nothing for braking.

    Args:
        velocity: of the car, in m/s.
        heading: unit vector along its lane; None off the road, where nothing is gained.
        seconds: per frame.
        impulse: of the collisions in this frame, in N s.
        steer: in [-1, 1].
        brake: in [0, 1].
    """
    along = velocity.dot(heading) if heading is not None else 0.0
    return float(along * seconds - PER_IMPULSE * impulse - PER_STEER * abs(steer) - PER_BRAKE * brake)
