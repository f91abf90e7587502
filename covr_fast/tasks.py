"""A task: an environment that gives pixels, how its actions and frames map to the agent's, and what a VLM is
told of it. EnvPool's tasks, CARLA's, and a user's own Gymnasium environments (`custom`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .carla.connection import SECONDS
from .carla.task import SCENARIOS, carla_simulator
from .custom import REGISTERED, Own, checked_names, looked_at, own_of, words_of
from .dm_control import BallInCup, models_without_tip
from .driving import DRIVES
from .errors import UserError, unknown
from .gymnasium_simulator import GymnasiumSimulator, Make
from .opengl import import_envpool, load_triton, require_frames
from .vector_simulator import VectorSimulator
from .words import Words, words_for

if TYPE_CHECKING:
    from .env_config import EnvConfig


# The lowest 12 of CarRacing's 96 rows show instruments, which say nothing that the view above does not show.
_CAR_RACING_VIEW = 84
LARGE = 480
"""Pixels of the longer side of a large picture. The models of MuJoCo's tasks allow 640 x 480."""
# EnvPool reports +-1e10 for MuJoCo's actuators without limits.
_UNBOUNDED = 1e9


@dataclass(frozen=True)
class Task:
    """An environment as the agent and the VLM know it."""

    action_dim: int
    to_sim: Callable[[np.ndarray], np.ndarray]
    """[n, action_dim] in [-1, 1] -> the simulator's actions."""
    to_rgb: Callable[[np.ndarray], np.ndarray] | None
    """[n, ...] simulator observation -> uint8[n, H, W, 3] newest frame. None: observations contain no frame;
    frames are rendered on request."""
    words: Words
    """What the VLM is told, and the actions' names."""
    simulate: Callable[[int], Any]
    """Seed of the first environment -> a simulator of a batch of them; see `envs.PixelEnvs`."""
    simulate_large: Callable[[int], Any] | None = None
    """Seed of an environment -> a simulator like that of `simulate`, whose render() draws a large picture for
    people. None: it would not be larger than what `simulate` draws."""
    evaluated_together: int | None = None
    """Most episodes of an evaluation that run at the same time. None: all of them."""
    steps_per_second: float = 50.0
    """Environment steps of a second of the simulated world, for videos."""


def find_task(config: "EnvConfig") -> Task:
    """The task of an environment of the user, or of config.id.

    Raises:
        UserError: an unknown id, or an environment that cannot be driven from pixels by bounded actions.
    """
    load_triton()  # an environment of the user may draw with OpenGL as well
    if (own := own_of(config)) is not None:
        return _own_task(config, own)
    if not config.id:
        raise UserError("no environment is named: give --env.entry-point package.module:make, or env.id")
    if config.prompt is not None or config.action_names is not None:
        raise UserError(
            f"env.prompt and env.action_names are for an environment of your own, and {config.id} has its "
            "words: vlm.prompt tells the VLM something else"
        )
    if config.id in SCENARIOS:
        return _carla_task(config)
    envpool = import_envpool()
    known = envpool.list_all_envs()
    if config.id not in known:
        how = (
            "name it by env.entry_point, or call covr_fast.register_task first, in every process that uses it"
        )
        if ":" in config.id:  # a name that GymEnv gave to what no other process finds
            raise UserError(f"unknown environment env.id {config.id!r}, which is one of your own: {how}")
        names = [*known, *SCENARIOS, *REGISTERED]
        raise UserError(
            f"{unknown('environment env.id', config.id, names)} (an environment of your own: {how})"
        )
    if config.id.startswith("CarRacing-"):
        return Task(
            2,
            _car_racing_action,
            lambda obs: obs[:, :_CAR_RACING_VIEW],
            words_for(config.id, 2),
            lambda seed: _envpool_simulator(config, seed),
            lambda seed: _envpool_simulator(config, seed, **_drawn(LARGE, LARGE)),
        )
    if config.id in DRIVES:
        return _driving_task(config)
    return _dm_control_task(config)


# ---- EnvPool ---------------------------------------------------------------------------------------


def _car_racing_action(action: np.ndarray) -> np.ndarray:
    """(steering, signed gas/brake) in [-1, 1]^2 -> (steering, gas, brake)."""
    steer, pedal = action[:, 0], action[:, 1]
    return np.stack([steer, np.maximum(pedal, 0), np.maximum(-pedal, 0)], axis=1)


def _driving_task(config: "EnvConfig") -> Task:
    drive = DRIVES[config.id]
    options = drive.options(config.id, config.max_episode_steps)
    large = options | drive.large_view
    return Task(
        drive.action_dim,
        drive.to_sim,
        None,
        words_for(config.id, drive.action_dim),
        lambda seed: _envpool_simulator(config, seed, **options),
        lambda seed: _envpool_simulator(config, seed, **large),
        steps_per_second=drive.steps_per_second,
    )


