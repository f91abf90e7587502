"""DrQ-v2 from pixels, with the VLM's action prior in the actor loss (Xia et al. 2026, Eq. 4)."""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..buffer.batch import Batch
from .agent import Agent, descend, follow
from .captured import Plan
from .compiled import compiled
from .drqv2_losses import Networks, critic_loss, noise_entropy, policy_loss
from .encoder import Convolutions, Projection
from .networks import ActorSample, NoisyActor, TwinQ, mlp


class DrQV2(Agent):
    """DrQ-v2 (Yarats et al. 2022: facebookresearch/drqv2, drqv2.py): a deterministic actor whose exploration
    noise follows a schedule, n-step returns (`replay.n_step`) and one random shift of each observation
    (`replay.augment`).

    The encoder has no target; actor and critic have their own linear layer with LayerNorm and tanh on it, and
    the critic's has a target like the Q functions. The actor's step reads the features from before the
    critic's step.
    """

    kinds = ("drqv2",)

    def _make_networks(self, obs_shape: tuple[int, ...]) -> None:
        c = self.config
        dtype = getattr(torch, c.encoder_dtype)
        convolutions = Convolutions(obs_shape, c.channels, c.strides, dtype=dtype, offset=-0.5)
        self.encoder = convolutions.to(self.device)
        trunk = Projection(convolutions.features, c.latent, squash=True)
        self.actor = NoisyActor(trunk, mlp(c.latent, c.hidden, self.action_dim, 1.0)).to(self.device)
        trunk = Projection(convolutions.features, c.latent, squash=True)
        self.critic = TwinQ(trunk, c.latent, c.hidden, self.action_dim, 1.0).to(self.device)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.std = torch.empty((), dtype=torch.float32, device=self.device)
        """The noise's standard deviation; a tensor, because CUDA graphs read it."""
        self.observe_decisions(0)
        self._critic_loss = compiled(critic_loss) if c.compile else critic_loss
        self._policy_loss = compiled(policy_loss) if c.compile else policy_loss

    def _make_optimizers(self) -> None:
        self.critic_optimizer = self._adam([*self.encoder.parameters(), *self.critic.parameters()])
        self.actor_optimizer = self._adam(self.actor.parameters())

    def observe_decisions(self, decisions: int) -> None:
        """Sets the noise by the schedule: linear from std_start to std_end over std_decisions decisions."""
        super().observe_decisions(decisions)
        c = self.config
        assert c.std_start is not None
        share = min(decisions / c.std_decisions, 1.0)
        self.std.fill_((1 - share) * c.std_start + share * c.std_end)

    # ---- acting --------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Tensor, *, explore: bool = True) -> Tensor:
        """uint8[B, C, H, W] -> actions float32[B, A] in (-1, 1): with noise, or the mean if not `explore`."""
        features = self.encoder(self._pixels(obs))
        sample: ActorSample = self.actor(features, self._noise(len(obs)), self.std, math.inf)
        return sample.action if explore else sample.mean

    @torch.no_grad()
    def entropy(self, obs: Tensor) -> Tensor:
        """e_t of Eq. 5: the entropy of the Gaussian noise, in nats, which is the same for all observations; a
        float32 scalar, which stays on the device."""
        return noise_entropy(self.std, self.action_dim)

    @torch.no_grad()
    def value(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        """uint8[B, C, H, W] -> float32[B], the critic's min Q, in units of reward, of `action` float32[B, A],
        or of the mean action."""
        features = self.encoder(self._pixels(obs))
        if action is None:
            noise = torch.zeros(len(obs), self.action_dim, dtype=torch.float32, device=self.device)
            action = self.actor(features, noise, self.std, math.inf).mean
        value: Tensor = self.critic(features, action.to(self.device)).amin(0) / self.config.reward_scale
        return value

    # ---- updates -------------------------------------------------------------------------------------

    def _update(self, batch: Batch[Tensor], plan: Plan) -> dict[str, Tensor]:
        features, metrics = self.update_critic(batch)
        if plan.actor:
            metrics |= self.update_actor(features, batch, guide=plan.guide)
        if plan.targets:
            follow(self.critic_target, self.critic, self.config.tau)
        return metrics

    def update_critic(self, batch: Batch[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A step on critic and encoder. Returns the features of batch.obs from before it, and metrics."""
        c = self.config
        loss, features, metrics = self._critic_loss(
            self.networks,
            batch,
            self._noise(len(batch.obs)),
            self.std,
            std_clip=c.std_clip,
            reward_scale=c.reward_scale,
        )
        descend(loss, self.critic_optimizer)
        return features, metrics

    def update_actor(self, features: Tensor, batch: Batch[Tensor], *, guide: bool) -> dict[str, Tensor]:
        """A step on the actor from detached features [B, F]. Returns metrics."""
        c = self.config
        # The actor's gradient passes through the critic, whose own weights need none.
        self.critic.requires_grad_(False)
        loss, metrics = self._policy_loss(
            self.networks,
            features,
            batch.extras,
            self._noise(len(features)),
            self.std,
            std_clip=c.std_clip,
            guide=guide,
            prior_weight=self.prior_weight,
            guidance=self.guidance,
        )
        descend(loss, self.actor_optimizer)
        self.critic.requires_grad_(True)
        return metrics

    # ---- state ---------------------------------------------------------------------------------------

    @property
    def networks(self) -> Networks:
        """The arguments of the losses."""
        return Networks(self.encoder, self.actor, self.critic, self.critic_target)

    def modules(self) -> dict[str, nn.Module]:
        """All networks by name, the target included."""
        return {name: getattr(self, name) for name in ("encoder", "actor", "critic", "critic_target")}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimizers by name."""
        return {name: getattr(self, name) for name in ("critic_optimizer", "actor_optimizer")}
