"""From a decision to a stored transition."""

import numpy as np
from torch import Tensor

from .buffer import ReplayBuffer
from .envs import PixelEnvs, Rows


class Collector:
    """Sends decisions to the environments, and stores each with its prior and its outcome.

    Between `send` and `store` an environment simulates: its decision waits here, and the VLM has time to give
    its prior. The replay buffer has the extras "prior" (A,), "prior_mask" () and "prior_version" (). The mask
    is the prior's weight in Eq. 4: 0 where there is none, or where it is too old to guide, else 1, or the
    VLM's confidence (`covr.confidence`). The version is that of the weights that gave the prior, -1 where
    there is none. A prior that is held for later decisions (vlm.between="hold") is stored with each of them,
    with its version.
    """

    def __init__(self, envs: PixelEnvs, buffer: ReplayBuffer) -> None:
        n, (action_dim,) = envs.config.num_envs, envs.action_shape
        self._envs = envs
        self._buffer = buffer
        self._decisions = np.zeros(n, np.int64)
        self._obs = np.zeros((n, *envs.obs_shape), np.uint8)
        self._action = np.zeros((n, action_dim), np.float32)
        self._prior = np.zeros((n, action_dim), np.float32)
        self._prior_mask = np.zeros(n, np.float32)
        self._prior_version = np.full(n, -1)
        self._running_return = np.zeros(n)

    def send(self, obs: np.ndarray, action: np.ndarray, env_ids: np.ndarray) -> None:
        """Starts to simulate `action` float32[n, A], the decision for `obs` uint8[n, C, H, W], in those
        environments of a batch that wait for one."""
        self._envs.send(action, env_ids)
        self._obs[env_ids], self._action[env_ids] = obs, action
        self._decisions[env_ids] += 1

    def latest(self, env_ids: np.ndarray) -> list[int]:
        """Number of the latest decision of each of these environments, from 0."""
        numbers: list[int] = (self._decisions[env_ids] - 1).tolist()
        return numbers

    def latest_action(self, env_ids: np.ndarray) -> np.ndarray:
        """float32[n, A], the latest decisions of these environments."""
        latest: np.ndarray = self._action[env_ids]
        return latest

    def set_prior(
        self, prior: np.ndarray, version: int, env_ids: np.ndarray, weight: np.ndarray | float = 1.0
    ) -> None:
        """The VLM's answers float32[n, A] for the latest decisions, the version of its weights, and the
        answers' weights in Eq. 4, float32[n] in [0, 1]. They stay for later decisions, up to the end of the
        episode or `mask_prior`."""
        self._prior[env_ids], self._prior_mask[env_ids] = prior, weight
        self._prior_version[env_ids] = version

    def mask_prior(self, env_ids: np.ndarray) -> None:
        """The latest decisions have no prior."""
        self._prior_mask[env_ids] = 0.0
        self._prior_version[env_ids] = -1

    def mask_older(self, oldest: int) -> None:
        """Priors of versions before `oldest` guide no more: those of decisions that are simulating, and those
        that are held."""
        self._prior_mask[self._prior_version < oldest] = 0.0

    def store(self, rows: Rows) -> tuple[Tensor, list[float]]:
        """Stores decisions with their outcome.

        Returns the transitions' ids int64[n], and the sum of rewards of each episode that ended.
        """
        ids = rows.env_ids
        stored = self._buffer.add(
            self._obs[ids],
            self._action[ids],
            rows.reward,
            rows.next_obs,
            rows.terminated,
            rows.truncated,
            env_ids=ids,
            prior=self._prior[ids],
            prior_mask=self._prior_mask[ids],
            prior_version=self._prior_version[ids],
        )
        ended = ids[rows.terminated | rows.truncated]
        self.mask_prior(ended)
        self._running_return[ids] += rows.reward
        returns: list[float] = self._running_return[ended].tolist()
        self._running_return[ended] = 0.0
        return stored, returns
