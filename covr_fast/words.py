"""What a VLM is told of EnvPool's tasks: what the picture shows, what is wanted, and what each number does.

The words are true of the pictures that `tasks` asks for, in grey too, so they name no colours. The tests step
the simulator to see that -1 and 1 do what the words say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MOTION_WORDS = (
    "The picture is three grey frames in one: red is the oldest, green the next, blue the newest; what moves "
    "has coloured edges."
)
"""What the pictures of `vlm.motion` show."""


@dataclass(frozen=True)
class Words:
    """A task in words."""

    prompt: str
    """For the VLM, without the format of the answer."""
    action_names: tuple[str, ...]
    """One short name per number of an action, for people. `left/right` names the effect of -1 and of 1."""


@dataclass(frozen=True)
class _Body:
    """What is controlled: the first words of a prompt, and its last ones."""

    scene: str
    actions: str
    action_names: tuple[str, ...]


_CLOCKWISE = (
    "Each number is the torque of a joint: 1 turns the part below it clockwise (a hanging leg swings back), "
    "-1 counterclockwise (it swings forward)."
)
_COUNTERCLOCKWISE = (
    "Each number is the torque of a joint: 1 turns the part below it counterclockwise (a hanging leg swings "
    "forward), -1 clockwise (it swings back)."
)
_CART_POLES = "You control a cart on a horizontal rail, seen from the side. {} on a hinge at the cart."
_CART = "The number pushes the cart: -1 to the left, 1 to the right."

# By the beginning of an id; the first that fits.
_BODIES = {
    "CarRacing": _Body(
        "You drive a racing car, seen from above. The car is near the bottom centre and points up. The road "
        "is dark, the grass beside it is lighter.",
        "Number 1 steers: -1 is fully left, 1 is fully right. Number 2 is the pedals: -1 is full brake, 1 is "
        "full gas.",
        ("left/right", "brake/gas"),
    ),
    "racetrack": _Body(
        "You drive a car, seen from above. It is at the centre of the picture, its lights are at its front, "
        "and its speed is constant. White lines bound the road, dashed ones divide its lanes.",
        "The number steers: -1 is fully left, 1 is fully right, as the driver sees it.",
        ("left/right",),
    ),
    "highway": _Body(
        "You drive a car on a four-lane highway, seen from above. All cars go to the right. Yours is a third "
        "of the picture from its left side, and halfway up.",
        "Number 1 changes the lane: -1 is left (up), 1 is right (down). Number 2 changes the speed: -1 is "
        "slower, 1 is faster. Only the number farther from 0 counts, beyond 0.33.",
        ("left/right", "slower/faster"),
    ),
    "CartpoleTwoPoles": _Body(
        _CART_POLES.format("A chain of two poles turns freely"), _CART, ("left/right",)
    ),
    "CartpoleThreePoles": _Body(
        _CART_POLES.format("A chain of three poles turns freely"), _CART, ("left/right",)
    ),
    "Cartpole": _Body(_CART_POLES.format("A pole turns freely"), _CART, ("left/right",)),
    "Reacher": _Body(
        "You control an arm of two links, seen from above, with its base at the centre of the picture. The "
        "ball that is not part of the arm is the target.",
        "Number 1 is the torque of the shoulder, at the base; number 2 that of the elbow, between the links: "
        "1 turns the part beyond the joint counterclockwise, -1 clockwise.",
        ("shoulder", "elbow"),
    ),
    "Cheetah": _Body(
        "You control a running robot with a back leg and a front leg, seen from the side. Its head is at the "
        "right.",
        _CLOCKWISE,
        ("back thigh", "back shin", "back foot", "front thigh", "front shin", "front foot"),
    ),
    "Walker": _Body(
        "You control a robot with a torso and two legs, seen from the side. It faces right; its right leg is "
        "the nearer one.",
        _COUNTERCLOCKWISE,
        ("right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
    ),
    "Finger": _Body(
        "You control a finger of two links, seen from the side, with its base at the left. At the right is a "
        "body that turns about its centre.",
        "Number 1 is the torque at the base, number 2 that between the links: 1 turns the part beyond the "
        "joint counterclockwise, -1 clockwise.",
        ("base", "middle joint"),
    ),
    "BallInCup": _Body(
        "You control a cup that is open at the top, seen from the side. A string ties a ball to it.",
        "Number 1 pushes the cup: -1 to the left, 1 to the right. Number 2 pushes it: -1 down, 1 up.",
        ("left/right", "down/up"),
    ),
    "Hopper": _Body(
        "You control a robot with one leg, seen from the side. It faces right, where its nose is.",
        _CLOCKWISE,
        ("waist", "hip", "knee", "ankle"),
    ),
    "Pendulum": _Body(
        "You control a pendulum, seen from the front: a rod that turns about a hinge, with a ball at its "
        "end.",
        "The number is the torque at the hinge: 1 turns the rod clockwise, -1 counterclockwise. It is too "
        "weak to lift the ball in one go.",
        ("torque",),
    ),
}

_LANE = "Follow the road in the middle of a lane, and steer no more than you need to."
_BALANCE = "Keep the pole upright above the cart, and the cart near the middle of the rail."
_SWING_UP = "Swing the pole up and keep it upright above the cart, near the middle of the rail."
_POLES = "Swing the poles up and keep them upright above the cart, near the middle of the rail."
_REACH = "Move the tip of the arm into the target and keep it there."
_TURN = "Turn the body with the finger until the mark at its end lies in the ball that floats beside it."

_GOALS = {
    "CarRacing": "Follow the road fast, and stay on it.",
    "racetrack": _LANE,
    "racetrack-large": _LANE,
    "highway": "Drive fast, hit no other car, and prefer the lower lanes.",
    "CartpoleBalance": _BALANCE,
    "CartpoleBalanceSparse": _BALANCE,
    "CartpoleSwingup": _SWING_UP,
    "CartpoleSwingupSparse": _SWING_UP,
    "CartpoleTwoPoles": _POLES,
    "CartpoleThreePoles": _POLES,
    "ReacherEasy": _REACH,
    "ReacherHard": _REACH,
    "CheetahRun": "Run to the right as fast as you can.",
    "WalkerStand": "Stand upright.",
    "WalkerWalk": "Stay upright and walk to the right.",
    "WalkerRun": "Stay upright and run to the right, fast.",
    "FingerSpin": "Hit the body with the tip of the finger, so that it keeps spinning clockwise, fast.",
    "FingerTurnEasy": _TURN,
    "FingerTurnHard": _TURN,
    "BallInCupCatch": "Swing the ball up, catch it in the cup and keep it there.",
    "HopperStand": "Stand upright on the foot.",
    "HopperHop": "Hop to the right, fast, and do not fall.",
    "PendulumSwingup": "Swing the ball up, and keep it upright above the hinge.",
}


def all_prompts() -> Iterator[str]:
    """The prompts of all tasks that have words of their own."""
    for name in _GOALS:
        for beginning, body in _BODIES.items():
            if name.startswith(beginning):
                yield words_for(f"{name}-v1", len(body.action_names)).prompt
                break


def words_for(env_id: str, action_dim: int) -> Words:
    """The words for an EnvPool id with `action_dim` actuators, such as CheetahRun-v1."""
    name = env_id.rpartition("-v")[0]
    # "HumanoidCMURun" -> "Humanoid CMU Run"
    title = re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    for beginning, body in _BODIES.items():
        if name.startswith(beginning):
            goal = _GOALS.get(name, f"The task is {title}.")
            order = f" In order: {', '.join(body.action_names)}." if action_dim > 2 else ""
            return Words(f"{body.scene} {goal} {body.actions}{order}", body.action_names)
    return Words(
        f"You control the body in the picture. The task is {title}, of the DeepMind Control Suite. Number i "
        "drives actuator i of the body: -1 and 1 are its limits.",
        tuple(f"actuator {i + 1}" for i in range(action_dim)),
    )
