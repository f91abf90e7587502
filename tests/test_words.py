"""The words for the VLM are true: the simulator is stepped with -1 and 1, and looked at."""

import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from covr_fast import TrainConfig
from covr_fast.env_config import EnvConfig
from covr_fast.envs import make_env
from covr_fast.gauges import TEXT, fitted
from covr_fast.load_vlm import task_words
from covr_fast.opengl import import_envpool
from covr_fast.panel import COLUMN
from covr_fast.presets import PRESETS
from covr_fast.tasks import find_task
from covr_fast.words import words_for

SIZE, SEEDS = 200, 2


class Simulator:
    """DMControl with its states and, if it is drawn, as the VLM's camera sees it."""

    def __init__(self, env_id: str, drawn: bool) -> None:
        size = {"render_width": SIZE, "render_height": SIZE, "render_camera_id": 0}
        camera = {"render_mode": "rgb_array", **size} if drawn else {}
        self.env = import_envpool().make_gymnasium(env_id, num_envs=SEEDS, seed=0, **camera)
        self.start, _ = self.env.reset()
        self.state = self.start

    def hold(self, action: np.ndarray, steps: int) -> None:
        for _ in range(steps):
            self.state, *_ = self.env.step(np.tile(action, (SEEDS, 1)))

    def body(self) -> np.ndarray:
        """bool[SEEDS, SIZE, SIZE]: the orange and red parts of the picture, in front of all that is blue."""
        frames = self.env.render(np.arange(SEEDS, dtype=np.int32)).astype(int)
        return frames[..., 0] > frames[..., 2] + 25


