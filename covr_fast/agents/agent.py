"""What all agents have: acting, updates from batches or as CUDA graphs, and state."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..buffer.batch import Batch, BatchSource
from ..cuda_graph import CudaGraphs
from ..errors import UserError
from .captured import CapturedUpdate, Plan
from .config import AgentConfig
from .guidance import Guidance


class Agent(ABC):
    """A visual agent whose actor never trains its encoder.

    Args:
        obs_shape: (C, H, W) of its observations, the stack of frames included.
        action_shape: (A,).
        config: default AgentConfig(), which is `fast`.
        device: of networks and batches.
        seed: of its weights and of its noise.
        guidance: the form of Eq. 4's second term; its weight is config.prior_weight until `weigh_prior`.

    Raises:
        UserError: settings that do not fit together, or frames that are too small for them.
    """

    kinds: ClassVar[tuple[str, ...]]
    """Values of `config.kind` that this class is for."""

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        action_shape: tuple[int, ...],
        config: AgentConfig | None = None,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        guidance: Guidance | None = None,
    ):
        self.config = config or AgentConfig()
        self.config.check()
        if self.config.kind not in self.kinds:
            raise UserError(
                f"agent.kind={self.config.kind!r} is none of {type(self).__name__}: use agents.make_agent"
            )
        self.guidance = guidance or Guidance()
        self.device = torch.device(device)
        (self.action_dim,) = action_shape
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.prior_weight = torch.tensor(self.config.prior_weight, dtype=torch.float32, device=self.device)
        """lambda of Eq. 4 as it is now; a tensor, because CUDA graphs read it."""
        self.updates = 0
        """Updates so far."""
        self.decisions = 0
        """Decisions so far, as `observe_decisions` was told."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._make_networks(obs_shape)
        self._capturable = self.config.graph and self.device.type == "cuda"
        self._make_optimizers()
        self._captured: CapturedUpdate | None = None
        if self._capturable:
            self._captured = CapturedUpdate(self._update, CudaGraphs(self.device, [self.generator]))

    # ---- what an agent is ----------------------------------------------------------------------------

    @abstractmethod
    def _make_networks(self, obs_shape: tuple[int, ...]) -> None:
        """Makes the modules and other learnt tensors, on self.device."""

    @abstractmethod
    def _make_optimizers(self) -> None:
        """Makes the optimizers, by `_adam`."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """All networks by name, targets included."""

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimizers by name."""

    @abstractmethod
    def act(self, obs: Tensor, *, explore: bool = True) -> Tensor:
        """uint8[B, C, H, W] -> actions float32[B, A] in (-1, 1): sampled, or the mean if not `explore`."""

    @abstractmethod
    def entropy(self, obs: Tensor) -> Tensor:
        """e_t of Eq. 5 on uint8[B, C, H, W], in nats; a float32 scalar, which stays on the device."""

    @abstractmethod
    def value(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        """uint8[B, C, H, W] -> float32[B], the critic's min Q, in units of reward, of `action` float32[B, A],
        or of the mean action."""

    @abstractmethod
    def _update(self, batch: Batch[Tensor], plan: Plan) -> dict[str, Tensor]:
        """One update; its metrics, with "td_error" [B] among them."""

    # ---- updates -------------------------------------------------------------------------------------

    def observe_decisions(self, decisions: int) -> None:
        """Tells the agent how many decisions were made so far, over all environments. Only an agent whose
        exploration follows a schedule (`drqv2`) reads it."""
        self.decisions = decisions

    def weigh_prior(self, weight: float) -> None:
        """Sets lambda of Eq. 4 for the updates to come. It is not part of the state."""
        self.prior_weight.fill_(weight)

    def update(self, batch: Batch[Tensor], *, guide: bool) -> dict[str, Tensor]:
        """One update of the critic and, when they are due, of actor, temperature and targets. Returns
        metrics, which stay on the device; those of the actor only when it was due.

        The host never waits for the device. With config.graph a CUDA graph runs; see CapturedUpdate.

        Args:
            batch: from a ReplayBuffer, or any object with these fields. obs and next_obs are float in [0, 1]
                (`drq`: uint8, which it shifts itself). extras has "prior" [B, A] and "prior_mask" [B], which
                are read only if `guide`.
            guide: whether the prior enters the actor's loss (after the cold start).
        """
        update = self._captured or self._update
        metrics = update(batch, self._plan(guide))
        self.updates += 1
        return metrics

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
            metrics = self._captured.sampled(source, self._plan(guide))
            self.updates += 1
            return metrics
        batch = source.sample()
        metrics = self.update(batch.to(self.device), guide=guide)
        if source.update_priorities is not None:
            source.update_priorities(batch.index, metrics["td_error"])
        return metrics

    def draws_from(self, source: BatchSource) -> bool:
        """Whether `update_from` draws the source's batches within its CUDA graph."""
        return self._captured is not None and source.device == self._where

    def _plan(self, guide: bool) -> Plan:
        """What the next update does. The first one does everything, as in the published code."""
        actor = self.updates % self.config.actor_every == 0
        return Plan(guide and actor, actor, self.updates % self.config.target_every == 0)

    # ---- state ---------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """Learnt tensors that no module has."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that a resumed run needs to continue bit for bit."""
        state = {
            **{name: module.state_dict() for name, module in self.modules().items()},
            **{name: tensor.detach().clone() for name, tensor in self._tensors().items()},
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers().items()},
            "updates": self.updates,
            "decisions": self.decisions,
            "generator": self.generator.get_state(),
        }
        return deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the state, in place. Learning rates stay those of config.

        Raises:
            KeyError, RuntimeError, ValueError: it is of an agent with other networks.
        """
        for name, module in self.modules().items():
            module.load_state_dict(state[name])
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state[name])
        for name, optimizer in self.optimizers().items():
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(deepcopy(state[name]))  # it keeps the given tensors and changes them
            # Loading set these to those of the saved agent.
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["capturable"], group["lr"] = self._capturable, rate
        self.updates = state["updates"]
        self.observe_decisions(state["decisions"])
        if self._captured is not None:
            self._captured.forget()  # loading replaced the tensors of the optimizers' state
        random_state = state["generator"].cpu()  # on another type of device it has another size
        if random_state.numel() == self.generator.get_state().numel():
            self.generator.set_state(random_state)

    # ---- helpers -------------------------------------------------------------------------------------

    @property
    def _where(self) -> torch.device:
        """self.device with its number."""
        return next(next(iter(self.modules().values())).parameters()).device

    def _adam(self, parameters: Any, **changes: Any) -> torch.optim.Adam:
        options = {"lr": self.config.lr, "fused": True, "capturable": self._capturable}
        return torch.optim.Adam(parameters, **(options | changes))

    def _pixels(self, obs: Tensor) -> Tensor:
        return obs.to(self.device).float() / 255

    def _noise(self, rows: int) -> Tensor:
        """Standard normal float32[rows, A]."""
        shape, generator = (rows, self.action_dim), self.generator
        return torch.randn(shape, dtype=torch.float32, device=self.device, generator=generator)


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of each optimizer on the gradient of `loss`."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target += tau * (online - target), weight by weight."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