def _dm_control_task(config: "EnvConfig") -> Task:
    try:
        spec = import_envpool().make_spec(config.id)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"env.id={config.id!r} cannot be built ({' '.join(str(error).split())}): "
            "choose CarRacing-v3, racetrack-v0, highway-v0 or a DMControl task, such as CheetahRun-v1"
        ) from error
    action = spec.action_space
    if not (hasattr(action, "low") and np.issubdtype(action.dtype, np.floating)):
        raise UserError(
            f"env.id={config.id!r} has discrete actions: COVR's actor and its priors are continuous; "
            "highway-v0 has an adapter (two numbers), CarRacing-v3 and CheetahRun-v1 have a Box"
        )
    if not type(spec).__name__.startswith("Dmc"):
        raise UserError(
            f"env.id={config.id!r} does not give pixels for continuous actions: "
            "choose CarRacing-v3, racetrack-v0, highway-v0 or a DMControl task, such as CheetahRun-v1"
        )
    low, high = action.low.astype(np.float64), action.high.astype(np.float64)
    if high.max() - low.min() >= _UNBOUNDED:
        raise UserError(
            f"the actions of env.id={config.id!r} have no bounds that [-1, 1] could be scaled to: "
            "choose another DMControl task, such as CheetahRun-v1"
        )

    def simulate(seed: int, scale: float = 1) -> Any:
        require_frames()
        size = _drawn(round(config.height * scale), round(config.width * scale))
        view = {**size, "render_camera_id": _camera(config.id)}
        if config.id.startswith("FingerSpin-"):
            with models_without_tip(spec.config.base_path) as models:
                return _envpool_simulator(config, seed, **view, base_path=models)
        simulator = _envpool_simulator(config, seed, **view)
        return BallInCup(simulator) if config.id.startswith("BallInCupCatch-") else simulator

    (action_dim,) = action.shape
    return Task(
        action_dim,
        _scaled(low, high),
        None,
        words_for(config.id, action_dim),
        simulate,
        lambda seed: simulate(seed, max(1, LARGE / max(config.height, config.width))),
    )


def _drawn(height: int, width: int) -> dict[str, Any]:
    """EnvPool's options for pictures of a size."""
    return {"render_mode": "rgb_array", "render_height": height, "render_width": width}


def _envpool_simulator(config: "EnvConfig", seed: int, **options: Any) -> Any:
    return import_envpool().make_gymnasium(
        config.id,
        num_envs=config.batch_size,
        num_threads=config.num_threads,
        seed=seed,
        max_episode_steps=config.max_episode_steps,
        **options,
    )


def _camera(env_id: str) -> int:
    """The camera of a DMControl task that gives the pixels.

    Camera 0, as in DMControl's pixel wrapper, except where it does not follow the body: the quadruped is tiny
    in it (others who learn from its pixels take camera 2 too), and in the dog's fetch task it follows the
    ball.
    """
    return 2 if env_id.startswith(("Quadruped", "DogFetch")) else 0


def _scaled(low: np.ndarray, high: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """[n, A] in [-1, 1] -> between `low` [A] and `high` [A]."""

    def to_sim(a: np.ndarray) -> np.ndarray:
        return np.asarray(low + (a + 1) * 0.5 * (high - low), np.float32)

    return to_sim


# ---- CARLA -----------------------------------------------------------------------------------------


def _carla_task(config: "EnvConfig") -> Task:
    """Every environment needs a server of its own, so evaluations run one episode after the other."""
    _, words = SCENARIOS[config.id]
    return Task(
        2,
        lambda action: action,
        lambda pictures: pictures,
        words,
        lambda seed: carla_simulator(config, seed),
        evaluated_together=1,
        steps_per_second=1 / SECONDS,
    )


# ---- a user's own ----------------------------------------------------------------------------------


def register_task(name: str, make: Make, prompt: str, action_names: Sequence[str]) -> None:
    """Makes a Gymnasium environment usable as `EnvConfig(id=name)`, in this process.

    One environment is made here, to look at its spaces and its first frame. A process that resumes or
    evaluates a run with this task has to register it too, which `GymEnv` and `env.entry_point` spare you.

    Args:
        name: the id.
        make: as for `GymEnv`.
        prompt: what the VLM is told: what it controls and sees, what is wanted, and what each number does,
            with the direction of -1 and of 1. The format of the answer is added.
        action_names: a short name for each of the A numbers, for people. `left/right` names the effect of -1
            and of 1.

    Raises:
        UserError: the name is taken, an argument has a wrong type, the environment's actions are no bounded
            Box, it gives no frames, or there are not A action names.
    """
    for argument, text in (("name", name), ("prompt", prompt)):
        if not (isinstance(text, str) and text.strip()):
            raise UserError(f"register_task: {argument}={text!r} must be text")
    if not callable(make):
        raise UserError(f"register_task: make={make!r} must be a function that makes one gymnasium.Env")
    names = checked_names(action_names, "register_task: action_names")
    if name in REGISTERED or name in SCENARIOS or name in _envpool_ids():
        raise UserError(f"register_task: name={name!r} is taken: choose another name")
    own = Own(make, "register_task: make()", prompt, names)
    words_of(own, name)  # raises for what cannot be used
    REGISTERED[name] = own


def _own_task(config: "EnvConfig", own: Own) -> Task:
    spaces = looked_at(own)

    def simulate(seed: int) -> GymnasiumSimulator | VectorSimulator:
        kind = VectorSimulator if spaces.vector else GymnasiumSimulator
        return kind(own.make, spaces, config, seed)

    given = spaces.pixels or spaces.vector
    to_rgb = (lambda frames: frames) if given else None
    words = words_of(own, config.id)
    return Task(len(spaces.low), _scaled(spaces.low, spaces.high), to_rgb, words, simulate)


def _envpool_ids() -> list[str]:
    """EnvPool's environments; none where it is not installed."""
    try:
        ids: list[str] = import_envpool().list_all_envs()
    except UserError:
        return []
    return ids