def both(env_id: str, number: int, steps: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The bodies in the picture after -1 and after 1, and the positions before."""
    simulators = held(env_id, number, steps, drawn=True)
    return [simulator.body() for simulator in simulators], simulators[0].start.get("position")


def held(env_id: str, number: int, steps: int, *, drawn: bool) -> list[Simulator]:
    """One in which the number was -1 for some steps, and one in which it was 1."""
    simulators = [Simulator(env_id, drawn) for _ in range(2)]
    action = np.zeros(import_envpool().make_spec(env_id).action_space.shape)
    for simulator, action[number] in zip(simulators, (-1.0, 1.0), strict=True):
        simulator.hold(action, steps)
    return simulators


def places(bodies: list[np.ndarray]) -> np.ndarray:
    """float[SEEDS, 2, 2]: the centres (x to the right, y up) of what is only in the picture after -1, or
    after 1."""
    minus, plus = bodies
    centres = np.zeros((SEEDS, 2, 2))
    for row, pair in enumerate(zip(minus & ~plus, plus & ~minus, strict=True)):
        for i, only in enumerate(pair):
            y, x = np.nonzero(only)
            centres[row, i] = x.mean(), SIZE - y.mean()
    return centres


def counterclockwise(bodies: list[np.ndarray], pivot: np.ndarray) -> np.ndarray:
    """bool[SEEDS]: whether 1 has turned the body counterclockwise about `pivot` [SEEDS or 1, 2], against
    -1."""
    minus, plus = np.moveaxis(places(bodies) - pivot[:, None], 1, 0)
    return minus[:, 0] * plus[:, 1] > minus[:, 1] * plus[:, 0]


def in_picture(x: float, y: float) -> np.ndarray:
    """A place given in shares of the picture, from the lower left."""
    return np.array([[x * SIZE, y * SIZE]])


def says(env_id: str, *phrases: str) -> None:
    prompt = words_for(env_id, import_envpool().make_spec(env_id).action_space.shape[0]).prompt
    assert [phrase for phrase in phrases if phrase not in prompt] == []


# ---- pushes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartpoleSwingup-v1", "CartpoleBalance-v1"])
def test_the_cart_is_pushed_to_the_right(env_id):
    says(env_id, "pushes the cart: -1 to the left, 1 to the right")
    bodies, _ = both(env_id, 0, 8)
    minus, plus = np.moveaxis(places(bodies), 1, 0)
    assert (plus[:, 0] > minus[:, 0] + 3).all()


@pytest.mark.parametrize("number, axis", [(0, 0), (1, 1)])
def test_the_cup_is_pushed_to_the_right_and_up(number, axis):
    says("BallInCupCatch-v1", "Number 1 pushes the cup: -1 to the left, 1 to the right", "-1 down, 1 up")
    bodies, _ = both("BallInCupCatch-v1", number, 6)
    minus, plus = np.moveaxis(places(bodies), 1, 0)
    assert (plus[:, axis] > minus[:, axis] + 10).all()


# ---- turns -----------------------------------------------------------------------------------------


def test_the_pendulum_turns_clockwise():
    says("PendulumSwingup-v1", "1 turns the rod clockwise, -1 counterclockwise", "too weak to lift the ball")
    bodies, _ = both("PendulumSwingup-v1", 0, 6)
    assert not counterclockwise(bodies, in_picture(0.5, 0.545)).any()


def test_the_arm_turns_counterclockwise():
    says("ReacherEasy-v1", "1 turns the part beyond the joint counterclockwise, -1 clockwise")
    base = in_picture(0.5, 0.5)
    bodies, _ = both("ReacherEasy-v1", 0, 4)
    assert counterclockwise(bodies, base).all()
    bodies, start = both("ReacherEasy-v1", 1, 4)
    shoulder = start[:, 0]
    link = 0.12 / (2 * 0.75 * np.tan(np.pi / 8)) * SIZE  # in pixels: a camera of 45 degrees, 0.75 m above
    elbow = base + link * np.stack([np.cos(shoulder), np.sin(shoulder)], 1)
    assert counterclockwise(bodies, elbow).all()


def test_the_finger_turns_counterclockwise():
    says("FingerSpin-v1", "1 turns the part beyond the joint counterclockwise, -1 clockwise")
    base = in_picture(0.27, 0.6)
    bodies, _ = both("FingerSpin-v1", 0, 4)
    assert counterclockwise(bodies, base).all()
    bodies, start = both("FingerSpin-v1", 1, 4)
    angle = start[:, 0]  # 0: to the right
    middle = base + 0.19 * SIZE * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert counterclockwise(bodies, middle).all()


def test_the_finger_is_paid_for_clockwise_spin():
    """The hinge of the body has the same axis as those of the finger, so negative is clockwise."""
    says("FingerSpin-v1", "keeps spinning clockwise")
    assert "spinner" in model("finger")
    assert model("finger").count("axis=") == 1
    env = import_envpool().make_gymnasium("FingerSpin-v1", num_envs=16, seed=0)
    env.reset()
    rng, paid = np.random.default_rng(0), []
    for _ in range(110):
        action = rng.choice([-1.0, 1.0], (16, 2))
        for _ in range(8):
            state, reward, *_ = env.step(action)
            paid += state["velocity"][reward > 0, 2].tolist()
    assert len(paid) > 20
    assert max(paid) < 0


def model(name: str) -> str:
    """MuJoCo's model of a task."""
    return (files("envpool_assets") / "mujoco" / "assets_dmc" / f"{name}.xml").read_text()


LEGGED = {
    "CheetahRun-v1": ("cheetah", "0 1 0", 3),
    "WalkerWalk-v1": ("walker", "0 -1 0", 3),
    "WalkerRun-v1": ("walker", "0 -1 0", 3),
    "HopperHop-v1": ("hopper", "0 1 0", 3),
}
"""The model, the axis of all its joints, and the place of the first joint among the velocities."""


@pytest.mark.parametrize("env_id", LEGGED)
def test_each_number_turns_its_own_joint_as_the_words_say(env_id):
    """Seen from -y, as camera 0 sees these models, a turn about +y is clockwise."""
    name, axis, first = LEGGED[env_id]
    joints = re.search(rf'<default class="{name}">(.*?)</default>', model(name), re.DOTALL)[1]
    assert re.findall(r'axis="([^"]*)"', joints) == [axis]
    assert re.search(r'<camera name="(side|cam0)" pos="0 -\S+ \S+"', model(name)), "the camera is at -y"
    sense, other = ("clockwise", "counterclockwise") if axis == "0 1 0" else ("counterclockwise", "clockwise")
    swings, back = ("back", "forward") if sense == "clockwise" else ("forward", "back")
    says(
        env_id,
        f"1 turns the part below it {sense} (a hanging leg swings {swings})",
        f"-1 {other} (it swings {back})",
    )
    actuators = re.findall(r'<motor name="(\w+)"', model(name))
    names = words_for(env_id, len(actuators)).action_names
    spelled = {"bthigh": "back thigh", "bshin": "back shin", "bfoot": "back foot"}
    spelled |= {short.replace("b", "f", 1): long.replace("back", "front") for short, long in spelled.items()}
    assert [spelled.get(each, each.replace("_", " ")) for each in actuators] == list(names)
    says(env_id, f"In order: {', '.join(names)}.")
    for number in range(len(actuators)):
        minus, plus = held(env_id, number, 1, drawn=False)
        turned = (plus.state["velocity"] - minus.state["velocity"])[:, first:]
        assert (turned[:, number] > 0.5).all()


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_the_cheetah_s_hanging_legs_swing_back(number):
    """What LEGGED concludes from axis and camera, seen in the picture."""
    (minus, plus), _ = both("CheetahRun-v1", number, 6)
    for pair in zip(minus, plus, strict=True):
        feet = []
        for body in pair:
            y, x = np.nonzero(body)
            feet.append(x[y > y.min() + 0.6 * (y.max() - y.min())].mean())
        assert feet[1] < feet[0] - 0.5


# ---- the car ---------------------------------------------------------------------------------------


def drive(*actions: tuple[float, float]) -> np.ndarray:
    """uint8[decisions, 3, 84, 96], the pictures after each decision."""
    config = EnvConfig(num_envs=1, batch_size=1, height=84, width=96, frame_stack=1, seed=3)
    with make_env(config) as envs:
        envs.reset()
        seen = []
        for action in actions:
            envs.send(np.array([action]), np.array([0]))
            seen.append(envs.recv().next_obs[0])
    return np.stack(seen)


def road(frame: np.ndarray) -> np.ndarray:
    """bool[84, 96]: what is grey."""
    return (np.ptp(frame.astype(int), axis=0) < 10) & (frame[0] > 60)


def test_the_car_steers_to_the_right_with_1():
    says("CarRacing-v3", "-1 is fully left, 1 is fully right")
    straight = [(0.0, 0.3)] * 10
    ahead = [np.nonzero(road(drive(*straight, *[(s, 0.3)] * 4)[-1])[:50])[1].mean() for s in (-0.3, 0.3)]
    assert ahead[0] > ahead[1] + 10  # steering to the left brings the road ahead to the right of the picture


def test_the_car_s_second_number_is_the_pedals():
    says("CarRacing-v3", "-1 is full brake, 1 is full gas", "points up", "near the bottom centre")

    def motion(frames: np.ndarray) -> float:
        return float(np.abs(np.diff(frames.astype(int), axis=0)).mean())

    gas, idle, brake = ([(0.0, 1.0)] * 16 + [(0.0, pedal)] * 8 for pedal in (1.0, 0.0, -1.0))
    moving = [motion(drive(*actions)[-4:]) for actions in (gas, idle, brake)]
    assert moving[0] > 0
    assert moving[2] < 0.2 * moving[1]
    standing = drive(*[(0.0, -1.0)] * 20)[-4:]
    assert motion(standing) < 0.2 * moving[1]
    red = (standing[-1][0] > 150) & (standing[-1][1] < 60)
    y, x = np.nonzero(red)
    assert abs(x.mean() - 48) < 4
    assert 60 < y.mean() < 84
    assert np.ptp(y) > np.ptp(x), "it does not point up"
    grey = standing[-1].mean(0)
    assert grey[road(standing[-1])].mean() < grey[~road(standing[-1]) & ~red].mean() - 20


# ---- their form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "custom"])  # that has the user's words
@pytest.mark.parametrize("model", ["nano", "some/pretrained"])
def test_prompts_of_presets_are_short_and_end_with_the_format(name, model):
    config = TrainConfig.preset(name, model)
    prompt = task_words(config)
    assert len(prompt.split()) <= 120
    assert re.match("You (control|drive) ", prompt)
    assert ("three grey frames" in prompt) == config.vlm.motion == (model == "nano")
    numbers = len(find_task(config.env).words.action_names)
    example = re.search(r"Answer in this format: Action: \[(.*)\]$", prompt)[1]
    assert example.count(",") + 1 == numbers
    assert f": {numbers} number" in prompt
    assert not re.search(r"actuator|The task is", prompt), "generic words"


def test_every_dm_control_task_has_words():
    envpool = import_envpool()
    tasks = [k for k, (module, *_) in envpool.registration.registry.specs.items() if module.endswith(".dmc")]
    for env_id in (task for task in tasks if not task.startswith("Lqr")):
        actions = envpool.make_spec(env_id).action_space.shape[0]
        words = words_for(env_id, actions)
        assert len(words.action_names) == len(set(words.action_names)) == actions
        if actions <= 12:  # the video names them
            room, size = COLUMN * 2 // 5 - 8, TEXT if actions <= 6 else 16
            assert all(fitted(name, room, size) == name for name in words.action_names)
        assert not re.search(r"\b(red|orange|blue|green|yellow)\b", words.prompt), "frames may be grey"
        known = re.match("BallInCup|Cartpole|Cheetah|Finger|Hopper|Pendulum|Reacher|Walker", env_id)
        assert ("The task is" in words.prompt) == (known is None)
    assert "The task is Humanoid CMU Run," in words_for("HumanoidCMURun-v1", 56).prompt


def test_the_documentation_shows_what_is_told():
    page = (Path(__file__).parents[1] / "docs/environments.md").read_text()
    shown = re.search(r"```text\n(You drive.*?)```", page, re.DOTALL)[1]
    assert " ".join(shown.split()) == task_words(TrainConfig.preset("carracing-gpu"))
