"""Evaluation: whole episodes of one policy, in many environments at the same time; and which policies a run
measures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .agents import Agent
from .config import TrainConfig
from .digits import evaluation_text
from .env_config import EnvConfig
from .envs import make_env
from .files import drop_lines_after, writing
from .logger import RunLogger
from .tasks import find_task
from .view import agent_view, vlm_view

if TYPE_CHECKING:
    from .vlm import ActionPrior

Policy = Callable[[np.ndarray], np.ndarray]
"""uint8[n, C, H, W] -> actions float32[n, A] in [-1, 1]."""

Watcher = Callable[[np.ndarray, np.ndarray, np.ndarray, float], None]
"""Called at each decision of the first environment, with its picture uint8[H', W', 3] as the simulator drew
it, obs uint8[C, H, W], action [A] and return so far."""


class Evaluation(NamedTuple):
    """Undiscounted episode returns, float64[episodes]."""

    returns: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        return float(self.returns.std())


def evaluate(
    policy: Policy, config: EnvConfig, episodes: int, *, seed: int, watch: Watcher | None = None
) -> Evaluation:
    """Runs `episodes` episodes, each in its own environment, with the seeds seed, seed + 1, ...

    Only the first episode of each environment counts, because short episodes would otherwise count more
    often. Tasks that cannot run so many at once run them in turns.
    """
    together = find_task(config).evaluated_together or episodes
    returns = [
        _evaluate_together(
            policy, config, min(together, episodes - first), seed + first, watch if first == 0 else None
        )
        for first in range(0, episodes, together)
    ]
    return Evaluation(np.concatenate(returns))


def _evaluate_together(
    policy: Policy, config: EnvConfig, episodes: int, seed: int, watch: Watcher | None
) -> np.ndarray:
    """float64[episodes], their returns."""
    with make_env(replace(config, num_envs=episodes, batch_size=episodes, num_threads=2, seed=seed)) as envs:
        obs = envs.reset()
        (ids,) = envs.batches()
        returns = np.zeros(episodes)
        running = np.ones(episodes, bool)
        while running.any():
            action = policy(obs)
            if watch and running[0] and ids[0] == 0:
                watch(envs.picture(0), obs[0], action[0], float(returns[0]))
            envs.send(action, ids)
            rows = envs.recv()
            ids, obs = rows.env_ids, rows.obs
            returns[ids] += rows.reward * running[ids]
            running[ids] &= ~(rows.terminated | rows.truncated)
    return returns


def random_policy(action_dim: int, seed: int) -> Policy:
    """Actions uniform in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1, 1, (len(obs), action_dim)).astype(np.float32)


def actor_policy(agent: Agent, config: TrainConfig) -> Policy:
    """The actor without the VLM, as it is deployed: mean actions."""
    return lambda obs: agent.act(agent_view(config, torch.from_numpy(obs)), explore=False).cpu().numpy()


def vlm_policy(prior: "ActionPrior", config: TrainConfig) -> Policy:
    """The VLM without the actor: it answers at every decision."""
    return lambda obs: prior(vlm_view(config, torch.from_numpy(obs))).action.cpu().numpy()


class Evaluations:
    """Evaluates a run's policies; logs and says the results, and writes the returns of all episodes into
    evaluations.jsonl, a line per evaluation.

    agent, prior: None in a run without.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        action_dim: int,
        agent: Agent | None,
        prior: "ActionPrior | None",
    ) -> None:
        self._config = config
        self._path = run / "evaluations.jsonl"
        self._action_dim = action_dim
        self._agent = agent
        self._prior = prior
        self._asks_vlm = config.eval.vlm or not config.has_agent
        self.before: dict[str, Evaluation] = {}
        """By policy, what was measured before training."""
        self.results: dict[str, Evaluation] = {}
        """By policy, what was measured before and after training, once it is over."""

    def resume(self, step: int) -> None:
        """Goes on after what the file says up to `step`, the step of the checkpoint."""
        if self._path.exists():
            drop_lines_after(self._path, step)

    def measure_before(self, step: int, log: RunLogger) -> dict[str, Evaluation]:
        """Measures the policies that exist before training, but for those that were before a resume."""
        policies = {"random": random_policy(self._action_dim, self._config.seed)}
        if self._prior is not None and self._asks_vlm and self._prior.version == 0:  # not one tuned already
            policies["vlm_before"] = vlm_policy(self._prior, self._config)
        new = [name for name in policies if name not in self.before]
        for name in new:  # one by one, so that none is measured again after an interrupt
            self.before[name] = self._measure(name, policies[name], step, log)
        return {name: self.before[name] for name in new}

    def measure_policy(self, step: int, log: RunLogger) -> dict[str, Evaluation]:
        """During training, the policy that decides: the actor alone, or the VLM."""
        if self._agent is None:
            return self.measure_vlm(step, log)
        return {"actor": self._measure("actor", actor_policy(self._agent, self._config), step, log)}

    def measure_vlm(self, step: int, log: RunLogger) -> dict[str, Evaluation]:
        """During training, the VLM alone."""
        assert self._prior is not None
        return {"vlm": self._measure("vlm", vlm_policy(self._prior, self._config), step, log)}

    def measure_after(self, step: int, log: RunLogger) -> dict[str, Evaluation]:
        """What training has changed, once it is over."""
        measured: dict[str, Evaluation] = {}
        if self._agent is not None:
            measured |= self.measure_policy(step, log)
        if self._prior is not None and self._asks_vlm and self._config.has_rounds:
            policy = vlm_policy(self._prior, self._config)
            measured["vlm_after"] = self._measure("vlm_after", policy, step, log)
        self.results = self.before | measured
        return measured

    @property
    def policy(self) -> str:
        """Of `results`, the name of the policy that the run is about: the actor, or the VLM that decided."""
        return next(name for name in ("actor", "vlm_after", "vlm_before") if name in self.results)

    def _measure(self, name: str, policy: Policy, step: int, log: RunLogger) -> Evaluation:
        asked = self._config.eval
        result = evaluate(policy, self._config.env, asked.episodes, seed=asked.seed)
        log.scalars(step, {f"eval/{name}_mean": result.mean, f"eval/{name}_std": result.std})
        line = {"step": step, "policy": name, "returns": result.returns.tolist()}
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        said = evaluation_text(result.mean, result.std, len(result.returns), decimals=0)
        log.say(f"{name}: {said}")
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"before": {name: result.returns.tolist() for name, result in self.before.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = {name: Evaluation(np.array(returns)) for name, returns in state["before"].items()}
