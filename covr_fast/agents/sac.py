"""SAC from pixels in its published forms, with the VLM's action prior in the actor loss (Xia et al. 2026,
Eqs. 1-4)."""

import copy
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from ..buffer.batch import Batch
from ..ops import random_shift
from .agent import Agent, descend, follow
from .captured import Plan
from .compiled import compiled
from .deepmdp import LatentModels, model_loss
from .encoder import Convolutions, Projection
from .losses import Networks, critic_loss, encode, policy_loss
from .networks import Actor, ActorSample, TwinQ, mlp


class SAC(Agent):
    """Soft actor-critic whose actor never trains the encoder: `sac`, `rad`, `drq`, `deepmdp`, `fast`.

    The published ones share convolutions between actor and critic, each of which has its own linear layer and
    LayerNorm on them; convolutions and critic have targets. The actor's step comes after the critic's and
    reads the convolutions as that has left them.

    - `sac`: tanh after the LayerNorm (Yarats et al. 2021, SAC-AE without its decoder:
      denisyarats/pytorch_sac_ae).
    - `rad`: no tanh; the batches are augmented (Laskin et al. 2020: MishaLaskin/rad, curl_sac.py).
    - `drq`: tanh; targets and losses are averages over `config.shifts` random shifts, which it makes itself
      (Kostrikov et al. 2021: denisyarats/drq).
    - `deepmdp`: no tanh; models of reward and transition train the encoder too (Gelada et al. 2019:
      facebookresearch/deep_bisim4control).
    - `fast`, ours: actor and critic share one latent, the encoder has no target, the actor's step reads the
      latents from before the critic's step. docs/agents.md says what this saves and costs.
    """

    kinds = ("sac", "rad", "drq", "deepmdp", "fast")

    def _make_networks(self, obs_shape: tuple[int, ...]) -> None:
        c = self.config
        self.models: LatentModels | None = None
        self.encoder_target: nn.Module | None = None
        if c.kind == "fast":
            self._make_fast(obs_shape)
        else:
            self._make_published(obs_shape)
            self.encoder_target = deepcopy(self.encoder).requires_grad_(False)
        if c.kind == "deepmdp":
            self.models = LatentModels(c.latent, self.action_dim).to(self.device)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        alpha = torch.tensor(c.init_alpha, dtype=torch.float32, device=self.device)
        self.log_alpha = alpha.log().requires_grad_()
        self.target_entropy = float(-self.action_dim if c.target_entropy is None else c.target_entropy)
        self._critic_loss = compiled(critic_loss) if c.compile else critic_loss
        self._policy_loss = compiled(policy_loss) if c.compile else policy_loss
        self._model_loss = compiled(model_loss) if c.compile else model_loss
        self._encode = compiled(encode) if c.compile else encode

    def _make_fast(self, obs_shape: tuple[int, ...]) -> None:
        """The encoder goes up to the latent, so that actor and critic have no trunks. Hidden layers begin
        with ReLU's gain, and the actor's mean near zero, so that the first exploration is unbiased."""
        c, gain = self.config, 2**0.5
        convolutions = self._convolutions(obs_shape, "orthogonal", first=5)
        projection = Projection(convolutions.features, c.latent, squash=True)
        self.encoder: nn.Module = nn.Sequential(convolutions, projection).to(self.device)
        net = mlp(c.latent, c.hidden, 2 * self.action_dim, gain)
        nn.init.orthogonal_(net[-1].weight, 0.01)  # type: ignore[arg-type]
        self.actor = Actor(nn.Identity(), net, (c.log_std_min, c.log_std_max)).to(self.device)
        self.critic = TwinQ(nn.Identity(), c.latent, c.hidden, self.action_dim, gain).to(self.device)

    def _make_published(self, obs_shape: tuple[int, ...]) -> None:
        c, gain = self.config, 1.0
        # drq/utils.py initialises whole kernels; the others their centres only.
        convolutions = self._convolutions(obs_shape, "orthogonal" if c.kind == "drq" else "delta")
        features, squash = convolutions.features, c.kind in ("sac", "drq")
        self.encoder = convolutions.to(self.device)
        trunk = Projection(features, c.latent, squash=squash)
        self.critic = TwinQ(trunk, c.latent, c.hidden, self.action_dim, gain).to(self.device)
        trunk = Projection(features, c.latent, squash=squash)
        net = mlp(c.latent, c.hidden, 2 * self.action_dim, gain)
        self.actor = Actor(trunk, net, (c.log_std_min, c.log_std_max)).to(self.device)

    def _convolutions(
        self, obs_shape: tuple[int, ...], init: Literal["orthogonal", "delta"], first: int = 3
    ) -> Convolutions:
        c = self.config
        dtype = getattr(torch, c.encoder_dtype)
        return Convolutions(obs_shape, c.channels, c.strides, first=first, init=init, dtype=dtype)

    def _make_optimizers(self) -> None:
        c = self.config
        self.critic_optimizer = self._adam([*self.encoder.parameters(), *self.critic.parameters()])
        self.actor_optimizer = self._adam(self.actor.parameters())
        self.alpha_optimizer = self._adam([self.log_alpha], lr=c.alpha_lr, betas=(c.alpha_beta, 0.999))
        if self.models is not None:
            encoding = [*self.encoder.parameters(), *self.critic.trunk.parameters()]
            self.encoder_optimizer = self._adam(encoding)
            self.model_optimizer = self._adam(self.models.parameters(), weight_decay=c.model_decay)

    # ---- acting --------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Tensor, *, explore: bool = True) -> Tensor:
        """uint8[B, C, H, W] -> actions float32[B, A] in (-1, 1): sampled, or the mean if not `explore`."""
        sample = self._sample(obs)
        return sample.action if explore else sample.mean

    @torch.no_grad()
    def entropy(self, obs: Tensor) -> Tensor:
        """e_t of Eq. 5 estimated on uint8[B, C, H, W]: minus the mean log-probability of actions, in nats; a
        float32 scalar, which stays on the device."""
        return -self._sample(obs).log_prob.mean()

    def _sample(self, obs: Tensor) -> ActorSample:
        sample: ActorSample = self.actor(self.encoder(self._pixels(obs)), self._noise(len(obs)))
        return sample

    @torch.no_grad()
    def value(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        """uint8[B, C, H, W] -> float32[B], the critic's min Q, in units of reward, of `action` float32[B, A],
        or of the mean action."""
        features = self.encoder(self._pixels(obs))
        if action is None:
            noise = torch.zeros(len(obs), self.action_dim, dtype=torch.float32, device=self.device)
            action = self.actor(features, noise).mean
        value: Tensor = self.critic(features, action.to(self.device)).amin(0) / self.config.reward_scale
        return value

    # ---- updates -------------------------------------------------------------------------------------

    def _update(self, batch: Batch[Tensor], plan: Plan) -> dict[str, Tensor]:
        c = self.config
        if c.kind == "drq":
            batch = self._shifted(batch)
        features, metrics = self.update_critic(batch)
        if self.models is not None:
            metrics |= self.update_models(self.models, batch)
        if plan.actor:
            if c.kind != "fast":  # the encoder has changed
                features = self._encode(self.networks, batch.obs[: len(batch.reward)])
            metrics |= self.update_actor(features, batch, guide=plan.guide)
        if plan.targets:
            self.update_targets()
        return metrics

    def _shifted(self, batch: Batch[Tensor]) -> Batch[Tensor]:
        """The batch with config.shifts random shifts of each observation, as `losses` takes them."""
        batch = copy.copy(batch)
        batch.obs, batch.next_obs = self._shift(batch.obs), self._shift(batch.next_obs)
        return batch

    def _shift(self, obs: Tensor) -> Tensor:
        if obs.dtype != torch.uint8:
            raise ValueError(
                f"batch.obs is {obs.dtype}, and agent.kind='drq' shifts uint8 itself: sample with "
                "augment=None and dtype=torch.uint8"
            )
        c = self.config
        rows = c.shifts * len(obs)
        offsets = torch.randint(
            2 * c.shift_pad + 1, (rows, 2), device=self.device, generator=self.generator, dtype=torch.int64
        )
        frames = obs.contiguous().repeat(c.shifts, 1, 1, 1)
        return random_shift(frames, offsets, c.shift_pad, dtype=getattr(torch, c.encoder_dtype))

    def update_critic(self, batch: Batch[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A step on critic and encoder. Returns the features of batch.obs from before it, and metrics."""
        loss, features, metrics = self._critic_loss(
            self.networks, batch, self._noise(len(batch.obs)), reward_scale=self.config.reward_scale
        )
        descend(loss, self.critic_optimizer)
        return features, metrics

    def update_models(self, models: LatentModels, batch: Batch[Tensor]) -> dict[str, Tensor]:
        """DeepMDP: a step on its models and the encoder. Returns metrics."""
        loss, parts = self._model_loss(self.networks, models, batch)
        descend(loss, self.encoder_optimizer, self.model_optimizer)
        return {"transition_loss": parts[0], "reward_loss": parts[1]}

    def update_actor(self, features: Tensor, batch: Batch[Tensor], *, guide: bool) -> dict[str, Tensor]:
        """A step on actor and temperature from detached features [B, F]. Returns metrics."""
        # The actor's gradient passes through the critic, whose own weights need none.
        self.critic.requires_grad_(False)
        loss, metrics = self._policy_loss(
            self.networks,
            features,
            batch.extras,
            self._noise(len(features)),
            guide=guide,
            prior_weight=self.prior_weight,
            guidance=self.guidance,
            target_entropy=self.target_entropy,
        )
        descend(loss, self.actor_optimizer, self.alpha_optimizer)
        self.critic.requires_grad_(True)
        return metrics

    def update_targets(self) -> None:
        """The targets follow: Q functions with tau; the encoder, and the critic's layer on it, with
        encoder_tau."""
        c = self.config
        follow(self.critic_target.q1, self.critic.q1, c.tau)
        follow(self.critic_target.q2, self.critic.q2, c.tau)
        if self.encoder_target is not None:
            assert c.encoder_tau is not None
            follow(self.critic_target.trunk, self.critic.trunk, c.encoder_tau)
            follow(self.encoder_target, self.encoder, c.encoder_tau)

    # ---- state ---------------------------------------------------------------------------------------

    @property
    def networks(self) -> Networks:
        """The arguments of the losses."""
        return Networks(
            self.encoder, self.actor, self.critic, self.encoder_target, self.critic_target, self.log_alpha
        )

    def modules(self) -> dict[str, nn.Module]:
        """All networks by name, targets included."""
        names = ("encoder", "actor", "critic", "critic_target", "encoder_target", "models")
        return {name: module for name in names if (module := getattr(self, name)) is not None}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimizers by name."""
        names = ["critic_optimizer", "actor_optimizer", "alpha_optimizer"]
        if self.models is not None:
            names += ["encoder_optimizer", "model_optimizer"]
        return {name: getattr(self, name) for name in names}

    def _tensors(self) -> dict[str, Tensor]:
        return {"log_alpha": self.log_alpha}
