"""The environments alone, with random actions: what a loop that learns nothing would make."""

from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch

from covr_fast.envs import make_env

from .chunks import Facts, Pauses, Progress
from .settings import Settings, settings_of


def _no_facts() -> Facts:
    return {}


def ours_alone(connection: Connection, settings: Settings) -> None:
    """Steps the environments of covr_fast until it is told to stop."""
    torch.set_num_threads(1)
    config = settings_of(settings).env
    rng, decisions = np.random.default_rng(0), 0
    with make_env(config) as envs:
        pauses = Pauses(connection, 1, settle=len(envs.batches()) + 1)

        def send(ids: np.ndarray) -> None:
            envs.send(rng.uniform(-1, 1, (len(ids), *envs.action_shape)), ids)

        envs.reset()
        for ids in envs.batches():
            send(ids)
        while True:
            rows = envs.recv()
            send(rows.env_ids)
            decisions += len(rows.env_ids)
            pauses(Progress(decisions, 0, {}), _no_facts)


def peer_alone(connection: Connection, settings: Settings, how: str) -> None:
    """Steps the peer's environments until it is told to stop; `how`: see vector_env."""
    from .peer_envs import MAKERS
    from .vector import vector_env

    config = settings_of(settings).env
    envs = vector_env([partial(MAKERS[settings.environment], config)] * config.num_envs, how)
    torch.set_num_threads(1)
    pauses = Pauses(connection, 1, settle=1)
    rng, decisions = np.random.default_rng(0), 0
    try:
        envs.reset(seed=0)
        while True:
            envs.step(rng.uniform(-1, 1, envs.action_space.shape).astype(np.float32))
            decisions += config.num_envs
            pauses(Progress(decisions, 0, {}), _no_facts)
    finally:
        envs.close()
