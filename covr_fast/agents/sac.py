"""SAC from pixels, with the VLM's action prior in the actor loss (Xia et al. 2026, Eqs. 1-4)."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..buffer.batch import Batch, BatchSource
from ..cuda_graph import CudaGraphs
from .captured import CapturedUpdate
from .compiled import compiled
from .guidance import Guidance
from .losses import Networks, critic_loss, policy_loss
from .networks import Actor, ActorSample, Encoder, TwinQ


@dataclass
class SACConfig:
    """Soft actor-critic. With `augment="crop"` in the replay this is RAD."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    """Output channels of the convolutions; the first is 5x5, the others 3x3."""
    strides: tuple[int, ...] = (2, 2, 1, 1)
    """Strides of the convolutions."""
    latent: int = 50
    """Width of the latent that actor and critic share."""
    hidden: int = 1024
    """Width of the two hidden layers of actor and critic."""
    lr: float = 1e-3
    """Learning rate of encoder, actor and critic (Adam)."""
    alpha_lr: float = 1e-3
    """Learning rate of the temperature (Adam on its logarithm)."""
    init_alpha: float = 0.1
    """Temperature at the start; later it adapts to the target entropy."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the convolutions compute in. bfloat16 is for GPUs: 1.26 times the updates a second
    on an H200."""
    target_entropy: float | None = None
    """Entropy that the temperature adapts to, in nats. None: minus the number of action dimensions."""
    tau: float = 0.01
    """Share of the critic's weights in the moving average that is its target, per update."""
    prior_weight: float = 1.0
    """lambda of Eq. 4 (the paper: 2.0 on CARLA, 1.0 on DMControl)."""
    reward_scale: float = 1.0
    """Factor on rewards inside the Bellman target; reported returns are never scaled."""
    graph: bool = True
    """On a GPU, launch the whole update as one CUDA graph, sampling included (3.2 times as fast as kernel by
    kernel: benchmarks/GPU.md). Then all batches must have one size. A CPU ignores it."""
    compile: bool = False
    """Compile losses and gradients with torch.compile, which delays the first updates. Off because it gains
    nothing on a CPU (docs/carracing.md) and has not run on a GPU. With `graph`, the graph records the
    compiled code."""


