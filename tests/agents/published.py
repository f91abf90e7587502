"""The published update equations in plain torch, for agents to be compared with.

Each function makes updates as the source's update loop does, on weights by name (`Weights`), and draws its
noise as the agent does: from a generator with the agent's seed, first for the target, then for the actor. Two
things differ from the sources. log(1 - tanh(x)^2) has no 1e-6 added, which only keeps float32 from log(0).
And Eq. 4's term stands in the actor's loss where the agent is guided.
"""

import math

import torch
from torch.nn import functional as F

A = 2  # actions


class Weights(dict):
    """Copies of an agent's weights, as leaves, by module and name."""

    def __init__(self, agent):
        names = {
            f"{module}.{name}": p
            for module, net in agent.modules().items()
            for name, p in net.named_parameters()
        }
        super().__init__({name: p.detach().clone().requires_grad_() for name, p in names.items()})
        self.log_alpha = (
            agent.log_alpha.detach().clone().requires_grad_() if "log_alpha" in vars(agent) else None
        )

    def of(self, *prefixes):
        return [p for name, p in self.items() if name.startswith(prefixes)]

    def follow(self, target, online, tau):
        with torch.no_grad():
            for p, q in zip(self.of(target + "."), self.of(online + "."), strict=True):
                p.copy_(tau * q + (1 - tau) * p)

    # ---- networks ------------------------------------------------------------------------------------

    def convolve(self, name, x):
        for i in range(4):
            stride, layer = 2 if i == 0 else 1, f"{name}.layers.{2 * i}"
            x = torch.relu(F.conv2d(x, self[f"{layer}.weight"], self[f"{layer}.bias"], stride))
        return x.flatten(1)

    def latent(self, name, h, tanh):
        h = F.linear(h, self[f"{name}.trunk.linear.weight"], self[f"{name}.trunk.linear.bias"])
        h = F.layer_norm(h, h.shape[1:], self[f"{name}.trunk.norm.weight"], self[f"{name}.trunk.norm.bias"])
        return torch.tanh(h) if tanh else h

    def mlp(self, name, x):
        for i in (0, 2, 4):
            x = F.linear(torch.relu(x) if i else x, self[f"{name}.{i}.weight"], self[f"{name}.{i}.bias"])
        return x

    def policy(self, h, noise, tanh):
        mu, log_std = self.mlp("actor.net", self.latent("actor", h, tanh)).chunk(2, -1)
        log_std = -10 + 0.5 * 12 * (torch.tanh(log_std) + 1)
        pi = mu + noise * log_std.exp()
        log_pi = (-0.5 * noise**2 - log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * A
        return torch.tanh(pi), log_pi - torch.log(1 - torch.tanh(pi) ** 2).sum(-1)

    def qs(self, name, h, action, tanh):
        x = torch.cat([self.latent(name, h, tanh), action], 1)
        return self.mlp(f"{name}.q1", x)[:, 0], self.mlp(f"{name}.q2", x)[:, 0]


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def prior_term(action, batch, weight):
    """lambda ||a_v - a_r||^2, averaged over the rows with a prior."""
    rows = batch.extras["prior_mask"] > 0
    return weight * (action - batch.extras["prior"])[rows].square().sum(-1).mean()


def adams(w, config):
    """RAD's and SAC-AE's three optimizers."""
    adam = torch.optim.Adam
    alpha = adam([w.log_alpha], lr=config.alpha_lr, betas=(config.alpha_beta, 0.999))
    return adam(w.of("encoder.", "critic."), lr=config.lr), adam(w.of("actor."), lr=config.lr), alpha


# ---- updates -------------------------------------------------------------------------------------------


def rad(w, config, batches, generator, tanh=False, models=None):
    """MishaLaskin/rad, curl_sac.py: RadSacAgent.update. With tanh: denisyarats/pytorch_sac_ae, sac_ae.py."""
    critic_adam, actor_adam, alpha_adam = adams(w, config)
    for step, (b, guide) in enumerate(batches):
        with torch.no_grad():
            noise = torch.randn(len(b.reward), A, generator=generator)
            action, log_pi = w.policy(w.convolve("encoder", b.next_obs), noise, tanh)
            h = w.convolve("encoder_target", b.next_obs)
            target_v = torch.min(*w.qs("critic_target", h, action, tanh)) - w.log_alpha.exp() * log_pi
            target_q = b.reward + b.discount * target_v
        q1, q2 = w.qs("critic", w.convolve("encoder", b.obs), b.action, tanh)
        descend(critic_adam, F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q))
        if models is not None:
            models(b)
        if step % 2 == 0:
            h = w.convolve("encoder", b.obs).detach()
            action, log_pi = w.policy(h, torch.randn(len(h), A, generator=generator), tanh)
            q = torch.min(*w.qs("critic", h, action, tanh))
            loss = (w.log_alpha.exp().detach() * log_pi - q).mean()
            descend(actor_adam, loss + (prior_term(action, b, config.prior_weight) if guide else 0))
            descend(alpha_adam, (w.log_alpha.exp() * (-log_pi + A).detach()).mean())
        if step % 2 == 0:
            w.follow("critic_target.q1", "critic.q1", 0.01)
            w.follow("critic_target.q2", "critic.q2", 0.01)
            w.follow("critic_target.trunk", "critic.trunk", 0.05)
            w.follow("encoder_target", "encoder", 0.05)


