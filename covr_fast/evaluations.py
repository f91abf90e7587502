"""What is measured before, during and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .agents import SAC
from .config import TrainConfig
from .envs import action_labels
from .evaluate import Evaluation, Policy, actor_policy, evaluate, random_policy, vlm_policy
from .logger import RunLogger
from .view import newest_frame, vlm_view
from .vlm import ActionPrior


class Evaluations:
    """Evaluates a run's policies, and logs and says the results.

    Args:
        config: of the run.
        agent: whose actor is measured.
        prior: the VLM, which with eval.vlm is measured before and after training.
    """

    def __init__(self, config: TrainConfig, agent: SAC, prior: ActionPrior) -> None:
        self._config = config
        self._agent = agent
        self._prior = prior
        self.before: dict[str, Evaluation] = {}
        """By policy, what was measured before training."""

    def measure_before(self, step: int, log: RunLogger) -> None:
        """Measures the policies that exist before training, unless that was done before a resume."""
        policies = {"random": random_policy(self._agent.action_dim, self._config.seed)}
        if self._config.eval.vlm and self._prior.version == 0:  # not a VLM that was tuned before a resume
            policies["vlm_before"] = vlm_policy(self._prior, self._config)
        for name, policy in policies.items():
            if name not in self.before:
                self.before[name] = self._measure(name, policy, step, log)

    def measure_actor(self, step: int, log: RunLogger) -> Evaluation:
        return self._measure("actor", actor_policy(self._agent, self._config), step, log)

    def measure_after(self, step: int, log: RunLogger) -> dict[str, Evaluation]:
        """All evaluations of the run by policy, once training is over."""
        after = {"actor": self.measure_actor(step, log)}
        if self._config.eval.vlm:
            policy = vlm_policy(self._prior, self._config)
            after["vlm_after"] = self._measure("vlm_after", policy, step, log)
        return self.before | after

    def _measure(self, name: str, policy: Policy, step: int, log: RunLogger) -> Evaluation:
        config = self._config
        result = evaluate(policy, config.env, config.eval.episodes, seed=config.eval.seed)
        log.scalars(step, {f"eval/{name}_mean": result.mean, f"eval/{name}_std": result.std})
        log.say(f"{name}: {result.mean:.0f} ± {result.std:.0f} over {len(result.returns)} episodes")
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"before": {name: result.returns.tolist() for name, result in self.before.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = {name: Evaluation(np.array(returns)) for name, returns in state["before"].items()}


def record_episode(config: TrainConfig, agent: SAC, prior: ActionPrior, run: Path) -> None:
    """Writes a video of one evaluation episode, with the actor's actions and the VLM's priors, into `run`."""
    from .video import EpisodeVideo

    video = EpisodeVideo(action_labels(config.env), fps=50 / config.env.action_repeat)

    def watch(obs: np.ndarray, action: np.ndarray, total: float) -> None:
        stack = torch.from_numpy(obs[None])
        answer = prior(vlm_view(config, stack)).action[0].cpu().numpy()
        video.add(newest_frame(config, stack)[0].numpy(), action, answer, total)

    evaluate(actor_policy(agent, config), config.env, 1, seed=config.eval.seed, watch=watch)
    video.write(run)