class SAC:
    """Soft actor-critic whose encoder is trained by the critic alone.

    The same encoder encodes the next observation: it has no target copy. That saves one forward pass per
    update, and the target copy of the critic is enough to keep the targets stable.
    """

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        action_shape: tuple[int, ...],
        config: SACConfig | None = None,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        guidance: Guidance | None = None,
    ):
        self.config = c = config or SACConfig()
        self.guidance = guidance or Guidance()
        self.device = torch.device(device)
        (self.action_dim,) = action_shape
        self.generator = torch.Generator(self.device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(
                obs_shape, c.channels, c.strides, c.latent, getattr(torch, c.encoder_dtype)
            ).to(self.device)
            self.actor = Actor(c.latent, c.hidden, self.action_dim).to(self.device)
            self.critic = TwinQ(c.latent, c.hidden, self.action_dim).to(self.device)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        alpha = torch.tensor(c.init_alpha, dtype=torch.float32, device=self.device)
        self.log_alpha = alpha.log().requires_grad_()
        self.target_entropy = float(-self.action_dim if c.target_entropy is None else c.target_entropy)
        self._capturable = c.graph and self.device.type == "cuda"
        adam = partial(torch.optim.Adam, fused=True, capturable=self._capturable)
        self.critic_optimizer = adam([*self.encoder.parameters(), *self.critic.parameters()], lr=c.lr)
        self.actor_optimizer = adam(self.actor.parameters(), lr=c.lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=c.alpha_lr)
        self._critic_loss = compiled(critic_loss) if c.compile else critic_loss
        self._policy_loss = compiled(policy_loss) if c.compile else policy_loss
        self._captured: CapturedUpdate | None = None
        if self._capturable:
            self._captured = CapturedUpdate(self._update, CudaGraphs(self.device, [self.generator]))

    @torch.no_grad()
    def act(self, obs: Tensor, *, explore: bool = True) -> Tensor:
        """uint8[B, C, H, W] -> actions float32[B, A] in (-1, 1): sampled, or the mean if not `explore`."""
        latent = self.encoder(obs.to(self.device).float() / 255)
        sample: ActorSample = self.actor(latent, self._noise(len(obs)))
        return sample.action if explore else sample.mean

    @torch.no_grad()
    def entropy(self, obs: Tensor) -> Tensor:
        """e_t of Eq. 5 estimated on uint8[B, C, H, W]: minus the mean log-probability of actions, in nats; a
        float32 scalar, which stays on the device."""
        latent = self.encoder(obs.to(self.device).float() / 255)
        sample: ActorSample = self.actor(latent, self._noise(len(obs)))
        return -sample.log_prob.mean()

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """uint8[B, C, H, W] -> float32[B], the critic's min Q of the mean action, in units of reward."""
        latent = self.encoder(obs.to(self.device).float() / 255)
        mean = self.actor(latent, latent.new_zeros(len(obs), self.action_dim)).mean
        value: Tensor = self.critic(latent, mean).amin(0) / self.config.reward_scale
        return value

    def update(self, batch: Batch[Tensor], *, guide: bool) -> dict[str, Tensor]:
        """One step on critic and encoder, actor, temperature and target. Returns metrics, which stay on the
        device.

        The host never waits for the device. With config.graph a CUDA graph runs; see CapturedUpdate.

        Args:
            batch: from a ReplayBuffer, or any object with these fields. obs and next_obs are float in [0, 1].
                extras has "prior" [B, A] and "prior_mask" [B], which are read only if `guide`.
            guide: whether the prior enters the actor's loss (after the cold start).
        """
        update = self._captured or self._update
        return update(batch, guide)

    def update_from(self, source: BatchSource, *, guide: bool) -> dict[str, Tensor]:
        """`update` with the source's next batch, and new priorities of a prioritized one: the TD errors.

        With config.graph and a buffer on the agent's device, sampling and update are one CUDA graph, and the
        host waits for nothing; see CapturedUpdate.

        Args:
            source: from `ReplayBuffer.sampling`, with batches as `update` takes them. Make it once: each has
                graphs of its own, which keep it, and its buffer, as long as they are not dropped.

        Raises:
            IndexError: nothing can be sampled yet.
        """
        if self._captured is not None and self.draws_from(source):
            return self._captured.sampled(source, guide)
        batch = source.sample()
        metrics = self.update(batch.to(self.device), guide=guide)
        if source.update_priorities is not None:
            source.update_priorities(batch.index, metrics["td_error"])
        return metrics

    def draws_from(self, source: BatchSource) -> bool:
        """Whether `update_from` draws the source's batches within its CUDA graph."""
        return self._captured is not None and source.device == self.log_alpha.device

    def _update(self, batch: Batch[Tensor], guide: bool) -> dict[str, Tensor]:
        latent, metrics = self.update_critic(batch)
        metrics |= self.update_actor(latent, batch, guide=guide)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.critic_target.parameters()), list(self.critic.parameters()), self.config.tau
            )
        return metrics

    def update_critic(self, batch: Batch[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A step on critic and encoder. Returns the latents [B, D] of batch.obs from before it, and
        metrics."""
        loss, latent, metrics = self._critic_loss(
            self.networks, batch, self._noise(len(batch.reward)), reward_scale=self.config.reward_scale
        )
        _descend(loss, self.critic_optimizer)
        return latent, metrics

    def update_actor(self, latent: Tensor, batch: Batch[Tensor], *, guide: bool) -> dict[str, Tensor]:
        """A step on actor and temperature from detached latents [B, D]. Returns metrics."""
        # The actor's gradient passes through the critic, whose own weights need none.
        self.critic.requires_grad_(False)
        loss, metrics = self._policy_loss(
            self.networks,
            latent,
            batch.extras,
            self._noise(len(latent)),
            guide=guide,
            prior_weight=self.config.prior_weight,
            guidance=self.guidance,
            target_entropy=self.target_entropy,
        )
        _descend(loss, self.actor_optimizer, self.alpha_optimizer)
        self.critic.requires_grad_(True)
        return metrics

    def _noise(self, rows: int) -> Tensor:
        shape, generator = (rows, self.action_dim), self.generator
        return torch.randn(shape, dtype=torch.float32, device=self.device, generator=generator)

    @property
    def networks(self) -> Networks:
        """The arguments of the losses."""
        return Networks(self.encoder, self.actor, self.critic, self.critic_target, self.log_alpha)

    def modules(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ("encoder", "actor", "critic", "critic_target")}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        names = ("critic_optimizer", "actor_optimizer", "alpha_optimizer")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that a resumed run needs to continue bit for bit."""
        state = {
            **{name: module.state_dict() for name, module in self.modules().items()},
            "log_alpha": self.log_alpha.detach().clone(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers().items()},
            "generator": self.generator.get_state(),
        }
        return deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, module in self.modules().items():
            module.load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        for name, optimizer in self.optimizers().items():
            optimizer.load_state_dict(deepcopy(state[name]))  # it keeps the given tensors and changes them
            # Loading set these to those of the saved agent.
            for group in optimizer.param_groups:
                group["capturable"] = self._capturable
                group["lr"] = self.config.alpha_lr if name == "alpha_optimizer" else self.config.lr
        if self._captured is not None:
            self._captured.forget()  # loading replaced the tensors of the optimizers' state
        random_state = state["generator"].cpu()  # on another type of device it has another size
        if random_state.numel() == self.generator.get_state().numel():
            self.generator.set_state(random_state)


def _descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of each optimizer on the gradient of `loss`."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    for optimizer in optimizers:
        optimizer.step()