def sac(w, config, batches, generator):
    """denisyarats/pytorch_sac_ae, sac_ae.py: SacAeAgent.update without a decoder."""
    rad(w, config, batches, generator, tanh=True)


def deepmdp(w, config, batches, generator):
    """facebookresearch/deep_bisim4control, agent/deepmdp_agent.py: DeepMDPAgent.update without a decoder of
    pixels, with the deterministic transition model."""
    encoder_adam = torch.optim.Adam(w.of("encoder.", "critic.trunk."), lr=config.lr)
    model_adam = torch.optim.Adam(w.of("models."), lr=config.lr, weight_decay=config.model_decay)

    def predict(name, x):
        x = F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        x = torch.relu(F.layer_norm(x, x.shape[1:], w[f"{name}.1.weight"], w[f"{name}.1.bias"]))
        return F.linear(x, w[f"{name}.3.weight"], w[f"{name}.3.bias"])

    def update_models(b):
        h = torch.cat([w.latent("critic", w.convolve("encoder", b.obs), False), b.action], 1)
        next_h = w.latent("critic", w.convolve("encoder", b.next_obs), False).detach()
        loss = (0.5 * (predict("models.transition", h) - next_h) ** 2).mean()
        loss = loss + F.mse_loss(predict("models.reward", h), b.reward[:, None])
        encoder_adam.zero_grad()
        descend(model_adam, loss)
        encoder_adam.step()

    rad(w, config, batches, generator, models=update_models)


def drq(w, config, batches, generator):
    """denisyarats/drq, drq.py and replay_buffer.py: K = M = 2 shifts of 4 pixels."""
    critic_adam, actor_adam, alpha_adam = adams(w, config)

    def shift(frames, offsets):
        padded = F.pad(frames.double(), [4] * 4, mode="replicate") / 255
        size = frames.shape[-1]
        rows = zip(padded, offsets.tolist(), strict=True)
        return torch.stack([x[:, y : y + size, z : z + size] for x, (y, z) in rows])

    for step, (b, guide) in enumerate(batches):
        n = len(b.reward)
        draws = [torch.randint(9, (2 * n, 2), generator=generator).split(n) for _ in range(2)]
        obs, obs_aug = (shift(b.obs, offsets) for offsets in draws[0])
        next_obs, next_obs_aug = (shift(b.next_obs, offsets) for offsets in draws[1])
        target_q = 0
        with torch.no_grad():
            noises = torch.randn(2 * n, A, generator=generator).split(n)
            for each, noise in zip((next_obs, next_obs_aug), noises, strict=True):
                action, log_pi = w.policy(w.convolve("encoder", each), noise, True)
                target_v = torch.min(*w.qs("critic_target", w.convolve("encoder_target", each), action, True))
                target_q += (b.reward + b.discount * (target_v - w.log_alpha.exp() * log_pi)) / 2
        q1, q2 = w.qs("critic", w.convolve("encoder", obs), b.action, True)
        loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
        q1, q2 = w.qs("critic", w.convolve("encoder", obs_aug), b.action, True)
        descend(critic_adam, loss + F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q))
        if step % 2 == 0:
            h = w.convolve("encoder", obs).detach()
            action, log_pi = w.policy(h, torch.randn(n, A, generator=generator), True)
            q = torch.min(*w.qs("critic", h, action, True))
            loss = (w.log_alpha.exp().detach() * log_pi - q).mean()
            descend(actor_adam, loss + (prior_term(action, b, config.prior_weight) if guide else 0))
            descend(alpha_adam, (w.log_alpha.exp() * (-log_pi + A).detach()).mean())
            w.follow("critic_target", "critic", 0.01)
            w.follow("encoder_target", "encoder", 0.01)


def drqv2(w, config, batches, generator, decisions=30_000):
    """facebookresearch/drqv2, drqv2.py: DrQV2Agent.update on frames that are shifted already; the schedule is
    linear(1.0, 0.1, 100000)."""
    std = 1.0 + decisions / 100_000 * (0.1 - 1.0)
    adam = torch.optim.Adam
    encoder_adam, critic_adam = adam(w.of("encoder."), lr=config.lr), adam(w.of("critic."), lr=config.lr)
    actor_adam = adam(w.of("actor."), lr=config.lr)

    def act(h):
        mu = torch.tanh(w.mlp("actor.net", w.latent("actor", h, True)))
        x = mu + torch.clamp(torch.randn(len(h), A, generator=generator) * std, -0.3, 0.3)
        return x - x.detach() + torch.clamp(x, -1 + 1e-6, 1 - 1e-6).detach()

    for b, guide in batches:
        obs = w.convolve("encoder", b.obs - 0.5)
        with torch.no_grad():
            next_obs = w.convolve("encoder", b.next_obs - 0.5)
            target_v = torch.min(*w.qs("critic_target", next_obs, act(next_obs), True))
            target_q = b.reward + b.discount * target_v
        q1, q2 = w.qs("critic", obs, b.action, True)
        encoder_adam.zero_grad()
        descend(critic_adam, F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q))
        encoder_adam.step()
        action = act(obs.detach())
        loss = -torch.min(*w.qs("critic", obs.detach(), action, True)).mean()
        descend(actor_adam, loss + (prior_term(action, b, config.prior_weight) if guide else 0))
        w.follow("critic_target", "critic", 0.01)


PUBLISHED = {"sac": sac, "rad": rad, "deepmdp": deepmdp, "drq": drq, "drqv2": drqv2}
